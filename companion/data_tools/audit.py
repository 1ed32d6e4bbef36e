"""Audit of instruction data: duplicates, leaks of the annotation text, unsupported objects."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from companion.data_tools.coco import AnnotatedImage
from companion.data_tools.expansion import LISTS
from companion.data_tools.objects import Vocabulary, unsupported
from llava_core.constants import IMAGE_MARKER
from llava_core.data.instruct import Sample
from llava_core.runtime import DataError

MAX_EXAMPLES = 5
NEAR = 0.9  # minimum Jaccard similarity of the word triples of two nearly identical dialogues
LEAK = "a text with"  # prefix of the names of these faults
LEAKS = {
    "a word on captions": r"\bcaption(?:s|ed)?\b",
    "a word on bounding boxes": r"\bbounding[ -]box(?:es)?\b",
    "a word on coordinates": r"\bcoordinates\b|\b(?:a|the) coordinate\b",  # people "coordinate" a game, too
    "a word on annotations": r"\bannotat(?:ed|ions?|ors?)\b",
    "a word on the given sentences": r"\b(?:the|these|given|provided) (?:sentences|descriptions)\b",
    "numbers like 0.123": r"(?<![\w.])0\.\d{2,3}(?!\d)",
}


def plain(question: str) -> str:
    return question.replace(IMAGE_MARKER, "").strip()


def kind_of(sample: Sample) -> str:
    return sample.kind or "unknown"


@dataclass(frozen=True)
class Fault:
    """Counts of one fault.

    Attributes:
        unit: what is counted: turns, texts, answers, records.
        of, counts: kind -> number of examined and of faulty units.
        examples: the first ones, `{kind, record, text}`.
    """

    name: str
    unit: str
    of: dict[str, int]
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, sample: Sample, text: str) -> None:
        kind = kind_of(sample)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append({"kind": kind, "record": sample.id, "text": text})

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def row(self) -> dict[str, Any]:
        examined = sum(self.of.values())
        by_kind = {k: {"found": self.counts.get(k, 0), "of": n} for k, n in self.of.items()}
        numbers = {"found": self.total, "of": examined, "percent": 100 * self.total / examined if examined else 0.0}
        return {"fault": self.name, "unit": self.unit, **numbers, "by_kind": by_kind, "examples": self.examples}


def find_faults(
    samples: Sequence[Sample], annotated: Sequence[AnnotatedImage] | None = None, folder: Path | None = None
) -> list[Fault]:
    """Count duplicates, leaks, and (if `annotated`) objects that neither captions nor boxes have.

    `folder`: folder of the images, if the samples' paths contain it. Raises DataError if none of the samples' images is
    annotated.
    """
    faults = [*_duplicates(samples), *_leaks(samples)]
    return faults if annotated is None else [*faults, _objects(samples, annotated, folder)]


def _tally(samples: Iterable[Sample], each: int | None = None) -> dict[str, int]:
    """Kind -> number of turns times `each`, or of records if `each` is None."""
    counts: Counter[str] = Counter()
    for sample in samples:
        counts[kind_of(sample)] += 1 if each is None else each * len(sample.turns)
    return dict(sorted(counts.items()))


def _duplicates(samples: Sequence[Sample]) -> Iterator[Fault]:
    turns = _tally(samples, 1)
    repeated = Fault("the same turn about the same image", "turns", turns)
    elsewhere = Fault("the same question and answer about another image", "turns", turns)
    seen: set[tuple[Path | None, str, str]] = set()
    images: dict[tuple[str, str], set[Path | None]] = defaultdict(set)
    for sample in samples:
        for question, answer in sample.turns:
            turn = (sample.image, plain(question), answer)
            if turn in seen:
                repeated.add(sample, f"{turn[1]} {answer}")
            seen.add(turn)
            images[turn[1:]].add(sample.image)
    for sample in samples:
        for question, answer in sample.turns:
            if len(images[plain(question), answer]) > 1:
                elsewhere.add(sample, f"{plain(question)} {answer}")
    near = Fault("a dialogue nearly identical to an earlier one", "records", _tally(samples))
    texts = (" ".join(text for question, answer in s.turns for text in (plain(question), answer)) for s in samples)
    for place, earlier in near_duplicates(texts):
        near.add(samples[place], f"like {kind_of(samples[earlier])} {samples[earlier].id}")
    yield from (repeated, elsewhere, near)


def near_duplicates(texts: Iterable[str]) -> list[tuple[int, int]]:
    """Pairs of texts whose word triples have a Jaccard similarity of at least `NEAR`: (index, index of an earlier one).

    MinHash with 4 bands of 4 finds the candidates (it misses one of 70 pairs with a similarity of 0.9), which are then
    compared in full. Case and punctuation do not count.
    """
    rng = np.random.default_rng(0)
    multipliers = rng.integers(1, 2**63, (1, 16), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    originals: dict[int, np.ndarray] = {}
    bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    pairs = []
    for place, text in enumerate(texts):
        triples = _triples(text)
        lowest = (triples[:, None] * multipliers).min(0)
        keys = [(k, lowest[4 * k : 4 * k + 4].tobytes()) for k in range(4)]
        for other in dict.fromkeys(other for key in keys for other in bands.get(key, ())):
            shared = len(np.intersect1d(triples, originals[other], assume_unique=True))
            if shared >= NEAR * (len(triples) + len(originals[other]) - shared):
                pairs.append((place, other))
                break
        else:  # a text similar to an earlier one is no candidate itself
            originals[place] = triples
            for key in keys:
                bands[key].append(place)
    return pairs


def _triples(text: str) -> np.ndarray:
    """Hashes of the word triples, (n,) uint64, sorted and unique."""
    words = re.findall(r"\w+", text.lower())
    hashes = np.array([zlib.crc32(word.encode(errors="replace")) for word in ["", "", *words]], np.uint64)
    mixed = hashes[:-2] * np.uint64(0x9E3779B1) + hashes[1:-1] * np.uint64(0x85EBCA77) + hashes[2:]
    return np.unique(mixed) if words else np.zeros(1, np.uint64)


def _leaks(samples: Sequence[Sample]) -> Iterator[Fault]:
    patterns = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in LEAKS.items()}
    faults = {name: Fault(f"{LEAK} {name}", "texts", _tally(samples, 2)) for name in LEAKS}
    requests = {wording for wordings in LISTS.values() for wording in wordings}  # "Give this image a caption."
    for sample in samples:
        for turn in sample.turns:
            for text in map(plain, turn):
                for name, pattern in patterns.items():
                    if (hit := pattern.search(text)) and text not in requests:
                        faults[name].add(sample, f"… {text[max(0, hit.start() - 40) : hit.end() + 40]} …")
    yield from faults.values()


def image_key(name: str) -> str:
    """An image's name without the prefix of COCO 2014, as records and annotations share it."""
    return re.sub(r"(^|/)COCO_[a-z]+\d{4}_(?=\d{12}\.)", r"\1", name)


def _objects(samples: Sequence[Sample], annotated: Sequence[AnnotatedImage], folder: Path | None) -> Fault:
    vocabulary = Vocabulary(category for image in annotated for category, _ in image.boxes)
    known = {image_key(image.image): image for image in annotated}
    supported: dict[str, set[str]] = {}
    examined: Counter[str] = Counter()
    fault = Fault("an answer names an object that no caption and no box has", "answers", {})
    for sample in samples:
        if sample.image is None:
            continue
        name = sample.image.relative_to(folder) if folder and sample.image.is_relative_to(folder) else sample.image
        image = known.get(key := image_key(name.as_posix()))
        if image is None:
            continue
        if key not in supported:
            named = (vocabulary.named(caption) for caption in image.captions)
            supported[key] = {category for category, _ in image.boxes}.union(*named)
        examined[kind_of(sample)] += len(sample.turns)
        for question, answer in sample.turns:
            if extra := unsupported(vocabulary, question, answer, supported[key]):
                fault.add(sample, f"{', '.join(extra.values())}: {plain(question)} {answer}"[:200])
    if not examined:
        first = next((s.image for s in samples if s.image is not None), None)
        raise DataError(
            f"annotations: none of the {len(known)} annotated images is one of the records', whose names are like "
            f"{first and first.name}; annotated is e.g. {next(iter(known), None)}: give the annotations of these images"
        )
    fault.of.update(sorted(examined.items()))
    return fault


def questions_of(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """Kind -> its questions, without image markers."""
    questions: dict[str, list[str]] = defaultdict(list)
    for sample in samples:
        questions[kind_of(sample)] += (plain(question) for question, _ in sample.turns)
    return dict(sorted(questions.items()))


def kind_rows(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    by_kind: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_kind[kind_of(sample)].append(sample)
    rows = []
    for kind, own in sorted(by_kind.items()):
        turns = [(plain(question), answer) for sample in own for question, answer in sample.turns]
        sides = {"question": [question for question, _ in turns], "answer": [answer for _, answer in turns]}
        row = {"kind": kind, "records": len(own), "images": len({sample.image for sample in own} - {None})}
        row["turns per record"] = len(turns) / len(own)
        row |= {f"words per {side}": sum(len(t.split()) for t in texts) / len(turns) for side, texts in sides.items()}
        rows.append(row | {f"different {side}s": len(set(texts)) for side, texts in sides.items()})
    return rows
