"""Instruction records: LLaVA-Instruct JSON, JSONL or parquet, checked strictly, read and written.

A record is ``{"id": str, "image": str (optional), "type": str (optional), "conversations": [{"from", "value"}, ...]}``
with turns that alternate human / gpt and, where there is an image, one ``<image>`` in the first human value.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from llava_core.constants import IMAGE_MARKER
from llava_core.registry import unknown
from llava_core.runtime import DataError, shown, write_json, write_jsonl

T = TypeVar("T")
ROLES = ("human", "gpt")
PROBLEM_KINDS = {
    "not_json": "the file or the line is no JSON",
    "not_parquet": "the file is no parquet, or damaged",
    "invalid_utf8": "text that is no valid Unicode",
    "no_records": "the file holds no record",
    "missing_field": "a required field is absent",
    "wrong_type": "a field has another type than the format says",
    "role_order": "the turns do not alternate human, gpt",
    "empty_turn": "a turn without text",
    "image_marker": f"not exactly one {IMAGE_MARKER} in the first human turn of a record with an image",
    "missing_image": "the image file does not exist",
    "outside_folder": "the image's path leaves the folder of images",
    "unreadable_image": "the image file is empty, truncated or no image",
    "too_long": "more words than fit into the model's context beside the image",
    "duplicate_id": "the id was used before (a warning: nothing depends on ids being unique)",
}
WARNINGS = frozenset({"duplicate_id"})
FORMATS = (".json", ".jsonl", ".parquet")

MAX_WORDS = 1300
"""Most words of a record that `check_file` lets pass: the paper trains on 2048 tokens, of which the image takes 256 and
the template some 50. That English has 1.35 tokens per word is assumed: a coarse bound, for which no tokenizer is
needed. What is longer loses its last turns."""

_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # Chinese, Japanese, Korean: a character is a word
_LONGEST_WORD = 20  # letters; a "word" of 2,000 letters (base64, a URL) counts as 100


@dataclass(frozen=True)
class Sample:
    """One dialogue about at most one image; the first question keeps its image marker where the file has it."""

    id: str
    turns: list[tuple[str, str]]
    image: Path | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Problem:
    """One defect of a data file.

    Attributes:
        line: line where the record starts, from 1; of a syntax error, its own line; of parquet, the row, from 1 (None
            for records of no file).
        record: the record's id, or `#` and its position from 0 where it has none; None for the file as a whole.
        kind: a key of `PROBLEM_KINDS`.
        message: what is wrong and how to put it right.
    """

    line: int | None
    record: str | None
    kind: str
    message: str

    @property
    def is_error(self) -> bool:
        """False for a mere warning, which does not keep a file from being loaded."""
        return self.kind not in WARNINGS

    def __str__(self) -> str:
        place = [f"line {self.line}"] if self.line is not None else []
        place += [f"record {self.record}"] if self.record is not None else []
        return f"{', '.join(place) or 'file'}: {self.message}"


@dataclass(frozen=True)
class RawRecord:
    """A parsed record, where it stood, and whether its bytes were valid UTF-8."""

    line: int | None
    position: int
    value: Any
    bad_utf8: bool = False


# ------------------------------------------------------------------------------------------------ images


def image_fault(path: Path, decode: bool = True) -> tuple[str, str] | None:
    """Say what is wrong with an image file.

    Args:
        path: the file.
        decode: decode the pixels too; without it only absent files and those whose header is wrong (empty, no image,
            too large) are noticed.

    Returns:
        None for a file that `load_image` reads, else a problem kind (`missing_image` or `unreadable_image`) and the
        reason.
    """
    from llava_core.data.images import ImageError, check_image

    if not decode and _has_plain_header(path):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata is no fault of the image
            check_image(path, decode=decode)
    except ImageError as error:
        return ("missing_image" if error.missing else "unreadable_image"), error.reason
    return None


def _has_plain_header(path: Path) -> bool:
    """Whether the first bytes are those of a JPEG or PNG of usable size; Pillow, ten times slower, judges the rest."""
    from llava_core.data.images import MAX_ASPECT, MAX_PIXELS

    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a pipe: no wait
    except (OSError, ValueError):
        return False
    try:
        head = os.read(file, 4096)
    except OSError:
        return False
    finally:
        os.close(file)
    size = None
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR" and len(head) >= 33:
        size = struct.unpack_from(">II", head, 16)
    elif head.startswith(b"\xff\xd8\xff"):
        at = 2
        while at + 9 <= len(head) and head[at] == 0xFF:
            marker, length = struct.unpack_from(">BH", head, at + 1)
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the start of a frame
                size = struct.unpack_from(">HH", head, at + 5)
                break
            at += 2 + length
    return size is not None and 0 < max(size) <= MAX_ASPECT * min(size) and size[0] * size[1] <= MAX_PIXELS


def leaves_folder(name: str) -> bool:
    """Whether an image's name points outside its folder; symbolic links inside are the user's own affair."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


# ------------------------------------------------------------------------------------------------ reading


def read_records(path: Path, problems: list[Problem]) -> Iterator[RawRecord]:
    """Yield the records of a file one by one; what cannot be parsed is put into `problems`.

    Args:
        path: a file of one of `FORMATS`.
        problems: list that is added to.

    Raises:
        DataError: there is no such file, or its format is another one.
    """
    if not path.is_file():
        raise DataError(f"{shown(path)}: no such file; check the path or run the step that writes it")
    if path.suffix not in FORMATS:
        raise DataError(
            f"{shown(path)}: neither .json nor .jsonl nor .parquet; `llava data convert` makes one of these of a "
            "CSV, a folder of images and texts, or a data set on disk"
        )
    if path.suffix == ".parquet":
        yield from _read_parquet(path, problems)
        return
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text, bad = data.decode(), None
    except UnicodeDecodeError:  # keep reading: each bad byte becomes a lone surrogate that is found again in its record
        text, bad = data.decode(errors="surrogateescape"), re.compile("[\udc80-\udcff]")
    del data
    if path.suffix == ".json" and text.lstrip()[:1] == "[":
        yield from _read_array(text, bad, problems)
    elif path.suffix == ".json":
        message = "a list of records was expected; put them between [ and ], or name a file of one per line .jsonl"
        problems.append(Problem(1, None, "wrong_type" if text.lstrip()[:1] == "{" else "not_json", message))
    else:
        position = 0
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield RawRecord(number, position, json.loads(line), bool(bad and bad.search(line)))
                except ValueError as error:
                    problems.append(_not_json(number, position, error))
                position += 1


def _read_parquet(path: Path, problems: list[Problem]) -> Iterator[RawRecord]:
    parquet = import_pyarrow("parquet")
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row, bad_utf8 in rows_of(batch):
                    number += 1
                    # a table has the cell of an absent field too
                    yield RawRecord(number, number - 1, {k: v for k, v in row.items() if v is not None}, bad_utf8)
    except (OSError, ValueError, import_pyarrow().ArrowException) as error:
        message = f"no parquet, or damaged ({error}); write the file again"
        problems.append(Problem(None, None, "not_parquet", message))


def import_pyarrow(module: str = "lib") -> Any:
    """Import `pyarrow.<module>`.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ModuleNotFoundError:
        raise DataError(
            "parquet and arrow files are read by pyarrow, which is not installed; "
            "fix: pip install 'llava-core[notebooks]'"
        ) from None


def rows_of(batch: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """The rows of an arrow record batch, and whether the text of each held bytes that are not UTF-8.

    Such bytes, which arrow stores unchecked, become lone surrogates.
    """
    try:
        yield from ((row, False) for row in batch.to_pylist())
        return
    except UnicodeDecodeError:
        pass
    arrow = import_pyarrow()
    schema = arrow.schema([field.with_type(_as_bytes(field.type, arrow)) for field in batch.schema])
    plain = arrow.Table.from_batches([batch]).cast(schema)
    for k in range(batch.num_rows):
        try:
            yield batch.slice(k, 1).to_pylist()[0], False
        except UnicodeDecodeError:
            yield _as_text(plain.slice(k, 1).to_pylist()[0]), True


def _as_bytes(kind: Any, arrow: Any) -> Any:
    """The arrow type with bytes in the place of text."""
    types = import_pyarrow("types")
    if types.is_string(kind) or types.is_large_string(kind):
        return arrow.binary() if types.is_string(kind) else arrow.large_binary()
    if types.is_list(kind):
        return arrow.list_(_as_bytes(kind.value_type, arrow))
    if types.is_struct(kind):
        fields = [kind.field(k) for k in range(kind.num_fields)]
        return arrow.struct([field.with_type(_as_bytes(field.type, arrow)) for field in fields])
    return kind


def _as_text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, dict):
        return {key: _as_text(inner) for key, inner in value.items()}
    return [_as_text(inner) for inner in value] if isinstance(value, list) else value


def _not_json(line: int, position: int, error: ValueError) -> Problem:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
    return Problem(line, f"#{position}", "not_json", f"no JSON ({reason}); write the record again or remove it")


def _read_array(text: str, bad: re.Pattern[str] | None, problems: list[Problem]) -> Iterator[RawRecord]:
    """Read a JSON list element by element: each record has its line, and a broken one does not hide the rest."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    begin = text.index("[") + 1
    indent = space.match(text, begin)[0].rpartition("\n")  # type: ignore[index]  # the pattern matches anything
    next_record = re.compile(rf"\n{indent[2]}\{{") if indent[1] else None
    position, at, counted, line, resumed = 0, begin, 0, 1, False

    def skip(start: int) -> int:
        return space.match(text, start).end()  # type: ignore[union-attr]

    while True:
        start = skip(at)
        line, counted = line + text.count("\n", counted, start), start
        try:
            if text.startswith("]", start) and position == 0:
                end = start
            else:
                value, after = decode(text, start)
                end = skip(after)
                # behind a broken record, a `{` in the record's column may still open a turn of the broken one
                if not resumed or (isinstance(value, dict) and "conversations" in value):
                    yield RawRecord(line, position, value, bool(bad and bad.search(text, start, after)))
                    position, resumed = position + 1, False
            if text.startswith(",", end):
                at = end + 1
                continue
            if not text.startswith("]", end):
                raise json.JSONDecodeError("expecting ',' or ']'", text, end)
            if skip(end + 1) != len(text):
                raise json.JSONDecodeError("text behind the list", text, end + 1)
            return
        except (ValueError, RecursionError) as error:
            if not resumed:
                where = error.pos if isinstance(error, json.JSONDecodeError) else start
                problems.append(_not_json(line + text.count("\n", start, where), position, ValueError(str(error))))
                position += 1
            following = next_record.search(text, start + 1) if next_record else None
            if following is None:
                return
            at, resumed = following.end() - 1, True


# ------------------------------------------------------------------------------------------------ checking


class Checker:
    """The rules of the format, with what they remember between records.

    Args:
        images: folder of the images; None looks at no file.
        decode: decode each image too.
        max_words: most words of a record; None for any number.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, images: str | Path | None, decode: bool, max_words: int | None = None) -> None:
        self.images = Path(images) if images is not None else None
        self.decode = decode
        self.max_words = max_words
        self.named: set[str] = set()
        self.first_use: dict[tuple[str, str | None], tuple[int, str]] = {}
        self.faults: dict[str, tuple[str, str] | None] = {}
        if self.images is not None and not self.images.is_dir():
            raise DataError(f"{shown(self.images)}: no such folder; give the folder that the records' images lie in")

    def check(self, raw: RawRecord) -> list[Problem]:
        """All problems of one record."""
        record = raw.value
        name = record.get("id") if isinstance(record, dict) else None
        label = name if isinstance(name, str) and name else f"#{raw.position}"
        return [Problem(raw.line, label, kind, message) for kind, message in self._defects(raw, record)]

    def _defects(self, raw: RawRecord, record: Any) -> Iterator[tuple[str, str]]:
        if not isinstance(record, dict):
            yield "wrong_type", f"a record is an object with id and conversations, not {_type(record)}"
            return
        turns = record.get("conversations")
        listed = turns if isinstance(turns, list) else []
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in listed]
        if raw.bad_utf8:
            yield "invalid_utf8", "bytes that are not UTF-8; save the file as UTF-8"
        elif not all(_encodable(text) for text in (record.get("id"), record.get("image"), *texts)):
            yield "invalid_utf8", "half of a surrogate pair (\\ud800 to \\udfff) stands alone; replace it"
        yield from self._identity(raw, record)
        image = record.get("image")
        if isinstance(image, str):
            yield from self._image(image)
        elif image is not None:
            yield "wrong_type", f"image is the name of one file, not {_type(image)}; leave it out of a text-only record"
        if "conversations" not in record:
            yield "missing_field", "conversations is missing; give the turns as a list of {from, value}"
        elif not isinstance(turns, list):
            yield "wrong_type", f"conversations is a list of turns, not {_type(turns)}"
        else:
            # an empty name is a problem already, and does not say whether there is to be an image
            yield from _dialogue(turns, texts, None if image == "" else image is not None)
            yield from self._length(texts)

    def _length(self, texts: list[Any]) -> Iterator[tuple[str, str]]:
        listed = [text for text in texts if isinstance(text, str)]
        if self.max_words is None or sum(map(len, listed)) <= self.max_words:
            return
        if (words := sum(map(count_words, listed))) > self.max_words:
            yield (
                "too_long",
                f"{words:,} words, of which {self.max_words:,} fit beside the image into 2048 tokens, and training "
                "leaves out the last turns; split the dialogue, or raise --max-words and train.max_length",
            )

    def _identity(self, raw: RawRecord, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
        name, kind = record.get("id"), record.get("type")
        if "id" not in record:
            yield "missing_field", "id is missing; give each record a string"
        elif not isinstance(name, str) or not name:
            yield "wrong_type", f"id is a non-empty string, not {_type(name)}; put it between quotation marks"
        if kind is not None and not isinstance(kind, str):
            yield "wrong_type", f"type is a string such as conversation, detail or complex, not {_type(kind)}"
        elif isinstance(name, str) and name:
            # the kinds of one image share its id in LLaVA-Instruct; under another type it is no duplicate
            here = f"record #{raw.position}" if raw.line is None else f"line {raw.line}"
            position, place = self.first_use.setdefault((name, kind), (raw.position, here))
            if position != raw.position:
                yield "duplicate_id", f"id '{name}' was already used at {place}; rename one if the samples differ"

    def _image(self, name: str) -> Iterator[tuple[str, str]]:
        if not name:
            yield "missing_image", "image is an empty string; name a file, or leave it out of a text-only record"
        elif leaves_folder(name):
            yield "outside_folder", f"image '{name}' leaves the folder of images; give a path relative to that folder"
        elif self.images is not None:
            fault = self.fault(name)
            # a damaged file is one problem however many records use it; a missing one is a problem of each record
            if fault is not None and not (name in self.named and fault[0] == "unreadable_image"):
                self.named.add(name)
                yield fault[0], f"image {shown(self.images / name)}: {fault[1]}; restore the file or remove the record"

    def fault(self, name: str) -> tuple[str, str] | None:
        """What `image_fault` says of an image of the folder, asked once per name."""
        if name not in self.faults:
            assert self.images is not None
            self.faults[name] = image_fault(self.images / name, self.decode)
        return self.faults[name]


def _dialogue(turns: list[Any], texts: list[Any], has_image: bool | None) -> Iterator[tuple[str, str]]:
    """Defects of the turns: types, roles, empty values, image markers."""
    if not turns:
        yield "role_order", "conversations is empty; give at least a question (human) and an answer (gpt)"
    roles: list[Any] = []
    for k, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        roles.append(turn.get("from") if isinstance(turn, dict) else None)
        if not isinstance(turn, dict):
            yield "wrong_type", f"turn {k} is an object with from and value, not {_type(turn)}"
        elif "from" not in turn or "value" not in turn:
            yield "missing_field", f"turn {k} has no {'from' if 'from' not in turn else 'value'}; each turn has both"
        elif not isinstance(text, str):
            yield "wrong_type", f"value of turn {k} is a string, not {_type(text)}"
        elif not text.strip():
            yield "empty_turn", f"turn {k} has no text; write it or remove the pair of turns"
    wrong = next((k for k, role in enumerate(roles) if role is not None and role != ROLES[k % 2]), None)
    if wrong is not None:
        expected = ROLES[wrong % 2]
        yield "role_order", f"turn {wrong} is from {roles[wrong]!r}, expected '{expected}': human and gpt alternate"
    elif len(turns) % 2:
        yield "role_order", "the last question has no answer; add a gpt turn or remove the question"
    counts = [text.count(IMAGE_MARKER) if isinstance(text, str) else 0 for text in texts]
    if has_image is not None and "human" in roles:  # otherwise there is no first human turn that could hold the marker
        first = roles.index("human")
        if sum(counts) != has_image:
            yield (
                "image_marker",
                f"{sum(counts)} x {IMAGE_MARKER} in a record with {'an' if has_image else 'no'} image; "
                f"{'write it once, in the first human turn' if has_image else 'remove it or name the image'}",
            )
        elif has_image and not counts[first]:
            place = counts.index(1)
            yield "image_marker", f"{IMAGE_MARKER} stands in turn {place}; move it to turn {first}, the first human one"


def count_words(text: str) -> int:
    """Words of a text, for which no tokenizer is needed: an unspaced script counts by character, a blob by length."""
    spaced = len(text.split()) if text.isascii() else len(text.split()) + len(_UNSPACED.findall(text))
    return max(spaced, len(text) // _LONGEST_WORD)


def _type(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true/false"}.get(
        type(value), "a number"
    ) + (" without text" if value == "" else "")


def _encodable(text: Any) -> bool:
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def check_file(
    path: str | Path,
    images: str | Path | None = None,
    decode: bool = True,
    max_words: int | None = MAX_WORDS,
) -> dict[str, Any]:
    """Find all problems of a file: what `llava data check` reports.

    Args:
        path: a `.json` list, a `.jsonl` file of one record per line, or a `.parquet` table of one record per row.
        images: the folder of the images; None looks at no image.
        decode: decode each image; without it only absent files and wrong headers are noticed.
        max_words: most words of a record; None for any number.

    Returns:
        `records` (how many could be parsed), `errors`, `warnings` (counts), `counted` (what the numbers of `line`
        count: `line`, or `row` of parquet), and `problems`, a list of `{line, record, kind, message}` in the order of
        the lines.

    Raises:
        DataError: the file or the folder of images does not exist.
    """
    problems: list[Problem] = []
    checker, count = Checker(images, decode, max_words), 0
    for raw in read_records(Path(path), problems):
        problems += checker.check(raw)
        count += 1
    note_empty(count, problems)
    return {"records": count, **report(path, problems)}


def report(path: str | Path, problems: list[Problem]) -> dict[str, Any]:
    """The problems of a file as `check_file` returns them."""
    problems = sorted(problems, key=lambda problem: problem.line or 0)
    errors = sum(problem.is_error for problem in problems)
    counted = "row" if Path(path).suffix == ".parquet" else "line"
    listed = [asdict(problem) for problem in problems]
    return {"errors": errors, "warnings": len(problems) - errors, "counted": counted, "problems": listed}


def note_empty(count: int, problems: list[Problem]) -> None:
    """Add a problem where a file holds no record and nothing else was wrong."""
    if not count and not problems:
        problems.append(Problem(1, None, "no_records", "the file holds no record; run the step that writes it"))


# ------------------------------------------------------------------------------------------------ loading, writing


def iter_instruct(path: Path, images: str | Path | None = None, decode: bool = False) -> Iterator[Sample]:
    """Yield the samples of a file one by one, and complain at its end of all that was wrong.

    Args:
        path, images, decode: as for `load_instruct`.

    Raises:
        DataError: the file has problems; what was yielded until then is not all of it.
    """
    problems: list[Problem] = []
    checker, count = Checker(images, decode), 0
    for raw in read_records(path, problems):
        found = [problem for problem in checker.check(raw) if problem.is_error]
        problems += found
        if not found:
            count += 1
            yield _sample(raw.value, checker.images)
    note_empty(count, problems)
    if problems:
        some = "".join(f"\n  {problem}" for problem in problems[:5])
        command = f"llava data check {shown(path)}" + (f" --images {shown(checker.images)}" if checker.images else "")
        raise DataError(f"{shown(path)}: {len(problems)} problem(s){some}\n  `{command}` lists all of them")


def load_instruct(
    path: str | Path,
    images: str | Path | None = None,
    subset: Mapping[str, float] | None = None,
    limit: int | None = None,
    seed: int = 0,
    decode: bool = False,
) -> list[Sample]:
    """Load a file of instruction records; one wrong record is an error that names all of them.

    Args:
        path: a `.json` list, a `.jsonl` file of one record per line, or a `.parquet` table of one record per row.
        images: folder of the images; None keeps their names as they stand and looks at no file.
        subset: share (0 to 1) of each kind to keep, e.g. `{"conversation": 1.0, "detail": 0.05}`; kinds that it does
            not name are left out. Shares are nested: 5 % of a kind is part of its 10 %.
        limit: keep a seeded choice of at most so many samples.
        seed: decides the two choices above.
        decode: decode every image now rather than when it is first needed.

    Returns:
        The samples in the order of the file.

    Raises:
        DataError: the file has problems, or no record of a kind that `subset` names.
    """
    path = Path(path)
    samples = list(iter_instruct(path, images, decode))
    if subset:
        samples = [samples[k] for k in choose_kinds([sample.kind for sample in samples], subset, seed, path)]
    if limit is not None and limit < len(samples):
        samples = _choose(samples, limit, f"{seed}:limit")
    return samples


def _sample(record: dict[str, Any], images: Path | None) -> Sample:
    values = [turn["value"] for turn in record["conversations"]]
    name = record.get("image")
    image = None if name is None else Path(name) if images is None else images / name
    return Sample(record["id"], list(zip(values[::2], values[1::2], strict=True)), image, record.get("type"))


def choose_kinds(kinds: Sequence[str | None], shares: Mapping[str, float], seed: int, path: Path) -> list[int]:
    """Which records a subset keeps, in the order of the file.

    Args:
        kinds: of each record.
        shares, seed: `subset` and `seed` of `load_instruct`.
        path: the file, for messages.

    Raises:
        DataError: no record of a kind that `shares` names, or a share that is none.
    """
    places: dict[str, list[int]] = {}
    for k, name in enumerate(kinds):
        places.setdefault(name or "(no type)", []).append(k)
    chosen: list[int] = []
    for kind, share in shares.items():
        if kind not in places:
            wrong = unknown("kind of record", kind, places)
            raise DataError(f"{shown(path)}: {wrong}; correct data.subset or the records' type")
        if not 0 <= share <= 1:
            raise DataError(f"{shown(path)}: the share of '{kind}' is {share}; give a number from 0 to 1")
        size = max(1, round(share * len(places[kind]))) if share else 0
        chosen += _choose(places[kind], size, f"{seed}:{kind}")
    return sorted(chosen)


def _choose(items: list[T], size: int, seed: str) -> list[T]:
    """A seeded choice in the old order; a smaller one is part of a larger one."""
    shuffled = random.Random(seed).sample(range(len(items)), len(items))
    return [items[k] for k in sorted(shuffled[:size])]


def write_instruct(path: str | Path, samples: Iterable[Sample], images: str | Path | None = None) -> Path:
    """Write samples as LLaVA-Instruct JSON (`.jsonl`: one record per line), whole or not at all.

    Args:
        path: the file to write.
        samples: what to write; `kind` becomes the record's `type`.
        images: folder that the image names become relative to; None if they are relative already.

    Raises:
        DataError: an image does not lie in `images`, or has an absolute path where none was given.
    """
    records = []
    for sample in samples:
        record: dict[str, Any] = {"id": sample.id}
        if sample.image is not None:
            inside = sample.image.is_relative_to(images) if images is not None else not sample.image.is_absolute()
            if not inside:
                raise DataError(
                    f"{shown(path)}, record {sample.id}: image {sample.image} does not lie in "
                    f"{images or 'a folder that was named'}; give write_instruct the folder of the images"
                )
            record["image"] = (sample.image.relative_to(images) if images is not None else sample.image).as_posix()
        if sample.kind is not None:
            record["type"] = sample.kind
        texts = [text for turn in sample.turns for text in turn]
        record["conversations"] = [{"from": ROLES[k % 2], "value": text} for k, text in enumerate(texts)]
        records.append(record)
    return write_jsonl(path, records) if Path(path).suffix == ".jsonl" else write_json(path, records)
