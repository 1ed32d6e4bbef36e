"""Two sets of reviews compared: how far two judges agree on the same answers, how far two systems lie apart.

The judge of the paper cannot be asked any more, so a score of today comes from another one. What such a swap does is
measured on answers that both have judged. Every interval comes from drawing the questions again with replacement.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from companion.evaluation.llava_bench import review_rows, review_scores
from companion.evaluation.resampling import SAMPLES, draws, summary
from llava_core.runtime import DataError

Reviews = str | Path | Iterable[Mapping[str, Any]]
VERDICTS = ("win", "tie", "loss")  # of the candidate over the reference


def question_scores(reviews: Reviews) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Return the mean scores of reference and candidate by question, over its good reviews; and what else is known.

    Returns:
        Question id -> (reference, candidate); `{failed, ids}`: reviews without scores, and question id -> the ids of
        the two answers where the reviews tell them.

    Raises:
        DataError: the file is missing, empty or holds something else than reviews with question ids.
    """
    where, rows = review_rows(reviews)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    ids: dict[str, tuple[str, ...]] = {}
    failed = 0
    for number, row in enumerate(rows, start=1):
        if "question_id" not in row:
            raise DataError(f"{where}, line {number}: no question_id; two sets of reviews are compared by it")
        key, scores = str(row["question_id"]), review_scores(row)
        named = tuple(str(row[name]) for name in ("answer1_id", "answer2_id") if row.get(name))
        if len(named) == 2 and ids.setdefault(key, named) != named:
            raise DataError(f"{where}, line {number}: question {key} has reviews of two answers; score them apart")
        if scores is None:
            failed += 1
        else:
            found[key].append(scores)
    means = {key: np.mean(scores, axis=0).tolist() for key, scores in found.items()}
    return {key: (reference, candidate) for key, (reference, candidate) in means.items()}, {
        "failed": failed,
        "ids": ids,
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotient, nan where the divisor is 0 up to rounding."""
    whole = below > 1e-9
    return np.where(whole, above / np.where(whole, below, 1.0), np.nan)


def _spearman(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    ranks = []
    for x in (a, b):
        below, equal = (x[:, None] < x[None, :]).astype(float), (x[:, None] == x[None, :]).astype(float)
        rank = weights @ (below + equal / 2)  # of each question in every draw, ties with their mean rank
        ranks.append(rank - (weights * rank).sum(1, keepdims=True) / np.maximum(weights.sum(1, keepdims=True), 1))
    (va, vb, both) = ((weights * x * y).sum(1) for x, y in ((ranks[0],) * 2, (ranks[1],) * 2, ranks))
    return _ratio(both, np.sqrt(va * vb))


def _kendall(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    signs = [np.sign(x[:, None] - x[None, :]) for x in (a, b)]

    def pairs(sign: np.ndarray) -> np.ndarray:
        total: np.ndarray = ((weights @ sign) * weights).sum(1)
        return total

    untied = pairs(signs[0] ** 2) * pairs(signs[1] ** 2)
    return _ratio(pairs(signs[0] * signs[1]), np.sqrt(untied))


def _kappa(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cohen's kappa of two classifications, and the share on which they agree."""
    n = weights.sum(1)
    same = weights @ (a == b) / n
    chance = sum((weights @ (a == k)) * (weights @ (b == k)) for k in np.unique([a, b])) / n**2
    return _ratio(same - chance, 1 - chance), same


def agreement(first: Reviews, second: Reviews, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """Compare two judges, or two repeats of one judge, on the same answers.

    Args:
        first: JSONL path or rows of reviews.
        second: another judge's.
        samples: resamples of the questions.
        seed: of the resampling.

    Returns:
        n (questions that both have scored), only_first and only_second (questions that one alone has scored), failed
        (reviews without scores of each), same_answers (True; None where the files do not tell which answers they
        judged); for the scores of `reference` and `candidate` and for `ratio` (candidate / reference by question, in
        %): n, spearman, kendall (tau-b) and shift (mean of the second minus the first); relative_score: first, second
        (each the ratio of means over the common questions, in %) and shift; verdicts (win, tie or loss of the
        candidate): kappa, same (share on which the two agree) and table (first's verdict -> second's -> questions).
        Each number has a value and an interval of 95 %; both are None where it is not defined, as is the correlation
        with a judge who always gives the same score.

    Raises:
        DataError: a file is not of reviews, the two judged other answers, or have fewer than two questions in common.
    """
    (scores, known), (others, other_known) = question_scores(first), question_scores(second)
    keys = _common(scores, others)
    told = [key for key in keys if key in known["ids"] and key in other_known["ids"]]
    different = [key for key in told if known["ids"][key] != other_known["ids"][key]]
    if different:
        raise DataError(
            f"question {different[0]}: the two judged other answers ({len(different)} such questions); give reviews of "
            "the same answers, or compare systems with `relative_difference`"
        )
    a, b = (np.array([table[key] for key in keys]) for table in (scores, others))  # (n, reference and candidate)
    weights = draws(len(keys), samples, seed)
    rated = (a[:, 0] > 0) & (b[:, 0] > 0)
    quotients = [100 * x[rated, 1] / x[rated, 0] for x in (a, b)]
    columns = {"reference": (a[:, 0], b[:, 0]), "candidate": (a[:, 1], b[:, 1]), "ratio": (quotients[0], quotients[1])}
    found: dict[str, Any] = {
        "n": len(keys),
        "only_first": len(scores.keys() - others.keys()),
        "only_second": len(others.keys() - scores.keys()),
        "failed": [known["failed"], other_known["failed"]],
        "same_answers": True if len(told) == len(keys) else None,
    }
    for name, (x, y) in columns.items():
        own = weights if name != "ratio" else weights[:, rated]
        shift = _ratio(own @ (y - x), own.sum(1))
        found[name] = {
            "n": len(x), "spearman": summary(_spearman(own, x, y)), "kendall": summary(_kendall(own, x, y)),
            "shift": summary(shift),
        }  # fmt: skip
    relative = [_relative(weights, table) for table in (a, b)]
    found["relative_score"] = {
        "first": summary(relative[0]), "second": summary(relative[1]), "shift": summary(relative[1] - relative[0])
    }  # fmt: skip
    verdicts = [np.sign(x[:, 0] - x[:, 1]).astype(int) + 1 for x in (a, b)]  # places in VERDICTS
    kappa, same = _kappa(weights, *verdicts)
    pairs = list(zip(*verdicts, strict=True))
    table = {v: {w: pairs.count((i, j)) for j, w in enumerate(VERDICTS)} for i, v in enumerate(VERDICTS)}
    found["verdicts"] = {"kappa": summary(kappa), "same": summary(same), "table": table}
    return found


def relative_difference(
    first: Reviews, second: Reviews, paired: bool = True, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Return how many points of the relative score the second set of reviews lies above the first.

    Args:
        first: JSONL path or rows of reviews.
        second: of another system, judged on the same questions by the same judge; or of other questions.
        paired: over the questions in common, drawn alike for both; else each set by itself.
        samples: resamples of the questions.
        seed: of the resampling.

    Returns:
        n (questions of each), first and second (relative scores in %), difference, interval.

    Raises:
        DataError: a file is not of reviews, or there are fewer than two questions to compare.
    """
    tables = [question_scores(reviews)[0] for reviews in (first, second)]
    keys = [_common(*tables)] * 2 if paired else [_common(table, table) for table in tables]
    values = []
    for k, (table, own) in enumerate(zip(tables, keys, strict=True)):
        scores = np.array([table[key] for key in own])
        values.append(_relative(draws(len(own), samples, seed if paired else seed + k), scores))
    ends = summary(values[1] - values[0])
    named = {name: summary(value)["value"] for name, value in zip(("first", "second"), values, strict=True)}
    return {"n": [len(own) for own in keys], **named, "difference": ends["value"], "interval": ends["interval"]}


def _relative(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Relative score in % of every draw; scores (n, reference and candidate)."""
    return 100 * _ratio(weights @ scores[:, 1], weights @ scores[:, 0])


def _common(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    keys = [key for key in first if key in second]
    if len(keys) < 2:
        raise DataError(f"{len(keys)} questions with scores in both sets of reviews; at least two are needed")
    return keys


def format_agreement(found: Mapping[str, Any]) -> str:
    """Return a comparison of two judges as lines of text."""

    def line(label: str, number: Mapping[str, Any], unit: str = "") -> str:
        if number["value"] is None:
            return f"{label:30} not defined"
        low, high = number["interval"]
        return f"{label:30} {number['value']:.3f}{unit}  ({low:.3f} to {high:.3f})"

    lines = [
        f"{found['n']} questions in common, {found['only_first']} only in the first and {found['only_second']} only in "
        f"the second; reviews without scores: {found['failed'][0]} and {found['failed'][1]}"
    ]
    for name in ("candidate", "reference", "ratio"):
        for what in ("spearman", "kendall", "shift"):
            lines.append(line(f"{name}, {what}", found[name][what], " %" if (name, what) == ("ratio", "shift") else ""))
    lines += [line(f"relative score, {name}", found["relative_score"][name], " %") for name in found["relative_score"]]
    lines += [line(f"win, tie or loss, {name}", found["verdicts"][name]) for name in ("kappa", "same")]
    return "\n".join(lines)


__all__: Sequence[str] = ["agreement", "format_agreement", "question_scores", "relative_difference"]
