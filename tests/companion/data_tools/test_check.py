"""The check of instruction files: each planted defect is reported once, with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from instruct_records import PROBLEM_KINDS, images, record  # noqa: F401 - a fixture

from companion.data_tools.check import check_file
from companion.data_tools.convert import convert_data
from llava_core.data.instruct import load_instruct
from llava_core.runtime import DataError, write_json


def turns(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in pairs]


DEFECTS: list[tuple[str, Any]] = [
    ("wrong_type", "not an object"),
    ("wrong_type", record() | {"id": 7}),
    ("wrong_type", record() | {"image": ["good.jpg", "good.png"]}),
    ("wrong_type", record() | {"type": 3}),
    ("wrong_type", record() | {"conversations": "hello"}),
    ("wrong_type", record() | {"conversations": turns(("human", "<image> Why?"), ("gpt", 5))}),
    ("wrong_type", record(image=None) | {"conversations": [*turns(("human", "Why?")), "So."]}),
    ("missing_field", {k: v for k, v in record().items() if k != "id"}),
    ("missing_field", {k: v for k, v in record().items() if k != "conversations"}),
    ("missing_field", record() | {"conversations": [*turns(("human", "<image> Why?")), {"from": "gpt"}]}),
    ("role_order", record() | {"conversations": turns(("gpt", "So."), ("human", "<image> Why?"))}),
    ("role_order", record() | {"conversations": turns(("human", "<image> Why?"), ("human", "And?"))}),
    ("role_order", record() | {"conversations": turns(("human", "<image> Why?"), ("assistant", "So."))}),
    ("role_order", record() | {"conversations": turns(("human", "<image> Why?"))}),
    ("role_order", record() | {"conversations": []}),
    ("empty_turn", record() | {"conversations": turns(("human", "<image> Why?"), ("gpt", " \n"))}),
    ("image_marker", record() | {"conversations": turns(("human", "Why?"), ("gpt", "So."))}),
    ("image_marker", record() | {"conversations": turns(("human", "<image> <image> Why?"), ("gpt", "So."))}),
    ("image_marker", record() | {"conversations": turns(("human", "Why?"), ("gpt", "<image> So."))}),
    ("image_marker", record(image=None) | {"conversations": turns(("human", "<image> Why?"), ("gpt", "So."))}),
    ("invalid_utf8", record() | {"conversations": turns(("human", "<image> Why?"), ("gpt", "So \ud800."))}),
    ("missing_image", record(image="absent.jpg")),
    ("missing_image", record() | {"image": ""}),
    ("outside_folder", record(image="../good.jpg")),
    ("outside_folder", record(image="/etc/good.jpg")),
    ("unreadable_image", record(image="cut.jpg")),
    ("unreadable_image", record(image="cut.png")),
    ("unreadable_image", record(image="text.jpg")),
    ("unreadable_image", record(image="empty.jpg")),
]


def planted() -> tuple[list[Any], list[tuple[int, str]]]:
    """Defects between good records, each under its own id, and the expected problems: (position, kind)."""
    records: list[Any] = []
    for k, (_, defect) in enumerate(DEFECTS):
        named = isinstance(defect, dict) and isinstance(defect.get("id"), str)
        records += [record(f"good {k}"), {**defect, "id": f"bad {k}"} if named else defect]
    wanted = [(2 * k + 1, kind) for k, (kind, _) in enumerate(DEFECTS)]
    records.append(record("good 0"))
    return records, [*wanted, (len(records) - 1, "duplicate_id")]


@pytest.mark.parametrize("layout", ["jsonl", "lines", "indented"])
def test_every_planted_defect_is_reported_once(tmp_path: Path, images: Path, layout: str) -> None:
    records, wanted = planted()
    lines = [json.dumps(item) for item in records]
    path = tmp_path / ("data.jsonl" if layout == "jsonl" else "data.json")
    joined = {"jsonl": "\n".join(lines), "lines": "[\n" + ",\n".join(lines) + "\n]"}
    path.write_text(joined.get(layout) or json.dumps(records, indent=2))
    result = check_file(path, images)
    assert result["records"] == len(records)
    assert result["warnings"] == 1
    starts = {"jsonl": lambda k: k + 1, "lines": lambda k: k + 2}.get(layout)
    if starts:
        assert [(p["line"], p["kind"]) for p in result["problems"]] == [(starts(k), kind) for k, kind in wanted]
    else:
        assert [p["kind"] for p in result["problems"]] == [kind for _, kind in wanted]
        source = path.read_text().split("\n")
        assert all(source[p["line"] - 1].strip()[:1] in '{"' for p in result["problems"])
    assert {p["kind"] for p in result["problems"]} <= PROBLEM_KINDS
    assert all(p["record"] and p["message"] for p in result["problems"])


def test_damaged_images_are_reported_once_missing_ones_always(images: Path, tmp_path: Path) -> None:
    def named(image: str, decode: bool) -> list[str]:
        file = write_json(tmp_path / "three.json", [record(str(k), image) for k in range(3)])
        return [problem["record"] for problem in check_file(file, images, decode)["problems"]]

    assert named("cut.jpg", decode=True) == ["0"]
    assert named("absent.jpg", decode=False) == ["0", "1", "2"]
    assert named("cut.jpg", decode=False) == []


def test_invalid_utf8_names_its_record(tmp_path: Path) -> None:
    for name in ("data.json", "data.jsonl"):
        good = [json.dumps(record(str(k))).encode() for k in range(3)]
        good[1] = good[1].replace(b"A cat.", b"A c\xff\xfet.")
        joined = b"[" + b",\n".join(good) + b"]" if name.endswith("json") else b"\n".join(good)
        (tmp_path / name).write_bytes(joined)
        problems = check_file(tmp_path / name)["problems"]
        assert [(p["line"], p["record"], p["kind"]) for p in problems] == [(2, "1", "invalid_utf8")]


def test_records_after_broken_json_are_checked(tmp_path: Path) -> None:
    records = [record(str(k)) for k in range(4)] + [record("last", image=None) | {"conversations": []}]
    text = json.dumps(records, indent=2)
    (tmp_path / "a.json").write_text(text.replace('"id": "1",', '"id": "1"', 1))
    lines = [json.dumps(item) for item in records]
    lines[1] = lines[1][:-5]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    result = check_file(tmp_path / "a.jsonl")
    assert result["records"] == 4
    assert [(p["line"], p["kind"]) for p in result["problems"]] == [(2, "not_json"), (5, "role_order")]
    result = check_file(tmp_path / "a.json")  # of a list, only what comes before the error can be read
    assert result["records"] == 1
    assert [(p["line"], p["record"], p["kind"]) for p in result["problems"]] == [(18, "#1", "not_json")]
    assert ['"id": "1"' in line for line in (tmp_path / "a.json").read_text().split("\n")].index(True) == 16
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    result = check_file(tmp_path / "cut.json")
    assert [p["kind"] for p in result["problems"]] == ["not_json"]
    assert result["records"] == 2


def test_another_layout_is_one_line_first_and_names_the_command(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    layouts: dict[str, list[Any]] = {
        "3 of 3 records have another layout (no conversations, but query, response)": [
            *[{"query": "Why?", "response": "So."}] * 2,
            {"query": "Why?", "response": "So.", "history": []},
        ],
        "no conversations, but messages, images": [{"messages": [], "images": ["a.jpg"]}] * 2 + [record("a", None)],
        "turns of role, content": [{"id": "a", "conversations": [{"role": "user", "content": "Why?"}]}],
    }
    for layout, rows in layouts.items():
        path.write_text("\n".join(map(json.dumps, rows)))
        first, *others = check_file(path)["problems"]
        assert (first["kind"], first["line"], first["record"]) == ("other_layout", None, None)
        assert layout in first["message"]
        assert f"llava data convert {path}" in first["message"]
        assert others
        assert all(problem["kind"] != "other_layout" for problem in others)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'[\n  {\n    "id": "a"\n  }\n]\n', "a JSON list, .* name the file .json"),
        ("a.jsonl", b'[{"id": "a"}, {"id": "b"}]\n', "a JSON list"),
        ("a.jsonl", b'{\n "id": "a"\n}\n{\n "id": "b"\n}\n', "over several lines; write one per line"),
        ("a.json", b"PAR1\x15\x04PAR1", "a parquet table"),
        ("a.jsonl", b"\x1f\x8b\x08", "compressed by gzip"),
        ("a.json", "[]".encode("utf-16"), "UTF-16"),
        ("a.parquet", b'\xef\xbb\xbf[{"id": "a"}]', "JSON text; name it .json"),
    ],
)
def test_a_file_of_another_form_is_one_problem(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    (problem,) = check_file(path)["problems"]
    assert (problem["line"], problem["record"]) == (None, None)
    assert re.search(message, problem["message"])
    assert "remove" not in problem["message"]
    with pytest.raises(DataError, match=message):
        load_instruct(path, skipped=[])
    with pytest.raises(DataError, match=message):
        convert_data(path, tmp_path / "mine.json")


def test_byte_order_marks_inside_a_file_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(b"\xef\xbb\xbf" + json.dumps(record(str(k))).encode() for k in range(2)))
    assert check_file(path)["problems"] == []
    assert [sample.id for sample in load_instruct(path)] == ["0", "1"]


def test_images_that_no_record_uses_are_reported(tmp_path: Path, images: Path) -> None:
    path = write_json(tmp_path / "text.json", [record("a", None), record("b", None)])
    result = check_file(path, images)
    assert [(p["line"], p["kind"]) for p in result["problems"]] == [(None, "no_images")]
    assert (result["errors"], result["warnings"]) == (0, 1)
    assert check_file(path)["problems"] == []
    write_json(path, [record("a", None), record("b")])
    assert check_file(path, images)["problems"] == []


@pytest.mark.parametrize(
    ("content", "kind"), [("", "not_json"), ("[]", "no_records"), ('{"a": 1}', "wrong_type"), ("[{}] []", "not_json")]
)
def test_files_without_a_record_list_are_errors(tmp_path: Path, content: str, kind: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert kind in [p["kind"] for p in check_file(tmp_path / "a.json")["problems"]]
    with pytest.raises(DataError, match=r"a\.json"):
        load_instruct(tmp_path / "a.json")
