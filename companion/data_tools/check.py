"""All problems of an instruction file: `llava data check`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_core.data.instruct import (
    NO_RECORDS,
    TURN_FIELDS,
    ImageFolder,
    Problem,
    Record,
    leaves_folder,
    read_records,
    record_problems,
    too_deep,
)
from llava_core.data.media import first_of
from llava_core.runtime import display_path, shortened

WARNINGS = frozenset({"duplicate_id", "no_images"})

MAX_WORDS = 1300
"""2048 tokens less 256 of the image and about 50 of the template, at 1.35 tokens per English word."""

MAX_LISTED = 1000
"""Problems of one kind that are listed; more are counted."""

_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # scripts without spaces: a character counts as a word
_MAX_WORD_LENGTH = 20  # characters; a "word" of 2,000 characters (base64, a URL) counts as 100


class Checker:
    """The rules of the format and those that depend on other records.

    Args:
        images: their folder, a DataError if there is none; None opens no image.
        decode: decode each image; otherwise only missing files and wrong headers are noticed.
        max_words: per record; None for no limit.
    """

    def __init__(self, images: str | Path | None, decode: bool, max_words: int | None = None) -> None:
        self.folder = ImageFolder(images, decode) if images is not None else None
        self.max_words = max_words
        self.reported: set[str] = set()  # damaged images
        self.with_image = 0
        self.layouts: Counter[str] = Counter()  # layouts of other formats -> records
        self.first_use: dict[tuple[str, str | None], tuple[int, str]] = {}

    def check(self, record: Record) -> list[Problem]:
        problems = list(record_problems(record.value))
        if isinstance(record.value, dict):
            problems += [*self._image(record.value), *self._length(record.value), *self._duplicate(record)]
        return [Problem(record.line, record.label, kind, message) for kind, message in problems]

    def count(self, record: Record, problems: list[Problem]) -> None:
        """Count a checked record for the problems of the file as a whole."""
        if isinstance(record.value, dict):
            self.with_image += record.value.get("image") is not None
            if problems and (layout := other_layout(record.value)):
                self.layouts[layout] += 1

    def _image(self, value: dict[str, Any]) -> Iterator[tuple[str, str]]:
        name = value.get("image")
        if self.folder is None or not isinstance(name, str) or not name or leaves_folder(name):
            return
        fault = self.folder.problem(name)
        # a damaged file is one problem however many records name it; a missing one is a problem of each record
        if fault is not None and not (fault[0] == "unreadable_image" and name in self.reported):
            self.reported.add(name)
            yield fault

    def _length(self, value: dict[str, Any]) -> Iterator[tuple[str, str]]:
        turns = value.get("conversations")
        values = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        texts = [text for text in values if isinstance(text, str)]
        if self.max_words is None:
            return
        size = sum(map(len, texts)) + len(texts)  # at most a word per two characters, but for scripts without spaces
        if size <= self.max_words * (2 if all(map(str.isascii, texts)) else 1):
            return
        if (words := sum(map(count_words, texts))) > self.max_words:
            yield (
                "too_long",
                f"{words:,} words, of which {self.max_words:,} fit into 2048 tokens with the image, and training "
                "leaves out the last turns; split the dialogue, or raise --max-words and train.max_length",
            )

    def _duplicate(self, record: Record) -> Iterator[tuple[str, str]]:
        name, kind = record.value.get("id"), record.value.get("type")
        if isinstance(name, str) and name and (kind is None or isinstance(kind, str)):
            # in LLaVA-Instruct the kinds of one image share its id; under another type it is no duplicate
            here = f"record #{record.position}" if record.line is None else f"line {record.line}"
            position, place = self.first_use.setdefault((name, kind), (record.position, here))
            if position != record.position:
                yield (
                    "duplicate_id",
                    f"id '{shortened(name)}' was already used at {place}; rename one if the samples differ",
                )


def count_words(text: str) -> int:
    """Approximate number of words: characters of scripts without spaces count, and so does the length of blobs."""
    words = len(text.split()) if text.isascii() else len(text.split()) + len(_CJK.findall(text))
    return max(words, len(text) // _MAX_WORD_LENGTH)


def other_layout(record: dict[str, Any]) -> str | None:
    """The fields by which a record has the layout of another format, or None."""
    turns = record.get("conversations")
    if "conversations" not in record:
        names = [name for name in record if name not in ("id", "image", "type")]
        return f"no conversations, but {first_of(names, 5)}" if names else None
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict) and not first.keys() & TURN_FIELDS:
        return f"turns of {first_of(first, 5)}"
    return None


def is_error(problem: Problem) -> bool:
    """False for a warning, with which a file can still be loaded."""
    return problem.kind not in WARNINGS


def check_file(
    path: str | Path, images: str | Path | None = None, decode: bool = True, max_words: int | None = MAX_WORDS
) -> dict[str, Any]:
    """Find all problems of a file; arguments as for `Checker`. Raises DataError if it or the folder does not exist.

    After a syntax error in a `.json` list the rest of the list is not checked; a `.jsonl` file is checked to its end.

    Returns:
        `records` (how many could be parsed), `errors`, `warnings` (counts), `counted` (the unit of `line`: `line`, or
        `row` of parquet), and `problems`, a list of `{line, record, kind, message}` in the order of the lines, at most
        `MAX_LISTED` of a kind.
    """
    problems = Problems()
    checker, count = Checker(images, decode, max_words), 0
    for item in read_records(Path(path)):
        if isinstance(item, Problem):
            problems.add([item])
        else:
            count += 1
            try:
                found = checker.check(item)
            except RecursionError:
                found = [too_deep(item)]
            checker.count(item, found)
            if found:
                problems.add(found)
    return report(Path(path), count, problems, checker)


class Problems:
    """The problems of a file; after `MAX_LISTED` of one kind the others are only counted."""

    def __init__(self) -> None:
        self.listed: list[Problem] = []
        self.counts: Counter[str] = Counter()

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.counts[problem.kind] += 1
            if self.counts[problem.kind] <= MAX_LISTED:
                self.listed.append(problem)

    def in_order(self) -> Iterator[Problem]:
        """The listed problems by their lines, then how many of a kind are not listed."""
        yield from sorted(self.listed, key=lambda problem: problem.line or 0)
        for kind, number in self.counts.items():
            if number > MAX_LISTED:
                yield Problem(None, None, kind, f"{number - MAX_LISTED:,} more problems of the kind {kind}, not listed")


def report(path: Path, count: int, problems: Problems, checker: Checker) -> dict[str, Any]:
    """The result of `check_file`, with the problems of the file as a whole."""
    if not count and not problems.counts:
        problems.add([Problem(1, None, "no_records", NO_RECORDS)])
    number = checker.layouts.total()
    if 2 * number > count:
        layout = checker.layouts.most_common(1)[0][0]
        message = (
            f"{number:,} of {count:,} records have another layout ({layout}); `llava data convert {display_path(path)} "
            "--to mine.json` reads messages, query and response, instruction and output, texts"
        )
        problems.add([Problem(None, None, "other_layout", message)])
    if checker.folder is not None and count and not checker.with_image:
        message = (
            f"--images {display_path(checker.folder.path)} was given, and none of the {count:,} records has an image; "
            "leave it out for text-only data, or name the images in the field 'image'"
        )
        problems.add([Problem(None, None, "no_images", message)])
    errors = sum(number for kind, number in problems.counts.items() if kind not in WARNINGS)
    return {
        "records": count,
        "errors": errors,
        "warnings": problems.counts.total() - errors,
        "counted": "row" if path.suffix == ".parquet" else "line",
        "problems": [asdict(problem) for problem in problems.in_order()],
    }
