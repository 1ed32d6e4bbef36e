"""The training format: LLaVA-Instruct records in a JSON, JSONL or parquet file, read and checked strictly.

A record is ``{"id": str, "image": str (optional), "type": str (optional), "conversations": [{"from", "value"}, ...]}``.
The turns alternate human / gpt. A record with an image has one ``<image>``, in the first human turn.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_core.constants import IMAGE_MARKER
from llava_core.data.media import first_of, foreign_markers, is_other_file, may_hold_markers, unread_fields
from llava_core.data.tables import TableError, read_table
from llava_core.registry import unknown
from llava_core.runtime import DataError, display_path, jsonl_fault, shortened, unread_content

ROLES = ("human", "gpt")
FIELDS = frozenset(("id", "image", "type", "conversations"))
TURN_FIELDS = frozenset(("from", "value"))
FORMATS = (".json", ".jsonl", ".parquet")
_LONGEST_NAME = 1000  # characters; a longer "name" is an image as base64 text
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Sample:
    """One dialogue about at most one image; the first question keeps the image marker of the file."""

    id: str
    turns: list[tuple[str, str]]
    image: Path | None = None
    kind: str | None = None
    line: int | None = field(default=None, compare=False)
    """Line of its record in the file (of parquet: row), from 1."""
    position: int = field(default=-1, compare=False)
    """Index of its record in the file, from 0; -1 for a sample that is of no file."""


@dataclass(frozen=True)
class Record:
    """A parsed record, its line (of parquet: row) from 1, and its index from 0."""

    line: int | None
    position: int
    value: Any

    @property
    def label(self) -> str:
        """The record's id, or `#` and its position if it has none."""
        name = self.value.get("id") if isinstance(self.value, dict) else None
        return shortened(name) if isinstance(name, str) and name else f"#{self.position}"


@dataclass(frozen=True)
class Problem:
    """One defect of a data file; `line` (of parquet: row, from 1) and `record` (its label) are None for the file.

    `kind` is a key of `companion.data_tools.check.PROBLEM_KINDS`.
    """

    line: int | None
    record: str | None
    kind: str
    message: str

    def __str__(self) -> str:
        place = [f"line {self.line}"] if self.line is not None else []
        place += [f"record {self.record}"] if self.record is not None else []
        return f"{', '.join(place) or 'file'}: {self.message}"


def read_records(path: Path) -> Iterator[Record | Problem]:
    """Yield the records of a file one by one, and a problem for each part that cannot be parsed."""
    if not path.is_file():
        raise DataError(f"{display_path(path)}: no such file; check the path or run the step that writes it")
    if path.suffix not in FORMATS:
        raise DataError(
            f"{display_path(path)}: neither .json nor .jsonl nor .parquet; `llava data convert` makes one of these of "
            "a CSV, a folder of images and texts, or a data set on disk"
        )
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    # a byte that is not UTF-8 becomes a lone surrogate, which `record_problems` reports with its record
    if what := unread_content(path):
        yield Problem(None, None, "not_json", what)
        return
    content = path.read_bytes()
    text = content.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    if path.suffix == ".json":
        yield from _read_list(text)
        return
    if _begins_otherwise(text) and (fault := jsonl_fault(text)):
        yield Problem(None, None, "not_json", fault)
        return
    position = 0
    for line, row in enumerate(text.split("\n"), start=1):  # not splitlines(): strings may hold U+2028
        if row.strip():
            try:
                yield Record(line, position, json.loads(row.lstrip("\ufeff")))
            except (ValueError, RecursionError) as error:
                yield _not_json(line, position, error)
            position += 1


def _begins_otherwise(text: str) -> bool:
    """Whether the first line is no JSON object, as of a list or of JSON over several lines."""
    first = text.lstrip().partition("\n")[0]
    try:
        return not isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return True


def _read_list(text: str) -> Iterator[Record | Problem]:
    """The elements of a JSON list, each with its line; reading ends at the first syntax error."""
    at = _after_space(text, 0)
    if not text.startswith("[", at):
        message = (
            "a list of records was expected; put them between [ and ], name a file of one per line .jsonl, or write "
            "the list that an object holds into a file of its own"
        )
        yield Problem(1, None, "wrong_type" if text.startswith("{", at) else "not_json", message)
        return
    decode, position, line, counted = json.JSONDecoder().raw_decode, 0, 1, 0
    at = _after_space(text, at + 1)
    try:
        while position or not text.startswith("]", at):
            line, counted = line + text.count("\n", counted, at), at
            value, at = decode(text, at)
            yield Record(line, position, value)
            position, at = position + 1, _after_space(text, at)
            if not text.startswith(",", at):
                break
            at = _after_space(text, at + 1)
        if not text.startswith("]", at):
            raise json.JSONDecodeError("expecting ',' or ']'", text, at)
        if _after_space(text, at + 1) < len(text):
            raise json.JSONDecodeError("text after the list", text, at + 1)
    except (ValueError, RecursionError) as error:
        yield _not_json(error.lineno if isinstance(error, json.JSONDecodeError) else line, position, error)


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # the pattern matches anything


def _not_json(line: int, position: int, error: Exception) -> Problem:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
    return Problem(line, f"#{position}", "not_json", f"no JSON ({reason}); write the record again or remove it")


def too_deep(record: Record) -> Problem:
    """The problem of a record in which a RecursionError came up: lists and objects lie in each other too deep."""
    return Problem(record.line, f"#{record.position}", "not_json", "nested too deep; write it again or remove it")


def _read_parquet(path: Path) -> Iterator[Record | Problem]:
    try:
        _, rows = read_table([path])
        for number, (_, row) in enumerate(rows):
            if row is None:
                yield Problem(number + 1, f"#{number}", "invalid_utf8", "text that is not UTF-8; correct it")
            else:  # an absent field is a null in a table
                yield Record(number + 1, number, row)
    except TableError as error:
        yield Problem(None, None, "not_parquet", error.reason)


def record_problems(record: Any) -> Iterator[tuple[str, str]]:
    """The defects of a record by the rules of the format: (kind, message); image files are not opened."""
    if not isinstance(record, dict):
        yield "wrong_type", f"a record is an object with id and conversations, not {_type(record)}"
        return
    turns, image, name, kind = (record.get(key) for key in ("conversations", "image", "id", "type"))
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns] if isinstance(turns, list) else []
    whole = "\n".join([text for text in texts if isinstance(text, str)])
    if not all(map(_is_unicode, (name, image, kind, whole))):
        yield "invalid_utf8", "bytes that are not UTF-8, or half of a surrogate pair; save the file as UTF-8"
    if "id" not in record:
        yield "missing_field", "id is missing; give each record a string"
    elif not isinstance(name, str) or not name:
        yield "wrong_type", f"id is a non-empty string, not {_type(name)}; put it between quotation marks"
    if kind is not None and not isinstance(kind, str):
        yield "wrong_type", f"type is a string such as conversation, detail or complex, not {_type(kind)}"
    if image == "":
        yield "missing_image", "image is an empty string; name a file, or leave it out of a text-only record"
    elif isinstance(image, str) and (len(image) > _LONGEST_NAME or image.startswith("data:")):
        yield "wrong_type", f"image is the name of one file, not {len(image):,} characters; write the image to a file"
    elif isinstance(image, str) and leaves_folder(image):
        where = "leaves the folder of images; give a path relative to that folder"
        yield "outside_folder", f"image '{shortened(image)}' {where}"
    elif isinstance(image, str) and is_other_file(image):
        yield "unread_medium", f"image '{shortened(image)}' is a video or audio; name an image, or leave the record out"
    elif image is not None and not isinstance(image, str):
        yield "wrong_type", f"image is the name of one file, not {_type(image)}; {_IMAGE_FIX[_stores_images(image)]}"
    if "conversations" not in record:
        yield "missing_field", "conversations is missing; give the turns as a list of {from, value}"
    elif not isinstance(turns, list):
        yield "wrong_type", f"conversations is a list of turns, not {_type(turns)}"
    else:
        roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
        number = whole.count(IMAGE_MARKER)
        yield from _turn_problems(turns, texts, roles, image or None)
        if image != "":  # whether the record has an image is unknown
            yield from _marker_problems(texts, roles, image is not None, number)
        if may_hold_markers(whole, number):
            found = list(foreign_markers(zip(roles, texts, strict=True)))
            if found:
                yield "unread_medium", _MARKER_MESSAGE.format(first_of(marker for _, marker in found), found[0][0])
    if not record.keys() <= FIELDS and (names := list(unread_fields(record, FIELDS, image or None))):
        yield "unread_medium", _FIELD_MESSAGE.format(first_of(names))


_FIELD_MESSAGE = (
    "training reads the image that 'image' names, and not {}; name the image there (one is renamed by --fix and by "
    "`llava data convert`), remove the field from a text-only record, or leave the record out"
)
_MARKER_MESSAGE = (
    f"{{}} in turn {{}} is a marker of another format; write {IMAGE_MARKER} for the record's image, or leave the "
    "record out"
)
_IMAGE_FIX = ("leave it out of a text-only record", "`llava data convert` writes the images of a table into a folder")


def _stores_images(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, bytes) or (isinstance(item, dict) and "bytes" in item) for item in items)


def _turn_problems(turns: list[Any], texts: list[Any], roles: list[Any], image: Any) -> Iterator[tuple[str, str]]:
    if not turns:
        yield "role_order", "conversations is empty; give at least a question (human) and an answer (gpt)"
    for k, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        if not isinstance(turn, dict):
            yield "wrong_type", f"turn {k} is an object with from and value, not {_type(turn)}"
        elif "from" not in turn or "value" not in turn:
            yield "missing_field", f"turn {k} has no {'from' if 'from' not in turn else 'value'}; each turn has both"
        elif not isinstance(text, str):
            yield "wrong_type", f"value of turn {k} is a string, not {_type(text)}"
        elif not text.strip():
            yield "empty_turn", f"turn {k} has no text; write it or remove the pair of turns"
        if isinstance(turn, dict) and len(turn) > 2 and (names := list(unread_fields(turn, TURN_FIELDS, image))):
            yield "unread_medium", _FIELD_MESSAGE.format(f"{first_of(names)} of turn {k}")
    if roles == [*ROLES] * (len(turns) // 2):
        return
    wrong = next((k for k, role in enumerate(roles) if role is not None and role != ROLES[k % 2]), None)
    if wrong is not None:
        expected = ROLES[wrong % 2]
        role = shortened(repr(roles[wrong]))
        yield "role_order", f"turn {wrong} is from {role}, expected '{expected}': human and gpt alternate"
    elif len(turns) % 2:
        yield "role_order", "the last question has no answer; add a gpt turn or remove the question"


def _marker_problems(texts: list[Any], roles: list[Any], has_image: bool, number: int) -> Iterator[tuple[str, str]]:
    if "human" not in roles:  # no turn could hold the marker
        return
    first = roles.index("human")
    if number != has_image:
        yield (
            "image_marker",
            f"{number} x {IMAGE_MARKER} in a record with {'an' if has_image else 'no'} image; "
            f"{'write it once, in the first human turn' if has_image else 'remove it or name the image'}",
        )
    elif has_image and not (isinstance(texts[first], str) and IMAGE_MARKER in texts[first]):
        place = next(k for k, text in enumerate(texts) if isinstance(text, str) and IMAGE_MARKER in text)
        yield "image_marker", f"{IMAGE_MARKER} is in turn {place}; move it to turn {first}, the first human one"


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true/false", bytes: "bytes"}
    return names.get(type(value), "a number") + (" without text" if value == "" else "")


def _is_unicode(text: Any) -> bool:
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def leaves_folder(name: str) -> bool:
    """Whether the name of a file points outside its folder; see `file_fault` for links."""
    return os.path.isabs(name) or (os.pardir in name and os.path.normpath(name).split(os.sep)[0] == os.pardir)


def file_fault(folder: Path, name: str, image: bool = False) -> str | None:
    """Why `folder / name` must not be read; None for a regular file, and for one that is not there.

    A file may be a link inside the folder, or into the blobs of the hub's cache, and lie in a linked folder. An image
    may be a link to anywhere, since whatever is no image is refused when it is opened.
    """
    if leaves_folder(name):
        return "leaves the folder of the data; give a path relative to that folder"
    try:
        path = folder / name
        if path.is_symlink() and not image:
            home, real = folder.resolve(), path.resolve()
            homes = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
            if not any(map(real.is_relative_to, homes)):
                return "is a link out of the folder of the data; copy the file into it"
        if path.exists() and not path.is_file():  # reading a pipe would block, and a device has no end
            return "is a folder, a pipe or a device; put the file itself there"
    except (OSError, RuntimeError, ValueError):  # a name too long, a link to itself, a NUL
        pass
    return None


class ImageFolder:
    """The images of a data set; each file is opened once, however many records name it."""

    def __init__(self, path: str | Path, decode: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(
                f"{display_path(self.path)}: no such folder; give the folder that the records' images lie in"
            )
        self._fault = lru_cache(maxsize=None)(lambda name: _file_or_image_fault(self.path, name, decode))

    def problem(self, name: str) -> tuple[str, str] | None:
        """(kind, message) if the image cannot be used, else None."""
        if (fault := self._fault(name)) is None:
            return None
        shown = display_path(self.path / shortened(name))
        reason = fault[1].replace(name, shortened(name))
        return fault[0], f"image {shown}: {reason}; restore the file or remove the record"


def _file_or_image_fault(folder: Path, name: str, decode: bool) -> tuple[str, str] | None:
    if (reason := file_fault(folder, name, image=True)) is not None:
        return "missing_image", reason
    return image_fault(folder / name, decode)


def image_fault(path: Path, decode: bool = True) -> tuple[str, str] | None:
    """(`missing_image` or `unreadable_image`, reason) if `check_image` refuses a file, else None."""
    from llava_core.data.images import ImageError, check_image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
            check_image(path, decode=decode)
    except ImageError as error:
        return ("missing_image" if error.missing else "unreadable_image"), error.reason
    return None


def load_instruct(
    path: str | Path,
    images: str | Path | None = None,
    subset: Mapping[str, float] | None = None,
    seed: int = 0,
    open_images: bool = True,
    skipped: list[Problem] | None = None,
) -> list[Sample]:
    """Load a file of instruction records in its order; a wrong record is an error.

    Args:
        images: folder of the images, of which the headers are read if `open_images`; None keeps the names.
        skipped: gets the problems of wrong records, which are then left out. A list that cannot be read to its end is
            still an error.
        subset: fraction (0 to 1) of each kind to keep, e.g. `{"conversation": 1.0, "detail": 0.05}`; other kinds are
            left out. Subsets are nested: 5 % of a kind is part of its 10 %.

    Raises:
        DataError: the file has problems, or it has no record of a kind that `subset` names.
    """
    path = Path(path)
    folder = ImageFolder(images, decode=False) if images is not None else None
    samples: list[Sample] = []
    problems: list[Problem] = []
    unreadable = False
    with _no_garbage_collection():
        for item in read_records(path):
            if isinstance(item, Problem):
                problems.append(item)
                unreadable |= path.suffix == ".json" or item.line is None  # the records after it are lost
                continue
            try:
                found = list(record_problems(item.value))
            except RecursionError:
                problems.append(too_deep(item))
                continue
            if not found and folder is not None and open_images and item.value.get("image"):
                found += [fault] if (fault := folder.problem(item.value["image"])) else []
            problems += [Problem(item.line, item.label, kind, message) for kind, message in found]
            if not found:
                samples.append(_sample(item, folder.path if folder is not None else None))
    if not samples and not problems:
        problems.append(Problem(1, None, "no_records", NO_RECORDS))
    if skipped is not None and samples and not unreadable:
        skipped += problems
    elif problems:
        command = f"llava data check {display_path(path)}" + (
            f" --images {display_path(folder.path)}" if folder is not None else ""
        )
        lines = [*map(str, problems[:5]), f"`{command}` lists all of them"]
        raise DataError(f"{display_path(path)}: {len(problems)} problem(s)", *lines)
    if subset:
        samples = [samples[k] for k in _select_kinds([sample.kind for sample in samples], subset, seed, path)]
    return samples


NO_RECORDS = "the file holds no record; run the step that writes it"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause Python's collector: 600,000 records make it walk over all of them again and again (29 s instead of 8 s)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sample(record: Record, images: Path | None) -> Sample:
    value, name = record.value, record.value.get("image")
    texts = [turn["value"] for turn in value["conversations"]]
    image = None if name is None else Path(name) if images is None else images / name
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    return Sample(value["id"], turns, image, value.get("type"), record.line, record.position)


def _select_kinds(kinds: Sequence[str | None], subset: Mapping[str, float], seed: int, path: Path) -> list[int]:
    """Indices of the records that a subset keeps, in the order of the file."""
    by_kind: dict[str, list[int]] = {}
    for k, name in enumerate(kinds):
        by_kind.setdefault(name or "(no type)", []).append(k)
    chosen: list[int] = []
    for kind, share in subset.items():
        if kind not in by_kind:
            wrong = unknown("kind of record", kind, by_kind)
            raise DataError(f"{display_path(path)}: {wrong}; correct data.subset or the records' type")
        if not 0 <= share <= 1:
            raise DataError(f"{display_path(path)}: the share of '{kind}' is {share}; give a number from 0 to 1")
        indices = by_kind[kind]
        size = max(1, round(share * len(indices))) if share else 0
        # a prefix of one seeded permutation, so that a smaller subset is part of a larger one
        shuffled = random.Random(f"{seed}:{kind}").sample(range(len(indices)), len(indices))
        chosen += [indices[k] for k in shuffled[:size]]
    return sorted(chosen)
