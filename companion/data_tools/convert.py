"""Conversion of your own data to LLaVA-Instruct records: `llava data convert`.

Turns of a row (`conversations` or `messages`) are copied. A row with an `answer` becomes a pair of turns with its
`question`, or with a drawn instruction (see `expansion.py`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from companion.data_tools.check import Checker, is_error
from companion.data_tools.expansion import expand, load_instructions
from companion.data_tools.layouts import KNOWN_COLUMNS, RowError, answer_of, history_of, question_of, turns_of
from companion.data_tools.repair import repair_record, write_parquet
from llava_core.constants import IMAGE_MARKER
from llava_core.data.instruct import FORMATS, Problem, Record, file_fault, leaves_folder, read_records
from llava_core.data.media import first_of, names_images, unread_fields
from llava_core.data.tables import read_table
from llava_core.registry import unknown
from llava_core.runtime import (
    DataError,
    atomic_write,
    display_path,
    read_json,
    shortened,
    unread_content,
    write_json,
    write_jsonl,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
_SIGNATURES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
_OWN_NAME = re.compile(r"(?:image|img|picture|photo)_?(?:path|name|file|file_?name)", re.IGNORECASE)
MAX_TEXT_BYTES = 10**6
"""Of the text of an image in a folder of images and texts."""
_LISTED = 5  # problems in an error message


@dataclass(frozen=True)
class _Row:
    """One row of a source: its place for messages, its fields by our names and the others, or what is wrong with it."""

    place: str
    fields: dict[str, Any]
    rest: dict[str, Any] = field(default_factory=dict)
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
            `.tsv` file with column names; a `.json` list or a `.jsonl` file of objects; a folder written by
            `save_to_disk` of the package `datasets`; or a `.parquet` file with the columns of such a data set.
        out: the file to write, `.json`, `.jsonl` or `.parquet`.
        images: folder of the images; default: the folder itself, or the one of the CSV. Images that a data set stores
            as bytes are written there; default: `images` in the folder of `out`.
        columns: our field (a key of `KNOWN_COLUMNS`) -> the source's column, e.g. `{"image": "photo"}`.
        instructions: questions for rows without one, as for `load_instructions`.
        split: split of a data set that has several.
        skip: leave out rows with problems and report them; otherwise a problem is an error.

    Returns:
        `source` (its format), `records`, `images`, `out`, `skipped` (`{place, message}` of each row left out), `notes`
        (what was left out of the rows, how many have no image).

    Raises:
        DataError: the source has an unknown format, a column is missing, or, without `skip`, a row has a problem.
    """
    source, out = Path(source), Path(out)
    if out.suffix not in FORMATS:
        raise DataError(f"{display_path(out)}: no known format; end the name in {', '.join(FORMATS)}")
    for name in columns or {}:
        if name not in KNOWN_COLUMNS:
            raise DataError(f"columns: {unknown('field', name, KNOWN_COLUMNS)}")
    wordings = load_instructions(instructions)
    format_name = _format_of(source)
    options = _Options(out, Path(images) if images is not None else None, columns or {}, split)
    opened = _READERS[format_name](source, options)
    if not opened.images.is_dir():
        raise DataError(f"{display_path(opened.images)}: no such folder; name the folder of the images with --images")
    checker = Checker(opened.images, decode=False)
    records: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    unread: Counter[str] = Counter()
    for number, row in enumerate(opened.rows, start=1):
        try:
            records.append(_record(row, number, checker, wordings, seed, unread))
        except (RowError, RecursionError) as error:
            message = "nested too deep; write it again" if isinstance(error, RecursionError) else str(error)
            skipped.append({"place": row.place, "message": message})
    if skipped and not skip:
        lines = [f"{fault['place']}: {fault['message']}" for fault in skipped[:_LISTED]]
        lines += [f"and {len(skipped) - _LISTED} more"] if len(skipped) > _LISTED else []
        lines.append("put them right, or leave these out with --skip; no records were written")
        raise DataError(f"{display_path(source)}: {len(skipped)} problem(s)", *lines)
    if not records:
        raise DataError(f"{display_path(source)}: it has no records; check that it is the right source")
    write = {".json": write_json, ".jsonl": write_jsonl, ".parquet": write_parquet}[out.suffix]
    write(out, records)
    paths = {"images": display_path(opened.images), "out": display_path(out)}
    notes = _notes(records, unread, images)
    return {"source": format_name, "records": len(records), **paths, "skipped": skipped, "notes": notes}


def _notes(records: list[dict[str, Any]], unread: Counter[str], images: str | Path | None) -> list[str]:
    bare = sum("image" not in record for record in records)
    notes = [f"not read: {shortened(name, 40)} ({count:,} rows)" for name, count in unread.most_common()]
    if bare == len(records) and images is not None:
        notes.append(f"--images {display_path(images)} was given, and no row names an image")
    elif bare:
        notes.append(f"{bare:,} of {len(records):,} records have no image")
    return notes


def _format_of(source: Path) -> str:
    if source.is_file() and source.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if source.is_file() and source.suffix.lower() in FORMATS:
        return "parquet" if source.suffix.lower() == ".parquet" else "json"
    if source.is_dir():
        known = ("state.json", "dataset_dict.json")
        return "datasets" if any((source / name).is_file() for name in known) else "folder"
    if not source.exists():
        raise DataError(f"{display_path(source)}: no such file or folder; check the path")
    raise DataError(
        f"{display_path(source)}: unknown format; give a .csv, .tsv, .json, .jsonl or .parquet file, a folder of "
        "images and .txt files, or a folder that `datasets` wrote with save_to_disk"
    )


def _record(
    row: _Row, number: int, checker: Checker, wordings: Sequence[str], seed: int, unread: Counter[str]
) -> dict[str, Any]:
    if row.error is not None:
        raise RowError(row.error)
    folder = checker.folder.path if checker.folder is not None else Path()
    fields = {name: value for name, value in row.fields.items() if value is not None and value != ""}
    rest, image = dict(row.rest), _image_name(fields.get("image"), folder)
    value: dict[str, Any] = {"id": str(fields.get("id", f"row-{number}"))}
    system = 0
    if "conversations" in fields:
        turns, images, system = turns_of(fields["conversations"])
        if images and image is None:
            image = _image_name(images, folder)
        elif images and _image_name(images, folder) != image:
            raise RowError("the row and its messages name different images; a record has one")
    else:
        turns = _question_and_answer(fields, rest, value["id"], wordings, seed, image is not None)
    value |= {} if image is None else {"image": image}
    value |= {"type": fields["type"]} if "type" in fields else {}
    value["conversations"] = turns
    # the name of a file from which a table stores the bytes is no other image
    stored = image is not None and not isinstance(fields.get("image"), str)
    others = {name: left for name, left in rest.items() if not (stored and _OWN_NAME.fullmatch(name))}
    if names := list(unread_fields(others, (), image)):
        column = next((name for name in names if names_images(name)), None)
        fix = f"name the column of the files of images, e.g. --columns image={column}, or " if column else ""
        raise RowError(f"{first_of(names)} names a medium that the record would not have; {fix}leave the row out")
    record = Record(None, number - 1, value)
    problems = checker.check(record)
    checker.reported.clear()  # each row reports its damaged image
    if any(map(is_error, problems)):
        record = Record(None, number - 1, repair_record(record, checker)[0])
        problems = checker.check(record)
        checker.reported.clear()
    errors = [problem.message for problem in problems if is_error(problem)]
    if errors:
        raise RowError("; ".join(errors))
    unread.update(name for name, left in rest.items() if left not in (None, "", [], {}) and name != "id")
    unread.update(["turns of the system"] * (system > 0))
    return dict(record.value)


def _question_and_answer(
    fields: dict[str, Any], rest: dict[str, Any], name: str, wordings: Sequence[str], seed: int, has_image: bool
) -> list[dict[str, str]]:
    answer, question, history = answer_of(fields, rest), question_of(fields, rest), history_of(rest)
    if question is None and not has_image:
        raise RowError("neither a question nor an image; a record needs one of them")
    turns = expand(answer.strip(), name, wordings, seed, has_image)
    if question is not None:
        marked = any(IMAGE_MARKER in text for text in [question, *(str(turn.get("value")) for turn in history)])
        turns[0]["value"] = question.strip()
        turns = [*history, *turns]
        if has_image and not marked:
            turns[0]["value"] = f"{IMAGE_MARKER}\n{turns[0]['value']}"
    return turns


def _choose_columns(columns: Mapping[str, str], present: Collection[str], source: Path) -> dict[str, str]:
    shown, present = [shortened(name, 40) for name in present], dict.fromkeys(present)  # which is fast to search
    for name, column in columns.items():
        if column not in present:
            raise DataError(f"{display_path(source)}: {unknown('column', column, shown)}; it was named for '{name}'")
    chosen = _known_columns(columns, present)
    if "conversations" not in chosen and "answer" not in chosen:
        listed = first_of(present, 20)
        raise DataError(
            f"{display_path(source)}: no column holds an answer or turns (columns: {listed}); name it, "
            f"e.g. --columns answer={shown[-1] if shown else 'caption'}"
        )
    return chosen


def _known_columns(columns: Mapping[str, str], present: Collection[str]) -> dict[str, str]:
    chosen = {name: column for name, column in columns.items() if column in present}
    for name, known in KNOWN_COLUMNS.items():
        free = [column for column in known if column in present and column not in chosen.values()]
        if name not in chosen and free:
            chosen[name] = free[0]
    return chosen


def _row(place: str, values: Mapping[str, Any], chosen: Mapping[str, str]) -> _Row:
    read = {column for name, column in chosen.items() if name != "id" or not names_images(column)}
    rest = {column: value for column, value in values.items() if column not in read}
    return _Row(place, {name: values[column] for name, column in chosen.items()}, rest)


def _read_json(source: Path, options: _Options) -> _Source:
    """Objects of any of the known layouts; each chooses its columns, so that a file may mix them."""
    if options.split:
        raise DataError(f"{display_path(source)}: a JSON file has no splits; leave --split out")
    items = list(read_records(source))
    values = [item.value for item in items if isinstance(item, Record) and isinstance(item.value, dict)]
    broken = next((item for item in items if isinstance(item, Problem)), None)
    if broken is not None and (source.suffix.lower() == ".json" or not values):  # the rows after it cannot be read
        raise DataError(f"{display_path(source)}, {broken}")
    if values:
        _choose_columns(options.columns, list(dict.fromkeys(name for value in values for name in value)), source)

    def rows() -> Iterator[_Row]:
        for item in items:
            if isinstance(item, Problem):
                yield _Row(f"line {item.line}", {}, error=item.message)
            elif not isinstance(item.value, dict):
                yield _Row(f"line {item.line}", {}, error=f"no object but {type(item.value).__name__}; remove it")
            else:
                yield _row(f"line {item.line}", item.value, _known_columns(options.columns, item.value))

    return _Source(rows(), options.images or source.parent)


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
                yield _Row(display_path(paths[0]), {}, error=f"no text; write {name}.txt")
        for name, text in texts.items():
            matches = images.get(name, [])
            if len(matches) != 1:
                what = f"several images, {', '.join(p.name for p in matches)}" if matches else "no image of this name"
                yield _Row(display_path(text), {}, error=f"{what}; one text belongs to one image")
                continue
            image = matches[0].relative_to(root).as_posix()
            fault = file_fault(source, str(text.relative_to(source))) or file_fault(root, image, image=True)
            if fault is None and text.is_file() and text.stat().st_size > MAX_TEXT_BYTES:
                fault = f"has more than {MAX_TEXT_BYTES:,} bytes; shorten the text"
            if fault is not None:
                yield _Row(display_path(text), {}, error=f"the text or its image {fault}")
                continue
            try:
                answer = text.read_bytes().decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                yield _Row(display_path(text), {}, error=f"not UTF-8 text (byte {error.start}); save the file as UTF-8")
                continue
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
    twice = sorted(name for name, number in Counter(header).items() if number > 1)
    if twice:
        raise DataError(
            f"{display_path(source)}, line 1: two columns are called '{shortened(twice[0], 40)}'; rename one"
        )
    chosen = _choose_columns(options.columns, header, source)

    def rows() -> Iterator[_Row]:
        for line, cells in lines:
            if len(cells) == len(header):
                values = dict(zip(header, cells, strict=True))
                yield _row(f"line {line}", values, chosen)
            else:
                error = f"{len(cells)} cells, but {len(header)} columns; put text with a comma between quotation marks"
                yield _Row(f"line {line}", {}, error=error)

    return _Source(rows(), options.images or source.parent)


def _csv_lines(source: Path) -> Iterator[tuple[int, list[str]]]:
    """The line on which each row of a CSV starts, and its cells; empty lines are skipped."""
    if what := unread_content(source):
        raise DataError(f"{display_path(source)}: {what}")
    content = source.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
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
    state = read_json(source / "state.json")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        files, indices = [source / name for name in names], state.get("_indices_data_files")
    except (AttributeError, KeyError, TypeError) as error:
        message = (
            f"{display_path(source / 'state.json')}: names no data files; save the data set again with save_to_disk"
        )
        raise DataError(message) from error
    if indices:
        raise DataError(
            f"{display_path(source)}: the rows are chosen by an index; call flatten_indices() and save it again"
        )
    if not files:
        raise DataError(f"{display_path(source)}: the data set has no rows")
    for name, file in zip(names, files, strict=True):
        if fault := file_fault(source, name):
            raise DataError(f"{display_path(source / 'state.json')}: its file {shortened(name)} {fault}")
        if not file.is_file():
            raise DataError(f"{display_path(file)}: named in state.json but missing; copy the complete folder again")

    return _read_tables(files, source, options)


def _split_folder(source: Path, split: str | None) -> Path:
    if not (source / "dataset_dict.json").is_file():
        if split:
            raise DataError(f"{display_path(source)}: it has no splits; leave --split out")
        return source
    content = read_json(source / "dataset_dict.json")
    known = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(known, list) or not known or any(not isinstance(n, str) or leaves_folder(n) for n in known):
        message = "has no list of names `splits`; save the data set again with save_to_disk"
        raise DataError(f"{display_path(source / 'dataset_dict.json')}: {message}")
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
    return _read_tables([source], source, options)


def _read_tables(files: list[Path], source: Path, options: _Options) -> _Source:
    columns, table = read_table(files)
    chosen = _choose_columns(options.columns, list(columns), source)
    holds_bytes = columns.get(chosen.get("image", ""), False)
    default = options.out.parent / "images" if holds_bytes else source if source.is_dir() else source.parent
    folder = options.images or default
    if holds_bytes:
        folder.mkdir(parents=True, exist_ok=True)

    def rows() -> Iterator[_Row]:
        for number, (file, values) in enumerate(table, start=1):
            place = f"{file.name}, row {number}"
            if values is None:
                yield _Row(place, {}, error="text that is not UTF-8; save the data set again")
            else:
                yield _row(place, dict.fromkeys(columns) | values, chosen)

    return _Source(rows(), folder)


def _image_name(value: Any, folder: Path) -> Any:
    """The image's path below the folder, None without one; bytes are written there, named by their hash."""
    if isinstance(value, list):
        images = [image for image in value if image is not None and image != ""]
        if len(images) > 1:
            raise RowError(f"{len(images)} images; a record has one: leave the row out, or split it")
        value = images[0] if images else None
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        if not content:
            raise RowError("the image has no bytes; save the data set again")
        suffix = next((suffix for start, suffix in _SIGNATURES.items() if content.startswith(start)), None)
        suffix = suffix or (".webp" if content[8:12] == b"WEBP" else ".img")
        name = hashlib.sha256(content).hexdigest()[:24] + suffix
        if not (folder / name).is_file():
            atomic_write(folder / name, content)
        return name
    path = value.get("path") if isinstance(value, dict) else value
    if isinstance(path, str) and (path.startswith(("data:", "{")) or len(path) > 1000):
        raise RowError(
            f"the image is no file name but {len(path):,} characters ({shortened(path, 30)}); write it to a file"
        )
    if isinstance(path, str) and "://" in path:
        raise RowError(f"the image is at {shortened(path, 60)}; download it and name the file")
    if isinstance(path, str) and os.path.isabs(path) and Path(path).is_relative_to(folder.absolute()):
        return Path(path).relative_to(folder.absolute()).as_posix()
    return path or None


_READERS: dict[str, Callable[[Path, _Options], _Source]] = {
    "folder": _read_folder,
    "csv": _read_csv,
    "json": _read_json,
    "datasets": _read_datasets,
    "parquet": _read_parquet,
}
