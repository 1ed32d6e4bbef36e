from __future__ import annotations

import pytest

from companion.evaluation.relative_score import relative_difference, relative_scores, times_over
from llava_core.runtime import DataError


def _reviews(scores):
    kinds = ("conv", "detail", "complex")
    return [{"question_id": k, "category": kinds[k % 3], "tuple": [8.0, s]} for k, s in enumerate(scores)]


def _images(n, per_image=3):
    return {k: f"{k // per_image}.jpg" for k in range(n)}


def test_scores_by_category_leave_out_failures() -> None:
    rows = _reviews([2.0, 4.0, 8.0, 6.0, 7.0, 3.0])
    rows[0] = {**rows[0], "tuple": None}
    result = relative_scores(rows)
    assert result["all"]["value"] == pytest.approx(100 * 28 / 40)
    assert (result["all"]["n"], result["all"]["failed"], result["conv"]["n"]) == (5, 1, 1)
    assert result["conv"]["interval"] == pytest.approx([75, 75])  # one question
    assert result["all"]["interval"][0] < result["all"]["value"] < result["all"]["interval"][1]


def test_intervals_are_clustered_by_image() -> None:
    first, second = _reviews([2.0] * 24), _reviews([9.0] * 12 + [3.0] * 12)
    single, grouped = _images(24, per_image=1), _images(24, per_image=6)
    widths = []
    for images in (None, single, grouped):
        low, high = relative_scores(second, images)["all"]["interval"]
        below, above = relative_difference(first, second, images=(images, images))["interval"]
        widths.append((high - low, above - below))
    assert widths[0] == pytest.approx(widths[1])
    assert all(apart < together / 1.5 for apart, together in zip(widths[1], widths[2], strict=True))


# ------------------------------------------------------------------------------------------------ several times


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
    with pytest.raises(DataError, match="0 questions are scored"):  # no score is below 1
        times_over([rows], [_reviews([0.0] * 6)], _images(6))
