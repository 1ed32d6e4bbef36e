from __future__ import annotations

import pytest

from companion.evaluation.relative_score import compare_systems


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
