"""A repaired copy of instruction records: what can be mended without inventing text, and what was done to each record.

A record without a problem is copied as it is. Of the others, the repairs of `REPAIRS` are tried, and the record is
checked again; what is then still wrong stays in the copy and is reported. Texts are never written or guessed:
a repair moves, renames or leaves out what is there.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_core.constants import IMAGE_MARKER
from llava_core.data.instruct import (
    FORMATS,
    MAX_WORDS,
    ROLES,
    Checker,
    Problem,
    RawRecord,
    import_pyarrow,
    leaves_folder,
    note_empty,
    read_records,
    report,
)
from llava_core.runtime import DataError, atomic_write, shown

REPAIRS = {
    "field_names": "messages, role and content become conversations, from and value",
    "role_names": "user becomes human, assistant (bot, model) becomes gpt, in any case",
    "white_space": "white space around ids, names of images and texts is left out",
    "numbers": "a whole number as id or text is put between quotation marks",
    "id": "a record without an id is called by its line",
    "image_name": "a list of one name, an absolute path into the folder, backslashes: the name below the folder",
    "no_image": "an empty name of an image, where no marker stands in the text, is left out",
    "marker": f"{IMAGE_MARKER} is written once, in the first human turn",
    "last_turn": "a last question without an answer, which is not learned from, is left out",
    "duplicate": "a record that equals an earlier one in everything is left out",
    "not_json": "a line that is no JSON is left out; it is still reported as a problem",
}
_FIELDS = {"messages": "conversations", "role": "from", "content": "value"}
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "bot": "gpt", "model": "gpt"}
_MARKER = re.escape(IMAGE_MARKER)
_AT_AN_END = re.compile(rf"\A\s*{_MARKER}\s*|\s*{_MARKER}\s*\Z")


# ------------------------------------------------------------------------------------------------ one record


def mend(raw: RawRecord, checker: Checker, place: str = "line") -> tuple[Any, list[str]]:
    """Try every repair on a copy of a record.

    Args:
        raw: the record and where it stood.
        checker: the rules that it broke, with the folder of the images.
        place: what `raw.line` counts, for the name of a record without an id.

    Returns:
        The mended record, and the keys of `REPAIRS` that changed it with what was changed, e.g. `marker: added`.
    """
    if not isinstance(raw.value, dict):
        return raw.value, []
    record, done = copy.deepcopy(raw.value), list[str]()
    _rename(record, ("messages",), done)
    turns = record.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    for k, turn in enumerate(turns):
        _rename(turn, ("role", "content"), done)
        _turn(turn, k, done)
    _identity(record, raw, place, done)
    _image(record, checker, done)
    listed = record.get("conversations")
    if isinstance(listed, list) and len(listed) == len(turns) and all(isinstance(t.get("value"), str) for t in turns):
        roles = [turn.get("from") for turn in turns]
        if len(turns) > 2 and len(turns) % 2 and roles == [ROLES[k % 2] for k in range(len(turns))]:
            del turns[-1], listed[-1]
            done.append("last_turn: the question without an answer left out")
        if isinstance(record.get("image"), str) and "human" in roles:
            _marker(turns, roles.index("human"), done)
    return record, done


def _rename(fields: dict[str, Any], names: Iterable[str], done: list[str]) -> None:
    for name in names:
        if name in fields and _FIELDS[name] not in fields:
            fields[_FIELDS[name]] = fields.pop(name)
            note = f"field_names: {name} -> {_FIELDS[name]}"
            if note not in done:
                done.append(note)


def _turn(turn: dict[str, Any], k: int, done: list[str]) -> None:
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


def _identity(record: dict[str, Any], raw: RawRecord, place: str, done: list[str]) -> None:
    name = record.get("id")
    if type(name) is int:
        record["id"] = str(name)
        done.append("numbers: id")
    elif isinstance(name, str) and name.strip() != name and name.strip():
        record["id"] = name.strip()
        done.append("white_space: id")
    elif name is None or (isinstance(name, str) and not name.strip()):
        number = raw.position if raw.line is None else raw.line
        # the id stands first, as in every other record
        fields = {"id": f"{place}-{number}", **{key: value for key, value in record.items() if key != "id"}}
        record.clear()
        record.update(fields)
        done.append(f"id: called {place}-{number}")


def _image(record: dict[str, Any], checker: Checker, done: list[str]) -> None:
    name = record.get("image")
    if isinstance(name, list) and len(name) == 1 and isinstance(name[0], str):
        record["image"], name = name[0], name[0]
        done.append("image_name: the one name of its list")
    if not isinstance(name, str):
        return
    if not name.strip():
        if IMAGE_MARKER not in json.dumps(record.get("conversations")):
            del record["image"]
            done.append("no_image: empty name left out")
        return
    if name.strip() != name and not _is_there(checker, name):
        record["image"] = name = name.strip()
        done.append("white_space: image")
    if "\\" in name and not leaves_folder(name.replace("\\", "/")) and _is_there(checker, name.replace("\\", "/")):
        record["image"] = name = name.replace("\\", "/")
        done.append("image_name: backslashes")
    if checker.images is not None and os.path.isabs(name):
        below = os.path.relpath(os.path.normpath(name), checker.images.absolute())
        if not leaves_folder(below) and _is_there(checker, below):
            record["image"] = Path(below).as_posix()
            done.append("image_name: relative to the folder")


def _is_there(checker: Checker, name: str) -> bool:
    if checker.images is None:
        return False
    try:
        return (checker.images / name).is_file()
    except (OSError, ValueError):  # a name too long, a NUL
        return False


def _marker(turns: list[dict[str, Any]], first: int, done: list[str]) -> None:
    """Put the marker where it belongs, if those that stand elsewhere can be taken away without leaving a hole."""
    texts = [turn["value"] for turn in turns]
    counts = [text.count(IMAGE_MARKER) for text in texts]
    if sum(counts) == counts[first] == 1 or counts[first] > 1:  # right; or a question about several images
        return
    cleaned = [text if k == first else _AT_AN_END.sub("", text) for k, text in enumerate(texts)]
    if any(IMAGE_MARKER in text or not text.strip() for k, text in enumerate(cleaned) if k != first):
        return  # the marker stands inside a sentence, or is all of it
    if not counts[first]:
        if not cleaned[first].strip():
            return
        cleaned[first] = f"{IMAGE_MARKER}\n{cleaned[first]}"
    for turn, text in zip(turns, cleaned, strict=True):
        turn["value"] = text
    done.append("marker: added" if not sum(counts) else "marker: kept" if counts[first] else "marker: moved")
    done[-1] += f" in turn {first}" + (", removed elsewhere" if counts[first] else "")


# ------------------------------------------------------------------------------------------------ a file


def fix_file(
    path: str | Path,
    out: str | Path,
    images: str | Path | None = None,
    decode: bool = True,
    max_words: int | None = MAX_WORDS,
) -> dict[str, Any]:
    """Write a repaired copy of a data file: what `llava data check --fix OUT` does.

    Args:
        path: the file, as for `check_file`.
        out: where the copy goes; `.json`, `.jsonl` or `.parquet`, which may be another format than the file's.
        images, decode, max_words: as for `check_file`.

    Returns:
        What `check_file` returns, where `problems` are those that are left (their lines are the file's), and `fixed`, a
        list of `{line, record, done}`, `written` (records of the copy) and `out`.

    Raises:
        DataError: the file or the folder of images does not exist, `out` is the file itself or of another format, or
            parquet cannot hold the records.
    """
    path, out = Path(path), Path(out)
    if out.suffix not in FORMATS:
        raise DataError(f"{shown(out)}: the copy is of no known format; end its name in {', '.join(FORMATS)}")
    if out.exists() and path.exists() and out.samefile(path):
        raise DataError(f"{shown(out)}: the copy would replace the file; give --fix another name")
    problems: list[Problem] = []
    checker = Checker(images, decode, max_words)
    place = "row" if path.suffix == ".parquet" else "line"
    fixed: list[dict[str, Any]] = []
    values: list[Any] = []
    lines: list[bytes] = []
    places: dict[str, list[int]] = {}  # of an id's records in `lines`
    count = 0
    for raw in read_records(path, problems):
        count += 1
        value, done, found = _mended(raw, checker, place)
        name = value.get("id") if isinstance(value, dict) else None
        label = name if isinstance(name, str) else f"#{raw.position}"
        line = _encoded(value, raw)
        same_id = places.setdefault(label, [])
        if any(lines[k] == line for k in same_id):
            done.append("duplicate: left out")
        else:
            same_id.append(len(lines))
            lines.append(line)
            problems += found
            if out.suffix == ".parquet":
                values.append(value)
        if done:
            fixed.append({"line": raw.line, "record": label, "done": done})
    note_empty(count, problems)
    if out.suffix == ".parquet":
        write_parquet(out, values)
    elif out.suffix == ".json":
        atomic_write(out, b"[\n" + b",\n".join(lines) + b"\n]\n")
    else:
        atomic_write(out, b"".join(line + b"\n" for line in lines))
    return {
        "records": count,
        **report(path, problems),
        "fixed": fixed,
        "written": len(lines),
        "out": shown(out),
    }


def _mended(raw: RawRecord, checker: Checker, place: str) -> tuple[Any, list[str], list[Problem]]:
    """A record after its repair, what was done, and the problems that are left."""
    image = raw.value.get("image") if isinstance(raw.value, dict) else None
    known = isinstance(image, str) and image in checker.named
    found = checker.check(raw)
    if not found:
        return raw.value, [], found
    if isinstance(image, str) and not known:
        checker.named.discard(image)  # so that the second look names the damaged image again
    value, done = mend(raw, checker, place)
    return value, done, checker.check(RawRecord(raw.line, raw.position, value, raw.bad_utf8))


def _encoded(value: Any, raw: RawRecord) -> bytes:
    """A record as one line of JSON; bytes that are no text stay the bytes that they were."""
    try:
        return json.dumps(value, ensure_ascii=False).encode(errors="surrogateescape" if raw.bad_utf8 else "strict")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(value).encode()
    except TypeError as error:  # the bytes of an image in parquet
        raise DataError(
            f"row {raw.line}: JSON cannot hold what stands there ({error}); "
            "`llava data convert` writes images that lie in a table into a folder"
        ) from error


def write_parquet(path: str | Path, records: list[Any]) -> Path:
    """Write records as a parquet table of one row each, whole or not at all.

    Raises:
        DataError: a column would hold values of several types; the message says what to do.
    """
    path, arrow, parquet = Path(path), import_pyarrow(), import_pyarrow("parquet")
    sink = arrow.BufferOutputStream()
    try:
        names = {name: None for record in records for name in record}  # in the order of their first appearance
        rows = [{name: record.get(name) for name in names} for record in records]
        parquet.write_table(arrow.Table.from_pylist(rows), sink)
    except (arrow.ArrowException, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{shown(path)}: parquet cannot hold these records ({error}); write .jsonl instead") from error
    return atomic_write(path, sink.getvalue().to_pybytes())
