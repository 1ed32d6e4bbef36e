"""Your own data into LLaVA-Instruct: a folder of images and texts, a CSV, or a data set in arrow or parquet files.

Every source gives rows of fields; a row becomes a record in one of two ways. It has turns (`conversations` or
`messages`): they are taken over. Or it has an `answer`, and a `question` or else an instruction drawn by the record's
id (`expansion`). What is wrong is collected, all of it, before records are written.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.data_tools.repair import mend, write_parquet
from llava_core.constants import IMAGE_MARKER
from llava_core.data.expansion import expand, load_instructions
from llava_core.data.instruct import FORMATS, Checker, RawRecord, import_pyarrow, rows_of
from llava_core.registry import unknown
from llava_core.runtime import DataError, atomic_write, read_json, shown, write_json, write_jsonl

FIELDS = ("id", "image", "question", "answer", "type", "conversations")
GUESSES = {
    "id": ("id", "image_id", "question_id"),
    "image": ("image", "file_name", "image_path", "filename", "path"),
    "question": ("question", "instruction", "prompt"),
    "answer": ("answer", "caption", "text", "response", "output"),
    "type": ("type",),
    "conversations": ("conversations", "messages", "conversation"),
}
"""Names of columns that are known without `columns`; the first that exists is taken."""

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
_MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
_SHOWN = 5


@dataclass(frozen=True)
class _Row:
    """One row of a source: its number from 1, its place for messages, and its fields by our names."""

    number: int
    place: str
    fields: dict[str, Any]
    bad_utf8: bool = False


@dataclass
class _Source:
    """An opened source: its rows, and the folder that its images lie in."""

    rows: Iterator[_Row]
    images: Path
    problems: list[str]


def convert_data(
    source: str | Path,
    out: str | Path,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    instructions: str | Path = "brief",
    split: str | None = None,
    seed: int = 0,
    skip: bool = False,
) -> dict[str, Any]:
    """Convert data of another layout to LLaVA-Instruct: what `llava data convert` does.

    Args:
        source: a folder of images, each with a text of the same name and the extension `.txt` (an image and its
            caption or description); a `.csv` or `.tsv` file with a line of column names; a folder that the package
            `datasets` wrote with `save_to_disk`; a `.parquet` file with the columns of one, as hubs offer them.
        out: the file to write, `.json`, `.jsonl` or `.parquet`.
        images: folder of the images. By default the folder itself, or the one that the CSV lies in. Images whose bytes
            lie in a data set are written there; by default into `images` beside `out`.
        columns: our field -> the source's column, e.g. `{"image": "photo", "answer": "legend"}`; fields are those of
            `FIELDS`. Columns named as in `GUESSES` need not be given.
        instructions: questions for rows without one: `brief`, `detail` or a file of one per line.
        split: part of a data set that has several.
        seed: decides the instructions and the side of the image.
        skip: leave rows with problems out and report them, rather than write nothing.

    Returns:
        `source` (its layout), `records`, `images` (the folder), `out`, `skipped` (`{place, message}` of each row left
        out).

    Raises:
        DataError: the source is of no known layout, a column is missing, or, without `skip`, a row has a problem; the
            message lists them.
    """
    source, out = Path(source), Path(out)
    if out.suffix not in FORMATS:
        raise DataError(f"{shown(out)}: no known format; end the name in {', '.join(FORMATS)}")
    for field in columns or {}:
        if field not in FIELDS:
            raise DataError(f"columns: {unknown('field', field, FIELDS)}")
    wordings = load_instructions(instructions)
    layout = _layout(source)
    folder = Path(images) if images is not None else None
    opened = _OPEN[layout](source, out, folder, dict(columns or {}), split)
    if not opened.images.is_dir():
        raise DataError(f"{shown(opened.images)}: no such folder; name the folder of the images with --images")
    checker = Checker(opened.images, decode=False)
    records: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for row in opened.rows:
        try:
            record = _record(row, checker, wordings, seed)
        except _RowError as error:
            skipped.append({"place": row.place, "message": str(error)})
        else:
            records.append(record)
    skipped += [{"place": text.partition(": ")[0], "message": text.partition(": ")[2]} for text in opened.problems]
    if skipped and not skip:
        some = "".join(f"\n  {fault['place']}: {fault['message']}" for fault in skipped[:_SHOWN])
        more = f"\n  and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        raise DataError(
            f"{shown(source)}: {len(skipped)} problem(s){some}{more}\n"
            "  put them right, or leave these out with --skip; no records were written"
        )
    if not records:
        raise DataError(f"{shown(source)}: no record came of it; check that it is the right source")
    _write(out, records)
    return {
        "source": layout,
        "records": len(records),
        "images": shown(opened.images),
        "out": shown(out),
        "skipped": skipped,
    }


def _layout(source: Path) -> str:
    if source.is_file() and source.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if source.is_file() and source.suffix.lower() == ".parquet":
        return "parquet"
    if source.is_dir():
        known = ("state.json", "dataset_dict.json")
        return "datasets" if any((source / name).is_file() for name in known) else "folder"
    if not source.exists():
        raise DataError(f"{shown(source)}: no such file or folder; check the path")
    raise DataError(
        f"{shown(source)}: no known layout; give a .csv, .tsv or .parquet file, a folder of images and .txt files, or "
        "a folder that `datasets` wrote with save_to_disk"
    )


def _write(out: Path, records: list[dict[str, Any]]) -> None:
    if out.suffix == ".parquet":
        write_parquet(out, records)
    else:
        (write_jsonl if out.suffix == ".jsonl" else write_json)(out, records)


# ------------------------------------------------------------------------------------------------ a row -> a record


class _RowError(Exception):
    """What is wrong with a row."""


def _record(row: _Row, checker: Checker, wordings: Sequence[str], seed: int) -> dict[str, Any]:
    """The record of a row, mended where it is safe, and checked."""
    fields = {name: value for name, value in row.fields.items() if value is not None and value != ""}
    image = fields.get("image")
    if "image" in row.fields and image is None:
        raise _RowError("no image is named; fill it in or remove the row")
    record: dict[str, Any] = {"id": str(fields.get("id", f"row-{row.number}"))}
    if image is not None:
        record["image"] = image
    if "type" in fields:
        record["type"] = fields["type"]
    if "conversations" in fields:
        record["conversations"] = _turns(fields["conversations"])
    else:
        record["conversations"] = _pair(fields, record["id"], wordings, seed)
    raw = RawRecord(None, row.number - 1, record, row.bad_utf8)
    found = checker.check(raw)
    if any(problem.is_error for problem in found):
        # the first look at a damaged image names it once for all; here each row has to say it
        checker.named.clear()
        mended, _ = mend(raw, checker)
        raw = RawRecord(None, raw.position, mended, row.bad_utf8)
        found = checker.check(raw)
    checker.named.clear()
    errors = [problem.message for problem in found if problem.is_error]
    if errors:
        raise _RowError("; ".join(errors))
    return dict(raw.value)


def _pair(fields: dict[str, Any], name: str, wordings: Sequence[str], seed: int) -> list[dict[str, str]]:
    answer = fields.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise _RowError("no answer; fill it in or remove the row")
    if IMAGE_MARKER in answer:
        raise _RowError(f"the answer contains {IMAGE_MARKER}; take it out")
    question, has_image = fields.get("question"), "image" in fields
    turns = expand(answer.strip(), name, wordings, seed, has_image)
    if question is None:
        if not has_image:
            raise _RowError("neither a question nor an image; a record needs one of them")
    elif not isinstance(question, str):
        raise _RowError(f"the question is no text but {type(question).__name__}; choose another column")
    elif has_image and IMAGE_MARKER not in question:
        turns[0]["value"] = f"{IMAGE_MARKER}\n{question.strip()}"
    else:
        turns[0]["value"] = question.strip()
    return turns


def _turns(value: Any) -> Any:
    """Turns as a list of objects; `datasets` stores some as one object of lists, CSV as a text of JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _RowError(f"the turns are no JSON ({error})") from None
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if isinstance(value, list):  # a struct has the cells of absent fields too
        return [{k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else turn for turn in value]
    return value


def _chosen(columns: dict[str, str], present: Sequence[str], source: Path) -> dict[str, str]:
    """Our field -> the source's column: those that were named, and those that are known by their name."""
    for field, column in columns.items():
        if column not in present:
            raise DataError(f"{shown(source)}: {unknown('column', column, present)}; it was named for '{field}'")
    taken = set(columns.values())
    chosen = dict(columns)
    for field, names in GUESSES.items():
        free = [name for name in names if name in present and name not in taken]
        if field not in chosen and free:
            chosen[field] = free[0]
            taken.add(free[0])
    if "conversations" not in chosen and "answer" not in chosen:
        raise DataError(
            f"{shown(source)}: no column holds an answer or turns (columns: {', '.join(present)}); name it, e.g. "
            f"--columns answer={present[-1] if present else 'caption'}"
        )
    return chosen


# ------------------------------------------------------------------------------------------------ folder


def _folder(source: Path, out: Path, images: Path | None, columns: dict[str, str], split: str | None) -> _Source:
    if columns or split:
        raise DataError(f"{shown(source)}: a folder of images and texts has neither columns nor splits")
    root = images or source
    pictures: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in PICTURES:
            pictures.setdefault(path.relative_to(root).with_suffix("").as_posix(), []).append(path)
    texts = {path.relative_to(source).with_suffix("").as_posix(): path for path in sorted(source.rglob("*.txt"))}
    if not pictures or not texts:
        what = "image" if not pictures else ".txt file"
        raise DataError(f"{shown(source)}: no {what} in this folder; each image needs a text of the same name")
    problems = [f"{shown(path[0])}: no text; write {name}.txt" for name, path in pictures.items() if name not in texts]

    def rows() -> Iterator[_Row]:
        for number, (name, text) in enumerate(texts.items(), start=1):
            found = pictures.get(name, [])
            if len(found) != 1:
                what = f"several images, {', '.join(p.name for p in found)}" if found else "no image of this name"
                problems.append(f"{shown(text)}: {what}; one text belongs to one image")
                continue
            try:
                answer = text.read_bytes().decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                problems.append(f"{shown(text)}: not UTF-8 text (byte {error.start}); save the file as UTF-8")
                continue
            image = found[0].relative_to(root).as_posix()
            yield _Row(number, shown(text), {"id": name, "image": image, "answer": answer})

    return _Source(rows(), root, problems)


# ------------------------------------------------------------------------------------------------ CSV


def _csv(source: Path, out: Path, images: Path | None, columns: dict[str, str], split: str | None) -> _Source:
    if split:
        raise DataError(f"{shown(source)}: a CSV has no splits; leave --split out")
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = source.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{shown(source)}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    csv.field_size_limit(2**24)  # an answer may be longer than csv's 128 KiB
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
    except csv.Error as error:
        raise DataError(f"{shown(source)}, line 1: {error}; correct the names of the columns") from error
    if len(header) == 1 and ";" in header[0]:
        raise DataError(f"{shown(source)}, line 1: separated by semicolons; save it with commas, or as .tsv with tabs")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{shown(source)}, line 1: two columns are called '{twice[0]}'; rename one")
    chosen = _chosen(columns, header, source)
    problems: list[str] = []

    def rows() -> Iterator[_Row]:
        number = 0
        while True:
            line = lines.line_num + 1
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"{shown(source)}, line {line}: {error}; the rest cannot be read: correct the quotation marks"
                ) from error
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                problems.append(
                    f"line {line}: {len(cells)} cells, but {len(header)} columns; put text with a comma between "
                    "quotation marks"
                )
                continue
            values = dict(zip(header, cells, strict=True))
            yield _Row(number, f"line {line}", {field: values[column] for field, column in chosen.items()})

    return _Source(rows(), images or source.parent, problems)


# ------------------------------------------------------------------------------------------------ datasets on disk


def _datasets(source: Path, out: Path, images: Path | None, columns: dict[str, str], split: str | None) -> _Source:
    source = _split_of(source, split)
    arrow, ipc = import_pyarrow(), import_pyarrow("ipc")
    state = read_json(source / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list) or not all(
        isinstance(f, dict) and isinstance(f.get("filename"), str) for f in listed
    ):
        raise DataError(
            f"{shown(source / 'state.json')}: names no data files; save the data set again with save_to_disk"
        )
    if state.get("_indices_data_files"):
        raise DataError(f"{shown(source)}: the rows are chosen by an index; call flatten_indices() and save it again")
    files = [source / name["filename"] for name in listed]
    for file in files:
        if os.path.dirname(file.relative_to(source)) or not file.is_file():
            raise DataError(f"{shown(file)}: named in state.json, and not there; copy the whole folder again")

    def batches() -> Iterator[tuple[Path, Any]]:
        for file in files:
            with arrow.memory_map(str(file)) as mapped:
                try:
                    with ipc.open_stream(mapped) as stream:
                        for batch in stream:
                            yield file, batch
                except (OSError, arrow.ArrowException) as error:
                    raise DataError(f"{shown(file)}: damaged ({error}); copy or save the data set again") from error

    return _table(source, out, images, columns, batches)


def _parquet(source: Path, out: Path, images: Path | None, columns: dict[str, str], split: str | None) -> _Source:
    if split:
        raise DataError(f"{shown(source)}: a parquet file has no splits; leave --split out")
    arrow, parquet = import_pyarrow(), import_pyarrow("parquet")

    def batches() -> Iterator[tuple[Path, Any]]:
        try:
            with parquet.ParquetFile(source) as file:
                for batch in file.iter_batches(batch_size=256):
                    yield source, batch
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{shown(source)}: no parquet, or damaged ({error}); download it again") from error

    return _table(source, out, images, columns, batches)


def _table(
    source: Path,
    out: Path,
    images: Path | None,
    columns: dict[str, str],
    batches: Callable[[], Iterator[tuple[Path, Any]]],
) -> _Source:
    """The rows of arrow batches, each with its file; images that lie in them as bytes are written to the folder."""
    first = next(batches(), None)
    if first is None:
        raise DataError(f"{shown(source)}: the data set has no rows")
    chosen = _chosen(columns, first[1].schema.names, source)
    kind = first[1].schema.field(chosen["image"]).type if "image" in chosen else None
    types = import_pyarrow("types")
    holds_bytes = kind is not None and (types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind))
    beside = source if source.is_dir() else source.parent
    folder = images or (out.parent / "images" if holds_bytes else beside)
    if holds_bytes:
        folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []

    def rows() -> Iterator[_Row]:
        number = 0
        for file, batch in batches():
            narrow = batch.select([*dict.fromkeys(chosen.values())])
            for start in range(0, narrow.num_rows, 64):  # the bytes of few images at once
                for values, bad_utf8 in rows_of(narrow.slice(start, 64)):
                    number += 1
                    place = f"{file.name}, row {number}"
                    fields = {field: values[column] for field, column in chosen.items()}
                    if "image" in fields:
                        try:
                            fields["image"] = _image_name(fields["image"], folder)
                        except _RowError as error:
                            problems.append(f"{place}: {error}")
                            continue
                    yield _Row(number, place, fields, bad_utf8)

    return _Source(rows(), folder, problems)


def _split_of(source: Path, split: str | None) -> Path:
    if not (source / "dataset_dict.json").is_file():
        if split:
            raise DataError(f"{shown(source)}: it has no splits; leave --split out")
        return source
    known = read_json(source / "dataset_dict.json").get("splits", [])
    if split is None and len(known) == 1:
        split = known[0]
    if split is None:
        raise DataError(f"{shown(source)}: it has the splits {', '.join(known)}; choose one with --split")
    if split not in known:
        raise DataError(f"{shown(source)}: {unknown('split', split, known)}")
    if not (source / split / "state.json").is_file():
        raise DataError(f"{shown(source / split)}: no state.json in it; copy the whole data set again")
    return source / split


def _image_name(value: Any, folder: Path) -> Any:
    """The image's path below the folder; bytes are written there, under a name that their content gives."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        ending = next((ending for magic, ending in _MAGIC.items() if content.startswith(magic)), None)
        ending = ending or (".webp" if content[8:12] == b"WEBP" else ".img")
        name = hashlib.sha256(content).hexdigest()[:24] + ending
        if not content:
            raise _RowError("the image has no bytes; save the data set again")
        if not (folder / name).is_file():
            atomic_write(folder / name, content)
        return name
    path = value.get("path") if isinstance(value, dict) else value
    if isinstance(path, str) and os.path.isabs(path) and Path(path).is_relative_to(folder.absolute()):
        return Path(path).relative_to(folder.absolute()).as_posix()
    return path


_OPEN: dict[str, Callable[[Path, Path, Path | None, dict[str, str], str | None], _Source]] = {
    "folder": _folder,
    "csv": _csv,
    "datasets": _datasets,
    "parquet": _parquet,
}
