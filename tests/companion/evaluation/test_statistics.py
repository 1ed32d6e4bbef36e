"""Intervals and tests against known values."""

from __future__ import annotations

import numpy as np
import pytest

from companion.evaluation.statistics import (
    mcnemar,
    paired_bootstrap,
    proportion,
    seeds_interval,
    unpaired_difference,
    welch,
    wilson,
)


def test_wilson() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert proportion(8, 10)["interval"] == pytest.approx([49.02, 94.33], abs=0.01)
    assert proportion(0, 0)["accuracy"] is None
    with pytest.raises(ValueError, match="11 correct of 10"):
        wilson(11, 10)


def test_mcnemar_is_exact() -> None:
    first = [True] * 9 + [False] + [True] * 5
    second = [False] * 9 + [True] + [True] * 5
    result = mcnemar(first, second)
    assert (result["n"], result["only_first"], result["only_second"]) == (15, 9, 1)
    assert result["p"] == pytest.approx(22 / 1024)
    assert mcnemar([True], [True])["p"] == 1


def test_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=500)
    second = first + 0.1 + rng.normal(scale=0.05, size=500)
    result = paired_bootstrap(list(first), list(second), samples=2000)
    low, high = result["interval"]
    assert low < result["difference"] < high
    # pairing removes the items' own spread (about 1): the width is that of the differences (0.05)
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / 500**0.5, rel=0.15)
    assert result == paired_bootstrap(list(first), list(second), samples=2000)
    assert paired_bootstrap([0, 1], [1, 2])["interval"] == [1, 1]
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap([1, 2], [1])


def test_seeds_interval() -> None:
    result = seeds_interval([1, 2, 3])
    assert (result["n"], result["mean"], result["std"]) == (3, 2, 1)
    assert result["interval"] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-4)
    assert seeds_interval([5])["interval"] is None
    with pytest.raises(ValueError, match="no value"):
        seeds_interval([])


def test_unpaired_difference() -> None:
    result = unpaired_difference(80, 100, 60, 100)
    assert result["difference"] == pytest.approx(-20)
    # pooled 0.7: the square root of 0.21 x 2 / 100
    assert result["standard_error"] == pytest.approx(6.4807, abs=1e-4)
    assert result["z"] == pytest.approx(-3.0861, abs=1e-4)
    assert result["p"] == pytest.approx(0.002028, abs=1e-6)
    assert result["interval"] == pytest.approx([-32.396, -7.604], abs=1e-3)
    assert unpaired_difference(60, 100, 80, 100)["z"] == -result["z"]
    assert unpaired_difference(5, 5, 7, 7)["z"] == 0
    with pytest.raises(ValueError, match="6 correct of 5"):
        unpaired_difference(6, 5, 1, 5)
    with pytest.raises(ValueError, match="0 correct of 0"):
        unpaired_difference(0, 0, 1, 5)


def test_welch_of_summaries_equals_welch_of_runs() -> None:
    from scipy import stats

    first, second = [19.0, 19.5, 18.7], [66.0, 69.6, 66.3]
    summary = [x for runs in (first, second) for x in (float(np.mean(runs)), float(np.std(runs, ddof=1)), len(runs))]
    result, runs = welch(*summary), stats.ttest_ind(second, first, equal_var=False)
    assert (result["t"], result["p"]) == pytest.approx((runs.statistic, runs.pvalue))
    assert result["freedom"] == pytest.approx(runs.df)
    assert result["interval"] == pytest.approx(list(runs.confidence_interval()))
    assert result["difference"] == pytest.approx(np.mean(second) - np.mean(first))
    with pytest.raises(ValueError, match="1 and 3 runs"):
        welch(1, 1, 1, 2, 1, 3)
