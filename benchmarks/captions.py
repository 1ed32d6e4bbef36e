"""Caption scores against pycocoevalcap: the same numbers on the same tokens, and what our tokenizer changes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import circumstances
from companion import miniature
from companion.evaluation.captions import bleu, cider, tokenize
from llava_core.runtime import CompanionError, read_json, read_jsonl

SCORES = ("differ", "bleu4", "bleu4_ptb", "cider", "cider_ptb", "error")
Captions = list[list[str]]


def peer_scores(tokens: list[list[list[str]]]) -> list[float]:
    """BLEU-1 to 4 and CIDEr-D of pycocoevalcap's own classes; of each image the first caption is the candidate."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    texts = [[" ".join(caption) for caption in captions] for captions in tokens]
    references, candidates = ({k: own[part] for k, own in enumerate(texts)} for part in (slice(1, None), slice(1)))
    with contextlib.redirect_stdout(io.StringIO()):
        scores = Bleu(4).compute_score(references, candidates, verbose=0)[0]
    return [*map(float, scores), float(Cider().compute_score(references, candidates)[0])]


def our_scores(tokens: list[list[list[str]]]) -> list[float]:
    """The same with our code."""
    references, candidates = [captions[1:] for captions in tokens], [captions[0] for captions in tokens]
    return [*bleu(references, candidates), sum(cider(references, candidates)) / len(tokens)]


def ptb_tokens(texts: list[str]) -> list[list[str]]:
    """The scorer's own tokens, by Stanford's Java program."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokens = PTBTokenizer().tokenize({k: [{"caption": text}] for k, text in enumerate(texts)})
    return [tokens[k][0].split() for k in range(len(texts))]


def measure(case: str, captions: Captions) -> dict[str, Any]:
    """One row; `captions` by image, or a single text each, of which only tokens are compared."""
    texts = [text for own in captions for text in own]
    ours = [tokenize(text) for text in texts]
    row: dict[str, Any] = {**circumstances(torch.device("cpu")), "case": case, "images": len(captions)}
    row |= {"texts": len(texts)} | dict.fromkeys(SCORES)
    theirs = ptb_tokens(texts) if shutil.which("java") else None
    if theirs is not None:
        row["differ"] = sum(a != b for a, b in zip(ours, theirs, strict=True))
    if any(len(own) < 2 for own in captions):
        return row

    def by_image(tokens: list[list[str]]) -> list[list[list[str]]]:
        left = iter(tokens)
        return [[next(left) for _ in own] for own in captions]

    scored, peer = our_scores(by_image(ours)), peer_scores(by_image(ours))
    row |= {"bleu4": scored[3], "cider": scored[4], "error": max(abs(a - b) for a, b in zip(scored, peer, strict=True))}
    if theirs is not None:
        row["bleu4_ptb"], row["cider_ptb"] = peer_scores(by_image(theirs))[3:]
    return row


def bench_captions(coco: Path | None = None, texts: Sequence[Path] = ()) -> dict[str, Any]:
    """Compare BLEU and CIDEr-D with pycocoevalcap's on the same tokens, and both tokenizers.

    Args:
        coco: JSONL of images with `captions`, as LLaVA-Bench has it.
        texts: JSONL files with `text`, `content` or `output`, of which only tokens are compared.

    Raises:
        CompanionError: pycocoevalcap is not installed (not a dependency: mostly Java archives of other scores).
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise CompanionError("pycocoevalcap is not installed; fix: pip install pycocoevalcap")
    annotated = read_json(miniature.ensure(only=["mini-coco"]) / "mini-coco/annotations/captions_val2014.json")
    by_image: dict[int, list[str]] = {}
    for entry in annotated["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry["caption"])
    cases: dict[str, Captions] = {"mini-coco val": list(by_image.values())}
    if coco:
        cases["COCO val2014"] = [row["captions"] for row in read_jsonl(coco)]
    for path in texts:
        cases[path.stem] = [[row.get("text") or row.get("content") or row["output"]] for row in read_jsonl(path)]
    rows = [measure(case, captions) for case, captions in cases.items()]
    return {"cases": rows, "same_scores": all((row["error"] or 0) <= 1e-6 for row in rows)}
