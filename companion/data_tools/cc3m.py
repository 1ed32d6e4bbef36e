"""Concept-balanced filter of CC3M: from 3.3M web captions to the pairs of stage 1 (paper, appendix E).

Noun phrases rarer than 3 are dropped; the others add, from the rarest on, their captions to a pool, or 100 random ones
if there are more. No code was released: each point that the recipe leaves open is a field of `FilterSettings`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from companion.data_tools.expansion import load_instructions
from companion.data_tools.filter_settings import FilterSettings
from companion.data_tools.image_availability import ImageAvailability, image_availability
from companion.data_tools.phrases import ARTICLES, MAX_TEXT, PRONOUNS, Phrases, extract, extract_file, extractor_named
from companion.data_tools.repair import write_parquet
from llava_core.constants import IMAGE_MARKER
from llava_core.data.media import is_medium_name
from llava_core.runtime import DataError, atomic_write, display_path, progress, shortened, unread_content, write_json

BLOCK = 256  # phrases per block of the search for the next phrase; about the square root of their number
_ADDRESS = re.compile(r"\s*(?:[\"']\s*)?(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_NUMBER = re.compile(r"\s*[-+]?[\d.]+(?:e[-+]?\d+)?\s*", re.IGNORECASE)
Integers = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]


class Row(NamedTuple):
    """A line of the TSV, numbered from 0."""

    number: int
    caption: str
    url: str
    image: str

    @property
    def id(self) -> str:
        return f"GCC_train_{self.number:09d}"


def read_captions(path: str | Path) -> Iterator[Row]:
    """Read the official TSV line by line: `caption <tab> url`; a third column may name the image.

    Line n belongs to image n, so a line of another form is refused, and not skipped: a header, columns in another order
    (CC12M: url, caption), quotation marks. Raises DataError for it, and if the file is missing.
    """
    try:
        if what := unread_content(path):
            raise DataError(f"{display_path(path)}: {what}")
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(2**24), b"")):
                try:
                    cells = line.decode("utf-8" if number else "utf-8-sig").rstrip("\r\n").split("\t")
                    if fault := _line_fault(cells, number):
                        raise ValueError(fault)
                except ValueError as error:  # bytes that are not UTF-8 are one too
                    raise DataError(
                        f"{display_path(path)}, line {number + 1}: {error}; a line is caption, url and perhaps an "
                        "image file, in UTF-8: correct or remove it"
                    ) from error
                yield Row(number, cells[0], cells[1], cells[2] if len(cells) == 3 else f"GCC_train_{number:09d}.jpg")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{display_path(path)}: no such file; give the TSV of captions") from error


def _line_fault(cells: list[str], number: int) -> str | None:
    """What is wrong with the cells of a line (from 0), or None."""
    if len(cells) not in (2, 3) or not all(map(str.strip, cells)):
        return f"{len(cells)} tab-separated cells{'' if all(cells) else ', some empty'}"
    caption, url, *image = cells
    if len(caption) > MAX_TEXT:
        return f"a caption of {len(caption):,} characters, more than {MAX_TEXT:,}"
    if not _ADDRESS.match(url):
        if _ADDRESS.match(caption):
            return "the columns are url, caption, as in CC12M; write the caption first"
        if number == 0 and not any(map(_ADDRESS.match, cells)):
            names = ", ".join(shortened(cell, 30) for cell in cells)
            return f"a header ({names}) and no pair; remove it, because images are numbered by line"
        return f"the second column is no URL but '{shortened(url, 50)}'"
    if _ADDRESS.match(caption):
        return "two URLs and no caption"
    if url[0] in "\"'" or _is_quoted(caption):
        return "the cells are quoted as in CSV; write the table without quotation marks"
    if image and is_medium_name(caption):
        return "the first column names an image file and is no caption"
    if image and (_ADDRESS.match(image[0]) or _NUMBER.fullmatch(image[0])):
        return f"the third column is no image file but '{shortened(image[0], 50)}'"
    return None


def _is_quoted(text: str) -> bool:
    """Whether a text is quoted as in CSV, which writes a quotation mark of the text twice."""
    inner = text[1:-1]
    return text[0] == text[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")


def normalize(phrase: str, settings: FilterSettings) -> str:
    """The form under which a phrase is counted; empty for one that is left out."""
    words = (phrase.lower() if settings.lowercase else phrase).split()
    if settings.drop_pronouns and len(words) == 1 and words[0].lower() in PRONOUNS:
        return ""
    if settings.strip_determiners:
        while words and words[0].lower() in ARTICLES:
            del words[0]
    form = " ".join(words)
    too_long = settings.max_words is not None and len(words) > settings.max_words
    return "" if too_long or not any(map(str.isalnum, form)) else form


@dataclass(frozen=True)
class PhraseTable:
    """The phrases of each caption, as pairs of indices sorted by caption.

    Attributes:
        phrases: unique, in the order of first appearance.
        rows, ids: one entry per caption and phrase in it, int32.
        repeats: index of the entry of each further occurrence in the same caption.
    """

    phrases: list[str]
    captions: int
    rows: Integers
    ids: Integers
    repeats: Integers
    extractor: str


def phrase_table(captions: Iterable[str] | Phrases, settings: FilterSettings | None = None) -> PhraseTable:
    """Normalise and number the noun phrases of captions, or phrases extracted before."""
    settings = settings or FilterSettings()
    extracted = captions if isinstance(captions, Phrases) else extract(captions, extractor_named(settings.phrases))
    numbers: dict[str, int] = {}
    known: dict[str, int] = {}  # spelling -> number, so that each spelling is normalised once; -1: left out
    rows, ids, repeats = array("i"), array("i"), array("i")
    row = -1
    for row, phrases in enumerate(extracted):
        entries: dict[int, int] = {}  # phrase -> entry, of this caption
        for phrase in phrases:
            number = known.get(phrase)
            if number is None:
                form = normalize(phrase, settings)
                number = known[phrase] = numbers.setdefault(form, len(numbers)) if form else -1
            if number in entries:
                repeats.append(entries[number])
            elif number >= 0:
                entries[number] = len(ids)
                rows.append(row)
                ids.append(number)
    columns = [np.array(column, np.int32) for column in (rows, ids, repeats)]
    return PhraseTable(list(numbers), row + 1, columns[0], columns[1], columns[2], extracted.extractor.name)


@dataclass(frozen=True)
class Selection:
    """The result of the filter.

    Attributes:
        pooled: per caption, whether it was selected.
        before, after: frequency per phrase in all (available) and in the selected captions; `after` is 0 if infrequent.
        frequent: per phrase, whether it has the minimum frequency.
    """

    table: PhraseTable
    pooled: Mask
    before: Integers
    after: Integers
    frequent: Mask

    @property
    def frequencies_before(self) -> dict[str, int]:
        """Frequency of every phrase, most frequent first (Figure 7)."""
        return self._sorted(self.before, self.before > 0)

    @property
    def frequencies_after(self) -> dict[str, int]:
        """Frequency of the frequent phrases in the selected captions, in the same order (Figure 7)."""
        return self._sorted(self.after, self.frequent)

    def _sorted(self, values: Integers, mask: Mask) -> dict[str, int]:
        return {self.table.phrases[k]: int(values[k]) for k in np.argsort(-self.before, kind="stable") if mask[k]}

    def counts(self) -> dict[str, int]:
        return {
            "captions": self.table.captions,
            "phrases": int((self.before > 0).sum()),
            "phrases_kept": int(self.frequent.sum()),
            "pairs_kept": int(self.pooled.sum()),
        }


def select(table: PhraseTable, settings: FilterSettings | None = None, available: Mask | None = None) -> Selection:
    """Select captions so that frequent concepts do not dominate; `available` (per caption): its image can be used.

    Source: paper, appendix E.
    """
    settings = settings or FilterSettings()
    usable = np.ones(table.captions, bool) if available is None else np.asarray(available, bool)
    counted = usable if settings.unavailable == "before" else np.ones(table.captions, bool)
    before = _frequencies(table, counted, settings)
    frequent = before >= max(1, settings.min_frequency)
    pooled = _fill_pool(table, frequent[table.ids] & counted[table.rows], before, frequent, settings) & usable
    after = np.where(frequent, _frequencies(table, pooled, settings), 0)
    return Selection(table, pooled, before, after, frequent)


def _frequencies(table: PhraseTable, captions: Mask, settings: FilterSettings) -> Integers:
    entries = np.flatnonzero(captions[table.rows])
    if settings.count == "occurrences":
        entries = np.concatenate([entries, table.repeats[captions[table.rows[table.repeats]]]])
    return np.bincount(table.ids[entries], minlength=len(table.phrases))


def _fill_pool(table: PhraseTable, entries: Mask, before: Integers, frequent: Mask, settings: FilterSettings) -> Mask:
    """Add captions to the pool, phrase by phrase; `entries` masks the rows of the table that count."""
    rows, ids, total = table.rows[entries], table.ids[entries], len(table.phrases)
    members = rows[np.argsort(ids, kind="stable")]  # captions of phrase p: members[bounds[p] : bounds[p + 1]]
    remaining = np.bincount(ids, minlength=total)
    bounds = np.concatenate([[0], np.cumsum(remaining)])
    pooled = np.zeros(table.captions, bool)

    def take(phrase: int) -> Integers:
        """Add the captions of one phrase to the pool; return the new ones."""
        captions = members[bounds[phrase] : bounds[phrase + 1]]
        fresh = captions[~pooled[captions]]
        pick, size = (fresh, settings.cap) if settings.draw == "unpooled" else (captions, settings.cap)
        if len(pick) > size:
            if settings.draw == "top_up":
                pick, size = fresh, max(0, size - (len(captions) - len(fresh)))
            if size < len(pick):
                # one generator per phrase: its draw does not depend on earlier draws
                own = np.random.default_rng([settings.seed, zlib.crc32(table.phrases[phrase].encode())])
                pick = own.choice(pick, size, replace=False)
        fresh = pick[~pooled[pick]]
        pooled[fresh] = True
        return fresh

    if settings.order == "static" or settings.draw == "all":  # with `all` every order gives the same pool
        order = np.argsort(before, kind="stable")
        for phrase in order[frequent[order]]:
            take(phrase)
        return pooled
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=table.captions))])  # of a caption, in `ids`
    # captions left of each waiting phrase, in blocks with their minima: the next phrase is the minimum of two searches
    done, width = np.iinfo(np.int64).max // 2, BLOCK
    left = np.full((-(-total // width), width), done)
    flat = left.reshape(-1)
    flat[np.flatnonzero(frequent)] = remaining[frequent]
    lowest = left.min(axis=1, initial=done)
    while len(lowest):
        block = lowest.argmin()
        phrase = int(block * width + left[block].argmin())
        fewest, flat[phrase] = flat[phrase], done
        if fewest == done:
            break
        lowest[block] = left[block].min()
        fresh = take(phrase) if fewest else ()  # 0: all its captions are in the pool
        if len(fresh):
            touched = np.concatenate([ids[starts[row] : starts[row + 1]] for row in fresh])
            touched = touched[flat[touched] < done]
            np.subtract.at(flat, touched, 1)
            blocks = np.unique(touched // width)
            lowest[blocks] = left[blocks].min(axis=1)
    return pooled


@dataclass(frozen=True)
class Filtered:
    """A filtered TSV; `phrases` are those before normalisation, `available` (per caption) is None without images."""

    source: Path
    settings: FilterSettings
    selection: Selection
    phrases: Phrases
    available: Mask | None
    availability: ImageAvailability | None

    def report(self) -> dict[str, Any]:
        return {
            **self.selection.counts(),
            "extractor": self.selection.table.extractor,
            "coverage": asdict(self.availability) if self.availability else None,
            "settings": asdict(self.settings),
        }


def filter_captions(
    captions: str | Path,
    images: str | Path | None = None,
    settings: FilterSettings | None = None,
    cache: str | Path | None = None,
    processes: int | None = None,
) -> Filtered:
    """Filter a TSV of captions without writing pairs.

    Args:
        images: folder of the images; rows without a readable one are reported, not selected. None: no image is opened.
        cache: folder for phrases and checked images: a killed run continues, and a run with other settings parses
            nothing. None: they stay in memory, and one process computes them.
    """
    captions, settings = Path(captions), settings or FilterSettings()
    extractor = extractor_named(settings.phrases)
    load_instructions(settings.instructions)  # an unreadable list fails here, not after hours of parsing
    available = availability = None
    if images is not None:
        image_cache = None if cache is None else Path(cache) / "images"
        names = (row.image for row in read_captions(captions))
        available, availability = image_availability(names, images, image_cache, 1 if cache is None else processes)

    def texts() -> Iterator[str]:
        return (row.caption for row in read_captions(captions))

    if cache is None:
        phrases = extract(progress(texts(), "noun phrases", unit=" captions"), extractor)
    else:
        phrases = extract_file(texts, captions, extractor, Path(cache), processes)
    selection = select(phrase_table(phrases, settings), settings, available)
    return Filtered(captions, settings, selection, phrases, available, availability)


def chosen_pairs(filtered: Filtered) -> Iterator[tuple[Row, str]]:
    """Each selected row with its question: a random instruction, the image before or after it at random."""
    chosen = filtered.selection.pooled
    # drawn for all rows: a record's question does not depend on the selection
    generator = np.random.default_rng([filtered.settings.seed, zlib.crc32(b"instructions")])
    instructions = load_instructions(filtered.settings.instructions)
    number = generator.integers(len(instructions), size=len(chosen))
    image_last = generator.random(len(chosen)) < 0.5  # paper, equation 2: [question, image] or [image, question]
    for row in read_captions(filtered.source):
        if chosen[row.number]:
            text = instructions[number[row.number]]
            yield row, f"{text}\n{IMAGE_MARKER}" if image_last[row.number] else f"{IMAGE_MARKER}\n{text}"


def write_pairs(filtered: Filtered, out: str | Path) -> dict[str, Any]:
    """Write the selected pairs in the released format, return the report; no parquet file without pyarrow."""
    out = Path(out)
    chat: list[dict[str, Any]] = []
    metadata: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for row, question in chosen_pairs(filtered):
        named = {"id": row.id, "image": row.image}
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": row.caption}]
        chat.append({**named, "conversations": turns})
        # the released file adds a caption by BLIP, which the filter does not have
        metadata.append({**named, "caption": row.caption, "blip_caption": None, "url": row.url})
        table.append({**named, "question": question, "caption": row.caption, "url": row.url})
    files: dict[str, str | None] = {"parquet": None}
    files["chat"] = display_path(_write_list(out / "chat.json", chat))
    files["metadata"] = display_path(_write_list(out / "metadata.json", metadata))
    if importlib.util.find_spec("pyarrow") is not None:
        files["parquet"] = display_path(write_parquet(out / "pairs.parquet", table))
    report = {**filtered.report(), **files}
    write_json(out / "report.json", report)
    return report


def _write_list(path: Path, values: Iterable[Any]) -> Path:
    lines = ",\n".join(json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values)
    return atomic_write(path, f"[\n{lines}\n]\n" if lines else "[]\n")


def filter_file(
    captions: str | Path,
    out: str | Path,
    images: str | Path | None = None,
    settings: FilterSettings | None = None,
    cache: str | Path | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """`llava filter`: `filter_captions` and `write_pairs`; the cache is by default `phrases` in `out`."""
    cache = Path(out) / "phrases" if cache is None else cache
    return write_pairs(filter_captions(captions, images, settings, cache, processes), out)
