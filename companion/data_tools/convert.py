"""Conversion of your own data to LLaVA-Instruct records: `llava data convert`.

Turns of a row (`conversations` or `messages`) are copied. A row with an `answer` becomes a pair of turns with its
`question`, or with a drawn instruction (see `expansion.py`).
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

from companion.data_tools.check import Checker, is_error
from companion.data_tools.expansion import expand, load_instructions
from companion.data_tools.repair import repair_record, write_parquet
from llava_core.constants import IMAGE_MARKER
from llava_core.data.instruct import FORMATS, Record, import_pyarrow, rows_of
from llava_core.registry import unknown
from llava_core.runtime import DataError, atomic_write, display_path, read_json, write_json, write_jsonl

KNOWN_COLUMNS = {
    "id": ("id", "image_id", "question_id"),
    "image": ("image", "file_name", "image_path", "filename", "path"),
    "question": ("question", "instruction", "prompt"),
    "answer": ("answer", "caption", "text", "response", "output"),
    "type": ("type",),
    "conversations": ("conversations", "messages", "conversation"),
}
"""Field -> column names that need not be given; the first that exists is used."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
_SIGNATURES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
_LISTED = 5  # problems in an error message


class _RowError(Exception):
    """A row that does not become a record."""


@dataclass(frozen=True)
class _Row:
    """One row of a source: its place for messages, and its fields by our names, or what is wrong with it."""

    place: str
    fields: dict[str, Any]
    error: str | None = None


@dataclass
class _Source:
    rows: Iterator[_Row]
    images: Path


@dataclass(frozen=True)
class _Options:
    out: Path
    images: Path | None
    columns: Mapping[str, str]
    split: str | None


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
    """Convert data of another format to LLaVA-Instruct records.

    Args:
        source: a folder of images, each with a `.txt` file of the same name (its caption or description); a `.csv` or
            `.tsv` file with column names; a folder written by `save_to_disk` of the package `datasets`; or a `.parquet`
            file with the columns of such a data set.
        out: the file to write, `.json`, `.jsonl` or `.parquet`.
        images: folder of the images; default: the folder itself, or the one of the CSV. Images that a data set stores
            as bytes are written there; default: `images` in the folder of `out`.
        columns: our field (a key of `KNOWN_COLUMNS`) -> the source's column, e.g. `{"image": "photo"}`.
        instructions: questions for rows without one, as for `load_instructions`.
        split: split of a data set that has several.
        skip: leave out rows with problems and report them; otherwise a problem is an error.

    Returns:
        `source` (its format), `records`, `images`, `out`, `skipped` (`{place, message}` of each row left out).

    Raises:
        DataError: the source has an unknown format, a column is missing, or, without `skip`, a row has a problem.
    """
    source, out = Path(source), Path(out)
    if out.suffix not in FORMATS:
        raise DataError(f"{display_path(out)}: no known format; end the name in {', '.join(FORMATS)}")
    for field in columns or {}:
        if field not in KNOWN_COLUMNS:
            raise DataError(f"columns: {unknown('field', field, KNOWN_COLUMNS)}")
    wordings = load_instructions(instructions)
    format_name = _format_of(source)
    options = _Options(out, Path(images) if images is not None else None, columns or {}, split)
    opened = _READERS[format_name](source, options)
    if not opened.images.is_dir():
        raise DataError(f"{display_path(opened.images)}: no such folder; name the folder of the images with --images")
    checker = Checker(opened.images, decode=False)
    records: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for number, row in enumerate(opened.rows, start=1):
        try:
            records.append(_record(row, number, checker, wordings, seed))
        except _RowError as error:
            skipped.append({"place": row.place, "message": str(error)})
    if skipped and not skip:
        some = "".join(f"\n  {fault['place']}: {fault['message']}" for fault in skipped[:_LISTED])
        more = f"\n  and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else ""
        raise DataError(
            f"{display_path(source)}: {len(skipped)} problem(s){some}{more}\n"
            "  put them right, or leave these out with --skip; no records were written"
        )
    if not records:
        raise DataError(f"{display_path(source)}: it has no records; check that it is the right source")
    write = {".json": write_json, ".jsonl": write_jsonl, ".parquet": write_parquet}[out.suffix]
    write(out, records)
    paths = {"images": display_path(opened.images), "out": display_path(out)}
    return {"source": format_name, "records": len(records), **paths, "skipped": skipped}


def _format_of(source: Path) -> str:
    if source.is_file() and source.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if source.is_file() and source.suffix.lower() == ".parquet":
        return "parquet"
    if source.is_dir():
        known = ("state.json", "dataset_dict.json")
        return "datasets" if any((source / name).is_file() for name in known) else "folder"
    if not source.exists():
        raise DataError(f"{display_path(source)}: no such file or folder; check the path")
    raise DataError(
        f"{display_path(source)}: unknown format; give a .csv, .tsv or .parquet file, a folder of images and .txt "
        "files, or a folder that `datasets` wrote with save_to_disk"
    )


def _record(row: _Row, number: int, checker: Checker, wordings: Sequence[str], seed: int) -> dict[str, Any]:
    if row.error is not None:
        raise _RowError(row.error)
    fields = {name: value for name, value in row.fields.items() if value is not None and value != ""}
    if "image" in row.fields and "image" not in fields:
        raise _RowError("no image is named; fill it in or remove the row")
    value: dict[str, Any] = {"id": str(fields.get("id", f"row-{number}"))}
    value |= {name: fields[name] for name in ("image", "type") if name in fields}
    if "conversations" in fields:
        value["conversations"] = _turns(fields["conversations"])
    else:
        value["conversations"] = _question_and_answer(fields, value["id"], wordings, seed)
    record = Record(None, number - 1, value)
    problems = checker.check(record)
    checker.reported.clear()  # each row reports its damaged image
    if any(map(is_error, problems)):
        record = Record(None, number - 1, repair_record(record, checker)[0])
        problems = checker.check(record)
        checker.reported.clear()
    errors = [problem.message for problem in problems if is_error(problem)]
    if errors:
        raise _RowError("; ".join(errors))
    return dict(record.value)


def _question_and_answer(fields: dict[str, Any], name: str, wordings: Sequence[str], seed: int) -> list[dict[str, str]]:
    question, answer, has_image = fields.get("question"), fields.get("answer"), "image" in fields
    if not isinstance(answer, str) or not answer.strip():
        raise _RowError("no answer; fill it in or remove the row")
    if IMAGE_MARKER in answer:
        raise _RowError(f"the answer contains {IMAGE_MARKER}; take it out")
    if question is None and not has_image:
        raise _RowError("neither a question nor an image; a record needs one of them")
    if question is not None and not isinstance(question, str):
        raise _RowError(f"the question is no text but {type(question).__name__}; choose another column")
    turns = expand(answer.strip(), name, wordings, seed, has_image)
    if question is not None:
        marker = f"{IMAGE_MARKER}\n" if has_image and IMAGE_MARKER not in question else ""
        turns[0]["value"] = marker + question.strip()
    return turns


def _turns(value: Any) -> Any:
    """Turns as a list of objects; `datasets` stores some as one object of lists, a CSV as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _RowError(f"the turns are no JSON ({error})") from None
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if isinstance(value, list):  # an absent field is a null in a struct
        return [{k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else turn for turn in value]
    return value


def _choose_columns(columns: Mapping[str, str], present: Sequence[str], source: Path) -> dict[str, str]:
    for field, column in columns.items():
        if column not in present:
            raise DataError(f"{display_path(source)}: {unknown('column', column, present)}; it was named for '{field}'")
    chosen = dict(columns)
    for field, names in KNOWN_COLUMNS.items():
        free = [name for name in names if name in present and name not in chosen.values()]
        if field not in chosen and free:
            chosen[field] = free[0]
    if "conversations" not in chosen and "answer" not in chosen:
        raise DataError(
            f"{display_path(source)}: no column holds an answer or turns (columns: {', '.join(present)}); name it, "
            f"e.g. --columns answer={present[-1] if present else 'caption'}"
        )
    return chosen


def _read_folder(source: Path, options: _Options) -> _Source:
    if options.columns or options.split:
        raise DataError(f"{display_path(source)}: a folder of images and texts has neither columns nor splits")
    root = options.images or source
    images: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(path.relative_to(root).with_suffix("").as_posix(), []).append(path)
    texts = {path.relative_to(source).with_suffix("").as_posix(): path for path in sorted(source.rglob("*.txt"))}
    if not images or not texts:
        what = "image" if not images else ".txt file"
        raise DataError(f"{display_path(source)}: no {what} in this folder; each image needs a text of the same name")

    def rows() -> Iterator[_Row]:
        for name, paths in images.items():
            if name not in texts:
                yield _Row(display_path(paths[0]), {}, f"no text; write {name}.txt")
        for name, text in texts.items():
            matches = images.get(name, [])
            if len(matches) != 1:
                what = f"several images, {', '.join(p.name for p in matches)}" if matches else "no image of this name"
                yield _Row(display_path(text), {}, f"{what}; one text belongs to one image")
                continue
            try:
                answer = text.read_bytes().decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                yield _Row(display_path(text), {}, f"not UTF-8 text (byte {error.start}); save the file as UTF-8")
                continue
            image = matches[0].relative_to(root).as_posix()
            yield _Row(display_path(text), {"id": name, "image": image, "answer": answer})

    return _Source(rows(), root)


def _read_csv(source: Path, options: _Options) -> _Source:
    # not pandas: it fills up short rows and renames columns of the same name in silence, and counts no lines
    if options.split:
        raise DataError(f"{display_path(source)}: a CSV has no splits; leave --split out")
    lines = _csv_lines(source)
    _, header = next(lines, (1, []))
    if len(header) == 1 and ";" in header[0]:
        raise DataError(
            f"{display_path(source)}, line 1: separated by semicolons; save it with commas, or as .tsv with tabs"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{display_path(source)}, line 1: two columns are called '{twice[0]}'; rename one")
    chosen = _choose_columns(options.columns, header, source)

    def rows() -> Iterator[_Row]:
        for line, cells in lines:
            if len(cells) == len(header):
                values = dict(zip(header, cells, strict=True))
                yield _Row(f"line {line}", {field: values[column] for field, column in chosen.items()})
            else:
                error = f"{len(cells)} cells, but {len(header)} columns; put text with a comma between quotation marks"
                yield _Row(f"line {line}", {}, error)

    return _Source(rows(), options.images or source.parent)


def _csv_lines(source: Path) -> Iterator[tuple[int, list[str]]]:
    """The line on which each row of a CSV starts, and its cells; empty lines are skipped."""
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = source.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{display_path(source)}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    csv.field_size_limit(2**24)  # an answer may be longer than csv's 128 KiB
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = (
                f"{display_path(source)}, line {line}: {error}; the rest cannot be read: correct the quotation marks"
            )
            raise DataError(message) from error
        if cells:
            yield line, cells


def _read_datasets(source: Path, options: _Options) -> _Source:
    """A folder of `save_to_disk`: arrow streams that `state.json` lists."""
    source = _split_folder(source, options.split)
    arrow, ipc = import_pyarrow(), import_pyarrow("ipc")
    state = read_json(source / "state.json")
    try:
        files = [source / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        message = (
            f"{display_path(source / 'state.json')}: names no data files; save the data set again with save_to_disk"
        )
        raise DataError(message) from error
    if state.get("_indices_data_files"):
        raise DataError(
            f"{display_path(source)}: the rows are chosen by an index; call flatten_indices() and save it again"
        )
    for file in files:
        if file.parent != source or not file.is_file():
            raise DataError(f"{display_path(file)}: named in state.json but missing; copy the complete folder again")

    def batches() -> Iterator[tuple[Path, Any]]:
        for file in files:
            try:
                with arrow.memory_map(str(file)) as mapped, ipc.open_stream(mapped) as stream:
                    for batch in stream:
                        yield file, batch
            except (OSError, arrow.ArrowException) as error:
                raise DataError(f"{display_path(file)}: damaged ({error}); copy or save the data set again") from error

    return _read_batches(source, options, batches)


def _split_folder(source: Path, split: str | None) -> Path:
    if not (source / "dataset_dict.json").is_file():
        if split:
            raise DataError(f"{display_path(source)}: it has no splits; leave --split out")
        return source
    known = read_json(source / "dataset_dict.json").get("splits", [])
    split = known[0] if split is None and len(known) == 1 else split
    if split is None:
        raise DataError(f"{display_path(source)}: it has the splits {', '.join(known)}; choose one with --split")
    if split not in known:
        raise DataError(f"{display_path(source)}: {unknown('split', split, known)}")
    if not (source / split / "state.json").is_file():
        raise DataError(f"{display_path(source / split)}: no state.json in it; copy the complete data set again")
    return source / split


def _read_parquet(source: Path, options: _Options) -> _Source:
    if options.split:
        raise DataError(f"{display_path(source)}: a parquet file has no splits; leave --split out")
    arrow, parquet = import_pyarrow(), import_pyarrow("parquet")

    def batches() -> Iterator[tuple[Path, Any]]:
        try:
            with parquet.ParquetFile(source) as file:
                for batch in file.iter_batches(batch_size=256):
                    yield source, batch
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{display_path(source)}: no parquet, or damaged ({error}); download it again") from error

    return _read_batches(source, options, batches)


def _read_batches(source: Path, options: _Options, batches: Callable[[], Iterator[tuple[Path, Any]]]) -> _Source:
    first = next(batches(), None)
    if first is None:
        raise DataError(f"{display_path(source)}: the data set has no rows")
    chosen = _choose_columns(options.columns, first[1].schema.names, source)
    kind = first[1].schema.field(chosen["image"]).type if "image" in chosen else None
    types = import_pyarrow("types")
    holds_bytes = kind is not None and (types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind))
    default = options.out.parent / "images" if holds_bytes else source if source.is_dir() else source.parent
    folder = options.images or default
    if holds_bytes:
        folder.mkdir(parents=True, exist_ok=True)

    def rows() -> Iterator[_Row]:
        number = 0
        for file, batch in batches():
            narrow = batch.select([*dict.fromkeys(chosen.values())])
            for start in range(0, narrow.num_rows, 64):  # the bytes of few images at once
                for values in rows_of(narrow.slice(start, 64)):
                    number += 1
                    yield _table_row(f"{file.name}, row {number}", values, chosen, folder)

    return _Source(rows(), folder)


def _table_row(place: str, values: dict[str, Any] | None, chosen: Mapping[str, str], folder: Path) -> _Row:
    if values is None:
        return _Row(place, {}, "text that is not UTF-8; save the data set again")
    fields = {field: values[column] for field, column in chosen.items()}
    if "image" in fields:
        try:
            fields["image"] = _image_name(fields["image"], folder)
        except _RowError as error:
            return _Row(place, {}, str(error))
    return _Row(place, fields)


def _image_name(value: Any, folder: Path) -> Any:
    """The image's path below the folder; bytes are written there, named by their hash."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        if not content:
            raise _RowError("the image has no bytes; save the data set again")
        suffix = next((suffix for start, suffix in _SIGNATURES.items() if content.startswith(start)), None)
        suffix = suffix or (".webp" if content[8:12] == b"WEBP" else ".img")
        name = hashlib.sha256(content).hexdigest()[:24] + suffix
        if not (folder / name).is_file():
            atomic_write(folder / name, content)
        return name
    path = value.get("path") if isinstance(value, dict) else value
    if isinstance(path, str) and os.path.isabs(path) and Path(path).is_relative_to(folder.absolute()):
        return Path(path).relative_to(folder.absolute()).as_posix()
    return path


_READERS: dict[str, Callable[[Path, _Options], _Source]] = {
    "folder": _read_folder,
    "csv": _read_csv,
    "datasets": _read_datasets,
    "parquet": _read_parquet,
}
