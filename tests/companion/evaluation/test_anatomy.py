"""Kinds of steps fit the generated solutions; the steps of an answer are scored while all before are right."""

from __future__ import annotations

import random
import re

import pytest

from companion.data_tools.scienceqa import Problem
from companion.evaluation.anatomy import BIND, KINDS, STEPS, anatomy, step_kinds
from companion.evaluation.reasons import first_pass, sentences
from companion.miniature.school_texts import FACTS, draw_problem
from companion.miniature.science_skills import ENDINGS, SKILLS, last_letters
from llava_core.runtime import DataError


def plain(text: str) -> list[str]:
    return re.sub(r"[.,:]", "", text.lower()).split()


def test_kinds_fit_generated_solutions() -> None:
    """Decided here by the text of a sentence: a sum, a fact, words of the hint, what an image shows."""
    facts = {" ".join(plain(fact)) for facts in FACTS.values() for fact in facts}
    facts |= {f"words that end in {last_letters(w)} take {end}" for end, words in ENDINGS.items() for w in words}
    assert STEPS.keys() == SKILLS.keys()
    assert {kind for kinds in STEPS.values() for kind in kinds} == set(KINDS)
    rng, lengths = random.Random(0), dict[str, set[int]]()
    for _ in range(1500):
        problem, scene = draw_problem(rng, "val")
        steps = sentences(problem.solution)
        kinds = step_kinds(problem.skill, len(steps))
        lengths.setdefault(problem.skill, set()).add(len(steps))
        for k, (step, kind) in enumerate(zip(steps, kinds, strict=True)):
            where = f"{problem.skill}: {step} ({kind})"
            words = plain(step)
            assert (kind == "see") == (scene is not None and k == 0), where
            assert (kind == "compute") == bool({"plus", "times", "divided"} & {*words}), where
            assert (kind == "compare") == bool({"than", "wrong"} & {*words}), where
            if kind == "recall":
                if words[:2] == ["so", "does"]:  # ends as the word of the step before
                    words = [*words[2:], *plain(steps[k - 1])[1:]]
                assert " ".join(words) in facts, where
            if kind == "look up":
                assert {*words} - {*plain(problem.hint)} <= {"is"}, where
            if kind == "conclude":
                assert k == len(steps) - 1, where
    assert {skill for skill, found in lengths.items() if len(found) > 1} == {"states of matter"}
    assert all(max(found) == len(STEPS[skill]) for skill, found in lengths.items())


def problem(name: str, solution: str, skill: str, choices: list[str], answer: int) -> Problem:
    subject = "natural science"
    return Problem(name, "What?", choices, answer, "", None, "A rule.", solution, subject, 3, "val", skill)


def answer(solution: str, letter: str) -> str:
    return f"LECTURE: A rule.\nSOLUTION: {solution}\n The answer is {letter}."


def test_steps_count_while_all_before_are_right() -> None:
    solution, choices = "The red thing is a dog. Dog goes two miles. Two times three is six.", ["five", "six"]
    said = {
        "right": answer(solution, "B"),
        "wrong letter": answer(solution, "A"),
        "wrong sum": answer(solution.replace("six", "five"), "A"),
        "wrong at first": answer(solution.replace("a dog", "a cat"), "B"),
        "short": answer("The red thing is a dog.", "B"),
        "empty": "\n The answer is B.",
    }
    problems = [problem(name, solution, "distance in a picture", choices, 1) for name in said]
    result = {kind: (row["correct"], row["n"]) for kind, row in anatomy(problems, said).items()}
    assert result["see"] == (4, 6)
    assert result["look up"] == (3, 4)
    assert result["compute"] == (2, 3)
    assert result["recall"] == result["compare"] == result["conclude"] == (0, 0)
    # the wrong sum names A and is followed by A, which binds; two reasons name no choice
    assert result[BIND] == (3, 4)


def test_right_reasons_of_generated_problems_are_right() -> None:
    rng = random.Random(1)
    problems = [draw_problem(rng, "val")[0] for _ in range(200)]
    for k, p in enumerate(problems):
        object.__setattr__(p, "id", str(k))
    said = {p.id: f"{first_pass(p)}\n The answer is {p.letter}." for p in problems}
    result = anatomy(problems, said)
    assert all(row["correct"] == row["n"] > 0 for row in result.values())
    assert result[BIND]["n"] == len(problems)


def test_unknown_skills_and_longer_solutions_are_named() -> None:
    assert step_kinds("states of matter", 2) == ["compare", "conclude"]
    with pytest.raises(DataError, match="skill 'plural'"):
        step_kinds("plural", 2)
    with pytest.raises(DataError, match="3 sentences, but skill 'plurals' has 2 kinds"):
        step_kinds("plurals", 3)
