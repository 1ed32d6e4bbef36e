"""43 planted defects: each is reported once, and repaired where that needs no new text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from instruct_records import PROBLEM_KINDS
from instruct_records import nested_images as images  # noqa: F401 - a fixture

from companion import cli
from companion.data_tools.check import check_file, count_words
from companion.data_tools.repair import fix_file
from llava_core.data.instruct import load_instruct
from llava_core.runtime import DataError

Turns = list[tuple[Any, Any]]
ASKED: Turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cat.")]


def record(name: Any = "a", turns: Turns | Any = ASKED, image: Any = "good.jpg", **changes: Any) -> dict[str, Any]:
    listed = [{"from": role, "value": text} for role, text in turns] if isinstance(turns, list) else turns
    return {"id": name, **({} if image is None else {"image": image}), "conversations": listed} | changes


def without(field: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in record(**changes).items() if key != field}


def defects(images: Path) -> list[tuple[str, bool, Any]]:
    """(kind of problem, whether it can be repaired, the record or its bytes)."""
    why, so, marked = ("human", "Why?"), ("gpt", "So."), ("human", "<image>\nWhy?")
    return [
        ("missing_image", False, record(image="absent.jpg")),
        ("missing_image", False, record(image="below")),
        ("missing_image", True, record(image=" good.jpg\n")),
        ("missing_image", True, record(image="below\\good.jpg")),
        ("missing_image", True, record(turns=[why, so], image="")),
        ("unreadable_image", False, record(image="cut.jpg")),
        ("unreadable_image", False, record(image="page.jpg")),
        ("unreadable_image", False, record(image="empty.png")),
        ("outside_folder", False, record(image="../secret.jpg")),
        ("outside_folder", False, record(image="below/../../secret.jpg")),
        ("outside_folder", True, record(image=str(images.absolute() / "good.png"))),
        ("image_marker", True, record(turns=[why, so])),
        ("image_marker", True, record(turns=[why, ("gpt", "<image>\nSo.")])),
        ("image_marker", True, record(turns=[marked, so, ("human", "<image>\nAnd now?"), so])),
        ("image_marker", False, record(turns=[("human", "<image> and <image>: which is older?"), so])),
        ("image_marker", False, record(turns=[why, ("gpt", "In <image> I see it.")])),
        ("image_marker", False, record(turns=[marked, so], image=None)),
        ("role_order", True, record(turns=[("user", "<image>\nWhy?"), ("assistant", "So.")])),
        ("role_order", True, record(turns=[("Human", "<image>\nWhy?"), (" GPT ", "So.")])),
        ("role_order", True, record(turns=[marked, so, why])),
        ("role_order", False, record(turns=[so, marked])),
        ("role_order", False, record(turns=[marked, why])),
        ("role_order", False, record(turns=[("system", "Be kind."), marked, so])),
        ("role_order", False, record(turns=[])),
        ("empty_turn", False, record(turns=[marked, ("gpt", "")])),
        ("empty_turn", False, record(turns=[marked, so, why, ("gpt", " \n")])),
        ("too_long", False, record(turns=[marked, ("gpt", "word" + " word" * 1399)])),
        ("too_long", False, record(turns=[marked, ("gpt", "字" * 1400)])),
        ("invalid_utf8", False, json.dumps(record("bytes")).encode().replace(b"A cat.", b"A c\xe4t.")),
        ("invalid_utf8", False, record(turns=[marked, ("gpt", "So \ud83d.")])),
        ("not_json", True, b'{"id": "cut", "conversations": ['),
        ("wrong_type", False, ["not", "an", "object"]),
        ("wrong_type", True, record(7)),
        ("wrong_type", True, record(image=["good.jpg"])),
        ("wrong_type", False, record(image=["good.jpg", "good.png"])),
        ("wrong_type", False, record(turns={"human": "Why?"})),
        ("wrong_type", True, record(turns=[marked, ("gpt", 3)])),
        ("missing_field", True, without("id")),
        ("missing_field", True, without("conversations", messages=[{"role": "user", "content": "<image>\nWhy?"}])
         | {"messages": [{"role": r, "content": t} for r, t in (("user", "<image>\nWhy?"), ("assistant", "So."))]}),
        ("unread_medium", False, record(video="clip.mp4")),
        ("unread_medium", True, record(turns=[why, so], image=None, images=["good.jpg"])),
        ("unread_medium", False, record(turns=[("human", "<video>\nWhy?"), so], image=None)),
        ("duplicate_id", True, record("good 0")),
    ]  # fmt: skip


def plant(images: Path, path: Path) -> list[tuple[int, str, bool]]:
    """Write each defect between sound records; returns (line, kind, repairable)."""
    lines: list[bytes] = []
    wanted = []
    for k, (kind, repairable, item) in enumerate(defects(images)):
        if isinstance(item, dict) and item.get("id") == "a":
            item = item | {"id": f"bad {k}"}
        lines += [
            json.dumps(record(f"good {k}")).encode(),
            item if isinstance(item, bytes) else json.dumps(item).encode(),
        ]
        wanted.append((len(lines), kind, repairable))
    path.write_bytes(b"\n".join(lines))
    return wanted


def test_repair_leaves_only_unrepairable_defects(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "mine.jsonl", tmp_path / "repaired.jsonl"
    wanted = plant(images, path)
    assert len(wanted) == 43
    before = path.read_bytes()

    assert cli.main(["data", "check", str(path), "--images", str(images), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [(p["line"], p["kind"]) for p in result["problems"]] == [(line, kind) for line, kind, _ in wanted]
    assert result["records"] == 85  # all but the line that is no JSON
    assert PROBLEM_KINDS - {p["kind"] for p in result["problems"]} == {
        "not_parquet", "no_records", "other_layout", "no_images"
    }  # fmt: skip

    assert cli.main(["data", "check", str(path), "--images", str(images), "--fix", str(out), "--json"]) == 1
    fixed = json.loads(capsys.readouterr().out)
    left = [(line, kind) for line, kind, repairable in wanted if not repairable or kind == "not_json"]
    assert [(p["line"], p["kind"]) for p in fixed["problems"]] == left
    assert [f["line"] for f in fixed["fixed"]] == [line for line, kind, ok in wanted if ok and kind != "not_json"]
    assert all(f["done"] for f in fixed["fixed"])
    assert path.read_bytes() == before

    copy = check_file(out, images)
    assert [p["kind"] for p in copy["problems"]] == [kind for _, kind, repairable in wanted if not repairable]
    assert copy["records"] == fixed["written"] == 84  # without the exact duplicate
    assert b"A c\xe4t." in out.read_bytes()  # bytes that are no text are carried over, not guessed
    texts = [
        turn["value"]
        for line in before.split(b"\n")
        if b'"id": "good' in line
        for turn in json.loads(line)["conversations"]
    ]
    assert all(json.dumps(text).encode() in out.read_bytes() for text in texts)


def test_repaired_records_have_the_intended_content(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "mine.json"
    turns = [("human", "Why?"), ("gpt", "So.")]
    records = [
        record("moved", [("human", "Why?"), ("gpt", "So.\n<image>")]),
        record("kept", [("human", "Why?\n<image>"), ("gpt", "So."), ("human", "<image>\nAnd?"), ("gpt", "Then.")]),
        record("inside", str(images), image=None) | {"conversations": [{"role": "User", "content": "Why? "},
                                                                         {"role": "model", "content": "So."}]},
        record("open", [*ASKED, ("human", "And?")]),
        record("empty", turns, [], images=[]),
        record(" sound\u2028", [("human", " <image>Why? "), ("gpt", "So.  ")]),
    ]  # fmt: skip
    path.write_text(json.dumps(records, indent=1))
    fixed = fix_file(path, tmp_path / "repaired.json", images)
    assert fixed["problems"] == []
    repaired = {s.id: s.turns for s in load_instruct(tmp_path / "repaired.json", images)}
    assert repaired["moved"] == [("<image>\nWhy?", "So.")]
    assert repaired["kept"] == [("Why?\n<image>", "So."), ("And?", "Then.")]
    assert repaired["inside"] == [("Why?", "So.")]
    assert repaired["open"] == [tuple(text for _, text in ASKED)]
    assert repaired[" sound\u2028"] == [(" <image>Why? ", "So.  ")]  # a record without a problem is not touched
    done = {f["record"]: f["done"] for f in fixed["fixed"]}
    assert done["moved"] == ["marker: moved in turn 0"]
    assert done["inside"][:2] == ["field_names: role -> from", "field_names: content -> value"]
    assert len(done) == 5
    assert turns == [("human", "Why?"), ("gpt", "So.")]


def test_a_single_image_of_another_field_or_marker_is_renamed(tmp_path: Path, images: Path) -> None:
    messages = [{"role": "user", "content": "Classify."}, {"role": "assistant", "content": "active"}]
    records = [
        {"messages": messages, "images": ["good.jpg"]},
        record("path", [("human", "Why?"), ("gpt", "So.")], None, image_path="good.png"),
        record("struct", [("human", "Why?"), ("gpt", "So.")], [], img={"path": "good.png", "bytes": None}),
        record("twice", ASKED, "", images=["good.jpg"], file_name="good.jpg"),
        *(record(marker, [("human", f"{marker}\nWhy?"), ("gpt", "So.")]) for marker in (
            "<Image>", "<ImageHere>", "<image_1>", "&lt;image&gt;", "<|image|>", "[IMG]", "&#60;image&#62;", "< image >"
        )),
    ]  # fmt: skip
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(records[:1]))
    assert fix_file(path, tmp_path / "repaired.json", images)["problems"] == []
    path.write_text(json.dumps(records))
    assert len(check_file(path, images)["problems"]) >= len(records)
    assert fix_file(path, tmp_path / "repaired.json", images)["problems"] == []
    samples = load_instruct(tmp_path / "repaired.json", images)
    assert [str(s.image.relative_to(images)) for s in samples[:4] if s.image] == [
        "good.jpg", "good.png", "good.png", "good.jpg"
    ]  # fmt: skip
    assert samples[0].turns == [("<image>\nClassify.", "active")]
    assert {s.turns[0] for s in samples[1:] if s.id != "twice"} == {("<image>\nWhy?", "So.")}
    assert len(samples) == len(records)


@pytest.mark.parametrize(
    "changes",
    [
        {"images": ["good.jpg", "good.png"]},
        {"images": ["good.jpg"], "video": "clip.mp4"},
        {"image_path": "http://example.org/good.jpg"},
        {"image_path": "data:image/png;base64,iVBORw0KGgo="},
        {"image_id": 458752},
        {"videos": ["good.mp4"]},
        {"images": ["good.jpg"], "text": "<image_1> <image_2>"},
        {"images": ["good.jpg"], "text": "<Img><ImageHere></Img> Why?"},
    ],
)
def test_media_that_cannot_be_read_stay_a_problem(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = changes.pop("text", "Why?")
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(record(turns=[("human", text), ("gpt", "So.")], image=None, **changes)))
    fixed = fix_file(path, tmp_path / "repaired.jsonl")
    assert "unread_medium" in {p["kind"] for p in fixed["problems"]}
    with pytest.raises(DataError, match=r"training reads|marker of another"):
        load_instruct(tmp_path / "repaired.jsonl")


def test_repaired_copy_is_a_new_file_of_any_format(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(record("a")) + "\n" + json.dumps(record("b", [("human", "Why?"), ("gpt", "So.")])))
    with pytest.raises(DataError, match="replace"):
        fix_file(path, path, images)
    with pytest.raises(DataError, match="no known format"):
        fix_file(path, tmp_path / "out.txt", images)
    pytest.importorskip("pyarrow")
    fix_file(path, tmp_path / "out.parquet", images)
    samples = load_instruct(tmp_path / "out.parquet", images)
    assert [sample.id for sample in samples] == ["a", "b"]
    assert samples[1].turns == [("<image>\nWhy?", "So.")]


def test_parquet_is_checked_by_rows(tmp_path: Path, images: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [record(str(k)) for k in range(6)]
    rows[2]["image"] = "absent.jpg"
    rows[3]["conversations"][1]["value"] = ""
    rows[4]["id"] = None
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "mine.parquet")
    result = check_file(tmp_path / "mine.parquet", images)
    assert result["counted"] == "row"
    assert [(p["line"], p["kind"]) for p in result["problems"]] == [
        (3, "missing_image"), (4, "empty_turn"), (5, "missing_field")
    ]  # fmt: skip
    turns = pa.array([[{"from": b"human", "value": b"<image> Why"}, {"from": b"gpt", "value": b"A c\xe4t"}]] * 2)
    text = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    bad = pa.Table.from_arrays([pa.array(["x", "y"]), pa.array(["good.jpg"] * 2), turns.view(text)],
                               ["id", "image", "conversations"])  # fmt: skip
    pq.write_table(bad, tmp_path / "bad.parquet")
    result = check_file(tmp_path / "bad.parquet", images)
    assert [(p["line"], p["record"], p["kind"]) for p in result["problems"]] == [
        (1, "#0", "invalid_utf8"), (2, "#1", "invalid_utf8")
    ]  # fmt: skip
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "mine.parquet").read_bytes()[:200])
    assert [p["kind"] for p in check_file(tmp_path / "cut.parquet")["problems"]] == ["not_parquet"]


def test_words_are_counted_without_a_tokenizer(tmp_path: Path) -> None:
    assert count_words("one two  three\n") == 3
    assert count_words("猫在睡觉") >= 4
    assert count_words("A" * 2000) == 100  # a blob without spaces
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(record(turns=[("human", "<image> a b c"), ("gpt", "d e f g")])))
    assert check_file(path, max_words=8)["errors"] == 0
    assert [p["kind"] for p in check_file(path, max_words=7)["problems"]] == ["too_long"]
    assert check_file(path, max_words=None)["errors"] == 0


def test_check_time_per_record_is_bounded(tmp_path: Path, images: Path) -> None:
    from time import process_time

    path, n = tmp_path / "many.jsonl", 10_000
    path.write_text("\n".join(json.dumps(record(str(k), [*ASKED[:1], ("gpt", "word " * 60)])) for k in range(n)))
    begin = process_time()
    assert check_file(path, images, decode=False)["problems"] == []
    assert (process_time() - begin) * 158_000 / n < 20
