"""Conversion of folders, CSV and data sets on disk."""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from instruct_records import nested_images as images  # noqa: F401 - a fixture
from PIL import Image

from companion import cli
from companion.data_tools.check import check_file
from companion.data_tools.convert import convert_data
from companion.data_tools.expansion import LISTS
from llava_core.constants import IMAGE_MARKER
from llava_core.runtime import DataError


def checked(out: Path, images: Path) -> list[dict[str, Any]]:
    assert check_file(out, images)["problems"] == []
    return json.loads(out.read_text())


def test_folder_of_images_and_texts(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "photos"
    (source / "garden").mkdir(parents=True)
    for name in ("cat.jpg", "garden/tree.png"):
        Image.new("RGB", (8, 8)).save(source / name)
    (source / "cat.txt").write_bytes(b"\xef\xbb\xbfA cat.\n")
    (source / "garden" / "tree.txt").write_text("Ein Baum — groß.")
    out = tmp_path / "mine.json"
    assert cli.main(["data", "convert", str(source), "--to", str(out), "--instructions", "detail", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 2
    first, second = checked(out, source)
    assert (first["id"], first["image"], first["conversations"][1]["value"]) == ("cat", "cat.jpg", "A cat.")
    assert first["conversations"][0]["value"].replace(IMAGE_MARKER, "").strip() in LISTS["detail"]
    assert (second["image"], second["conversations"][1]["value"]) == ("garden/tree.png", "Ein Baum — groß.")

    Image.new("RGB", (8, 8)).save(source / "textless.jpg")
    (source / "orphan.txt").write_text("A text.")
    (source / "void.jpg").touch()
    (source / "void.txt").write_text("Nothing.")
    for name in ("mute.jpg", "latin.jpg"):
        Image.new("RGB", (8, 8)).save(source / name)
    (source / "mute.txt").write_text(" ")
    (source / "latin.txt").write_bytes(b"Gr\xfc\xdfe")
    with pytest.raises(DataError, match="5 problem"):
        convert_data(source, tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()
    report = convert_data(source, tmp_path / "other.json", skip=True)
    assert report["records"] == 2
    places = {Path(skipped["place"]).name: skipped["message"] for skipped in report["skipped"]}
    assert sorted(places) == ["latin.txt", "mute.txt", "orphan.txt", "textless.jpg", "void.txt"]
    assert "not UTF-8" in places["latin.txt"]


def test_csv_by_the_names_of_its_columns(tmp_path: Path, images: Path) -> None:
    path, out = tmp_path / "table.csv", tmp_path / "mine.json"
    rows = [
        ["photo", "legend", "ask", "nr"],
        ["good.jpg", 'A "cat",\nasleep\u2028here.', "What?", "1"],
        ["good.png", "A dog.", "", "2"],
        [str(images.absolute() / "below/good.jpg"), "A cow.", "Who?", "3"],
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    columns = {"image": "photo", "answer": "legend", "question": "ask", "id": "nr"}
    convert_data(path, out, images, columns)
    first, second, third = checked(out, images)
    assert first["conversations"][0]["value"] == "<image>\nWhat?"
    assert first["conversations"][1]["value"] == 'A "cat",\nasleep\u2028here.'
    assert second["conversations"][0]["value"].replace(IMAGE_MARKER, "").strip() in LISTS["brief"]
    assert [first["id"], third["image"]] == ["1", "below/good.jpg"]

    with pytest.raises(DataError, match=r"unknown column 'foto'; did you mean 'photo'"):
        convert_data(path, out, images, {"image": "foto"})
    with pytest.raises(DataError, match="unknown field 'img'"):
        convert_data(path, out, images, {"img": "photo"})
    with pytest.raises(DataError, match="--columns answer="):
        convert_data(path, out, images, {"image": "photo"})
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(
            [["absent.jpg", "A", "B", "4"], ["", "A", "B", "5"], ["good.jpg", "", "B", "6"], ["x"]]
        )
    report = convert_data(path, out, images, columns, skip=True)
    assert report["records"] == 4
    assert report["notes"] == ["1 of 4 records have no image"]
    assert [skipped["place"] for skipped in report["skipped"]] == ["line 6", "line 8", "line 9"]
    with path.open("a") as file:
        file.write('good.jpg,"never closed\n')
    with pytest.raises(DataError, match=r"line 10: .*quotation marks"):  # --skip would lose the rows after it
        convert_data(path, out, images, columns, skip=True)
    semicolons = tmp_path / "semi.csv"
    semicolons.write_text("image;caption\na.jpg;A\n")
    with pytest.raises(DataError, match="semicolons"):
        convert_data(semicolons, out)


def save_to_disk(folder: Path, tables: list[Any], **state: Any) -> Path:
    """What `datasets.Dataset.save_to_disk` writes: arrow streams, state.json and dataset_info.json."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{k:05d}-of-{len(tables):05d}.arrow" for k in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], **state}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def content(color: int, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), (color, 0, 0)).save(file, kind)
    return file.getvalue()


def test_data_set_on_disk_with_images_as_bytes(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    tables = [
        pa.table({
            "image": [{"bytes": content(k), "path": None}, {"bytes": content(9, "JPEG"), "path": "x.jpg"}],
            "messages": [[{"role": "user", "content": f"Why {k}?"}, {"role": "assistant", "content": "So."}]] * 2,
            "extra": [1, 2],
        })
        for k in range(2)
    ]  # fmt: skip
    source = save_to_disk(tmp_path / "set" / "train", tables)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    out = tmp_path / "out" / "mine.json"
    report = convert_data(tmp_path / "set", out, split="train")
    assert report["records"] == 4
    records = checked(out, out.parent / "images")
    assert [r["conversations"][0]["value"] for r in records] == [f"<image>\nWhy {k}?" for k in (0, 0, 1, 1)]
    assert records[0]["conversations"][1] == {"from": "gpt", "value": "So."}
    assert records[1]["image"] == records[3]["image"]  # the same bytes are one file
    assert Path(records[1]["image"]).suffix == ".jpg"
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(tables[0], tmp_path / "part.parquet")
    report = convert_data(tmp_path / "part.parquet", tmp_path / "other" / "part.json")
    assert report["source"] == "parquet"
    assert checked(tmp_path / "other" / "part.json", tmp_path / "other" / "images") == [
        {**item, "id": f"row-{k}"} for k, item in enumerate(records[:2], start=1)
    ]
    with pytest.raises(DataError, match="choose one with --split"):
        convert_data(tmp_path / "set", out)
    with pytest.raises(DataError, match="unknown split 'val'"):
        convert_data(tmp_path / "set", out, split="val")
    with pytest.raises(DataError, match=r"no state\.json"):
        convert_data(tmp_path / "set", out, split="test")
    data = next(source.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:50])
    with pytest.raises(DataError, match="damaged"):
        convert_data(source, out)
    data.unlink()
    with pytest.raises(DataError, match=r"named in state.json but missing"):
        convert_data(source, out)


def test_data_set_on_disk_with_paths_and_turns_as_columns(tmp_path: Path, images: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    sequence = {"from": ["human", "gpt"], "value": ["<image>\nWhy?", "So."]}
    table = pa.table({"image": ["good.jpg", str(images.absolute() / "good.png")], "conversations": [sequence] * 2})
    source = save_to_disk(tmp_path / "set", [table])
    convert_data(source, tmp_path / "mine.json", images)
    assert [r["image"] for r in checked(tmp_path / "mine.json", images)] == ["good.jpg", "good.png"]
    captions = save_to_disk(tmp_path / "captions", [pa.table({"file_name": ["good.jpg"], "caption": ["A cat."]})])
    convert_data(captions, tmp_path / "mine.json", images)
    assert checked(tmp_path / "mine.json", images)[0]["conversations"][1]["value"] == "A cat."
    indexed = save_to_disk(tmp_path / "indexed", [table], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="flatten_indices"):
        convert_data(indexed, tmp_path / "mine.json", images)


# -------------------------------------------------------------------------------------------------- layouts of others

ASKED = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}]
USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


def image_parts(**image: Any) -> list[dict[str, Any]]:
    return [{"type": "image", **image}, {"type": "text", "text": "Why?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT], "images": ["good.jpg"]},
        {"messages": [{"role": "system", "content": "Be kind."}, USER, ASSISTANT], "image": "good.jpg"},
        {"messages": [{"role": "user", "content": image_parts(image="good.jpg")}, ASSISTANT]},
        {"messages": [{"role": "user", "content": image_parts(text=None, index=0)}, ASSISTANT], "images": ["good.jpg"]},
        {"messages": [{"role": "user", "content": [{"image": "good.jpg"}, {"text": "Why?"}]}, ASSISTANT]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "So."}]}], "images": "good.jpg"},
        {"query": "Why?", "response": "So.", "images": ["good.jpg"]},
        {"query": "<image>\nWhy?", "response": "So.", "images": ["good.jpg"], "history": [], "videos": []},
        {"instruction": "Why?", "input": "", "output": "So.", "images": ["good.jpg"], "system": ""},
        {"texts": [{"user": "Why?", "assistant": "So.", "source": "vqa"}], "images": ["good.jpg"]},
        {"conversation": [{"input": "Why?", "output": "So."}], "image": ["good.jpg"]},
        {"conversations": [["Why?", "So."]], "image_path": "good.jpg"},
        {"conversations": [["user", "Why?"], ["assistant", "So."]], "image_path": "good.jpg"},
        {"conversations": ASKED, "image": {"path": "good.jpg", "bytes": None}},
        {"conversations": [{"from": "user", "value": "<image_1>\nWhy?"}, ASKED[1]], "image": "good.jpg"},
        {"question": "Why?", "answer": "So.", "image": "good.jpg", "width": 64, "model": "gpt"},
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_of_layouts_in_wide_use(tmp_path: Path, images: Path, row: dict[str, Any], suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(json.dumps([row]) if suffix == ".json" else json.dumps(row) + "\n")
    report = convert_data(path, tmp_path / "mine.json", images)
    (record,) = checked(tmp_path / "mine.json", images)
    assert (record["image"], record["conversations"]) == ("good.jpg", ASKED)
    read_by_check = check_file(path, images)["problems"] == []
    assert read_by_check is (row.get("conversations") == ASKED and row.get("image") == "good.jpg")
    assert "Be kind" not in json.dumps(report)


def test_history_input_and_numbers_keep_their_text(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [
        {"query": "And now?", "response": "Red.", "history": [["What?", "A bus."]], "images": ["good.jpg"]},
        {"instruction": "Translate.", "input": "Hund", "output": "dog"},
        {"question": "How many?", "answer": 3.0, "image": "good.png", "hint": "Count.", "source": "mine"},
        {"query": "Why?", "response": "So.", "images": []},
    ]
    path.write_text(json.dumps(rows))
    report = convert_data(path, tmp_path / "mine.json", images)
    records = checked(tmp_path / "mine.json", images)
    texts = [[turn["value"] for turn in record["conversations"]] for record in records]
    assert texts == [
        ["<image>\nWhat?", "A bus.", "And now?", "Red."],
        ["Translate.\nHund", "dog"],
        ["<image>\nHow many?", "3"],
        ["Why?", "So."],
    ]
    assert report["notes"] == ["not read: hint (1 rows)", "not read: source (1 rows)", "2 of 4 records have no image"]
    path.write_text(json.dumps(rows[1:2]))
    report = convert_data(path, tmp_path / "mine.json", images)
    assert report["notes"] == [f"--images {images} was given, and no row names an image"]


LONG = "iVBORw0KGgo" * 9000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, ASSISTANT], "images": ["a.jpg", "b.jpg"]}, "2 images; a record has one"),
        (
            {"query": "Why?", "response": "So.", "videos": ["clip.mp4"]},
            "videos names a medium that the record would not have; leave the row out",
        ),
        ({"question": "Why?", "answer": "So.", "image_id": 458752}, "image_id names a medium"),
        ({"question": "Why?", "answer": "So.", "metadata": {"video": "clip"}}, r"metadata\.video names a medium"),
        ({"question": "<video>Why?", "answer": "So."}, "<video> in turn 0 is a marker"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, ASSISTANT]},
            "neither text nor",
        ),
        (
            {"messages": [{"role": "user", "content": image_parts() * 2}, ASSISTANT], "images": ["good.jpg"]},
            "2 x <image>",
        ),
        ({"messages": [USER, ASSISTANT], "image": "https://example.org/a.jpg"}, "download it"),
        ({"question": "Why?", "answer": 2, "choices": ["a", "b"], "image": "good.jpg"}, "question with choices"),
        ({"question": "Why?", "answer": "B", "A": "a", "B": "b", "image": "good.jpg"}, "question with choices"),
        ({"question": "Why?", "answer": float("nan"), "image": "good.jpg"}, "no answer"),
        ({"question": "Why?", "answer": ["a", "b"], "image": "good.jpg"}, "the answer is no text but list"),
        ({"question": "<image>\nWhy?", "answer": "So.", "image": None}, "1 x <image> in a record with no image"),
        ({"texts": ["A cat.", "A dog."], "image": "good.jpg"}, "turn 0 is an object"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "no column holds an answer"),
        ({"question": "Why?", "answer": "So.", "image": LONG}, "the image is no file name but 99,000"),
        ({"question": "Why?", "answer": "So.", "image": f"data:image/png;base64,{LONG}"}, "the image is no file name"),
        ({"question": "Why?", "answer": "So.", "image_base64": LONG}, "image_base64 names a medium"),
        ({"question": LONG.split(), "answer": "So.", "image": "good.jpg"}, "the question is no text"),
        ({LONG: "Why?"}, "no column holds an answer"),
        ({"conversations": [{"from": LONG, "value": "Why?"}, ASKED[1]]}, "turn 0 is from"),
        ({"id": LONG, "conversations": [ASKED[1]]}, "turn 0 is from"),
    ],
)
def test_other_rows_are_refused_with_a_short_message(
    tmp_path: Path, images: Path, row: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=message) as refused:
        convert_data(path, tmp_path / "mine.json", images)
    assert not (tmp_path / "mine.json").exists()
    assert LONG[:100] not in str(refused.value)
    problems = check_file(path, images)["problems"]
    assert problems
    assert LONG[:100] not in json.dumps(problems)


def test_mixed_tables_have_records_with_and_without_image(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    asked = [{"from": "human", "value": "Why?"}, ASKED[1]]
    stored = {"bytes": content(3), "path": None}
    for column, first, second in (
        ("image", stored, None),
        ("image", stored, {"bytes": None, "path": None}),
        ("images", [stored], []),
        ("images", [stored], None),
        ("image", stored["bytes"], None),
    ):
        rows: list[dict[str, Any]] = [
            {"id": "1", column: first, "image_path": "train/1.png", "image_id": 1, "conversations": ASKED},
            {"id": "2", column: second, "image_path": None, "image_id": None, "conversations": asked},
        ]
        path, out = tmp_path / "mixed.parquet", tmp_path / "out" / "mine.json"
        pq.write_table(pa.Table.from_pylist(rows), path)
        report = convert_data(path, out)
        assert report["notes"][-1] == "1 of 2 records have no image"
        records = checked(out, out.parent / "images")
        assert [("image" in record, record["conversations"]) for record in records] == [(True, ASKED), (False, asked)]
        pq.write_table(pa.Table.from_pylist([rows[0], {**rows[1], "conversations": ASKED}]), path)
        with pytest.raises(DataError, match=r"row 2: 1 x <image> in a record with no image"):
            convert_data(path, out)
        stored_problem = check_file(path)["problems"]
        assert any("llava data convert" in problem["message"] for problem in stored_problem)


def test_a_table_with_a_null_image_is_checked_as_it_is_converted(tmp_path: Path, images: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    asked = [{"from": "human", "value": "Why?"}, ASKED[1]]
    rows = [
        {"id": "1", "image": "good.jpg", "conversations": ASKED},
        {"id": "2", "image": None, "conversations": asked},
        {"id": "3", "image": None, "conversations": ASKED},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mixed.parquet")
    assert [(p["line"], p["kind"]) for p in check_file(tmp_path / "mixed.parquet", images)["problems"]] == [
        (3, "image_marker")
    ]
    report = convert_data(tmp_path / "mixed.parquet", tmp_path / "mine.json", images, skip=True)
    assert (report["records"], len(report["skipped"])) == (2, 1)


# ------------------------------------------------------------------------------------------------ naive expansion
