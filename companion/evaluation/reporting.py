"""Reporting rules: what a failed answer counts for, in one table per benchmark.

A failed answer has no score: no choice can be read from it, the judge gave no two scores, or an image has no caption.
The paper does not say what such answers count for, and its code changed the rule. Under each rule the score is another
number, so every benchmark is reported under all of them:

as wrong: a failed answer has the lowest score. excluded: it is left out of the mean. at expected luck: it has the score
that is expected without any knowledge. as released: what the authors' script does, where that is none of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from companion.evaluation.captions import compare, read_files, score, score_with_bounds
from companion.evaluation.llava_bench import (
    CATEGORY_PREFIX,
    FAILED,
    HIGHEST,
    LOWEST,
    Reviews,
    relative_score,
    review_rows,
    review_scores,
    score_reviews,
    summarize_repeats,
)
from companion.evaluation.statistics import SAMPLES, estimate, item_counts, proportion, wilson
from llava_core.runtime import DataError, fingerprint

WRONG, EXCLUDED, LUCK, RELEASED = "as wrong", "excluded", "at expected luck", "as released"
RULES = (WRONG, EXCLUDED, LUCK)


def accuracy_rules(correct: int, n: int, luck: Sequence[float]) -> list[dict[str, Any]]:
    """Return the accuracy under each rule.

    Args:
        correct: right answers among `n`.
        luck: of each failed answer, the probability that a random choice is right; 0 for one that no rule draws.

    Returns:
        Rows of rule, failed, n (answers in the mean), accuracy and interval (Wilson), in percent.
    """
    expected = correct + math.fsum(luck)
    low, high = wilson(math.floor(expected), n)[0], wilson(min(n, math.ceil(expected)), n)[1]
    drawn = {"n": n, "accuracy": 100 * expected / n if n else None, "interval": [100 * low, 100 * high]}
    results = (proportion(correct, n), proportion(correct, n - len(luck)), drawn)
    return [
        {"rule": rule, "failed": len(luck), **{key: result[key] for key in ("n", "accuracy", "interval")}}
        for rule, result in zip(RULES, results, strict=True)
    ]


def relative_score_rules(reviews: Reviews, samples: int = SAMPLES) -> list[dict[str, Any]]:
    """Return the relative score of LLaVA-Bench under each rule.

    As wrong, the candidate of a failed review has the judge's lowest score and the reference its own mean; at expected
    luck, both have the middle of the scale; as released, both have -1.

    Returns:
        Rows of rule, failed, n (reviews in the means), score and interval (bootstrap over reviews), in percent; None
        where nothing is left to score.
    """
    _, rows = review_rows(reviews)
    read = [review_scores(row) for row in rows]
    pairs = [pair for pair in read if pair is not None]
    failed = len(read) - len(pairs)
    mean = sum(pair[0] for pair in pairs) / len(pairs) if pairs else HIGHEST
    middle = (LOWEST + HIGHEST) / 2
    completed: dict[str, list[tuple[float, float]]] = {
        WRONG: [pair or (mean, LOWEST) for pair in read],
        EXCLUDED: pairs,
        LUCK: [pair or (middle, middle) for pair in read],
        RELEASED: [review_scores(row, released=True) or FAILED for row in rows],
    }
    result = []
    for rule, scores in completed.items():
        found: dict[str, Any] = {"value": None, "interval": None}
        if scores:
            found = estimate(relative_score(item_counts(len(scores), samples), np.array(scores)))
        lost = scores.count(FAILED) if rule == RELEASED else failed  # its script reads fewer forms
        row = {"rule": rule, "failed": lost, "n": len(scores), "score": found["value"]}
        result.append(row | {"interval": found["interval"]})
    return result


def caption_rules(references: Mapping[Any, Sequence[str]], captions: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Return BLEU-4 and CIDEr (in the scorer's units) under each rule; an image without a caption is a failure.

    As wrong, its caption is empty; at expected luck, it is that of another image.

    Returns:
        Rows of rule, failed, n (images), bleu4, cider and interval (of CIDEr, bootstrap over images).
    """
    if not captions:
        raise DataError("no caption to score")
    missing = [key for key in references if key not in captions]
    others = list(captions.values())
    drawn = {key: others[k % len(others)] for k, key in enumerate(missing)}
    result = []
    for rule, added in ((WRONG, dict.fromkeys(missing, "")), (EXCLUDED, {}), (LUCK, drawn)):
        own = {**captions, **added}
        scored, ends = score(references, own), compare(references, own)
        row = {"rule": rule, "failed": len(missing), "n": scored["n"], "bleu4": scored["bleu4"]}
        result.append(row | {"cider": scored["cider"], "interval": ends["cider"]["interval"]})
    return result


def review_report(reviews: Reviews, *, released: bool = False) -> dict[str, Any]:
    """Return `llava_bench.score_reviews` with `reporting`, the rows of `relative_score_rules`."""
    return {**score_reviews(reviews, released=released), "reporting": relative_score_rules(reviews)}


def repeats(paths: Sequence[str | Path], *, released: bool = False) -> dict[str, Any]:
    """Return `{repeats, files, notes}` of repeated reviews of one bench; `notes` are on files that are the same.

    Raises:
        DataError: a file is given twice, or two files have different questions or categories: they are no repeats.
    """
    results: dict[str, Any] = {}
    questions: dict[str, dict[str, str]] = {}
    contents: dict[str, str] = {}
    notes = []
    for path in paths:
        name, rows = review_rows(path)
        if name in results:
            raise DataError(f"{name}: given twice; a repeat is another review of the same questions")
        results[name] = review_report(rows, released=released)
        questions[name] = {
            str(row.get("question_id", number)): str(row.get("category", "")).removeprefix(CATEGORY_PREFIX)
            for number, row in enumerate(rows, start=1)
        }
        content = fingerprint(
            [[str(row.get(key)) for key in ("question_id", "order", "content", "tuple")] for row in rows]
        )
        if (same := contents.setdefault(content, name)) != name:
            notes.append(f"{name} has the same reviews as {same}: it is a copy, and no repeat.")
    _check_same_bench(questions)
    files = [{"file": name, **result} for name, result in results.items()]
    return {"repeats": summarize_repeats(list(results.values())), "files": files, "notes": notes}


def _check_same_bench(questions: Mapping[str, Mapping[str, str]]) -> None:
    """Raise DataError if two files have different questions or categories."""
    (first, own), *others = questions.items()
    for file, ids in others:
        if different := sorted(own.keys() ^ ids.keys()):
            raise DataError(
                f"{file} reviews {len(ids)} questions and {first} {len(own)}; {len(different)} are in one of the "
                f"two only ({', '.join(key[:40] for key in different[:3])}): give repeats of the same bench, or score "
                "each alone"
            )
        if other := [key for key in ids if ids[key] != own[key]]:
            raise DataError(
                f"{file}: question {other[0]} is '{ids[other[0]]}', in {first} '{own[other[0]]}' ({len(other)} "
                "such): give repeats of the same bench, or score each alone"
            )


def caption_report(references: str | Path, predictions: str | Path, limit: int | None = None) -> dict[str, Any]:
    """Score a COCO result file (rows of image_id, caption; one per image) against COCO's `captions_*.json`.

    Returns `captions.score_with_bounds` with `reporting`, the rows of `caption_rules`; None if no caption is missing.
    """
    files = read_files(references, predictions, limit)
    result = score_with_bounds(*files)
    rules = caption_rules(*files) if result["missing"] else None
    return {**result, "reporting": rules}


def format_rules(rows: Sequence[Mapping[str, Any]], scale: float = 1.0) -> str:
    """Return the rows of a benchmark as a text table; `scale` is multiplied with scores and intervals."""
    names = [name for name in ("accuracy", "score", "bleu4", "cider") if name in rows[0]]
    lines = [f"{rows[0]['failed']} failed answers, counted"]
    for row in rows:
        values = ["   none" if row[name] is None else f"{scale * row[name]:7.2f}" for name in names]
        low, high = row["interval"] or (math.nan, math.nan)
        ends = "" if row["interval"] is None else f"   {scale * low:.2f} to {scale * high:.2f}"
        lost = "" if row["failed"] == rows[0]["failed"] else f"   {row['failed']} failed"
        lines.append(f"  {row['rule']:17} n {row['n']:5}  {' '.join(values)}{ends}{lost}")
    return "\n".join(lines)
