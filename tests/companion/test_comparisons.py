"""The interval rule: coverage of planted differences, equivalence, Holm's correction, learning speed, power."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from companion.comparisons import Scores, beats, compare, compare_speed, holm, power_table, simulated_arms, steps_to
from companion.paper.verdict import verdict_of_difference
from llava_core.runtime import DataError

SEEDS, N, RUNS = 5, 1000, 20


def verdicts(effect: float) -> list[str]:
    """The verdicts of twenty simulated ablations of one family, claimed to be below zero."""
    results = [compare(*simulated_arms(np.random.default_rng(k), SEEDS, N, effect)) for k in range(RUNS)]
    return [verdict_of_difference(result, "below 0", p=result.p, margin=2.5) for result in results]


def test_planted_null_gives_no_direction() -> None:
    found = verdicts(0.0)
    assert sum(verdict in ("agrees", "disagrees") for verdict in found) <= 1
    assert "no difference" in found


def test_planted_effect_has_the_right_sign() -> None:
    assert verdicts(-8.0) == ["agrees"] * RUNS
    assert verdicts(8.0) == ["disagrees"] * RUNS


def test_interval_is_the_widest_of_three() -> None:
    first, second = simulated_arms(np.random.default_rng(1), SEEDS, N, -3)
    result = compare(first, second)
    differences = (second.values - first.values).tolist()
    parts = [result.interval_over(source) for source in ("seeds", "questions", "both")]
    assert result.interval() == [min(ends[0] for ends in parts), max(ends[1] for ends in parts)]
    expected = stats.t.interval(0.95, SEEDS - 1, np.mean(differences), stats.sem(differences))
    assert parts[0] == pytest.approx(expected)
    mean = (second.scores - first.scores).mean(0)
    assert result.errors["questions"].value == pytest.approx(100 * stats.sem(mean))
    test = stats.ttest_1samp(differences, 0)
    assert result.p > 0.999 * test.pvalue


def test_relative_scores_have_the_error_of_a_ratio() -> None:
    rng = np.random.default_rng(2)
    weights = rng.uniform(6, 10, (2, 400))
    first, second = (Scores.of(weights * rng.uniform(low, 1, (2, 400)), weights) for low in (0.2, 0.4))
    drawn = rng.integers(400, size=(2000, 400))
    means = [100 * a.scores[:, drawn].sum(2) / a.weights[:, drawn].sum(2) for a in (first, second)]
    bootstrap = (means[1] - means[0]).mean(0).std()
    assert compare(first, second).errors["questions"].value == pytest.approx(bootstrap, rel=0.08)


def test_questions_of_one_image_count_as_a_cluster() -> None:
    first, second = simulated_arms(np.random.default_rng(3), 2, 200, -5)
    triple = [Scores.of(np.repeat(arm.scores, 3, axis=1)) for arm in (first, second)]
    images = np.repeat(np.arange(200), 3).tolist()
    alone, clustered = (compare(*triple, clusters=names).errors["questions"].value for names in (None, images))
    assert clustered == pytest.approx(compare(first, second).errors["questions"].value, rel=1e-9)
    assert alone < 0.6 * clustered


def test_seeds_of_one_base_model_are_one_unit() -> None:
    first, second = simulated_arms(np.random.default_rng(4), 4, 300, 0)
    result = compare(first, second, units=["a", "b", "a", "b"])
    differences = second.values - first.values
    assert result.values == pytest.approx([differences[[0, 2]].mean(), differences[[1, 3]].mean()])
    assert result.errors["seeds"].freedom == 1
    with pytest.raises(DataError, match="4 seeds, but 3 units"):
        compare(first, second, units=["a", "b", "a"])


def test_single_seed_has_no_interval() -> None:
    result = compare(*simulated_arms(np.random.default_rng(5), 1, 100, -30))
    assert result.interval() is None
    assert (result.p, result.equivalence_p(2.5)) == (1, 1)
    assert verdict_of_difference(result, "below 0", p=result.p, margin=2.5) == "not resolved"


def test_equivalence_is_the_90_percent_interval_within_the_margin() -> None:
    for k in range(8):
        result = compare(*simulated_arms(np.random.default_rng(k), SEEDS, N, 1.0))
        low, high = result.interval(0.90) or (0, 0)
        assert (result.equivalence_p(2.5) < 0.05) == (low > -2.5 and high < 2.5)
    with pytest.raises(DataError, match="margin"):
        result.equivalence_p(0)


def test_holm_corrects_the_family() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_baseline_is_beaten_by_the_same_rule() -> None:
    arm, _ = simulated_arms(np.random.default_rng(6), SEEDS, N, 0, accuracy=60)
    table = (np.random.default_rng(7).random(N) < 0.55).astype(float)
    assert beats(arm, 50.0)
    assert not beats(arm, 59.5)
    assert not beats(arm, arm.scores.mean(0))
    assert beats(arm, table * 0.8)


def test_untested_and_undirected_verdicts() -> None:
    result = compare(*simulated_arms(np.random.default_rng(8), SEEDS, N, -9))
    assert verdict_of_difference(result, "below 0", p=result.p, margin=2.5, testable=False) == "cannot be tested"
    assert verdict_of_difference(result, None, p=result.p, margin=2.5) == "shown only"
    assert verdict_of_difference(result, "below 0", p=0.2, margin=2.5) == "not resolved"  # after Holm's correction


def curves(rng: np.random.Generator, speed: float, seeds: int = 4) -> np.ndarray:
    """Right answers (seeds, 8 checkpoints, 600 questions) of a curve from 40 to 80 %."""
    levels = 0.4 + 0.4 * (1 - np.exp(-speed * np.arange(1, 9)))
    return (rng.random((seeds, 8, 600)) < levels[:, None]).astype(float)


def test_learning_speed_is_paired_steps_to_an_accuracy() -> None:
    steps = [50 * k for k in range(1, 9)]
    assert steps_to(steps, np.array([[41, 45, 55, 70, 71, 72, 73, 74.0]]), 50) == pytest.approx([125])
    assert steps_to(steps, np.full((1, 8), 40.0), 50) == pytest.approx([np.inf])
    assert steps_to(steps, np.full((1, 8), 60.0), 50) == pytest.approx([50])
    rng = np.random.default_rng(9)
    fast, slow = curves(rng, 0.6), curves(rng, 0.15)
    result, needed = compare_speed(steps, fast, slow, 60)
    low, high = result.interval() or (0, 0)
    assert 1 < low < 2 < high < 3  # four times the steps are two binary logarithms
    assert None not in needed["first"]
    assert compare_speed(steps, fast, curves(rng, 0.6), 60)[0].p > 0.05
    bounded, needed = compare_speed(steps, fast, curves(rng, 0.001), 60)
    assert needed["second"] == [None] * 4
    assert bounded.effect > 0


def test_power_grows_with_seeds_and_effect() -> None:
    rows = power_table([2, 5], 400, [-2.5, -6], draws=40)
    assert [row["seeds"] for row in rows] == [2, 5]
    assert rows[1]["half-width"] < rows[0]["half-width"]
    assert rows[1]["power at -2.5"] < rows[1]["power at -6"]
    assert rows[0]["power at -6"] < rows[1]["power at -6"]


def test_arms_with_other_questions_are_refused() -> None:
    first, second = simulated_arms(np.random.default_rng(10), 2, 50, 0)
    with pytest.raises(DataError, match="compare the same ones"):
        compare(first, second.part(np.arange(40)))
    with pytest.raises(DataError, match="at least two"):
        compare(first, second, clusters=["a"] * 50)
