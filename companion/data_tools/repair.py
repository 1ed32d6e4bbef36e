"""A repaired copy of an instruction file: `llava data check --fix`.

Only records with a problem are changed and checked again; remaining problems are copied and reported. A repair moves,
renames or removes; it never writes text.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from companion.data_tools.check import MAX_WORDS, Checker, Problems, report
from llava_core.constants import IMAGE_MARKER
from llava_core.data.instruct import FIELDS, FORMATS, ROLES, Problem, Record, leaves_folder, read_records, too_deep
from llava_core.data.media import foreign_markers, is_medium_name, is_other_file, names_images, unread_fields
from llava_core.data.tables import import_pyarrow
from llava_core.runtime import DataError, atomic_write, display_path

_FIELDS = {"messages": "conversations", "role": "from", "content": "value"}
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "bot": "gpt", "model": "gpt"}
_OTHER_MARKER = re.compile(  # of one image, e.g. <Image>, <image_1>, <|image|>, <ImageHere>, [IMG]
    r"(?:[<＜〈\[{]|\{\{|__|<\|)\s*(?:image|img|start_of_image)[ _]?(?:here|placeholder|[01])?\s*"
    r"(?:[>＞〉\]}]|\}\}|__|/>|\|>)",
    re.IGNORECASE,
)
_ESCAPED_MARKER = re.compile(r"&(?:amp;)*(?:lt|#60|#x3c);image&(?:amp;)*(?:gt|#62|#x3e);", re.IGNORECASE)


def repair_record(record: Record, checker: Checker, unit: str = "line") -> tuple[Any, list[str]]:
    """Try every repair on a copy of a record; `unit` is what `record.line` counts.

    Returns the repaired record, and the repairs that changed it, e.g. `marker: added in turn 0`.
    """
    if not isinstance(record.value, dict):
        return record.value, []
    value, done = copy.deepcopy(record.value), list[str]()
    _rename(value, ("messages",), done)
    listed = value.get("conversations")
    turns = [turn for turn in listed if isinstance(turn, dict)] if isinstance(listed, list) else []
    for k, turn in enumerate(turns):
        _rename(turn, ("role", "content"), done)
        _repair_turn(turn, k, done)
    _repair_id(value, record, unit, done)
    _repair_image_field(value, done)
    _repair_image(value, checker, done)
    if isinstance(listed, list) and len(listed) == len(turns) and all(isinstance(t.get("value"), str) for t in turns):
        roles = [turn.get("from") for turn in turns]
        if len(turns) > 2 and len(turns) % 2 and roles == [ROLES[k % 2] for k in range(len(turns))]:
            del turns[-1], listed[-1]
            done.append("last_turn: the question without an answer left out")
        if isinstance(value.get("image"), str) and "human" in roles:
            _rename_marker(turns, done)
            _repair_marker(turns, roles.index("human"), done)
    return value, done


def _rename(fields: dict[str, Any], names: Iterable[str], done: list[str]) -> None:
    for name in names:
        if name in fields and _FIELDS[name] not in fields:
            fields[_FIELDS[name]] = fields.pop(name)
            note = f"field_names: {name} -> {_FIELDS[name]}"
            if note not in done:
                done.append(note)


def _repair_turn(turn: dict[str, Any], k: int, done: list[str]) -> None:
    role, text = turn.get("from"), turn.get("value")
    if isinstance(role, str) and role not in ROLES and (known := _ROLES.get(role.strip().lower())):
        turn["from"] = known
        if (note := f"role_names: {role} -> {known}") not in done:
            done.append(note)
    if type(text) is int:
        turn["value"] = str(text)
        done.append(f"numbers: value of turn {k}")
    elif isinstance(text, str) and text.strip() != text and text.strip():
        turn["value"] = text.strip()
        done.append(f"white_space: value of turn {k}")


def _repair_id(value: dict[str, Any], record: Record, unit: str, done: list[str]) -> None:
    name = value.get("id")
    if type(name) is int:
        value["id"] = str(name)
        done.append("numbers: id")
    elif isinstance(name, str) and name.strip() != name and name.strip():
        value["id"] = name.strip()
        done.append("white_space: id")
    elif name is None or (isinstance(name, str) and not name.strip()):
        number = record.position if record.line is None else record.line
        fields = {"id": f"{unit}-{number}", **{key: field for key, field in value.items() if key != "id"}}
        value.clear()
        value.update(fields)
        done.append(f"id: called {unit}-{number}")


def _repair_image_field(record: dict[str, Any], done: list[str]) -> None:
    """Rename the field that names the one image of a record without `image`; its other media stay a problem."""
    if record.get("image"):
        return
    names = list(unread_fields(record, FIELDS))
    paths = {path for name in names for path in _paths(name, record.get(name))}
    if len(paths) == 1 and None not in paths:
        for name in names:
            del record[name]
        record["image"] = paths.pop()
        done.append(f"image_field: {', '.join(names)} -> image")


def _paths(name: str, value: Any) -> list[str | None]:
    """The file names of images in a field; None for what is not one."""
    items = value if isinstance(value, list) else [value]
    items = [item.get("path", item.get("image")) if isinstance(item, dict) else item for item in items]
    is_images = names_images(name) or name.lower() in ("file_name", "filename", "file", "path")
    return [
        item
        if is_images and isinstance(item, str) and is_medium_name(item) and ":" not in item
        and not is_other_file(item)
        else None
        for item in items
    ]  # fmt: skip


def _rename_marker(turns: list[dict[str, Any]], done: list[str]) -> None:
    """Write the image marker for the one marker of another format, if there is no other."""
    if any(IMAGE_MARKER in turn["value"] for turn in turns):
        return
    found = list(foreign_markers((turn.get("from"), turn["value"]) for turn in turns))
    if len(found) != 1:
        return
    turn, marker = turns[found[0][0]], found[0][1]
    text = turn["value"].replace(marker, IMAGE_MARKER, 1) if _OTHER_MARKER.fullmatch(marker) else turn["value"]
    text = _ESCAPED_MARKER.sub(IMAGE_MARKER, text)
    if text != turn["value"]:
        turn["value"] = text
        done.append(f"marker: {marker} -> {IMAGE_MARKER}")


def _repair_image(record: dict[str, Any], checker: Checker, done: list[str]) -> None:
    name = record.get("image")
    if isinstance(name, list) and len(name) == 1 and isinstance(name[0], str):
        record["image"], name = name[0], name[0]
        done.append("image_name: the one name of its list")
    if name in ([], {}):
        record["image"] = name = ""
    if not isinstance(name, str):
        return
    if not name.strip():
        if IMAGE_MARKER not in json.dumps(record.get("conversations")):
            del record["image"]
            done.append("no_image: empty name left out")
        return
    if name.strip() != name and not _exists(checker, name):
        record["image"] = name = name.strip()
        done.append("white_space: image")
    if "\\" in name and not leaves_folder(name.replace("\\", "/")) and _exists(checker, name.replace("\\", "/")):
        record["image"] = name = name.replace("\\", "/")
        done.append("image_name: backslashes")
    if checker.folder is not None and os.path.isabs(name):
        below = os.path.relpath(os.path.normpath(name), checker.folder.path.absolute())
        if not leaves_folder(below) and _exists(checker, below):
            record["image"] = Path(below).as_posix()
            done.append("image_name: relative to the folder")


def _exists(checker: Checker, name: str) -> bool:
    if checker.folder is None:
        return False
    try:
        return (checker.folder.path / name).is_file()
    except (OSError, ValueError):  # a name too long, a NUL
        return False


def _repair_marker(turns: list[dict[str, Any]], first: int, done: list[str]) -> None:
    """Write the marker once, in the first human turn, if markers elsewhere are at the start or end of a text."""
    texts = [turn["value"] for turn in turns]
    counts = [text.count(IMAGE_MARKER) for text in texts]
    if sum(counts) == counts[first] == 1 or counts[first] > 1:  # correct; or a question about several images
        return
    cleaned = [text if k == first else _without_marker_at_an_end(text) for k, text in enumerate(texts)]
    if any(IMAGE_MARKER in text or not text.strip() for k, text in enumerate(cleaned) if k != first):
        return  # the marker is inside a sentence, or the only text
    if not counts[first]:
        if not cleaned[first].strip():
            return
        cleaned[first] = f"{IMAGE_MARKER}\n{cleaned[first]}"
    for turn, text in zip(turns, cleaned, strict=True):
        turn["value"] = text
    done.append("marker: added" if not sum(counts) else "marker: kept" if counts[first] else "marker: moved")
    done[-1] += f" in turn {first}" + (", removed elsewhere" if counts[first] else "")


def _without_marker_at_an_end(text: str) -> str:
    for strip, starts, cut in (
        (str.lstrip, str.startswith, str.removeprefix),
        (str.rstrip, str.endswith, str.removesuffix),
    ):
        if starts(strip(text), IMAGE_MARKER):
            text = strip(cut(strip(text), IMAGE_MARKER))
    return text


def fix_file(
    path: str | Path,
    out: str | Path,
    images: str | Path | None = None,
    decode: bool = True,
    max_words: int | None = MAX_WORDS,
) -> dict[str, Any]:
    """Write a repaired copy of a data file; `out` may have another format.

    Returns:
        The result of `check_file` with the problems that remain (their lines are the file's), `fixed`, a list of
        `{line, record, done}`, `written` (records of the copy) and `out`.

    Raises:
        DataError: the file or the folder of images does not exist, `out` is the file itself or of another format, or
            parquet cannot hold the records.
    """
    path, out = Path(path), Path(out)
    if out.suffix not in FORMATS:
        raise DataError(f"{display_path(out)}: the copy is of no known format; end its name in {', '.join(FORMATS)}")
    if out.exists() and path.exists() and out.samefile(path):
        raise DataError(f"{display_path(out)}: the copy would replace the file; give --fix another name")
    checker, unit = Checker(images, decode, max_words), "row" if path.suffix == ".parquet" else "line"
    problems = Problems()
    fixed: list[dict[str, Any]] = []
    values: list[Any] = []
    lines: list[bytes] = []
    written: set[bytes] = set()
    count = 0
    for item in read_records(path):
        if isinstance(item, Problem):
            problems.add([item])
            continue
        count += 1
        try:
            repaired, done, remaining = _repaired(item, checker, unit)
            line = _encoded(repaired)
        except RecursionError:
            problems.add([too_deep(item)])
            continue
        checker.count(repaired, remaining)
        if line in written:
            done.append("duplicate: left out")
        else:
            written.add(line)
            lines.append(line)
            values.append(repaired.value)
            problems.add(remaining)
        if done:
            fixed.append({"line": item.line, "record": repaired.label, "done": done})
    if out.suffix == ".parquet":
        write_parquet(out, values)
    elif out.suffix == ".json":
        atomic_write(out, b"[\n" + b",\n".join(lines) + b"\n]\n")
    else:
        atomic_write(out, b"".join(line + b"\n" for line in lines))
    result = report(path, count, problems, checker)
    return {**result, "fixed": fixed, "written": len(lines), "out": display_path(out)}


def _repaired(record: Record, checker: Checker, unit: str) -> tuple[Record, list[str], list[Problem]]:
    image = record.value.get("image") if isinstance(record.value, dict) else None
    was_reported = isinstance(image, str) and image in checker.reported
    problems = checker.check(record)
    if not problems:
        return record, [], problems
    if isinstance(image, str) and not was_reported:
        checker.reported.discard(image)  # so that the second check reports a damaged image again
    value, done = repair_record(record, checker, unit)
    repaired = Record(record.line, record.position, value)
    return repaired, done, checker.check(repaired)


def _encoded(record: Record) -> bytes:
    """A record as one line of JSON; bytes that are not UTF-8 are copied unchanged."""
    try:
        return json.dumps(record.value, ensure_ascii=False).encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which needs an escape
        return json.dumps(record.value).encode()
    except TypeError as error:  # the bytes of an image in parquet
        raise DataError(
            f"row {record.line}: JSON cannot hold this record ({error}); "
            "`llava data convert` writes images that are stored in a table into a folder"
        ) from error


def write_parquet(path: str | Path, records: list[Any]) -> Path:
    """Write a row per record, atomically; a DataError if a column would hold values of several types."""
    path, arrow, parquet = Path(path), import_pyarrow(), import_pyarrow("parquet")
    sink = arrow.BufferOutputStream()
    try:
        names = dict.fromkeys(name for record in records for name in record)  # in the order of first appearance
        rows = [{name: record.get(name) for name in names} for record in records]
        parquet.write_table(arrow.Table.from_pylist(rows), sink)
    except (arrow.ArrowException, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{display_path(path)}: parquet cannot hold these records ({error}); write .jsonl instead"
        ) from error
    return atomic_write(path, sink.getvalue().to_pybytes())
