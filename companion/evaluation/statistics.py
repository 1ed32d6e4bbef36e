"""Confidence intervals, significance tests and bootstrap draws.

Tests and intervals are scipy's. The draws of `item_counts` are NumPy's: published numbers of the
miniature depend on them, and `scipy.stats.bootstrap` draws other resamples from the same seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
PERCENTILES = (2.5, 97.5)
SAMPLES = 2000


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's interval of a proportion, as two fractions; with no trial it is (0, 1)."""
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}: the count must lie between 0 and n")
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(correct, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def proportion(correct: int, n: int) -> dict[str, Any]:
    """Return `{n, correct, accuracy, interval}` in percent; the accuracy of nothing is None."""
    low, high = wilson(correct, n)
    accuracy = 100 * correct / n if n else None
    return {"n": n, "correct": correct, "accuracy": accuracy, "interval": [100 * low, 100 * high]}


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, samples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Return `{n, difference, interval}`: mean of `second - first` over items, with its percentile interval."""
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"paired scores of {len(first)} and {len(second)} items: give two scores of each of >= 2 items"
        )
    difference = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    mean = float(difference.mean())
    if np.ptp(difference) == 0:  # every resample is the same
        return {"n": len(difference), "difference": mean, "interval": [mean, mean]}
    result = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=samples,
        batch=max(1, 2_000_000 // len(difference)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return {"n": len(difference), "difference": mean, "interval": [float(end) for end in result.confidence_interval]}


def item_counts(n: int, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Return how often each of n items occurs (1 + samples, n): once in the first row, then in every resample."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
    return np.vstack([np.ones(n, dtype=counts.dtype), counts]).astype(float)


def estimate(values: np.ndarray) -> dict[str, Any]:
    """Return `{value, interval}` of a statistic (1 + samples,) of `item_counts`; both None where it is undefined."""
    defined = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(defined):
        return {"value": None, "interval": None}
    return {"value": float(values[0]), "interval": np.percentile(defined, PERCENTILES).tolist()}


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the quotient, NaN where the divisor is 0 up to rounding."""
    defined = below > 1e-9
    return np.where(defined, above / np.where(defined, below, 1.0), np.nan)


def correlation(measure: Callable[..., Any], counts: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return scipy's rank correlation of every resample of `item_counts`, NaN where one side is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant and of short resamples, whose result is NaN
        resamples = ((np.repeat(x, row), np.repeat(y, row)) for row in counts.astype(int))
        return np.array([measure(*pair).statistic for pair in resamples])


def mcnemar(first_right: Sequence[bool], second_right: Sequence[bool]) -> dict[str, Any]:
    """Return McNemar's exact two-sided test of paired answers: `{n, only_first, only_second, p}`."""
    pairs = list(zip(first_right, second_right, strict=True))
    only_first = sum(bool(a) and not b for a, b in pairs)
    only_second = sum(bool(b) and not a for a, b in pairs)
    discordant = only_first + only_second
    p = float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return {"n": len(pairs), "only_first": only_first, "only_second": only_second, "p": p}


def p_text(p: float) -> str:
    """Return a p value for tables, `0.012` or `< 0.001`."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def seeds_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return `{n, mean, std, interval}` of repeated runs: sample standard deviation, Student's t interval of the mean.

    To compare two arms with the same seeds, give the differences per seed. A single value has no std and no interval.
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
    """Return the two-proportion z test of two accuracies, as if their questions were independent draws.

    Returns:
        In points: `difference` (second minus first), `standard_error` (pooled) and `interval` (not pooled); `z` (0 for
        two systems without variance) and the two-sided `p`.
    """
    for correct, n in ((correct_a, n_a), (correct_b, n_b)):
        if n < 1 or not 0 <= correct <= n:
            raise ValueError(f"{correct} correct of {n}: give at least one question and a count between 0 and n")
    first, second, pooled = correct_a / n_a, correct_b / n_b, (correct_a + correct_b) / (n_a + n_b)
    error = (pooled * (1 - pooled) * (1 / n_a + 1 / n_b)) ** 0.5
    z = (second - first) / error if error else 0.0
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    half *= (first * (1 - first) / n_a + second * (1 - second) / n_b) ** 0.5
    return {
        "difference": 100 * (second - first),
        "standard_error": 100 * error,
        "z": z,
        "interval": [100 * (second - first - half), 100 * (second - first + half)],
        "p": float(2 * stats.norm.sf(abs(z))),
    }


def welch(mean_a: float, std_a: float, n_a: int, mean_b: float, std_b: float, n_b: int) -> dict[str, Any]:
    """Return Welch's t test of two means of repeated runs (at least two each), with sample standard deviations.

    Returns:
        `difference` (second minus first), `standard_error`, `t`, `freedom` (Welch's), `interval` and two-sided `p`.
    """
    if min(n_a, n_b) < 2 or not std_a + std_b > 0:
        raise ValueError(f"{n_a} and {n_b} runs with deviations {std_a:g} and {std_b:g}: give >= 2 runs that differ")
    test = stats.ttest_ind_from_stats(mean_b, std_b, n_b, mean_a, std_a, n_a, equal_var=False)
    parts = std_a**2 / n_a, std_b**2 / n_b
    error = sum(parts) ** 0.5
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (n_a - 1) + parts[1] ** 2 / (n_b - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    difference = mean_b - mean_a
    return {
        "difference": difference,
        "standard_error": error,
        "t": float(test.statistic),
        "freedom": freedom,
        "interval": [difference - half, difference + half],
        "p": float(test.pvalue),
    }
