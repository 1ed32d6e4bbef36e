"""What is wrong with instruction data, counted, and the data card that says so: `llava data audit`.

Everything is computed from the file, from the log of the requests that made it, and from the images' annotations; no
clock and no chance is involved, so the same data give the same card.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from companion.data_tools.coco import AnnotatedImage, load_annotations
from companion.data_tools.expansion import LISTS
from companion.data_tools.objects import Vocabulary, unsupported
from companion.data_tools.verbs import Verbs, root_verbs
from llava_core.constants import IMAGE_MARKER
from llava_core.data.instruct import Sample, load_instruct
from llava_core.runtime import (
    ConfigError,
    DataError,
    atomic_write,
    read_json,
    read_jsonl,
    sha256_file,
    shown,
    write_json,
)

CARD, TWIN = "DATA_CARD.md", "audit.json"
MAKER = "llava data audit"  # in the twin: a card beside it is ours
EXAMPLES = 5
NEAR = 0.9  # of the word triples that either of two nearly identical dialogues has, least share that both have
LEAK = "a text with"  # begins the name of each fault of this sort
LEAKS = {
    "a word on captions": r"\bcaption(?:s|ed)?\b",
    "a word on bounding boxes": r"\bbounding[ -]box(?:es)?\b",
    "a word on coordinates": r"\bcoordinates\b|\b(?:a|the) coordinate\b",  # people "coordinate" a game, too
    "a word on annotations": r"\bannotat(?:ed|ions?|ors?)\b",
    "a word on the given sentences": r"\b(?:the|these|given|provided) (?:sentences|descriptions)\b",
    "numbers like 0.123": r"(?<![\w.])0\.\d{2,3}(?!\d)",
}
"""What betrays that a writer saw text and not an image."""

_RELEASED = {
    "about": "LLaVA-Instruct, as released with the paper",
    "license": "CC BY NC 4.0; the texts come from GPT-4, so OpenAI's terms of use hold too",
    "images": "COCO 2014, named as in COCO 2017; each image under the license that COCO's files name for it",
}
RELEASED = dict.fromkeys(
    (
        "llava_instruct_150k.json", "llava_instruct_80k.json", "conversation_58k.json", "detail_23k.json",
        "complex_reasoning_77k.json",
    ),
    _RELEASED,
)  # fmt: skip
"""What is known of a released file by its name.

Source: the model and data cards of LLaVA v1.
"""


def plain(question: str) -> str:
    """Return a question without its image marker."""
    return question.replace(IMAGE_MARKER, "").strip()


def kind_of(sample: Sample) -> str:
    """Return a sample's kind, `unknown` where its record names none."""
    return sample.kind or "unknown"


# ------------------------------------------------------------------------------------------------ faults


@dataclass(frozen=True)
class Fault:
    """How often something is wrong.

    Attributes:
        name: what.
        unit: what is counted: turns, texts, answers, records.
        of: kind -> how many were looked at.
        found: kind -> how many have it.
        examples: the first few, `{kind, record, text}`.
    """

    name: str
    unit: str
    of: dict[str, int]
    found: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, sample: Sample, text: str) -> None:
        """Count one."""
        kind = kind_of(sample)
        self.found[kind] = self.found.get(kind, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append({"kind": kind, "record": sample.id, "text": text})

    @property
    def total(self) -> int:
        """How many there are in all kinds."""
        return sum(self.found.values())

    def row(self) -> dict[str, Any]:
        """Return name and numbers, by kind and in percent, as JSON holds them."""
        looked = sum(self.of.values())
        by_kind = {k: {"found": self.found.get(k, 0), "of": n} for k, n in self.of.items()}
        numbers = {"found": self.total, "of": looked, "percent": 100 * self.total / looked if looked else 0.0}
        return {"fault": self.name, "unit": self.unit, **numbers, "by_kind": by_kind, "examples": self.examples}


def find_faults(
    samples: Sequence[Sample], annotated: Sequence[AnnotatedImage] | None = None, folder: Path | None = None
) -> list[Fault]:
    """Count duplicates, leaks, and objects that nothing supports.

    Args:
        samples: all records.
        annotated: what is known of the images; without it objects are not looked for.
        folder: of the images, where the samples' paths begin with it.

    Returns:
        The faults, those that were not found too.

    Raises:
        DataError: none of the samples' images is annotated.
    """
    faults = [*_duplicates(samples), *_leaks(samples)]
    return faults if annotated is None else [*faults, _objects(samples, annotated, folder)]


def _tally(samples: Iterable[Sample], each: int | None = None) -> dict[str, int]:
    """Kind -> turns, times `each`; or records where that is None."""
    counts: Counter[str] = Counter()
    for sample in samples:
        counts[kind_of(sample)] += 1 if each is None else each * len(sample.turns)
    return dict(sorted(counts.items()))


def _duplicates(samples: Sequence[Sample]) -> Iterator[Fault]:
    turns = _tally(samples, 1)
    again = Fault("the same turn about the same image", "turns", turns)
    elsewhere = Fault("the same question and answer about another image", "turns", turns)
    seen: set[tuple[Path | None, str, str]] = set()
    images: dict[tuple[str, str], set[Path | None]] = defaultdict(set)
    for sample in samples:
        for question, answer in sample.turns:
            turn = (sample.image, plain(question), answer)
            if turn in seen:
                again.add(sample, f"{turn[1]} {answer}")
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
    yield from (again, elsewhere, near)


def near_duplicates(texts: Iterable[str]) -> list[tuple[int, int]]:
    """Find texts that are nearly the same as an earlier one: at least `NEAR` of their word triples are in both.

    Candidates are found by MinHash, 4 bands of 4 (a pair that shares nine tenths is overlooked once in 70 times), and
    compared in full. Case and punctuation do not count.

    Args:
        texts: read once.

    Returns:
        (place of the text, place of the first earlier one found), in order.
    """
    rng = np.random.default_rng(0)
    multipliers = rng.integers(1, 2**63, (1, 16), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    kept: dict[int, np.ndarray] = {}
    bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    found = []
    for place, text in enumerate(texts):
        triples = _triples(text)
        lowest = (triples[:, None] * multipliers).min(0)
        keys = [(k, lowest[4 * k : 4 * k + 4].tobytes()) for k in range(4)]
        for other in dict.fromkeys(other for key in keys for other in bands.get(key, ())):
            shared = len(np.intersect1d(triples, kept[other], assume_unique=True))
            if shared >= NEAR * (len(triples) + len(kept[other]) - shared):
                found.append((place, other))
                break
        else:  # one that is like an earlier text need not stand for itself
            kept[place] = triples
            for key in keys:
                bands[key].append(place)
    return found


def _triples(text: str) -> np.ndarray:
    """A hash of each three words in a row, (n,) uint64, sorted and different."""
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
    """Return an image's name as records and annotations share it: without the prefix that COCO 2014 has."""
    return re.sub(r"(^|/)COCO_[a-z]+\d{4}_(?=\d{12}\.)", r"\1", name)


def _objects(samples: Sequence[Sample], annotated: Sequence[AnnotatedImage], folder: Path | None) -> Fault:
    vocabulary = Vocabulary(category for image in annotated for category, _ in image.boxes)
    known = {image_key(image.image): image for image in annotated}
    supported: dict[str, set[str]] = {}
    looked: Counter[str] = Counter()
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
        looked[kind_of(sample)] += len(sample.turns)
        for question, answer in sample.turns:
            if extra := unsupported(vocabulary, question, answer, supported[key]):
                fault.add(sample, f"{', '.join(extra.values())}: {plain(question)} {answer}"[:200])
    if not looked:
        first = next((s.image for s in samples if s.image is not None), None)
        raise DataError(
            f"annotations: none of the {len(known)} annotated images is one of the records', which are called like "
            f"{first and first.name}; annotated is e.g. {next(iter(known), None)}: give the annotations of these images"
        )
    fault.of.update(sorted(looked.items()))
    return fault


# ------------------------------------------------------------------------------------------------ the whole


def audit_file(
    path: str | Path,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Audit a file of instruction records.

    Args:
        path: LLaVA-Instruct JSON, JSONL or parquet.
        annotations: captions and boxes of the images, as `load_annotations` reads them; None: objects are not looked
            for.
        images: folder of the images; None: no image is looked for.
        cache: where what the parser found is kept.

    Returns:
        What `summary` returns. Root verbs are left out, and `verbs_missing` says why, where no parser is installed.

    Raises:
        DataError: the file has problems, or the annotations are others'.
    """
    path, folder = Path(path), Path(images) if images is not None else None
    samples = load_instruct(path, folder)
    faults = find_faults(samples, None if annotations is None else load_annotations(annotations), folder)
    try:
        verbs, missing = root_verbs(questions_of(samples), path, cache), None
    except ConfigError as error:
        verbs, missing = None, str(error)
    result = summary(path, samples, faults, verbs, annotations)
    return result | ({"verbs_missing": missing} if missing else {})


def questions_of(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """Return the questions of each kind, without image markers."""
    questions: dict[str, list[str]] = defaultdict(list)
    for sample in samples:
        questions[kind_of(sample)] += (plain(question) for question, _ in sample.turns)
    return dict(sorted(questions.items()))


def kind_rows(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Return one row per kind: records, images, turns and words."""
    by_kind: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_kind[kind_of(sample)].append(sample)
    rows = []
    for kind, own in sorted(by_kind.items()):
        turns = [(plain(question), answer) for sample in own for question, answer in sample.turns]
        words = {
            f"words per {side}": sum(len(turn[k].split()) for turn in turns) / len(turns)
            for k, side in enumerate(("question", "answer"))
        }
        row = {"kind": kind, "records": len(own), "images": len({sample.image for sample in own} - {None})}
        row |= {"turns per record": len(turns) / len(own), **words}
        rows.append(row | {f"different {side}s": len({turn[k] for turn in turns}) for k, side in _SIDES})
    return rows


_SIDES = ((0, "question"), (1, "answer"))


def summary(
    path: Path,
    samples: Sequence[Sample],
    faults: Sequence[Fault],
    verbs: Mapping[str, Verbs] | None,
    annotations: str | Path | None = None,
    tokens: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Put together what is known of a data set: what its card is written from.

    Args:
        path: the audited file; `provenance.jsonl` and `failures.jsonl` of `llava generate` are read from beside it.
        samples: its records.
        faults: what `find_faults` found.
        verbs: what `root_verbs` found, or None.
        annotations: where the annotations are from; a `card.json` there names the images' license.
        tokens: kind -> numbers on the length of its token sequences.

    Returns:
        A JSON object: maker, file, sha256, records, images, turns, source, teacher (None without a log), kinds, tokens,
        faults and verbs.
    """
    log = path.parent / "provenance.jsonl"
    rows = [row for row in read_jsonl(log) if isinstance(row, dict) and "request" in row] if log.is_file() else []
    failures = path.parent / "failures.jsonl"
    return {
        "maker": MAKER,
        "file": _portable(path),
        "sha256": sha256_file(path),
        "annotations": None if annotations is None else _portable(Path(annotations)),
        "records": len(samples),
        "images": len({sample.image for sample in samples} - {None}),
        "turns": sum(len(sample.turns) for sample in samples),
        "source": _source(path, annotations, bool(rows)),
        "teacher": _teacher(rows, len(read_jsonl(failures)) if failures.is_file() else 0) if rows else None,
        "kinds": kind_rows(samples),
        "tokens": None if tokens is None else {kind: dict(numbers) for kind, numbers in tokens.items()},
        "faults": [fault.row() for fault in faults],
        "verbs": None
        if verbs is None
        else {
            kind: {**found.found, "pairs": [[*pair, n] for pair, n in found.pairs.items()]}
            for kind, found in verbs.items()
        },
    }


def _portable(path: Path) -> str:
    """A path as it may stand in a card: from the repository on, or the name alone."""
    return path.name if Path(shown(path.absolute())).is_absolute() else shown(path.absolute())


def _source(path: Path, annotations: str | Path | None, logged: bool) -> dict[str, str]:
    """What is known of texts and images, and under which licenses they are."""
    unknown = "not stated in the file; ask whoever made it"
    source = {"about": unknown, "license": unknown, "images": unknown}
    if logged:
        source["about"] = "written by a teacher that read captions and boxes; each of its replies is logged"
        source["license"] = "that of the captions and boxes, and the terms of the teacher named below"
    elif path.name in RELEASED:
        source = dict(RELEASED[path.name])
    place = None if annotations is None else Path(annotations)
    cards = [folder / "card.json" for folder in (place, place.parent, place.parent.parent)] if place else []
    card: Any = next((read_json(file) for file in cards if file.is_file()), {})
    if isinstance(card, dict) and {"name", "about", "license"} <= card.keys():
        source["images"] = f"{card['name']}: {card['about']} License: {card['license']}"
    return source


def _teacher(rows: Sequence[Mapping[str, Any]], failures: int) -> dict[str, Any]:
    """The log of requests in numbers."""

    def different(key: str) -> list[Any]:
        return sorted({str(row[key]) for row in rows if row.get(key) is not None})

    prompts: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        prompts[str(row.get("type"))].add(str(row.get("prompt")))
    dates = different("date")
    sums = {key: sum(row.get(key) or 0 for row in rows) for key in ("prompt_tokens", "completion_tokens", "cost_usd")}
    return {
        "models": dict(sorted(Counter(str(row.get("model")) for row in rows).items())),
        "asked_for": different("asked_model"),
        "clients": different("client"),
        "replies": len(rows),
        "refused_replies": failures,
        **sums,
        "usd_per_million_tokens": sorted({tuple(row["price"]) for row in rows if row.get("price")}),
        "temperature": different("temperature"),
        "prompts": {kind: sorted(versions) for kind, versions in sorted(prompts.items())},
        "dates": [dates[0], dates[-1]] if dates else None,
    }


# ------------------------------------------------------------------------------------------------ the card


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([_number(v) for v in row.values()] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def card_text(audit: Mapping[str, Any]) -> str:
    """Write the data card of what `summary` or `audit_file` returned, as Markdown."""
    source, teacher, faults = audit["source"], audit["teacher"], audit["faults"]
    dates = teacher and teacher["dates"]
    facts = {
        "what": source["about"],
        "size": f"{audit['records']:,} records, {audit['turns']:,} turns, {audit['images']:,} images",
        "images": source["images"],
        "license": source["license"],
        "file": f"`{audit['file']}`, SHA-256 `{audit['sha256'][:16]}`",
        "date": " to ".join(dict.fromkeys(date[:10] for date in dates)) if dates else "not recorded",
    }
    lines = ["# Data card", "", *_table([{"": key, " ": text} for key, text in facts.items()])]
    lines += ["## What is in it", "", *_table(audit["kinds"])]
    if audit["tokens"]:
        lines += ["Tokens per record:", "", *_table([{"kind": k, **row} for k, row in audit["tokens"].items()])]
    lines += ["## How it was made", "", *_made(teacher)]
    lines += ["## What was found", ""]
    columns = ("fault", "found", "of", "unit", "percent")
    lines += _table([{key: fault[key] for key in columns} for fault in faults])
    for fault in (fault for fault in faults if fault["found"]):
        kinds = ", ".join(f"{kind} {n['found']:,} of {n['of']:,}" for kind, n in fault["by_kind"].items())
        first = fault["examples"][0]
        lines.append(f"- **{fault['fault']}**: {kinds}. Such as {first['kind']} `{first['record']}`.")
    if not any(fault["found"] for fault in faults):
        lines.append("None of these was found.")
    if audit["annotations"] is None:
        lines.append("- Objects that nothing supports were not looked for: no annotations were given.")
    lines += ["", "## What is asked", "", *_asked(audit), "", *_LIMITS, "", "## Make it again", ""]
    command = f"llava data audit {audit['file']}"
    command += f" --annotations {audit['annotations']}" if audit["annotations"] else ""
    made = "Prompts' versions and requests' keys are in `provenance.jsonl`, beside the records. " * bool(teacher)
    return "\n".join([*lines, f"{made}This card:", "", "```bash", command, "```", ""])


_LIMITS = (
    "## What the audit cannot see",
    "",
    "Objects are looked for among the annotations' categories, by name, plural and everyday words, and colors, counts, "
    "places and everything else that an answer claims are not compared. An object counts as supported if a box or a "
    'caption has it. What stands behind "no", "not" or "without" in a sentence is not counted, nor what a question '
    "asks about whose answer begins with a no. General remarks (\"umbrellas keep people dry\") do count, so for "
    "reasoning the number is an upper bound.",
)  # fmt: skip


def _made(teacher: Mapping[str, Any] | None) -> list[str]:
    if teacher is None:
        return ["No log of requests lies beside the file.", ""]
    models = ", ".join(f"{model} ({n:,} replies)" for model, n in teacher["models"].items())
    facts = {
        "teacher": models,
        "asked for": ", ".join(teacher["asked_for"]),
        "through": ", ".join(teacher["clients"]),
        "refused replies": teacher["refused_replies"],
        "tokens": f"{teacher['prompt_tokens']:,} of prompts, {teacher['completion_tokens']:,} of replies",
        "price": "; ".join(f"{a:g} and {b:g}" for a, b in teacher["usd_per_million_tokens"])
        + " USD per million tokens of prompt and reply",
        "paid": f"{teacher['cost_usd']:,.2f} USD",
        "temperature": ", ".join(teacher["temperature"]),
        "prompts": "; ".join(f"{kind} `{', '.join(keys)}`" for kind, keys in teacher["prompts"].items()),
    }
    return _table([{"": key, " ": value} for key, value in facts.items()])


def _asked(audit: Mapping[str, Any]) -> list[str]:
    if audit["verbs"] is None:
        return [f"Root verbs were not looked for. {audit.get('verbs_missing', '')}".strip()]
    rows = []
    for kind, found in audit["verbs"].items():
        common = ", ".join(f"{verb} {noun} ({n:,})" for verb, noun, n in found["pairs"][:5])
        rows.append({"kind": kind, **{k: n for k, n in found.items() if k != "pairs"}, "commonest": common or "–"})
    return _table(rows)


def write_card(audit: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write `DATA_CARD.md` and its numbers, `audit.json`, into a folder.

    Args:
        audit: what `summary` or `audit_file` returned.
        folder: where; made if needed.

    Returns:
        The two files.

    Raises:
        DataError: a card lies there that is not ours, or is that of another file.
    """
    card, twin = Path(folder) / CARD, Path(folder) / TWIN
    for file in (card, twin):
        if file.exists() and not is_ours(twin):
            raise DataError(f"{shown(file)}: written by somebody else, so it is not replaced; name another folder")
    if twin.exists() and (other := read_json(twin).get("file")) != audit["file"]:
        raise DataError(f"{shown(card)}: the card of {other}, so it is not replaced; name another folder")
    return [write_json(twin, audit), atomic_write(card, card_text(audit))]


def is_ours(twin: Path) -> bool:
    """Whether a file is an `audit.json` of this module."""
    try:
        content = read_json(twin)
    except DataError:
        return False
    return isinstance(content, dict) and content.get("maker") == MAKER
