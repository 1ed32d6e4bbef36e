"""Bring your own data: 40 planted defects found and mended, tables and folders converted, instructions drawn."""

from __future__ import annotations

import csv
import json
import pickle
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from companion import cli
from companion.data_tools.own_data import convert_data
from companion.data_tools.repair import fix_file
from llava_core.constants import IMAGE_MARKER
from llava_core.data import cache
from llava_core.data.expansion import LISTS, draw, expand, load_instructions
from llava_core.data.instruct import PROBLEM_KINDS, check_file, count_words, load_instruct
from llava_core.runtime import DataError

Turns = list[tuple[Any, Any]]
ASKED: Turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cat.")]


def record(name: Any = "a", turns: Turns | Any = ASKED, image: Any = "good.jpg", **changes: Any) -> dict[str, Any]:
    listed = [{"from": role, "value": text} for role, text in turns] if isinstance(turns, list) else turns
    return {"id": name, **({} if image is None else {"image": image}), "conversations": listed} | changes


def without(field: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in record(**changes).items() if key != field}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    for name in ("good.jpg", "good.png", "below/good.jpg"):
        picture.save(folder / name)
    content = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) * 2 // 3])
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "empty.png").touch()
    (tmp_path / "secret.jpg").write_bytes(content)
    return folder


# ------------------------------------------------------------------------------------------------ the check


def defects(images: Path) -> list[tuple[str, bool, Any]]:
    """(kind of problem, whether it can be mended, the record or its bytes)."""
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
        ("duplicate_id", True, record("good 0")),
    ]  # fmt: skip


def plant(images: Path, path: Path) -> list[tuple[int, str, bool]]:
    """Write each defect between sound records; returns (line, kind, mendable)."""
    lines: list[bytes] = []
    wanted = []
    for k, (kind, mendable, item) in enumerate(defects(images)):
        if isinstance(item, dict) and item.get("id") == "a":
            item = item | {"id": f"bad {k}"}
        lines += [
            json.dumps(record(f"good {k}")).encode(),
            item if isinstance(item, bytes) else json.dumps(item).encode(),
        ]
        wanted.append((len(lines), kind, mendable))
    path.write_bytes(b"\n".join(lines))
    return wanted


def test_forty_planted_defects_are_found_once_each_and_only_the_unfixable_are_left(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "mine.jsonl", tmp_path / "mended.jsonl"
    wanted = plant(images, path)
    assert len(wanted) == 40
    before = path.read_bytes()

    assert cli.main(["data", "check", str(path), "--images", str(images), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(p["line"], p["kind"]) for p in found["problems"]] == [(line, kind) for line, kind, _ in wanted]
    assert found["records"] == 79  # all but the line that is no JSON
    assert set(PROBLEM_KINDS) - {p["kind"] for p in found["problems"]} == {"not_parquet", "no_records"}

    assert cli.main(["data", "check", str(path), "--images", str(images), "--fix", str(out), "--json"]) == 1
    fixed = json.loads(capsys.readouterr().out)
    left = [(line, kind) for line, kind, mendable in wanted if not mendable or kind == "not_json"]
    assert [(p["line"], p["kind"]) for p in fixed["problems"]] == left
    assert [f["line"] for f in fixed["fixed"]] == [line for line, kind, ok in wanted if ok and kind != "not_json"]
    assert all(f["done"] for f in fixed["fixed"])
    assert path.read_bytes() == before

    copy = check_file(out, images)
    assert [p["kind"] for p in copy["problems"]] == [kind for _, kind, mendable in wanted if not mendable]
    assert copy["records"] == fixed["written"] == 78  # without the exact duplicate
    assert b"A c\xe4t." in out.read_bytes()  # bytes that are no text are carried over, not guessed
    texts = [
        turn["value"]
        for line in before.split(b"\n")
        if b'"id": "good' in line
        for turn in json.loads(line)["conversations"]
    ]
    assert all(json.dumps(text).encode() in out.read_bytes() for text in texts)


def test_what_is_mended_is_what_was_meant(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "mine.json"
    turns = [("human", "Why?"), ("gpt", "So.")]
    records = [
        record("moved", [("human", "Why?"), ("gpt", "So.\n<image>")]),
        record("kept", [("human", "Why?\n<image>"), ("gpt", "So."), ("human", "<image>\nAnd?"), ("gpt", "Then.")]),
        record("inside", str(images), image=None) | {"conversations": [{"role": "User", "content": "Why? "},
                                                                         {"role": "model", "content": "So."}]},
        record("open", [*ASKED, ("human", "And?")]),
        record(" sound\u2028", [("human", " <image>Why? "), ("gpt", "So.  ")]),
    ]  # fmt: skip
    path.write_text(json.dumps(records, indent=1))
    fixed = fix_file(path, tmp_path / "mended.json", images)
    assert fixed["problems"] == []
    mended = {s.id: s.turns for s in load_instruct(tmp_path / "mended.json", images, decode=True)}
    assert mended["moved"] == [("<image>\nWhy?", "So.")]
    assert mended["kept"] == [("Why?\n<image>", "So."), ("And?", "Then.")]
    assert mended["inside"] == [("Why?", "So.")]
    assert mended["open"] == [tuple(text for _, text in ASKED)]
    assert mended[" sound\u2028"] == [(" <image>Why? ", "So.  ")]  # a record without a problem is not touched
    done = {f["record"]: f["done"] for f in fixed["fixed"]}
    assert done["moved"] == ["marker: moved in turn 0"]
    assert done["inside"][:2] == ["field_names: role -> from", "field_names: content -> value"]
    assert len(done) == 4
    assert turns == [("human", "Why?"), ("gpt", "So.")]


def test_the_copy_never_replaces_the_file_and_may_be_of_another_format(tmp_path: Path, images: Path) -> None:
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
    found = check_file(tmp_path / "mine.parquet", images)
    assert found["counted"] == "row"
    assert [(p["line"], p["kind"]) for p in found["problems"]] == [
        (3, "missing_image"), (4, "empty_turn"), (5, "missing_field")
    ]  # fmt: skip
    turns = pa.array([[{"from": b"human", "value": b"<image> Why"}, {"from": b"gpt", "value": b"A c\xe4t"}]] * 2)
    text = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    bad = pa.Table.from_arrays([pa.array(["x", "y"]), pa.array(["good.jpg"] * 2), turns.view(text)],
                               ["id", "image", "conversations"])  # fmt: skip
    pq.write_table(bad, tmp_path / "bad.parquet")
    found = check_file(tmp_path / "bad.parquet", images)
    assert [(p["line"], p["record"], p["kind"]) for p in found["problems"]] == [
        (1, "x", "invalid_utf8"), (2, "y", "invalid_utf8")
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


def test_the_check_of_many_records_takes_little_time_per_record(tmp_path: Path, images: Path) -> None:
    from time import process_time

    path, n = tmp_path / "many.jsonl", 10_000
    path.write_text("\n".join(json.dumps(record(str(k), [*ASKED[:1], ("gpt", "word " * 60)])) for k in range(n)))
    begin = process_time()
    assert check_file(path, images, decode=False)["problems"] == []
    assert (process_time() - begin) * 158_000 / n < 20


# ------------------------------------------------------------------------------------------------ converters


def checked(out: Path, images: Path) -> list[dict[str, Any]]:
    assert check_file(out, images)["problems"] == []
    return json.loads(out.read_text())


def test_a_folder_of_images_and_texts(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
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

    Image.new("RGB", (8, 8)).save(source / "alone.jpg")
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
    assert sorted(places) == ["alone.jpg", "latin.txt", "mute.txt", "orphan.txt", "void.txt"]
    assert "not UTF-8" in places["latin.txt"]


def test_a_csv_by_the_names_of_its_columns(tmp_path: Path, images: Path) -> None:
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
    assert report["records"] == 3
    assert [skipped["place"] for skipped in report["skipped"]] == ["line 6", "line 7", "line 8", "line 9"]
    with path.open("a") as file:
        file.write('good.jpg,"never closed\n')
    with pytest.raises(DataError, match=r"line 10: .*quotation marks"):  # --skip would lose what stands behind
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


def test_a_data_set_on_disk_with_images_as_bytes(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match="not there"):
        convert_data(source, out)


def test_a_data_set_on_disk_with_paths_and_turns_as_columns(tmp_path: Path, images: Path) -> None:
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


# ------------------------------------------------------------------------------------------------ naive expansion


def test_our_lists_are_as_long_as_the_papers_and_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    assert [len(set(load_instructions(name))) for name in ("brief", "detail")] == [11, 16]
    path = tmp_path / "official.txt"
    path.write_text('\ufeffDescribe the image.\n\n- "Say it."\n', encoding="utf-8")
    assert load_instructions(path) == ("Describe the image.", "Say it.")
    for text, wrong in (("", "no instruction"), ("A.\nA.", "line 2"), ("A <image>.", "line 1")):
        path.write_text(text)
        with pytest.raises(DataError, match=wrong):
            load_instructions(path)
    with pytest.raises(DataError, match="did you mean 'brief'"):
        load_instructions("breif")


def test_the_instruction_is_drawn_by_seed_and_id_alone_and_evenly() -> None:
    brief = LISTS["brief"]
    assert draw(brief, "000000123") == draw(brief, "000000123")
    drawn = Counter(draw(brief, str(k)) for k in range(11_000))
    assert set(drawn) == set(brief)
    assert all(850 < count < 1150 for count in drawn.values())
    assert sum(draw(brief, str(k)) != draw(brief, str(k), 1) for k in range(1000)) > 800
    turns = [expand("A cat.", str(k), brief) for k in range(1000)]
    first = sum(question["value"].startswith(IMAGE_MARKER) for question, _ in turns)
    assert 400 < first < 600
    assert all(question["value"].count(IMAGE_MARKER) == 1 for question, _ in turns)
    assert IMAGE_MARKER not in expand("A cat.", "1", brief, image=False)[0]["value"]


# ------------------------------------------------------------------------------------------------ the cache


def test_a_cached_file_is_not_read_again_until_it_changes(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    path, folder = tmp_path / "mine.json", tmp_path / "cache"
    records = [record(str(k), image=("good.jpg", None)[k % 2], type="detail") for k in range(5)]
    for k in (1, 3):
        records[k]["conversations"][0]["value"] = "Why\u2028?"
    path.write_text(json.dumps(records))
    loaded = load_instruct(path, images)
    first = cache.cached_instruct(path, images, folder=folder)
    assert list(first) == loaded
    assert list(first[1::2]) == loaded[1::2]
    assert first[-1] == loaded[-1]
    assert list(pickle.loads(pickle.dumps(first[3:]))) == loaded[3:]
    with pytest.raises(IndexError):
        first[5]

    with monkeypatch.context() as patch:
        patch.setattr(cache, "iter_instruct", None)  # to read the records would now be an error
        assert list(cache.cached_instruct(path, images, folder=folder)) == loaded
        for other in ({"decode": True}, {"images": None}):
            with pytest.raises(TypeError):
                cache.cached_instruct(path, **{"images": images, **other}, folder=folder)
        path.write_text(json.dumps(records[:2]))
        with pytest.raises(TypeError):
            cache.cached_instruct(path, images, folder=folder)
    assert list(cache.cached_instruct(path, images, folder=folder)) == loaded[:2]
    path.write_text(json.dumps([*records, record("bad", image="absent.jpg")]))
    files = sorted(folder.iterdir())
    with pytest.raises(DataError, match="record bad"):
        cache.cached_instruct(path, images, folder=folder)
    assert sorted(folder.iterdir()) == files  # nothing half-written
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    path.write_text(json.dumps(records))
    with pytest.raises(DataError, match="remove it"):
        cache.cached_instruct(path, images, folder=folder)


def test_a_large_file_gives_the_same_samples_through_the_cache(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    path, folder = tmp_path / "mine.json", tmp_path / "cache"
    path.write_text(json.dumps([record(str(k), type=("detail", "complex")[k % 2]) for k in range(40)]))
    options: dict[str, Any] = {"subset": {"detail": 0.5, "complex": 0.1}, "seed": 3}
    plain = cache.load_large(path, images, **options, folder=folder)
    assert plain == load_instruct(path, images, **options)
    assert not folder.exists()
    monkeypatch.setattr(cache, "CACHED_FROM", 0)
    cached = cache.load_large(path, images, **options, folder=folder)
    assert isinstance(cached, cache.CachedSamples)
    assert list(cached) == plain
    rows = [5, 0, 3]
    assert list(cache.pick(cached, rows)) == cache.pick(plain, rows) == [plain[k] for k in rows]
    with pytest.raises(DataError, match="did you mean 'detail'"):
        cache.load_large(path, images, {"details": 1.0}, folder=folder)
    with monkeypatch.context() as patch:
        patch.setattr(cache.importlib.util, "find_spec", lambda name: None)
        assert cache.load_large(path, images, **options, folder=folder) == plain
