from __future__ import annotations

import pytest

from companion.evaluation.relative_score import compare_systems, times_over
from llava_core.runtime import DataError


def _reviews(scores):
    kinds = ("conv", "detail", "complex")
    return [{"question_id": k, "category": kinds[k % 3], "tuple": [8.0, s]} for k, s in enumerate(scores)]


def test_systems_are_compared_on_the_same_questions() -> None:
    full = [[2.0, 4.0, 8.0, 6.0, 7.0, 3.0], [4.0, 4.0, 8.0, 6.0, 7.0, 1.0]]
    reviews = {"full": [_reviews(run) for run in full], "less": [_reviews([s - 1 for s in run]) for run in full]}
    rows = {(r["system"], r["category"]): r for r in compare_systems(reviews)}
    assert rows["full", "all"]["score"] == pytest.approx(62.5)
    less = rows["less", "all"]
    assert less["difference"] == pytest.approx(-12.5)
    # the difference is the same on every question, so its interval has no width; the scores themselves vary
    assert less["difference_interval"] == pytest.approx([-12.5, -12.5])
    assert less["interval"][1] - less["interval"][0] > 5
    assert rows["full", "conv"]["n"] == 2


def test_seeds_of_a_system_are_resampled_too() -> None:
    less = [_reviews([6.0] * 6), _reviews([2.0] * 6)]  # no question differs from another, the seeds do
    reviews = {"full": [_reviews([8.0] * 6)] * 2, "less": less, "none": [_reviews([4.0] * 6)]}
    result = {r["system"]: r for r in compare_systems(reviews)}
    assert result["less"]["difference"] == pytest.approx(-50)
    assert result["less"]["difference_interval"] == pytest.approx([-75, -25])
    assert result["none"]["difference_interval"] == pytest.approx([-50, -50])


def test_failed_review_counts_for_neither_side() -> None:
    rows = _reviews([8.0] * 6)
    rows[0] = {**rows[0], "tuple": None}
    result = compare_systems({"full": [rows]})
    assert result[0]["score"] == pytest.approx(100)


# ------------------------------------------------------------------------------------------------ several times


def _images(n, per_image=3):
    return {k: f"{k // per_image}.jpg" for k in range(n)}


@pytest.mark.parametrize(
    ("more", "less", "times", "verdict"),
    [
        ([8.0, 7.0, 9.0] * 10, [2.0, 1.0, 2.0] * 10, 24 / 5, "agrees"),
        ([8.0, 7.0, 9.0] * 10, [7.0, 6.0, 8.0] * 10, 24 / 21, "disagrees"),  # better, but not several times
        ([8.0, 1.0, 9.0, 8.0] * 3, [2.0, 5.0, 1.0, 3.0] * 3, 26 / 11, "not resolved"),
    ],
)
def test_several_times_needs_the_whole_interval(more, less, times, verdict) -> None:
    result = times_over([_reviews(more)], [_reviews(less)], _images(len(more)))
    assert result["times"] == pytest.approx(times)
    assert (result["n"], result["n_images"], result["n_seeds"]) == (len(more), -(-len(more) // 3), 1)
    assert result["interval"][0] <= times <= result["interval"][1]
    assert result["verdict"] == verdict


def test_questions_of_one_image_are_resampled_together() -> None:
    more, less = [9.0] * 12 + [3.0] * 12, [2.0] * 24
    alone = times_over([_reviews(more)], [_reviews(less)], _images(24, per_image=1))["interval"]
    together = times_over([_reviews(more)], [_reviews(less)], _images(24, per_image=6))["interval"]
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])


def test_several_seeds_widen_the_interval() -> None:
    same = [_reviews([8.0] * 6)] * 2
    apart = [_reviews([9.0] * 6), _reviews([7.0] * 6)]
    less = [_reviews([2.0] * 6)]
    assert times_over(same, less, _images(6))["interval"] == pytest.approx([4, 4])
    wide = times_over(apart, less, _images(6))
    assert wide["times"] == pytest.approx(4)
    assert wide["interval"][0] < 2 < 8 < wide["interval"][1]  # two seeds
    assert wide["verdict"] == "not resolved"


def test_times_over_names_what_does_not_fit() -> None:
    rows = _reviews([8.0] * 6)
    with pytest.raises(DataError, match="question 5 has no image"):
        times_over([rows], [rows], _images(5))
    with pytest.raises(DataError, match="3 and 2 seeds"):
        times_over([rows] * 3, [rows] * 2, _images(6))
    with pytest.raises(DataError, match="not defined"):
        times_over([rows], [_reviews([0.0] * 6)], _images(6))
