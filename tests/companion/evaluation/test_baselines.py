"""Chance and the look-up table of training answers."""

from __future__ import annotations

import pytest

from companion.data_tools.scienceqa import Problem
from companion.evaluation.baselines import chance_accuracy, lookup_table_accuracy, lookup_table_scores
from llava_core.runtime import DataError


def problem(question: str, choices: str, answer: int, hint: str = "") -> Problem:
    name = f"{question}-{choices}-{answer}"
    return Problem(name, question, choices.split(), answer, hint, None, "", "", "natural science", 2, "x")


TRAIN = [
    problem("Which is red?", "apple leaf", 0),
    problem("Which is red?", "leaf apple", 1),
    problem("Which is red?", "leaf brick", 1),
]


def test_lookup_table_takes_the_most_frequent_offered_answer() -> None:
    asked = [
        problem("which is  RED", "brick apple", 1),  # the same question: apple was right twice, brick once
        problem("Which is red?", "brick apple", 0),
        problem("Which is red?", "leaf brick", 1),  # the most frequent answer is not offered
        problem("Which is red?", "leaf sky", 0),  # neither was ever right: half a point
        problem("Which is old?", "a b c", 2),  # an unknown question: a third
    ]
    assert lookup_table_scores(TRAIN, asked) == pytest.approx([1, 0, 1, 1 / 2, 1 / 3])
    result = lookup_table_accuracy(TRAIN, asked)
    assert result["accuracy"] == pytest.approx(100 * (2 + 5 / 6) / 5)
    assert (result["n"], result["correct"]) == (5, 3)
    assert result["interval"][0] < result["accuracy"] < result["interval"][1]


def test_lookup_table_is_scored_by_subset() -> None:
    asked = [problem("Which is red?", "apple leaf", 0, "hint"), problem("Which is red?", "apple leaf", 1)]
    subsets = lookup_table_accuracy(TRAIN, asked)["subsets"]
    assert {name: subsets[name]["accuracy"] for name in ("TXT", "NO", "NAT")} == {"TXT": 100, "NO": 0, "NAT": 50}
    assert "IMG" not in subsets


def test_chance_is_the_mean_over_problems() -> None:
    assert chance_accuracy([problem("q", "a b", 0), problem("q", "a b c d", 0)]) == pytest.approx(37.5)


def test_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no problem"):
        chance_accuracy([])
    with pytest.raises(DataError, match="no training problem"):
        lookup_table_accuracy([], TRAIN)
