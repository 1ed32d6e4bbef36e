"""Agreement of judges: against scipy, on simulated judges, and on three reviews of the same answers."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from companion.evaluation import judges
from companion.evaluation.judges import format_agreement
from companion.evaluation.llava_bench import score_reviews
from companion.evaluation.relative_score import question_scores, relative_difference
from companion.evaluation.statistics import correlation, estimate, item_counts
from llava_core.runtime import DataError

Row = dict[str, Any]


def reviews(scores: list[tuple[float, float]], **more: Any) -> list[Row]:
    return [{"question_id": k, "content": f"{a:g} {b:g}"} | more for k, (a, b) in enumerate(scores)]


def two_judges(n: int = 40, seed: int = 0) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    rng = random.Random(seed)
    first = [(rng.randint(6, 10), rng.randint(1, 10)) for _ in range(n)]
    second = [(min(10, max(1, a + rng.randint(-1, 1))), min(10, max(1, b + rng.randint(-3, 3)))) for a, b in first]
    return first, second


agreement = partial(judges.agreement, samples=200)  # the default takes seconds per call, and no test reads more of them


def test_agreement_equals_scipy() -> None:
    first, second = two_judges()
    result = agreement(reviews(first), reviews(second))
    a, b = np.array(first, float), np.array(second, float)
    for name, x, y in (("reference", a[:, 0], b[:, 0]), ("candidate", a[:, 1], b[:, 1]),
                       ("ratio", 100 * a[:, 1] / a[:, 0], 100 * b[:, 1] / b[:, 0])):  # fmt: skip
        assert result[name]["spearman"]["value"] == pytest.approx(stats.spearmanr(x, y).statistic)
        assert result[name]["kendall"]["value"] == pytest.approx(stats.kendalltau(x, y).statistic)
        assert result[name]["shift"]["value"] == pytest.approx((y - x).mean())
        for number in (result[name]["spearman"], result[name]["kendall"]):
            assert number["interval"][0] < number["value"] < number["interval"][1]
    relative = result["relative_score"]
    assert relative["first"]["value"] == pytest.approx(score_reviews(reviews(first))["all"], abs=0.05)  # means rounded
    assert relative["shift"]["value"] == pytest.approx(relative["second"]["value"] - relative["first"]["value"])


def test_kappa_by_hand() -> None:
    # verdicts of the first: 2 wins, 1 tie, 1 loss; of the second: 1 win, 2 ties, 1 loss; three of four are the same
    result = agreement(reviews([(5, 8), (5, 9), (7, 7), (8, 2)]), reviews([(5, 8), (9, 9), (7, 7), (8, 7)]))["verdicts"]
    chance = (2 * 1 + 1 * 2 + 1 * 1) / 16
    assert result["same"]["value"] == 0.75
    assert result["kappa"]["value"] == pytest.approx((0.75 - chance) / (1 - chance))
    assert [list(row.values()) for row in result["table"].values()] == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_resampled_correlation_equals_scipy() -> None:
    first, second = (np.array(scores, float)[:, 1] for scores in two_judges(15))
    weights = item_counts(15, 3, 0)
    spearman, kendall = (correlation(f, weights, first, second) for f in (stats.spearmanr, stats.kendalltau))
    assert (weights.sum(1) == 15).all()
    assert (weights[0] == 1).all()
    for k, counts in enumerate(weights):
        x, y = (np.repeat(scores, counts.astype(int)) for scores in (first, second))
        assert spearman[k] == pytest.approx(stats.spearmanr(x, y).statistic)
        assert kendall[k] == pytest.approx(stats.kendalltau(x, y).statistic)


def test_intervals_have_the_nominal_coverage() -> None:
    covered = 0
    for seed in range(60):
        rng = random.Random(seed)
        first = np.array([float(rng.randint(3, 7)) for _ in range(40)])
        second = np.array([c + rng.choice([-1, 0, 1, 2]) for c in first])  # 0.5 on average
        low, high = estimate(item_counts(40, samples=400) @ (second - first) / 40)["interval"]
        covered += low <= 0.5 <= high
    assert 51 <= covered <= 60  # 95 % of 60 are 57


def test_constant_judge_has_no_correlation() -> None:
    result = agreement(reviews([(8, 8)] * 5), reviews([(8, k) for k in range(1, 6)]))
    undefined = {"value": None, "interval": None}
    assert (
        result["candidate"]["spearman"]
        == result["candidate"]["kendall"]
        == result["reference"]["spearman"]
        == undefined
    )
    assert result["candidate"]["shift"]["value"] == -5
    assert "candidate, spearman            not defined" in format_agreement(result)
    assert agreement(reviews([(8, 8)] * 5), reviews([(9, 9)] * 5))["verdicts"]["kappa"] == undefined


def test_failed_and_missing_questions_are_left_out() -> None:
    first, second = reviews([(8, 4), (9, 5), (7, 7), (9, 2)]), reviews([(8, 5), (9, 5), (7, 6)])
    first[1]["content"] = "I cannot say."
    result = agreement(first, second)
    assert (result["n"], result["only_first"], result["only_second"], result["failed"]) == (2, 1, 1, [1, 0])
    assert result["same_answers"] is None
    assert "reviews without scores: 1 and 0" in format_agreement(result)
    zero = agreement(reviews([(0, 4), (9, 5), (7, 7)]), second)
    assert (zero["n"], zero["ratio"]["n"], zero["failed"]) == (2, 2, [1, 0])  # 0 is not on the judge's scale
    with pytest.raises(DataError, match="1 questions have scores in both"):
        agreement(first[:1], second)
    with pytest.raises(DataError, match="line 1: no question_id"):
        agreement([{"content": "8 9"}], second)


def test_both_orders_of_a_question_are_one_score() -> None:
    rows = reviews([(8, 6)]) + reviews([(4, 7)], order="candidate_first")  # content is in the order of asking
    assert question_scores(rows).scores == {"0": (7.5, 5)}


def test_judges_are_compared_on_the_same_answers_only() -> None:
    first, second = reviews([(8, 4), (9, 5)], answer1_id="r", answer2_id="x"), reviews([(8, 4), (9, 5)], answer1_id="r")
    assert agreement(first, first)["same_answers"] is True
    assert agreement(first, second)["same_answers"] is None
    second[1]["answer2_id"] = "y"
    with pytest.raises(
        DataError, match=r"question 1: the two judges read different answers.*`llava evaluate llava-bench"
    ):
        agreement(first, second)
    assert relative_difference(first, second)["difference"] == 0
    with pytest.raises(DataError, match="question 0 has reviews of two answers"):
        question_scores([first[0], second[1] | {"question_id": 0, "order": "candidate_first"}])


def test_difference_of_systems_is_paired_or_not() -> None:
    rng = random.Random(1)
    first = [(10.0, float(rng.randint(1, 8))) for _ in range(60)]
    better = [(a, b + 1) for a, b in first]
    paired = relative_difference(reviews(first), reviews(better))
    assert paired["interval"] == pytest.approx([10, 10])
    assert paired["n"] == [60, 60]
    apart = relative_difference(reviews(first), reviews(better[:50]), paired=False)
    assert apart["n"] == [60, 50]
    assert apart["interval"][0] < 0 < apart["difference"] < apart["interval"][1]


def test_three_reviews_of_the_same_answers(reference: Path) -> None:
    folder = reference / "llava_bench_wild" / "reviews"
    files = [folder / f"llava-v1.5-13b-eval{k}.jsonl" for k in (1, 2, 3)]
    for first, second, kappa in ((0, 1, 0.92), (0, 2, 0.92), (1, 2, 0.92)):
        result = agreement(files[first], files[second])
        assert (result["n"], result["same_answers"], result["failed"]) == (60, True, [0, 0])
        assert result["candidate"]["spearman"]["value"] > 0.97
        assert 0.90 < result["candidate"]["kendall"]["value"] < result["candidate"]["spearman"]["value"]
        assert round(result["verdicts"]["kappa"]["value"], 2) == kappa
        low, high = result["relative_score"]["shift"]["interval"]
        assert low < 0 < high  # repeats of one judge: no shift beyond chance
