"""How sure a number is: intervals and paired tests, all computed by scipy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def wilson(correct: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's interval of a proportion, as two fractions; with no trial it is (0, 1).

    Raises:
        ValueError: `correct` is not between 0 and `n`.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}: the count must lie between 0 and n")
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def proportion(correct: int, n: int) -> dict[str, Any]:
    """Return `{n, correct, accuracy, interval}` in percent; the accuracy of nothing is None."""
    low, high = wilson(correct, n)
    accuracy = 100 * correct / n if n else None
    return {"n": n, "correct": correct, "accuracy": accuracy, "interval": [100 * low, 100 * high]}


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, samples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Return the mean difference `second - first` of two scores of the same items, and its percentile interval.

    Args:
        first: one score per item, for accuracies 0 or 1.
        second: the other system's scores, item by item.
        samples: resamples of the items.
        seed: of the resampling.

    Raises:
        ValueError: the two do not hold the same number (at least two) of items.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"paired scores of {len(first)} and {len(second)} items: give the same two or more items twice"
        )
    difference = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    mean = float(difference.mean())
    if np.ptp(difference) == 0:  # every resample is the same
        return {"n": len(difference), "difference": mean, "interval": [mean, mean]}
    result = stats.bootstrap(
        (difference,), np.mean, n_resamples=samples, batch=max(1, 2_000_000 // len(difference)),
        confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = result.confidence_interval
    return {"n": len(difference), "difference": mean, "interval": [float(low), float(high)]}


def seeds_and_items(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the mean difference `second - first` of two systems trained with several seeds, and its interval.

    A bootstrap in two levels: each resample draws seeds and, independently, items; the same for both systems. It takes
    in what another training run and other questions would change. With two seeds it still is too narrow, since two runs
    show little of how runs scatter: read it beside `seeds_interval`. With one seed it is `paired_bootstrap`.

    Args:
        first: a row of scores per seed (seeds, items).
        second: the other system's, for the same seeds and items.
        samples: resamples.
        seed: of the resampling.

    Returns:
        `{n_seeds, n, difference, interval}`.

    Raises:
        ValueError: the two are not tables of the same shape with at least two items.
    """
    one, other = (np.atleast_2d(np.asarray(scores, dtype=float)) for scores in (first, second))
    if one.shape != other.shape or one.shape[1] < 2:
        raise ValueError(f"scores of {one.shape} and {other.shape} seeds and items: give the same of both, two items")
    table, rng = other - one, np.random.default_rng(seed)
    n_seeds, n = table.shape
    means = []
    for part in np.array_split(np.arange(samples), max(1, samples * n // 2_000_000)):
        seeds, items = (rng.multinomial(k, np.full(k, 1 / k), size=len(part)) / k for k in (n_seeds, n))
        means.append(((seeds @ table) * items).sum(1))
    low, high = np.percentile(np.concatenate(means), [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return {
        "n_seeds": n_seeds, "n": n, "difference": float(table.mean()), "interval": [float(low), float(high)],
    }  # fmt: skip


def mcnemar(first_right: Sequence[bool], second_right: Sequence[bool]) -> dict[str, Any]:
    """Return McNemar's exact test: of the questions where only one system is right, is either side favored?

    Returns:
        `{n, only_first, only_second, p}`, p two-sided.
    """
    pairs = list(zip(first_right, second_right, strict=True))
    only_first = sum(bool(a) and not b for a, b in pairs)
    only_second = sum(bool(b) and not a for a, b in pairs)
    discordant = only_first + only_second
    p = float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return {"n": len(pairs), "only_first": only_first, "only_second": only_second, "p": p}


def seeds_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation and Student's t interval of the mean over repeated runs.

    For two arms run with the same seeds, give the differences seed by seed.

    Returns:
        `{n, mean, std, interval}`; std and interval are None for a single value.
    """
    if not values:
        raise ValueError("no value: give one number per seed")
    mean = float(np.mean(values))
    if len(values) == 1:
        return {"n": 1, "mean": mean, "std": None, "interval": None}
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * std / len(values) ** 0.5
    return {"n": len(values), "mean": mean, "std": std, "interval": [mean - half, mean + half]}


def unpaired_difference(correct_a: int, n_a: int, correct_b: int, n_b: int) -> dict[str, Any]:
    """Compare two accuracies as if their questions were drawn independently: the two-proportion z test.

    Where both systems answered the same questions, a paired test (`mcnemar`) sees smaller differences, but it needs the
    answers of both, question by question; counts alone allow no more than this.

    Args:
        correct_a: right answers of the first system.
        n_a: its questions.
        correct_b: right answers of the second system.
        n_b: its questions.

    Returns:
        In points: `difference` (second minus first), `standard_error` (of the test: both pooled) and `interval` (95 %,
        not pooled); `z` and the two-sided `p`. Two systems without any scatter have z 0.

    Raises:
        ValueError: a system has no question, or its count does not lie between 0 and its questions.
    """
    for correct, n in ((correct_a, n_a), (correct_b, n_b)):
        if n < 1 or not 0 <= correct <= n:
            raise ValueError(f"{correct} correct of {n}: give at least one question and a count between 0 and n")
    first, second, pooled = correct_a / n_a, correct_b / n_b, (correct_a + correct_b) / (n_a + n_b)
    error = (pooled * (1 - pooled) * (1 / n_a + 1 / n_b)) ** 0.5
    z = (second - first) / error if error else 0.0
    reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    half = reach * (first * (1 - first) / n_a + second * (1 - second) / n_b) ** 0.5
    return {
        "difference": 100 * (second - first),
        "standard_error": 100 * error,
        "z": z,
        "interval": [100 * (second - first - half), 100 * (second - first + half)],
        "p": float(2 * stats.norm.sf(abs(z))),
    }


def welch(mean_a: float, std_a: float, n_a: int, mean_b: float, std_b: float, n_b: int) -> dict[str, Any]:
    """Compare two means of repeated runs by their summaries: Welch's t test.

    Args:
        mean_a: mean of the first system's runs.
        std_a: their sample standard deviation.
        n_a: number of runs.
        mean_b: mean of the second system's runs.
        std_b: their sample standard deviation.
        n_b: number of runs.

    Returns:
        `difference` (second minus first), `standard_error`, `t`, `freedom` (Welch's degrees), `interval` (95 %) and the
        two-sided `p`.

    Raises:
        ValueError: fewer than two runs, or no scatter at all.
    """
    if min(n_a, n_b) < 2 or not std_a + std_b > 0:
        raise ValueError(f"{n_a} and {n_b} runs with deviations {std_a:g} and {std_b:g}: give two runs that scatter")
    found = stats.ttest_ind_from_stats(mean_b, std_b, n_b, mean_a, std_a, n_a, equal_var=False)
    parts = std_a**2 / n_a, std_b**2 / n_b
    error = sum(parts) ** 0.5
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (n_a - 1) + parts[1] ** 2 / (n_b - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    difference = mean_b - mean_a
    return {
        "difference": difference,
        "standard_error": error,
        "t": float(found.statistic),
        "freedom": freedom,
        "interval": [difference - half, difference + half],
        "p": float(found.pvalue),
    }
