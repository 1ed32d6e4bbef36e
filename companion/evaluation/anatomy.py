"""Anatomy of an answer: how often each kind of step of a written reason is right, and the letter after the last one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from companion.data_tools.scienceqa import Problem
from companion.evaluation.grounding import normalize
from companion.evaluation.reasons import last_named, sentences
from companion.evaluation.science_qa import parse_answer
from companion.evaluation.statistics import proportion
from llava_core.config_files import read_yaml
from llava_core.registry import unknown
from llava_core.runtime import DataError

STEPS: dict[str, list[str]] = read_yaml(Path(__file__).with_suffix(".yaml"))
"""Kinds of the steps of a solution by skill of mini-scienceqa."""
KINDS = ("see", "look up", "recall", "compute", "compare", "conclude")
BIND = "bind the letter"


def step_kinds(skill: str, steps: int) -> list[str]:
    """Return the kinds of a solution's sentences.

    Raises:
        DataError: the skill is unknown, or has fewer kinds than the solution has sentences.
    """
    if skill not in STEPS:
        raise DataError(f"steps of a solution: {unknown('skill', skill, STEPS)}; only mini-scienceqa has skills")
    kinds = STEPS[skill]
    if steps > len(kinds):
        raise DataError(f"steps of a solution: {steps} sentences, but skill '{skill}' has {len(kinds)} kinds")
    return [*kinds[: steps - 1], kinds[-1]]


def anatomy(problems: Iterable[Problem], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Score each kind of step where all steps before it are right, and the letter given the reason that was written.

    Args:
        answers: by id, written reasons and the letter of the second pass, as `science_answers` returns them.

    Returns:
        By kind the `proportion` of right steps, word for word; `bind the letter`: of the reasons whose last step names
        a choice, right or wrong, the proportion that is followed by its letter.
    """
    right: dict[str, list[bool]] = {kind: [] for kind in (*KINDS, BIND)}
    for problem in problems:
        reason = answers[problem.id].partition("\n The answer is")[0]
        written = sentences(reason.partition("SOLUTION:")[2])
        wanted = sentences(problem.solution)
        for k, kind in enumerate(step_kinds(problem.skill, len(wanted))):
            right[kind].append(k < len(written) and normalize(written[k]) == normalize(wanted[k]))
            if not right[kind][-1]:
                break
        named = last_named(written[-1], problem.choices) if written else None
        if named is not None:
            right[BIND].append(parse_answer(answers[problem.id], len(problem.choices)) == named[0])
    return {kind: proportion(sum(hits), len(hits)) for kind, hits in right.items()}
