"""Reasons with an exchanged fact, and the letters that follow them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from companion.data_tools.scienceqa import Problem, answer_prompt, format_problem
from companion.evaluation import predict, reasons
from companion.miniature.school_texts import draw_problem
from companion.miniature.scienceqa import SKILLS
from llava_core.checkpoints.load import Loaded
from llava_core.runtime import DataError


def problem(solution: str, choices: list[str], answer: int, name: str = "1") -> Problem:
    subject = "natural science"
    return Problem(name, "What is it?", choices, answer, "", None, "A rule.", solution, subject, 3, "val", "x")


@pytest.mark.parametrize(
    ("solution", "choices", "answer", "false", "wrong"),
    [
        ("It is a dog. A dog is an animal.", ["plant", "animal"], 1, "It is a dog. A dog is a plant.", 0),
        ("The opposite of north is south.", ["south", "north"], 0, "The opposite of north is north.", 1),
        ("Two plus six is eight coins.", ["six coins", "eight coins"], 1, "Two plus six is six coins.", 0),
        ("They take es and s.", ["s and es", "es and s", "s and s"], 1, "They take s and s.", 2),
        ("Lake comes first. Dog is last.", ["lake", "dog"], 1, "Lake comes first. Lake is last.", 0),
    ],
)
def test_false_reason(solution: str, choices: list[str], answer: int, false: str, wrong: int) -> None:
    changed, index = reasons.false_reason(problem(solution, choices, answer)) or (None, None)
    assert changed
    assert (changed.solution, index, changed.answer) == (false, wrong, answer)


def test_reason_that_names_no_choice_is_left_out() -> None:
    assert reasons.false_reason(problem("It is a cat.", ["a dog", "cats"], 0)) is None
    assert reasons.false_reason(problem("It is red, not blue.", ["red", "blue"], 0)) is None
    assert reasons.false_reason(problem("", ["red", "blue"], 0)) is None


def test_every_skill_has_a_false_reason() -> None:
    rng, seen = random.Random(0), set()
    for _ in range(600):
        drawn, _ = draw_problem(rng, "val")
        changed, wrong = reasons.false_reason(drawn) or (None, None)
        assert changed, drawn
        assert changed.solution != drawn.solution
        assert wrong != drawn.answer
        seen.add(drawn.skill)
    assert seen == set(SKILLS)


def test_letters_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that reads the reason follows both; one that knows the answer follows the right one only."""
    asked = [
        problem("It is red.", ["red", "blue", "white"], 0, "1"),
        problem("It is blue.", ["red", "blue", "white"], 1, "2"),
        problem("Nothing.", ["red", "blue", "white"], 2, "3"),
    ]
    seen: list[str] = []

    def reader(loaded: Any, rows: Any, answer_prefixes: Any, **_: Any) -> dict[str, str]:
        seen.extend(answer_prefixes.values())
        letters = {"red": "A", "blue": "B", "white": "C"}
        return {key: f" {letters[text.split('It is ')[1].split('.')[0]]}." for key, text in answer_prefixes.items()}

    def knower(loaded: Any, rows: Any, answer_prefixes: Any, **_: Any) -> dict[str, str]:
        return {"1": " A.", "2": " E."}

    loaded: Any = Loaded(None, None, None, {"prompt_format": "QCM-LEPA"})  # type: ignore[arg-type]
    monkeypatch.setattr(predict, "answer_questions", reader)
    result = reasons.swapped_reasons(loaded, asked)
    assert (result["n"], result["left_out"]) == (2, 1)
    right, false = (row for row in result["rows"] if row["problems"] == "all")
    assert [right[key]["correct"] for key in ("follow", "right", "other")] == [2, 2, 0]
    assert [false[key]["correct"] for key in ("follow", "right", "other")] == [2, 0, 0]
    reply = format_problem(asked[0], "QCM-LEPA").turns[0][1]
    assert reply.startswith(seen[0])  # as in training
    assert seen[0].endswith(str(answer_prompt("QCM-LEPA")))
    monkeypatch.setattr(predict, "answer_questions", knower)
    false = reasons.swapped_reasons(loaded, asked)["rows"][3]
    assert [false[key]["correct"] for key in ("follow", "right", "other")] == [0, 1, 1]


def test_answer_first_has_no_second_pass() -> None:
    loaded: Any = Loaded(None, None, None, {"prompt_format": "QCM-ALE"})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="QCM-ALE asks for no letter"):
        reasons.swapped_reasons(loaded, [problem("It is red.", ["red", "blue"], 0)])
