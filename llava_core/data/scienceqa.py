"""ScienceQA: the official files, the paper's categories, and the prompt formats that turn a problem into a dialogue.

A format's name says the order of its parts: Q question, C context (hint), M multiple choice; then, behind the dash, the
order of the reply: L lecture, E solution (explanation), A answer; P a second prompt. QCM-LEPA is the paper's: reasoning
first, then the answer in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_core.constants import IMAGE_MARKER
from llava_core.data.instruct import Sample
from llava_core.registry import Registry, unknown
from llava_core.runtime import DataError, read_json, shown

LETTERS = "ABCDE"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
SUBSETS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")  # the columns of the paper's Table 7


@dataclass(frozen=True)
class Problem:
    """One multiple-choice problem.

    Attributes:
        answer: position of the right choice, from 0.
        hint: the text context, possibly empty.
        image: the image's file, or None.
        grade: school year, 1 to 12.
        skill: the finest category, used to choose what a problem asks for.
    """

    id: str
    question: str
    choices: list[str]
    answer: int
    hint: str
    image: Path | None
    lecture: str
    solution: str
    subject: str
    grade: int
    split: str
    skill: str = ""

    @property
    def letter(self) -> str:
        """Letter of the right choice."""
        return LETTERS[self.answer]

    @property
    def subsets(self) -> list[str]:
        """The columns of Table 7 that the problem counts for (TXT and IMG may both hold).

        Source: tools/evaluate_acc.py of lupantech/ScienceQA.
        """
        context = [name for name, holds in (("TXT", self.hint), ("IMG", self.image)) if holds]
        return [SUBJECTS[self.subject], *(context or ["NO"]), "G1-6" if self.grade <= 6 else "G7-12"]


def load_problems(folder: str | Path, split: str = "train", check_images: bool = True) -> list[Problem]:
    """Load a split of ScienceQA from its official files.

    Args:
        folder: holds `problems.json`, `pid_splits.json` and `images/<split>/<id>/image.png`.
        split: a name in `pid_splits.json`, e.g. train, val, test, minitrain.
        check_images: make sure that each image's file exists.

    Returns:
        The problems in the order of the split.

    Raises:
        DataError: a file or an image is missing, the split is unknown, or a problem is malformed.
    """
    folder = Path(folder)
    splits, problems = read_json(folder / "pid_splits.json"), read_json(folder / "problems.json")
    if split not in splits:
        raise DataError(f"{shown(folder / 'pid_splits.json')}: {unknown('split', split, splits)}")
    absent = [name for name in splits[split] if name not in problems]
    if absent:
        raise DataError(
            f"{shown(folder / 'problems.json')}: {len(absent)} of {len(splits[split])} problems of split '{split}' are "
            f"missing, the first is {absent[0]}; take problems.json and pid_splits.json from the same release"
        )
    loaded = [_parse(name, problems[name], folder) for name in splits[split]]
    lost = [problem for problem in loaded if check_images and problem.image and not problem.image.is_file()]
    if lost:
        raise DataError(
            f"{shown(str(lost[0].image))}: no such file (problem {lost[0].id}; {len(lost)} images of split '{split}' "
            f"are missing); unpack the images into {shown(folder / 'images')}"
        )
    return loaded


def _parse(name: str, raw: Any, folder: Path) -> Problem:
    place = f"{shown(folder / 'problems.json')}, problem {name}"
    fields = {"question": str, "choices": list, "answer": int, "subject": str, "grade": str, "split": str}
    for field, kind in fields.items():
        if not isinstance(raw, dict) or not isinstance(raw.get(field), kind):
            raise DataError(f"{place}: {field} is missing or no {kind.__name__}; take the official file")
    grade = raw["grade"].removeprefix("grade")
    if not grade.isdecimal() or not 1 <= int(grade) <= 12:
        raise DataError(f"{place}: grade '{raw['grade']}' is not grade1 to grade12; correct it")
    if raw["subject"] not in SUBJECTS:
        raise DataError(f"{place}: {unknown('subject', raw['subject'], SUBJECTS)}")
    size = len(raw["choices"])
    if not 0 <= raw["answer"] < size <= len(LETTERS):
        raise DataError(f"{place}: answer {raw['answer']} of {size} choices (at most {len(LETTERS)}); correct it")
    image = raw.get("image")
    return Problem(
        id=name,
        question=raw["question"],
        choices=raw["choices"],
        answer=raw["answer"],
        hint=raw.get("hint") or "",
        # minitrain and its like are lists of problems that lie in the folder of their own split
        image=folder / "images" / raw["split"] / name / image if image else None,
        lecture=raw.get("lecture") or "",
        solution=raw.get("solution") or "",
        subject=raw["subject"],
        grade=int(grade),
        split=raw["split"],
        skill=raw.get("skill") or "",
    )


# ------------------------------------------------------------------------------------------------ prompt formats


@dataclass(frozen=True)
class PromptFormat:
    """How a problem becomes a question and a reply.

    Attributes:
        ask: the human turn, image marker included.
        reply: the turn that a model learns.
        answer_prompt: what a second pass appends to the generated reasoning; None where one pass does.
    """

    ask: Callable[[Problem], str]
    reply: Callable[[Problem], str]
    answer_prompt: str | None = None


PROMPT_FORMATS: Registry[PromptFormat] = Registry("prompt format")


def _tidy(text: str) -> str:
    # one pass, as in the released conversion: of three spaces two remain
    return text.replace("  ", " ").strip()


def _ask_qcm(problem: Problem) -> str:
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
    text = _tidy(f"Question: {problem.question}\nContext: {problem.hint.strip() or 'N/A'}\nOptions: {choices}\n")
    text = text.replace("Question: ", "")  # everywhere: the released files have lost the word inside hints too
    return f"{text}\n{IMAGE_MARKER}" if problem.image else text


def _reply_in_order(parts: str) -> Callable[[Problem], str]:
    """Replies of the letters A, L, E in a given order; reasons behind the answer are introduced by BECAUSE."""

    def reply(problem: Problem) -> str:
        texts = {"A": f"The answer is {problem.letter}.", "L": problem.lecture, "E": problem.solution}
        reasons = any(texts[part].strip() for part in parts[1:])
        words = [texts[part] for part in parts]
        if parts[0] == "A" and len(parts) > 1:
            words = [texts["A"], "BECAUSE:", *words[1:]] if reasons else [texts["A"]]
        return _tidy(" ".join(words))

    return reply


def _reply_lepa(problem: Problem) -> str:
    named = (("LECTURE", problem.lecture), ("SOLUTION", problem.solution))
    reasons = "".join(f"{name}: {text}\n" for name, text in named if text.strip())
    return _tidy(f"{reasons}###\nANSWER: {problem.letter}.")


def _ask_lettered(problem: Problem) -> str:
    """LLaVA-1.5's layout of its evaluation file: image first, one lettered choice per line."""
    lines = [IMAGE_MARKER] if problem.image else []
    lines += [f"Context: {problem.hint}"] if problem.hint else []
    choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
    return _tidy("\n".join([*lines, problem.question, *choices]))


# AL and AE are absent on purpose: the released converter swaps their letters, so the names would mean two things
for _order in ("A", "LA", "EA", "LEA", "ELA", "ALE", "AEL"):
    PROMPT_FORMATS.register(f"QCM-{_order}")(PromptFormat(_ask_qcm, _reply_in_order(_order)))
# the released evaluation appended " ###" here although its training files have a line break before the marks
PROMPT_FORMATS.register("QCM-LEPA")(PromptFormat(_ask_qcm, _reply_lepa, answer_prompt="\n###\nANSWER:"))
PROMPT_FORMATS.register("CQM-A")(PromptFormat(_ask_lettered, lambda problem: problem.letter))


def format_problem(problem: Problem, prompt_format: str) -> Sample:
    """Turn a problem into a one-turn dialogue.

    Args:
        problem: what `load_problems` gave.
        prompt_format: exact name, e.g. `QCM-LEPA` (the paper's), `QCM-LEA`, `QCM-ALE` (answer first), `QCM-A`.

    Returns:
        The sample; the QCM formats have their image behind the question, as the released conversion wrote them.

    Raises:
        ConfigError: unknown format.

    Source: scripts/convert_sqa_to_llava.py of haotian-liu/LLaVA at 8959d5c; CQM-A: llava_test_CQM-A.json of LLaVA-1.5.
    """
    layout = PROMPT_FORMATS.get(prompt_format)
    return Sample(problem.id, [(layout.ask(problem), layout.reply(problem))], problem.image)


def answer_prompt(prompt_format: str) -> str | None:
    """Return what follows the generated reasoning in the second pass, or None for formats that need one pass only."""
    return PROMPT_FORMATS.get(prompt_format).answer_prompt
