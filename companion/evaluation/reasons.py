"""Do reasons cause the answer? The letter after the right reason, and after one that names a wrong choice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from companion.data_tools.scienceqa import Problem, format_problem
from companion.evaluation.predict import letters_after
from companion.evaluation.science_qa import parse_answer
from companion.evaluation.statistics import proportion

if TYPE_CHECKING:
    from llava_core.checkpoints.load import Loaded


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, one for each step of a reason; a stop before a space ends a sentence."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def last_named(text: str, choices: Sequence[str]) -> tuple[int, re.Match[str]] | None:
    """Return the choice that a text names last, as its index and the match; of two that end there, the longer one."""
    found = [
        (match.end(), len(choice), k, match)
        for k, choice in enumerate(choices)
        if choice.strip()
        for match in re.finditer(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", text, re.IGNORECASE)
    ]
    if not found:
        return None
    _, _, index, match = max(found, key=lambda entry: entry[:2])
    return index, match


def false_reason(problem: Problem) -> tuple[Problem, int] | None:
    """Return the problem with a false solution, whose last sentence names a wrong choice, and the choice's index.

    The wrong choice is the one after the right one, or the first; an article before it is adapted. None if the last
    sentence does not name the right choice, or names another one after it.
    """
    *before, last = sentences(problem.solution) or [""]
    named = last_named(last, problem.choices)
    if named is None or named[0] != problem.answer:
        return None
    wrong = (problem.answer + 1) % len(problem.choices)
    match, text = named[1], problem.choices[wrong].strip()
    start = last[: match.start()]
    if article := re.search(r"(?i)(?<!\w)an? $", start):
        first = article[0][0]
        start = start[: article.start()] + (f"{first}n " if text[:1].lower() in "aeiou" else f"{first} ")
    if not start:
        text = text[:1].upper() + text[1:]
    solution = " ".join([*before, start + text + last[match.end() :]])
    return replace(problem, solution=solution), wrong


def first_pass(problem: Problem) -> str:
    """Return the first pass of a model that writes the problem's lecture and solution."""
    return format_problem(problem, "QCM-LEPA").turns[0][1].partition("###")[0].strip()


def swapped_reasons(loaded: Loaded, problems: Sequence[Problem], **options: Any) -> dict[str, Any]:
    """Give the right and a false reason as the first pass and generate the letters.

    Args:
        options: as for `letters_after`.

    Returns:
        `n` problems, `left_out` (see `false_reason`), and `rows`: for each reason and group of problems `n`, and the
        `proportion` of letters that `follow` the reason, are `right`, or `other` (another choice, or none).
    """
    swapped = {p.id: swap for p in problems if (swap := false_reason(p)) is not None}
    used = [p for p in problems if p.id in swapped]
    reasons = {
        "right": {p.id: (first_pass(p), p.answer) for p in used},
        "false": {key: (first_pass(changed), wrong) for key, (changed, wrong) in swapped.items()},
    }
    groups = {
        "all": used, "with an image": [p for p in used if p.image], "without": [p for p in used if not p.image]
    }  # fmt: skip
    rows = []
    for name, given in reasons.items():
        answers = letters_after(loaded, used, {key: text for key, (text, _) in given.items()}, **options)
        letters = {p.id: parse_answer(answers[p.id], len(p.choices)) for p in used}
        for group, members in groups.items():
            follow = sum(letters[p.id] == given[p.id][1] for p in members)
            right = sum(letters[p.id] == p.answer for p in members)
            either = sum(letters[p.id] in (given[p.id][1], p.answer) for p in members)
            counts = {"follow": follow, "right": right, "other": len(members) - either}
            shares = {key: proportion(count, len(members)) for key, count in counts.items()}
            rows.append({"reason": name, "problems": group, "n": len(members), **shares})
    return {"n": len(used), "left_out": len(problems) - len(used), "rows": rows}
