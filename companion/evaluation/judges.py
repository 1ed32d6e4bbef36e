"""Agreement of two judges, or of two repeats of one, on the same answers to LLaVA-Bench; bootstraps over questions.

The judge of the paper is no longer offered; `agreement` measures what another one changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from companion.evaluation.llava_bench import Reviews, relative_score
from companion.evaluation.relative_score import common_questions, question_scores
from companion.evaluation.statistics import SAMPLES, correlation, estimate, item_counts, ratio
from llava_core.runtime import DataError

OUTCOMES = ("win", "tie", "loss")  # of the candidate against the reference


def agreement(first: Reviews, second: Reviews, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """Compare two judges on the same answers.

    Returns:
        n (questions that both have scored), only_first, only_second, failed (reviews without scores, of each judge),
        same_answers (None where the files do not name the answers); for the scores of `reference` and `candidate` and
        for `ratio` (candidate / reference per question, in %): n, spearman, kendall (tau-b) and shift (mean of second
        minus first); relative_score: first, second (in %) and shift; verdicts (win, tie or loss of the candidate):
        kappa (Cohen's), same (share of equal outcomes) and table (first's outcome -> second's -> questions).
        Each number is `{value, interval}`, both None where it is undefined, as a correlation with a constant score.

    Raises:
        DataError: not reviews, reviews of different answers, or fewer than two questions in common.
    """
    one, other = question_scores(first), question_scores(second)
    keys = common_questions(one.scores, other.scores)
    named = [key for key in keys if key in one.answer_ids and key in other.answer_ids]
    different = [key for key in named if one.answer_ids[key] != other.answer_ids[key]]
    if different:
        raise DataError(
            f"question {different[0]}: the two judges read different answers ({len(different)} such questions); "
            "give reviews of the same answers; two systems are compared by the scores that `llava evaluate llava-bench "
            "--reviews FILE` prints for each"
        )
    a, b = (np.array([judge.scores[key] for key in keys]) for judge in (one, other))  # (n, 2), reference and candidate
    counts = item_counts(len(keys), samples, seed)
    rated = (a[:, 0] > 0) & (b[:, 0] > 0)
    ratios = [100 * x[rated, 1] / x[rated, 0] for x in (a, b)]
    result: dict[str, Any] = {
        "n": len(keys),
        "only_first": len(one.scores.keys() - other.scores.keys()),
        "only_second": len(other.scores.keys() - one.scores.keys()),
        "failed": [one.failed, other.failed],
        "same_answers": True if len(named) == len(keys) else None,
        "reference": _compare(counts, a[:, 0], b[:, 0]),
        "candidate": _compare(counts, a[:, 1], b[:, 1]),
        "ratio": _compare(counts[:, rated], *ratios),
    }
    scores = [relative_score(counts, table) for table in (a, b)]
    values = {"first": scores[0], "second": scores[1], "shift": scores[1] - scores[0]}
    result["relative_score"] = {name: estimate(value) for name, value in values.items()}
    outcomes = [np.sign(x[:, 0] - x[:, 1]).astype(int) + 1 for x in (a, b)]  # indices into OUTCOMES
    pairs = list(zip(*outcomes, strict=True))
    table = {v: {w: pairs.count((i, j)) for j, w in enumerate(OUTCOMES)} for i, v in enumerate(OUTCOMES)}
    kappa, same = _kappa(counts, *outcomes)
    result["verdicts"] = {"kappa": estimate(kappa), "same": estimate(same), "table": table}
    return result


def _compare(counts: np.ndarray, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    return {
        "n": len(x),
        "spearman": estimate(correlation(stats.spearmanr, counts, x, y)),
        "kendall": estimate(correlation(stats.kendalltau, counts, x, y)),
        "shift": estimate(ratio(counts @ (y - x), counts.sum(1))),
    }


def _kappa(counts: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Cohen's kappa of two classifications in every resample, and the share of equal classes."""
    n = counts.sum(1)
    same = counts @ (a == b) / n
    chance = sum((counts @ (a == k)) * (counts @ (b == k)) for k in np.unique([a, b])) / n**2
    return ratio(same - chance, 1 - chance), same


def format_agreement(result: Mapping[str, Any]) -> str:
    """Return a comparison of two judges as lines of text."""

    def line(label: str, number: Mapping[str, Any], unit: str = "") -> str:
        if number["value"] is None:
            return f"{label:30} not defined"
        low, high = number["interval"]
        return f"{label:30} {number['value']:.3f}{unit}  ({low:.3f} to {high:.3f})"

    lines = [
        f"{result['n']} questions in common, {result['only_first']} only in the first and "
        f"{result['only_second']} only in the second; "
        f"reviews without scores: {result['failed'][0]} and {result['failed'][1]}"
    ]
    for name in ("candidate", "reference", "ratio"):
        for what in ("spearman", "kendall", "shift"):
            lines.append(
                line(f"{name}, {what}", result[name][what], " %" if (name, what) == ("ratio", "shift") else "")
            )
    lines += [
        line(f"relative score, {name}", result["relative_score"][name], " %") for name in result["relative_score"]
    ]
    lines += [line(f"win, tie or loss, {name}", result["verdicts"][name]) for name in ("kappa", "same")]
    return "\n".join(lines)
