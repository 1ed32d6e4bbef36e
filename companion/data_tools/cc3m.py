"""Concept-balanced filtering of CC3M: from 3.3M web captions to the pairs of stage 1 (paper, appendix E).

The recipe: extract the noun phrases of all captions, drop phrases rarer than 3, walk through the rest from the
rarest on and add the captions of each to a pool, or 100 random ones where a phrase has more. The authors released the
result but no code, and the recipe can be read in several ways; each open point is a field of `FilterSettings`.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from companion.data_tools.coverage import Coverage, look_at_images
from companion.data_tools.expansion import load_instructions
from companion.data_tools.phrases import ARTICLES, PRONOUNS, Phrases, extract, extract_file, extractor_named
from companion.data_tools.streams import json_list, parquet
from llava_core.constants import IMAGE_MARKER
from llava_core.runtime import ConfigError, DataError, progress, shown, write_json

BLOCK = 256  # phrases among which the next one is looked for at a time; about the root of their number
Integers = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class FilterSettings:
    """Every choice that the published recipe leaves open, and the two numbers that it gives.

    Attributes:
        phrases: `spacy` (noun chunks of a parser, as in the paper) or `rules` (a chunker without a model). Default
            `auto`: spaCy if it is installed.
        lowercase: count "Dog" and "dog" as one phrase. Default yes: CC3M's captions have no capitals, so it matters for
            other data only.
        strip_determiners: count "the dog" and "a dog" as one phrase. Default yes: the paper balances concepts, and word
            by word there are eight times as many phrases as it found.
        drop_pronouns: leave out "it", "who", "something". Default yes: they name no concept.
        max_words: leave out longer phrases. Default None: the paper speaks of no limit.
        count: frequency = `captions` that contain the phrase (default: the draws are of captions, too), or all its
            `occurrences`.
        min_frequency: leave out rarer phrases (paper: 3).
        cap: take so many captions at random of a phrase that has more (paper: 100).
        order: `static` walks by frequency in all captions, `remaining` by the number of captions not yet in the pool,
            which shrinks on the way. Equal ones come in the order of their first appearance. Default `static`: with
            the default draw both end in the same pool.
        draw: what is compared with the cap and drawn from. Default `all`: all captions of the phrase, in the pool or
            not (the paper's words; the order of the walk then changes nothing). `unpooled`: those not yet in the pool.
            `top_up`: as many as its captions in the pool fall short of the cap.
        unavailable: rows without a readable image go `before` the phrases are counted (default: then every kept concept
            is in the pool), or `after` the selection.
        instructions: what asks for the caption: a list of `expansion.py` by name, or a text file of one instruction per
            line, such as the official list.
        seed: decides the draws, the instructions and the side of the image.

    Source: paper, appendix E and Figure 7.
    """

    phrases: Literal["auto", "spacy", "rules"] = "auto"
    lowercase: bool = True
    strip_determiners: bool = True
    drop_pronouns: bool = True
    max_words: int | None = None
    count: Literal["captions", "occurrences"] = "captions"
    min_frequency: int = 3
    cap: int = 100
    order: Literal["static", "remaining"] = "static"
    draw: Literal["all", "unpooled", "top_up"] = "all"
    unavailable: Literal["before", "after"] = "before"
    instructions: str = "brief"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "phrases": ("auto", "spacy", "rules"),
            "count": ("captions", "occurrences"),
            "order": ("static", "remaining"),
            "draw": ("all", "unpooled", "top_up"),
            "unavailable": ("before", "after"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"filter setting {name} = '{getattr(self, name)}'; choose one of {', '.join(known)}")
        for name, least in {"min_frequency": 0, "cap": 1, "max_words": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"filter setting {name} = {value}; write {least} or more")


def settings_from(values: Mapping[str, Any]) -> FilterSettings:
    """Make settings of names and values, as a command line gives them.

    Raises:
        ConfigError: a name is unknown or a value has the wrong type.
    """
    known = {entry.name: entry.default for entry in fields(FilterSettings)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"no filter setting '{name}'; choose one of {', '.join(known)}")
        wanted = int if name == "max_words" else type(known[name])
        if type(value) is not wanted and not (name == "max_words" and value is None):
            raise ConfigError(f"filter setting {name} = {value!r}: write {wanted.__name__}, e.g. {known[name]!r}")
    return FilterSettings(**values)


class Row(NamedTuple):
    """A line of the TSV: its number from 0, caption, URL, and the image's file name."""

    number: int
    caption: str
    url: str
    image: str

    @property
    def id(self) -> str:
        """The record's name in the released files."""
        return f"GCC_train_{self.number:09d}"


def read_captions(path: str | Path) -> Iterator[Row]:
    """Read the official TSV line by line.

    Args:
        path: `caption <tab> url` per line; a third column may name the image (default `GCC_train_<9 digits>.jpg`).

    Yields:
        One row per line.

    Raises:
        DataError: the file is missing, or a line has another form; the message names line and fix.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                try:
                    cells = line.decode().rstrip("\r\n").split("\t")
                    if len(cells) not in (2, 3) or not all(map(str.strip, cells)):
                        raise ValueError(f"{len(cells)} tab-separated cells{'' if all(cells) else ', some empty'}")
                except ValueError as error:  # bytes that are not UTF-8 are one too
                    raise DataError(
                        f"{shown(path)}, line {number + 1}: {error}; a line is caption, url and perhaps an image file, "
                        "in UTF-8: correct or remove it"
                    ) from error
                yield Row(number, cells[0], cells[1], cells[2] if len(cells) == 3 else f"GCC_train_{number:09d}.jpg")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{shown(path)}: no such file; give the TSV of captions") from error


# ------------------------------------------------------------------------------------------------ noun phrases


def normalize(phrase: str, settings: FilterSettings) -> str:
    """Return the form under which a phrase is counted, or an empty string for one that is left out."""
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
    """Which phrase occurs in which caption, as pairs of numbers sorted by caption.

    Attributes:
        phrases: the unique phrases in the order of their first appearance.
        captions: how many captions were read.
        rows, ids: one entry per caption and phrase in it, int32.
        again: the entries (positions in `rows`) of second and further occurrences within a caption, with repetition.
        extractor: how the phrases were found.
    """

    phrases: list[str]
    captions: int
    rows: Integers
    ids: Integers
    again: Integers
    extractor: str


def phrase_table(captions: Iterable[str] | Phrases, settings: FilterSettings | None = None) -> PhraseTable:
    """Normalise and number noun phrases.

    Args:
        captions: captions, whose phrases are found here; or phrases that were found before.
        settings: how the recipe is read.
    """
    settings = settings or FilterSettings()
    found = captions if isinstance(captions, Phrases) else extract(captions, extractor_named(settings.phrases))
    numbers: dict[str, int] = {}
    known: dict[str, int] = {}  # as written -> number, so that each spelling is normalised once
    columns: list[tuple[Integers, Integers, Integers]] = []
    captions_read = entries = 0
    for shard in found:
        for phrase in shard.phrases:
            if phrase not in known:
                form = normalize(phrase, settings)
                known[phrase] = numbers.setdefault(form, len(numbers)) if form else -1
        own = np.fromiter(map(known.__getitem__, shard.phrases), np.int32, len(shard.phrases))
        rows, ids, again = _entries(np.repeat(np.arange(len(shard.lengths)), shard.lengths), own[shard.codes])
        columns.append(((rows + captions_read).astype(np.int32), ids, (again + entries).astype(np.int32)))
        captions_read, entries = captions_read + len(shard.lengths), entries + len(ids)
    rows, ids, again = map(np.concatenate, zip(*columns, strict=True)) if columns else [np.zeros(0, np.int32)] * 3
    return PhraseTable(list(numbers), captions_read, rows, ids, again, found.extractor.name)


def _entries(rows: Integers, ids: Integers) -> tuple[Integers, Integers, Integers]:
    """Drop phrases numbered -1 and keep the first of those that a caption has twice; say whose the others were."""
    rows, ids = rows[ids >= 0], ids[ids >= 0]
    order = np.lexsort((ids, rows))  # stable: the first occurrence of a pair stays first
    opens = np.ones(len(order), bool)
    opens[1:] = (np.diff(rows[order]) != 0) | (np.diff(ids[order]) != 0)
    first = np.zeros(len(order), bool)
    first[order[opens]] = True
    position = np.cumsum(first) - 1
    group = np.cumsum(opens) - 1
    return rows[first], ids[first], position[order[opens][group[~opens]]]


# ------------------------------------------------------------------------------------------------ selection


@dataclass(frozen=True)
class Selection:
    """The outcome of the filter.

    Attributes:
        pooled: per caption, whether it was chosen.
        before: per phrase, its frequency in all (available) captions.
        after: per phrase, its frequency in the chosen ones; 0 for phrases below the least frequency.
        kept: per phrase, whether it is frequent enough.
    """

    table: PhraseTable
    pooled: Mask
    before: Integers
    after: Integers
    kept: Mask

    @property
    def frequencies_before(self) -> dict[str, int]:
        """Frequency of every phrase before filtering, most frequent first (Figure 7)."""
        return self._sorted(self.before, self.before > 0)

    @property
    def frequencies_after(self) -> dict[str, int]:
        """Frequency of every kept phrase in the chosen captions, in the order of `frequencies_before` (Figure 7)."""
        return self._sorted(self.after, self.kept)

    def _sorted(self, values: Integers, mask: Mask) -> dict[str, int]:
        return {self.table.phrases[k]: int(values[k]) for k in np.argsort(-self.before, kind="stable") if mask[k]}

    def counts(self) -> dict[str, int]:
        """The numbers that the paper gives: unique phrases, those kept, chosen pairs; and the captions read."""
        return {
            "captions": self.table.captions,
            "phrases": int((self.before > 0).sum()),
            "phrases_kept": int(self.kept.sum()),
            "pairs_kept": int(self.pooled.sum()),
        }


def select(table: PhraseTable, settings: FilterSettings | None = None, available: Mask | None = None) -> Selection:
    """Choose captions so that frequent concepts do not drown rare ones.

    Args:
        table: the phrases of the captions.
        settings: how the recipe is read.
        available: per caption, whether its image can be used; None for all.

    Returns:
        The chosen captions and the frequencies before and after.

    Source: paper, appendix E.
    """
    settings = settings or FilterSettings()
    usable = np.ones(table.captions, bool) if available is None else np.asarray(available, bool)
    counted = usable if settings.unavailable == "before" else np.ones(table.captions, bool)
    before = _frequencies(table, counted, settings)
    kept = before >= max(1, settings.min_frequency)
    pooled = _walk(table, kept[table.ids] & counted[table.rows], before, kept, settings) & usable
    after = np.where(kept, _frequencies(table, pooled, settings), 0)
    return Selection(table, pooled, before, after, kept)


def _frequencies(table: PhraseTable, captions: Mask, settings: FilterSettings) -> Integers:
    entries = np.flatnonzero(captions[table.rows])
    if settings.count == "occurrences":
        entries = np.concatenate([entries, table.again[captions[table.rows[table.again]]]])
    return np.bincount(table.ids[entries], minlength=len(table.phrases))


def _walk(table: PhraseTable, entries: Mask, before: Integers, kept: Mask, settings: FilterSettings) -> Mask:
    """Walk through the kept phrases and fill the pool; each entry (caption, phrase) is touched a few times only."""
    rows, ids, total = table.rows[entries], table.ids[entries], len(table.phrases)
    members = rows[np.argsort(ids, kind="stable")]  # captions of phrase p: members[bounds[p] : bounds[p + 1]]
    remaining = np.bincount(ids, minlength=total)
    bounds = np.concatenate([[0], np.cumsum(remaining)])
    pooled = np.zeros(table.captions, bool)

    def take(phrase: int) -> Integers:
        """Add the captions of one phrase; return those that are new to the pool."""
        captions = members[bounds[phrase] : bounds[phrase + 1]]
        fresh = captions[~pooled[captions]]
        pick, size = (fresh, settings.cap) if settings.draw == "unpooled" else (captions, settings.cap)
        if len(pick) > size:
            if settings.draw == "top_up":
                pick, size = fresh, max(0, size - (len(captions) - len(fresh)))
            if size < len(pick):
                # a generator of the phrase's own: its draw does not depend on what was drawn before
                own = np.random.default_rng([settings.seed, zlib.crc32(table.phrases[phrase].encode())])
                pick = own.choice(pick, size, replace=False)
        fresh = pick[~pooled[pick]]
        pooled[fresh] = True
        return fresh

    if settings.order == "static" or settings.draw == "all":  # with `all` every order ends in the same pool
        walk = np.argsort(before, kind="stable")
        walk = walk[kept[walk]]
        large = remaining[walk] > settings.cap
        # up to the first phrase above the cap there is nothing to draw, so all their captions go at once
        easy = large if settings.draw == "all" else np.logical_or.accumulate(large)
        small = np.zeros(total, bool)
        small[walk[~easy]] = True
        pooled[rows[small[ids]]] = True
        for phrase in walk[easy]:
            take(phrase)
        return pooled
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=table.captions))])  # of a caption, in `ids`
    # how many captions of each waiting phrase are left, in blocks whose minima are kept: the next is found in two looks
    done, width = np.iinfo(np.int64).max // 2, BLOCK
    left = np.full((-(-total // width), width), done)
    flat = left.reshape(-1)
    flat[np.flatnonzero(kept)] = remaining[kept]
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


# ------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Filtered:
    """A filtered TSV.

    Attributes:
        source: the TSV.
        settings: how the recipe was read.
        selection: what was chosen.
        phrases: the noun phrases as written, for another reading of the recipe.
        available: per caption, whether its image can be used; None: not looked at, and so is `coverage`.
        coverage: of the images.
    """

    source: Path
    settings: FilterSettings
    selection: Selection
    phrases: Phrases
    available: Mask | None
    coverage: Coverage | None

    def report(self) -> dict[str, Any]:
        """Counts, extractor, settings and coverage as plain values."""
        return {
            **self.selection.counts(),
            "extractor": self.selection.table.extractor,
            "coverage": asdict(self.coverage) if self.coverage else None,
            "settings": asdict(self.settings),
        }


def filter_captions(
    captions: str | Path,
    images: str | Path | None = None,
    settings: FilterSettings | None = None,
    decode: bool = True,
    cache: str | Path | None = None,
    processes: int | None = None,
) -> Filtered:
    """Filter a TSV of captions without writing pairs.

    Args:
        captions: the TSV.
        images: folder of the images; rows without a readable one are reported, not chosen. None: no image is opened.
        settings: how the recipe is read.
        decode: decode each image rather than only look for its file.
        cache: folder where found phrases and what was seen of images are kept, so that a killed run goes on and another
            reading of the recipe parses nothing. None: one process finds them, in memory.
        processes: how many look and find where there is a cache; None for one per core.
    """
    captions, settings = Path(captions), settings or FilterSettings()
    extractor = extractor_named(settings.phrases)
    load_instructions(settings.instructions)  # a list that cannot be read is known before hours of parsing
    available = coverage = None
    if images is not None:
        seen = None if cache is None else Path(cache) / "images"
        names = (row.image for row in read_captions(captions))
        available, coverage = look_at_images(names, images, decode, seen, 1 if cache is None else processes)

    def texts() -> Iterator[str]:
        return (row.caption for row in read_captions(captions))

    if cache is None:
        phrases = extract(progress(texts(), "noun phrases", unit=" captions"), extractor)
    else:
        phrases = extract_file(texts, captions, extractor, Path(cache), processes)
    selection = select(phrase_table(phrases, settings), settings, available)
    return Filtered(captions, settings, selection, phrases, available, coverage)


def chosen_pairs(filtered: Filtered) -> Iterator[tuple[Row, str]]:
    """Give each chosen row with the human's turn: a random wording, the image on a random side of it."""
    chosen = filtered.selection.pooled
    # drawn for all rows, chosen or not: a record reads the same whatever else is chosen
    generator = np.random.default_rng([filtered.settings.seed, zlib.crc32(b"instructions")])
    instructions = load_instructions(filtered.settings.instructions)
    number = generator.integers(len(instructions), size=len(chosen))
    image_last = generator.random(len(chosen)) < 0.5  # paper, equation 2: [question, image] or [image, question]
    for row in read_captions(filtered.source):
        if chosen[row.number]:
            text = instructions[number[row.number]]
            yield row, f"{text}\n{IMAGE_MARKER}" if image_last[row.number] else f"{IMAGE_MARKER}\n{text}"


def write_pairs(filtered: Filtered, out: str | Path) -> dict[str, Any]:
    """Write the chosen pairs as `chat.json` and `metadata.json` in the released format, `pairs.parquet`, `report.json`.

    Each file is written whole or not at all, record by record: memory does not grow with their number.

    Returns:
        The report, with the paths of the files; `parquet` is None where pyarrow is not installed.
    """
    out = Path(out)
    names = {"chat": "chat.json", "metadata": "metadata.json"}
    if importlib.util.find_spec("pyarrow"):
        names["parquet"] = "pairs.parquet"
    with ExitStack() as stack:
        chat, metadata = (stack.enter_context(json_list(out / names[name])) for name in ("chat", "metadata"))
        columns = ("id", "image", "question", "caption", "url")
        table = stack.enter_context(parquet(out / names["parquet"], columns)) if "parquet" in names else None
        for row, question in chosen_pairs(filtered):
            named = {"id": row.id, "image": row.image}
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": row.caption}]
            chat({**named, "conversations": turns})
            # the released file adds a caption by BLIP, which the filter does not have
            metadata({**named, "caption": row.caption, "blip_caption": None, "url": row.url})
            if table is not None:
                table({**named, "question": question, "caption": row.caption, "url": row.url})
    files = {"parquet": None, **{name: shown(out / file) for name, file in names.items()}}
    report = {**filtered.report(), **files}
    write_json(out / "report.json", report)
    return report


def filter_file(
    captions: str | Path,
    out: str | Path,
    images: str | Path | None = None,
    settings: FilterSettings | None = None,
    decode: bool = True,
    cache: str | Path | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Filter a TSV and write the chosen pairs: what `llava filter` does.

    Args:
        captions, images, settings, decode, processes: see `filter_captions`.
        out: where the files go.
        cache: where found phrases are kept; None: the folder `phrases` in `out`.

    Returns:
        `captions`, `phrases`, `phrases_kept`, `pairs_kept`, `extractor`, `coverage`, `settings`, and the paths written.
    """
    cache = Path(out) / "phrases" if cache is None else cache
    return write_pairs(filter_captions(captions, images, settings, decode, cache, processes), out)
