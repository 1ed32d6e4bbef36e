"""Relative scores of LLaVA-Bench with bootstrap intervals: of one system, their difference, and their ratio."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from companion.evaluation.llava_bench import (
    CATEGORY_PREFIX,
    Reviews,
    relative_score,
    review_rows,
    review_scores,
    score_reviews,
)
from companion.evaluation.statistics import SAMPLES, estimate, item_counts, ratio, seeds_interval
from companion.paper.verdict import verdict_of_interval
from llava_core.runtime import DataError

SEVERAL = 2.0
"""A score is "several times" another one if the whole interval of their ratio is above this."""


@dataclass
class QuestionScores:
    """By question: mean scores of reference and candidate, and the ids of the two answers where reviews name them."""

    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    answer_ids: dict[str, tuple[str, ...]] = field(default_factory=dict)
    failed: int = 0  # reviews without scores


def question_scores(reviews: Reviews) -> QuestionScores:
    """Group reviews by question.

    Raises:
        DataError: no question ids, or reviews of two different answers to one question.
    """
    where, rows = review_rows(reviews)
    result, scores = QuestionScores(), defaultdict[str, list[tuple[float, float]]](list)
    for number, row in enumerate(rows, start=1):
        if "question_id" not in row:
            raise DataError(f"{where}, line {number}: no question_id; reviews are compared by question")
        key, pair = str(row["question_id"]), review_scores(row)
        ids = tuple(str(row[name]) for name in ("answer1_id", "answer2_id") if row.get(name))
        if len(ids) == 2 and result.answer_ids.setdefault(key, ids) != ids:
            raise DataError(f"{where}, line {number}: question {key} has reviews of two answers; score them separately")
        if pair is None:
            result.failed += 1
        else:
            scores[key].append(pair)
    for key, pairs in scores.items():
        reference, candidate = np.mean(pairs, axis=0).tolist()
        result.scores[key] = reference, candidate
    return result


def common_questions(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the questions that both have scores for, at least two."""
    keys = [key for key in first if key in second]
    if len(keys) < 2:
        raise DataError(f"{len(keys)} questions have scores in both sets of reviews; at least two are needed")
    return keys


def image_counts(
    keys: Sequence[str], images: Mapping[Any, str] | None, samples: int = SAMPLES, seed: int = 0
) -> np.ndarray:
    """Return `item_counts` of questions (1 + samples, n), those about one image resampled together.

    Args:
        images: question id -> image; None: every question by itself.

    Raises:
        DataError: a question has no image.
    """
    if images is None:
        return item_counts(len(keys), samples, seed)
    names, image_index = np.unique(_images_of(keys, images), return_inverse=True)
    return item_counts(len(names), samples, seed)[:, image_index]


def _images_of(keys: Sequence[str], images: Mapping[Any, str]) -> list[str]:
    image_of = {str(key): image for key, image in images.items()}
    if absent := [key for key in keys if key not in image_of]:
        raise DataError(f"question {absent[0]} has no image; give reviews and images of the same questions")
    return [image_of[key] for key in keys]


def relative_scores(
    reviews: Sequence[Mapping[str, Any]], images: Mapping[Any, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Return category -> `{n, failed, value, interval}` in %, of the rows of `llava_bench.judge`; also for `all`.

    The value is 100 x mean candidate / mean reference without failed reviews, the interval a bootstrap over images
    (question id -> image), or without them over reviews.
    """
    summary, result = score_reviews(reviews), {}
    for name, value in {"all": summary["all"], **summary["categories"]}.items():
        rows = [r for r in reviews if name in ("all", str(r["category"]).removeprefix(CATEGORY_PREFIX))]
        scored = [r for r in rows if r["tuple"]]
        pairs = np.array([r["tuple"] for r in scored], dtype=float).reshape(-1, 2)
        counts = image_counts([str(r["question_id"]) for r in scored], images)
        interval = estimate(relative_score(counts, pairs))["interval"]
        result[name] = {"n": len(pairs), "failed": len(rows) - len(pairs), "value": value, "interval": interval}
    return result


def relative_difference(
    first: Reviews,
    second: Reviews,
    paired: bool = True,
    samples: int = SAMPLES,
    seed: int = 0,
    images: Sequence[Mapping[Any, str] | None] = (None, None),
) -> dict[str, Any]:
    """Return the relative score of a second set of reviews minus that of a first, in points.

    Args:
        first: JSONL path or rows of reviews, like `second`, by the same judge.
        paired: both answered the same questions, which are resampled together; else each set by itself.
        images: of either set, as for `image_counts`.

    Returns:
        n (questions of each), first and second (relative scores in %), difference, interval.

    Raises:
        DataError: not reviews, or fewer than two questions to compare.
    """
    tables = [question_scores(reviews).scores for reviews in (first, second)]
    keys = [common_questions(*tables)] * 2 if paired else [common_questions(table, table) for table in tables]
    values = []
    for k, (table, own) in enumerate(zip(tables, keys, strict=True)):
        counts = image_counts(own, images[k], samples, seed if paired else seed + k)
        values.append(relative_score(counts, np.array([table[key] for key in own])))
    change, (one, other) = estimate(values[1] - values[0]), (estimate(value)["value"] for value in values)
    return {"n": [len(own) for own in keys], "first": one, "second": other, "difference": change["value"],
            "interval": change["interval"]}  # fmt: skip


def times_over(more: Sequence[Reviews], less: Sequence[Reviews], images: Mapping[Any, str]) -> dict[str, Any]:
    """Return how many times a system's relative score is that of another, as `times_over_scores`, from reviews.

    Args:
        more: reviews of the system with the higher score, per seed; like `less`, by the same judge.
        images: question id -> image.

    Raises:
        DataError: also for a question without an image, or fewer than two questions that are scored everywhere.
    """
    tables = [[question_scores(reviews).scores for reviews in runs] for runs in (more, less)]
    keys = [key for key in tables[0][0] if all(key in table for runs in tables for table in runs)]
    if len(keys) < 2:
        raise DataError(f"{len(keys)} questions are scored everywhere; give reviews of the same questions")
    first, second = (np.array([[table[key] for key in keys] for table in runs]) for runs in tables)
    return times_over_scores(first, second, _images_of(keys, images))


def times_over_scores(more: np.ndarray, less: np.ndarray, images: Sequence[str]) -> dict[str, Any]:
    """Return how many times a system's relative score is that of another, and whether that is "several times".

    Args:
        more: (seeds, questions, 2), the judge's scores of reference and candidate.
        less: the same of the other system: as many seeds, or one run that every seed is compared with.
        images: of each question; questions about one image are resampled together.

    Returns:
        n (questions), n_images, n_seeds, times (mean relative score of `more` over that of `less`), interval (the
        widest of the bootstrap over images and, with two or more seeds, Student's t of the logarithm over seeds),
        verdict on "several times": whether the interval lies above `SEVERAL`.

    Raises:
        DataError: numbers of seeds that cannot be paired, or a relative score of 0.
    """
    if len(less) not in (1, len(more)):
        raise DataError(f"{len(more)} and {len(less)} seeds cannot be paired; give one or equal numbers of runs")
    questions = [str(k) for k in range(len(images))]
    counts = image_counts(questions, dict(zip(questions, images, strict=True)))
    values = [
        np.array([relative_score(counts, run, rounded=False) for run in runs]) for runs in (more, less)
    ]  # (seeds, 1 + samples)
    result = estimate(ratio(values[0].mean(0), values[1].mean(0)))
    if not all(table[:, 0].min() > 0 for table in values):
        raise DataError("a relative score is 0; a ratio of it is not defined")
    interval = result["interval"]
    if len(more) > 1:
        of_seeds = np.log(values[0][:, 0] / values[1][:, 0])  # one run of `less` is compared with every seed
        over_seeds = np.exp(seeds_interval(of_seeds.tolist())["interval"])
        interval = [min(interval[0], float(over_seeds[0])), max(interval[1], float(over_seeds[1]))]
    return {
        "n": len(images),
        "n_images": len(set(images)),
        "n_seeds": len(more),
        "times": result["value"],
        "interval": interval,
        "verdict": verdict_of_interval([end - SEVERAL for end in interval], "above 0"),
    }
