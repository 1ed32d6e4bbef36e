"""Hostile and damaged data: one line names the file, in time that grows with the file and not with its square."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from instruct_records import record
from PIL import Image

from companion.cli import main
from companion.data_tools.cc3m import read_captions
from companion.data_tools.check import MAX_LISTED, check_file
from companion.data_tools.coco import load_annotations
from companion.data_tools.convert import convert_data
from companion.data_tools.data_card import audit_file
from companion.data_tools.phrases import MAX_TEXT, Extractor
from companion.data_tools.repair import fix_file
from companion.data_tools.scienceqa import load_problems
from llava_core.data.instruct import ImageFolder, file_fault
from llava_core.runtime import DataError

# ------------------------------------------------------------------------------------- files that are none of the data


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "link out": (link("/etc/hostname"), "is a link out of the folder"),
    "link above": (link("../other.txt"), "is a link out of the folder"),
    "pipe": (os.mkfifo, "a pipe or a device"),
    "device": (link("/dev/zero"), "is a link out of the folder"),
}


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, ".txt") for name in NO_FILES), ("pipe", ".png"), ("device", ".png")]
)
def test_folders_are_read_without_what_lies_outside(name: str, suffix: str, tmp_path: Path) -> None:
    make, reason = NO_FILES[name]
    (tmp_path / "other.txt").write_text("a secret")
    folder = tmp_path / "photos"
    folder.mkdir()
    for stem in ("a", "b"):
        Image.new("RGB", (8, 8)).save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text("A cat.")
    (folder / f"a{suffix}").unlink()
    make(folder / f"a{suffix}")
    with pytest.raises(DataError, match=rf"a\.txt: .*({reason}|a pipe or a device)"):
        convert_data(folder, tmp_path / "mine.json")
    report = convert_data(folder, tmp_path / "mine.json", skip=True)
    assert (report["records"], len(report["skipped"])) == (1, 1)
    if suffix == ".png":
        assert (ImageFolder(folder).problem("a.png") or ("", ""))[0] == "missing_image"


def test_images_may_be_links_to_other_places_and_what_is_no_image_is_refused(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "kept.png")
    (folder / "a.png").symlink_to(elsewhere / "kept.png")
    (folder / "a.txt").write_text("A cat.")
    (folder / "b.png").symlink_to("/etc/hostname")
    assert convert_data(folder, tmp_path / "mine.json", skip=True)["records"] == 1
    assert ImageFolder(folder).problem("a.png") is None
    assert (ImageFolder(folder).problem("b.png") or ("", ""))[0] == "unreadable_image"


def test_links_inside_a_folder_and_into_the_hubs_blobs_are_files(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "commit"
    for folder in (snapshot, tmp_path / "blobs", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    for path in (snapshot / "a.png", tmp_path / "blobs" / "hash", tmp_path / "elsewhere" / "d.png"):
        Image.new("RGB", (8, 8)).save(path, "PNG")
    (snapshot / "b.png").symlink_to("a.png")
    (snapshot / "c.png").symlink_to("../../blobs/hash")
    (snapshot / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("a.png", "b.png", "c.png", "linked/d.png", "absent.png"):
        assert file_fault(snapshot, name) is None


def test_a_text_without_end_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(DataError, match=r"a\.txt: .*more than 1,000,000 bytes"):
        convert_data(tmp_path, tmp_path / "mine.json")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
@pytest.mark.parametrize("head", [b"", b"[" + b" " * 5000])
def test_files_of_holes_are_not_read(head: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(20 * 2**30)
    reason = "bytes are there" if head else "UTF-16 text or binary data"
    with pytest.raises(DataError, match=rf"a\.{suffix}.*{reason}"):
        list(read_captions(path)) if suffix == "tsv" else convert_data(path, tmp_path / "mine.json")


@pytest.mark.parametrize("state", [["/etc/passwd"], ["../a.arrow"], [3], [], "name", None])
def test_data_sets_on_disk_name_files_of_their_folder(state: Any, tmp_path: Path) -> None:
    files = [{"filename": name} for name in state] if isinstance(state, list) else state
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    with pytest.raises(DataError, match=tmp_path.name):
        convert_data(tmp_path, tmp_path / "mine.json")


@pytest.mark.parametrize("splits", [["/etc"], [1], "train", {"train": 1}, [], None])
def test_data_sets_on_disk_name_their_splits(splits: Any, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match=r"dataset_dict\.json: has no list of names"):
        convert_data(tmp_path, tmp_path / "mine.json")


# ------------------------------------------------------------------------------------------- values of other types

PROBLEM = {
    "question": "Why?", "choices": ["a", "b"], "answer": 0, "subject": "natural science", "grade": "grade2",
    "split": "train", "image": "image.png",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "../../../../etc/passwd"}, "leaves the folder"),
        ({"image": "/etc/passwd"}, "leaves the folder"),
        ({"split": "../.."}, "leaves the folder"),
        ({"image": 3}, "image has 3 instead of a text"),
        ({"hint": ["a"]}, "hint has"),
        ({"choices": ["a", None]}, "choices has None"),
        (None, "question is missing"),
    ],
)
def test_problems_of_scienceqa_with_other_values(change: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "pid_splits.json").write_text('{"train": ["1"]}')
    (tmp_path / "problems.json").write_text(json.dumps({"1": change and PROBLEM | change}))
    with pytest.raises(DataError, match=rf"problems\.json, problem 1: .*{message}"):
        load_problems(tmp_path, check_images=False)


@pytest.mark.parametrize(
    ("file", "content"),
    [("problems.json", [1]), ("pid_splits.json", [1]), ("pid_splits.json", {"train": 3}),
     ("pid_splits.json", {"train": [["1"]]}), ("problems.json", "text")],
)  # fmt: skip
def test_files_of_scienceqa_with_other_values(file: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / "pid_splits.json").write_text('{"train": ["1"]}')
    (tmp_path / "problems.json").write_text(json.dumps({"1": PROBLEM}))
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=file.replace(".", r"\.")):
        load_problems(tmp_path, check_images=False)


@pytest.mark.parametrize(
    ("table", "entry"),
    [
        ("categories", 3), ("categories", {"id": [1], "name": "cat"}), ("images", "text"),
        ("images", {"id": 1, "file_name": "../a.jpg"}), ("images", {"id": 1, "file_name": "/a.jpg"}),
        ("annotations", None), ("annotations", {"image_id": 1, "category_id": 1, "bbox": [float("nan"), 0, 1, 1]}),
        ("annotations", {"image_id": 1, "category_id": 1, "bbox": [10**400, 0, 1, 1]}),
        ("images", {"id": 1, "file_name": "a.jpg", "width": 10**400, "height": 1}),
    ],
)  # fmt: skip
def test_coco_files_with_other_values(table: str, entry: Any, tmp_path: Path) -> None:
    image = {"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    instances = content | {table: [entry]}
    captions = {"images": instances["images"], "annotations": [{"image_id": 1, "caption": "A cat."}]}
    (tmp_path / "captions_a.json").write_text(json.dumps(captions))
    (tmp_path / "instances_a.json").write_text(json.dumps(instances))
    with pytest.raises(DataError, match=r"(captions|instances)_a\.json, "):
        load_annotations(tmp_path)


@pytest.mark.parametrize(
    "change", [{"cost_usd": float("nan")}, {"price": "ab"}, {"prompt_tokens": "3"}, {"price": [1, float("inf")]}]
)
def test_provenance_with_other_numbers(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([record(image=None)]))
    row = {"request": "key", "model": "m", "cost_usd": 0.1, "price": [1, 2], **change}
    (tmp_path / "provenance.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"provenance\.jsonl, request 1: {next(iter(change))} is "):
        audit_file(tmp_path / "mine.json")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", [900, 100_000])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_values_nested_too_deep(suffix: str, depth: int, tmp_path: Path) -> None:
    path, text = tmp_path / f"a.{suffix}", json.dumps(record(image=None))[:-1] + f', "meta": {nested(depth)}}}'
    path.write_text({"json": f"[{text}]", "jsonl": text, "csv": f'id,conversations\n1,"{nested(depth)}"\n'}[suffix])
    if suffix != "csv":
        assert [problem["kind"] for problem in check_file(path)["problems"]] == ["not_json"]
    with pytest.raises(DataError, match=rf"a\.{suffix}[\s\S]*(nested too deep|recursion)"):
        convert_data(path, tmp_path / "mine.json")


def test_lone_surrogates_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"id": "\ud800\x1b"}).encode() + b'\n{"id": "\xff"}\n')
    assert main(["data", "check", str(tmp_path / "a.jsonl")]) == 1
    assert "record \\ud800\\u001b: missing_field" in capsys.readouterr().out


def test_long_texts_are_refused_or_cut_before_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tsv").write_text("A cat.\thttp://a\n" + "cat " * 300_000 + "\thttp://b\n")
    with pytest.raises(DataError, match=r"a\.tsv, line 2: a caption of 1,200,000 characters"):
        list(read_captions(tmp_path / "a.tsv"))

    class Parser:
        def pipe(self, texts: Any, batch_size: int) -> Any:
            return (len(text) for text in texts)

    parser = type("package", (), {"load": staticmethod(lambda exclude: Parser())})
    monkeypatch.setattr("importlib.import_module", lambda name: parser)
    find = Extractor("spacy", "key", "package", read=lambda parsed: [parsed]).start()
    assert list(find(["word " * 300_000, "A cat."])) == [[MAX_TEXT], [6]]


# ------------------------------------------------------------------------------------------------------ linear time


def seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def test_problems_of_one_kind_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": \n' * (MAX_LISTED + 5) + '{"id": 3}\n')
    result = check_file(path)
    assert result["errors"] == MAX_LISTED + 5 + 2
    assert len(result["problems"]) == MAX_LISTED + 2 + 1
    assert result["problems"][-1]["message"] == "5 more problems of the kind not_json, not listed"


def repeated_id(path: Path, size: int) -> Callable[[], Any]:
    rows = (record(image=None, extra=k, conversations=[]) for k in range(size))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda: fix_file(path, path.with_suffix(".json"))


def wide_csv(path: Path, size: int) -> Callable[[], Any]:
    path.with_suffix(".csv").write_text(",".join(f"c{k}" for k in range(size)) + ",question,answer\n")

    def convert() -> None:
        with pytest.raises(DataError, match="no records"):
            convert_data(path.with_suffix(".csv"), path.with_suffix(".json"))

    return convert


def asking(text: str) -> Callable[[Path, int], Callable[[], Any]]:
    def write(path: Path, size: int) -> Callable[[], Any]:
        turns = [{"from": "human", "value": text * size}, {"from": "gpt", "value": "So."}]
        path.write_text(json.dumps({"id": "a", "image": "a.jpg", "conversations": turns}))
        return lambda: fix_file(path, path.with_suffix(".json"))

    return write


LINEAR = {
    "repeated id": (repeated_id, 20_000), "wide header": (wide_csv, 30_000), "tags": (asking("<img>"), 100_000),
    "strong markers": (asking("<image_1>"), 50_000), "alternative text": (asking("!["), 100_000),
    "attributes": (asking("\n<img " + "=" * 1000), 100), "spaces": (asking(" " * 1000 + "x"), 100),
    "open marker": (asking("<|" + "image" * 20_000), 2), "open tag": (asking("<" + " " * 100_000), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_hostile_texts_take_linear_time(name: str, tmp_path: Path) -> None:
    write, size = LINEAR[name]
    assert seconds(write(tmp_path / "a.jsonl", size)) < 5  # minutes, where the time grows with the square


@pytest.mark.parametrize("line", ['"' + '""' * 40_000 + "x\thttp://a", " " * 90_000 + "x\thttp://a"])
def test_hostile_captions_take_linear_time(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(f"{line}\n" * 3)
    assert seconds(lambda: list(read_captions(tmp_path / "a.tsv"))) < 5
