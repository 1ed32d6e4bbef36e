"""Scores on ScienceQA without a model: a blind guess, and the most frequent training answer to the same question."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from companion.data_tools.scienceqa import SUBSETS, Problem
from companion.evaluation.grounding import normalize
from companion.evaluation.statistics import proportion
from llava_core.runtime import DataError


def chance_accuracy(problems: Sequence[Problem]) -> float:
    """Return the expected accuracy of a uniform guess, in percent."""
    if not problems:
        raise DataError("chance: no problem; give a split with problems")
    return 100 * float(np.mean([1 / len(problem.choices) for problem in problems]))


def lookup_table_scores(problems_train: Sequence[Problem], problems_test: Sequence[Problem]) -> list[float]:
    """Return for each test problem the expected score of the table, 0 to 1.

    Among the offered choices the table takes the one that was the right answer most often to the same question text in
    training. Choices with equal counts share the score; so do all choices if none was ever right.
    """
    if not problems_train:
        raise DataError("look-up table: no training problem; give the split train")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for problem in problems_train:
        counts[normalize(problem.question)][normalize(problem.choices[problem.answer])] += 1
    scores = []
    for problem in problems_test:
        known = counts.get(normalize(problem.question), Counter[str]())
        votes = [known[normalize(choice)] for choice in problem.choices]
        best = max(votes)
        scores.append((votes[problem.answer] == best) / votes.count(best))
    return scores


def lookup_table_accuracy(problems_train: Sequence[Problem], problems_test: Sequence[Problem]) -> dict[str, Any]:
    """Score the table of `lookup_table_scores`.

    Returns:
        `{n, correct, accuracy, interval}` in percent (`correct` and `interval` of the rounded count), and `subsets`,
        the same by column of the paper's Table 7.
    """
    scores = np.array(lookup_table_scores(problems_train, problems_test))

    def part(chosen: np.ndarray) -> dict[str, Any]:
        return proportion(round(float(chosen.sum())), len(chosen)) | {"accuracy": 100 * float(chosen.mean())}

    subsets = {}
    for name in SUBSETS:
        inside = [name in problem.subsets for problem in problems_test]
        if any(inside):
            subsets[name] = part(scores[inside])
    return {**part(scores), "subsets": subsets}
