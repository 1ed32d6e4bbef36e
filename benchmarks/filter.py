"""The CC3M filter at the paper's size: selection by cached phrases, and noun phrases against a plain spaCy loop."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common import Clock, circumstances, in_own_process, in_turns, peak_mib
from companion import miniature
from companion.data_tools import cc3m
from companion.data_tools.phrases import SHARD, extractor_named, shard_key
from llava_core.runtime import fingerprint, resolve, write_json

CAPTIONS = 3_318_333  # of CC3M's training file
# Zipf-Mandelbrot over so many possible phrases: 3.3M captions then have about the 890,000 different ones that a reader
# of the paper counted in CC3M (issue 1176 of haotian-liu/LLaVA)
POSSIBLE, EXPONENT, SHIFT = 4_000_000, 1.12, 2.7
PER_CAPTION = (1, 4, 0.475)  # 1 + binomial(4, 0.475) phrases, 2.9 on average: assumed, no source gives it for CC3M
ARTICLES = ("", "a ", "the ")
COLUMNS = (
    "case", "captions", "phrases", "pairs", "processes", "ours", "peer", "ratio", "ratio_low", "ratio_high", "peak_mib",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ selection


def plant_corpus(folder: Path, captions: int = CAPTIONS, seed: int = 0) -> Path:
    """Write a TSV of Zipf-distributed phrases, and in the folder `cache` the shards of its phrases."""
    rng = np.random.default_rng(seed)
    weights = np.cumsum((np.arange(POSSIBLE) + SHIFT) ** -EXPONENT)
    source = folder / "train.tsv"
    parts = folder / "parts"
    parts.mkdir(parents=True)
    with open(source, "w", encoding="utf-8") as file:
        for number, begin in enumerate(range(0, captions, SHARD)):
            rows = min(SHARD, captions - begin)
            lengths = (PER_CAPTION[0] + rng.binomial(*PER_CAPTION[1:], rows)).astype(np.int32)
            ranks = np.searchsorted(weights, rng.random(int(lengths.sum())) * weights[-1])
            which = ranks * len(ARTICLES) + rng.choice(len(ARTICLES), len(ranks), p=(0.5, 0.3, 0.2))
            words = iter([_name(int(k)) for k in which])
            phrases = [[next(words) for _ in range(length)] for length in lengths.tolist()]
            (parts / f"{number:06d}.json").write_text(json.dumps(phrases))
            for row, names in enumerate(phrases):
                text = " and ".join(names)
                file.write(f"{text} .\thttps://example.org/{begin + row}.jpg\n")
    facts = shard_key(source, extractor_named("rules"))
    home = folder / "cache" / fingerprint(facts)
    home.parent.mkdir()
    parts.rename(home)
    write_json(home / "done.json", {**facts, "captions": captions, "shards": -(-captions // SHARD)})
    return source


def _name(which: int) -> str:
    rank, article = divmod(which, len(ARTICLES))
    return f"{ARTICLES[article]}style{rank % 1999} thing{rank // 1999}"


def select_kept(source: str, write: bool = False, **settings: Any) -> dict[str, Any]:
    """Count and select by cached phrases, and write the pairs if asked; seconds, counts and peak memory."""
    path = Path(source)
    result: dict[str, Any] = {}
    filter_settings = cc3m.FilterSettings("rules", **settings)

    def work() -> None:
        begin = time.perf_counter()
        filtered = cc3m.filter_captions(path, None, filter_settings, cache=path.parent / "cache")
        if write:
            cc3m.write_pairs(filtered, path.parent / "out")
        result.update(filtered.selection.counts(), seconds=time.perf_counter() - begin)

    peak = peak_mib(work, torch.device("cpu"))
    return {**result, "peak_mib": peak}


def bench_selection(captions: int = CAPTIONS, corpus: Path | None = None) -> list[dict[str, Any]]:
    """Time counting and selection of a corpus of CC3M's size, in processes of their own; a row per setting.

    Args:
        captions: lines of the corpus.
        corpus: folder that keeps it; None: a temporary folder.
    """
    cases: dict[str, dict[str, Any]] = {
        "select": {},
        "select top_up remaining": {"draw": "top_up", "order": "remaining"},
        "select unpooled remaining": {"draw": "unpooled", "order": "remaining"},
        "select and write": {"write": True},
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        home = corpus or Path(folder) / "corpus"
        source = home / "train.tsv" if (home / "cache").exists() else plant_corpus(home, captions)
        for case, settings in cases.items():
            result = in_own_process("benchmarks.filter:select_kept", source=str(source), **settings)
            rows.append(
                _row(
                    case=case, captions=result["captions"], phrases=result["phrases"], pairs=result["pairs_kept"],
                    processes=1, ours=result["seconds"], peak_mib=round(result["peak_mib"]),
                )
            )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------ noun phrases


def varied_captions(source: Path, count: int, seed: int = 0) -> list[str]:
    """Different captions of about ten words, like CC3M's, each from two of the miniature."""
    short = sorted({row.caption.rstrip(" .") for row in cc3m.read_captions(source)})
    rng, captions = random.Random(seed), dict[str, None]()
    while len(captions) < count:
        captions[f"{rng.choice(short)} near {rng.choice(short)} ."] = None
    return list(captions)


def bench_extraction(source: Path, captions: int = 2000, rounds: int = 5, clock: Clock = "cpu") -> dict[str, Any]:
    """Time noun phrases by our extractor against a plain `nlp.pipe` loop over the full pipeline, in one process.

    Raises:
        AssertionError: the phrases differ.
    """
    import importlib

    extractor = extractor_named("spacy")
    texts, find = varied_captions(source, captions), extractor.start()
    parser = importlib.import_module(str(extractor.package)).load()

    def ours() -> list[list[str]]:
        return list(find(texts))

    def peer() -> list[list[str]]:
        return [[chunk.text for chunk in parsed.noun_chunks] for parsed in parser.pipe(texts)]

    assert ours() == peer()
    turns = in_turns(ours, peer, rounds, clock)
    return _row(case=f"noun phrases, {clock} time", captions=captions, processes=1, **turns)


def _row(**values: Any) -> dict[str, Any]:
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
    return {**dict.fromkeys(COLUMNS), **rounded, **circumstances(torch.device("cpu"))}


Part = Literal["selection", "extraction"]


def bench_filter(
    only: Sequence[Part] = ("selection", "extraction"),
    captions: int = CAPTIONS,
    corpus: Path | None = None,
    source: Path | None = None,
) -> dict[str, Any]:
    """Time counting and selection at the paper's size, and noun phrases against a plain spaCy loop.

    Args:
        only: selection of pairs by cached phrases; extraction of noun phrases.
        captions: lines of the synthetic corpus.
        corpus: folder that keeps the synthetic corpus, or already has it.
        source: captions to parse; None: those of mini-cc3m.
    """
    if source is None and set(only) != {"selection"}:
        miniature.ensure(only=["mini-cc3m"])
    file = source or resolve("data/mini/mini-cc3m/Train_GCC-training.tsv")
    rows: list[dict[str, Any]] = []
    if "selection" in only:
        rows += bench_selection(captions, corpus)
    if "extraction" in only:
        rows.append(bench_extraction(file))
    return {"cases": rows}
