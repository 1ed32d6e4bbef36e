"""ScienceQA: the official files, the paper's categories, and the prompt formats that turn a problem into a dialogue.

A prompt format is named by the order of its parts: Q question, C context (hint), M multiple choice, L lecture, E
solution (explanation); behind the dash the reply: L, E, A answer, P a second prompt. QCM-LEPA is the paper's: reasoning
first, then the answer in a second pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from llava_core.constants import IMAGE_MARKER
from llava_core.data.instruct import Sample, file_fault
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError, display_path, read_json, shortened, write_json

LETTERS = "ABCDE"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
SUBSETS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")  # the columns of the paper's Table 7


@dataclass(frozen=True)
class Problem:
    """One multiple-choice problem.

    Attributes:
        answer: position of the right choice, from 0.
        hint: the text context, possibly empty.
        grade: school year, 1 to 12.
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
        return LETTERS[self.answer]

    @property
    def subsets(self) -> list[str]:
        """The columns of Table 7 that the problem counts for (TXT and IMG may both hold).

        Source: tools/evaluate_acc.py of lupantech/ScienceQA.
        """
        context = [name for name, holds in (("TXT", self.hint), ("IMG", self.image)) if holds]
        return [SUBJECTS[self.subject], *(context or ["NO"]), "G1-6" if self.grade <= 6 else "G7-12"]


def load_problems(folder: str | Path, split: str = "train", check_images: bool = True) -> list[Problem]:
    """Load a split of ScienceQA (a name in `pid_splits.json`, e.g. train, val, test, minitrain).

    `folder` holds the official `problems.json`, `pid_splits.json` and `images/<split>/<id>/image.png`. Raises DataError
    if a file or (with `check_images`) an image is missing, the split is unknown, or a problem is malformed.
    """
    folder = Path(folder)
    splits, problems = read_json(folder / "pid_splits.json"), read_json(folder / "problems.json")
    for file, content in (("pid_splits.json", splits), ("problems.json", problems)):
        if not isinstance(content, dict):
            raise DataError(f"{display_path(folder / file)}: no object with names; take the official file")
    if split not in splits:
        raise DataError(f"{display_path(folder / 'pid_splits.json')}: {unknown('split', split, splits)}")
    if not isinstance(splits[split], list) or not all(isinstance(name, str) for name in splits[split]):
        raise DataError(
            f"{display_path(folder / 'pid_splits.json')}: {split} is no list of ids; take the official file"
        )
    absent = [name for name in splits[split] if name not in problems]
    if absent:
        raise DataError(
            f"{display_path(folder / 'problems.json')}: {len(absent)} of {len(splits[split])} problems of split "
            f"'{split}' are "
            f"missing, the first is {absent[0]}; take problems.json and pid_splits.json from the same release"
        )
    loaded = [_parse(name, problems[name], folder) for name in splits[split]]
    lost = [problem for problem in loaded if check_images and problem.image and not problem.image.is_file()]
    if lost:
        raise DataError(
            f"{display_path(str(lost[0].image))}: no such file (problem {lost[0].id}; {len(lost)} images of split "
            f"'{split}' "
            f"are missing); unpack the images into {display_path(folder / 'images')}"
        )
    return loaded


def _parse(name: str, raw: Any, folder: Path) -> Problem:
    place = f"{display_path(folder / 'problems.json')}, problem {name}"
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
    texts = {field: raw.get(field) or "" for field in ("hint", "image", "lecture", "solution", "skill")}
    for field, text in [*texts.items(), *(("choices", choice) for choice in raw["choices"])]:
        if not isinstance(text, str):
            raise DataError(f"{place}: {field} has {shortened(text)} instead of a text; take the official file")
    file = str(Path(raw["split"], name, texts["image"]))  # an absolute part replaces those before it
    if texts["image"] and (fault := file_fault(folder / "images", file, image=True)):
        raise DataError(f"{place}: the image {shortened(file)} {fault}")
    return Problem(
        id=name,
        question=raw["question"],
        choices=raw["choices"],
        answer=raw["answer"],
        hint=texts["hint"],
        # minitrain and its like are lists of problems that lie in the folder of their own split
        image=folder / "images" / file if texts["image"] else None,
        lecture=texts["lecture"],
        solution=texts["solution"],
        subject=raw["subject"],
        grade=int(grade),
        split=raw["split"],
        skill=texts["skill"],
    )


def write_training_files(
    folder: str | Path, formats: Iterable[str] = ("QCM-LEPA", "QCM-ALE"), check_images: bool = True
) -> dict[str, int]:
    """Write the splits train and val as LLaVA-Instruct records: `llava_<split>_<format>.json` in the same folder.

    The records name their images relative to the folder `images`. Returns the number of records per file name;
    raises ConfigError for an unknown format, DataError as `load_problems`.

    Source: scripts/convert_sqa_to_llava.py of haotian-liu/LLaVA at 82bc69e (its image names start at `images/<split>`).
    """
    folder, formats = Path(folder), list(formats)
    for prompt_format in formats:
        _parts(prompt_format)
    counts = {}
    for split in ("train", "val"):
        problems = load_problems(folder, split, check_images)
        for prompt_format in formats:
            records = [_record(format_problem(problem, prompt_format), folder / "images") for problem in problems]
            path = write_json(folder / f"llava_{split}_{prompt_format}.json", records)
            counts[path.name] = len(records)
    return counts


def _record(sample: Sample, images: Path) -> dict[str, Any]:
    ((question, reply),) = sample.turns
    image = {"image": sample.image.relative_to(images).as_posix()} if sample.image else {}
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    return {"id": sample.id, **image, "conversations": turns}


LETTERED = "CQM-A"
_INPUTS = ("QCM", "CQM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
_OUTPUTS = ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE", "AEL", "LEPA")
PROMPT_FORMATS = tuple(f"{order}-{reply}" for order in _INPUTS for reply in _OUTPUTS)


def format_problem(problem: Problem, prompt_format: str, released: bool = False) -> Sample:
    """Turn a problem into a one-turn dialogue; `prompt_format` is one of `PROMPT_FORMATS`, or a ConfigError.

    The released converter departs from the names of its formats; `released` repeats this: AL gives the solution and AE
    the lecture; of three spaces two remain; `Question: ` and `Answer: ` are removed everywhere from a text that begins
    with them, hints and lectures included; a backslash with an n in a lecture becomes a line break; and a reply without
    reasons may begin with a space. `CQM-A` without `released` is the format of LLaVA-1.5's evaluation file (image
    first, a lettered line per choice); in all others the image follows the question.

    Source: scripts/convert_sqa_to_llava_base_prompt.py of haotian-liu/LLaVA at 82bc69e; CQM-A: llava_test_CQM-A.json
    of LLaVA-1.5.
    """
    order, reply = _parts(prompt_format)
    if prompt_format == LETTERED and not released:
        return Sample(problem.id, [(_ask_lettered(problem), problem.letter)], problem.image)
    asked = _ask(problem, order, released) + (f"\n{IMAGE_MARKER}" if problem.image else "")
    return Sample(problem.id, [(asked, _reply(problem, reply, released))], problem.image)


def answer_prompt(prompt_format: str, released: bool = False) -> str | None:
    """What follows the generated reasoning in the second pass; None for formats of one pass.

    The released evaluation puts a space where its training files have a line break.
    """
    if _parts(prompt_format)[1] != "LEPA":
        return None
    return " ###\nANSWER:" if released else "\n###\nANSWER:"


def _parts(prompt_format: str) -> tuple[str, str]:
    if prompt_format not in PROMPT_FORMATS:
        raise ConfigError(unknown("prompt format", prompt_format, PROMPT_FORMATS))
    order, _, reply = prompt_format.partition("-")
    return order, reply


def _ask(problem: Problem, order: str, released: bool) -> str:
    lines = {
        "Q": f"Question: {problem.question}",
        "C": f"Context: {problem.hint.strip() or 'N/A'}",
        "M": "Options: " + " ".join(f"({a}) {b}" for a, b in zip(LETTERS, problem.choices, strict=False)),
    }
    asked = []
    for key, parts in groupby(order, lambda part: "reasons" if part in "LE" else part):
        reasons = _reasons(problem, "".join(parts), released) if key == "reasons" else ""
        if key != "reasons" or reasons.strip() or released:
            asked.append(lines.get(key, f"BECAUSE: {reasons}"))
    text = _tidy("\n".join(asked), released)
    return _without_label(text, "Question: ", released)


def _reply(problem: Problem, order: str, released: bool) -> str:
    if order == "LEPA":
        named = {"LECTURE": _reasons(problem, "L", released), "SOLUTION": _reasons(problem, "E", released)}
        lines = "".join(f"{name}: {text}\n" for name, text in named.items() if text.strip())
        return _tidy(f"{lines}###\nANSWER: {problem.letter}.", released)
    answer = f"The answer is {problem.letter}."
    if released and order in ("AL", "AE"):
        order = {"AL": "AE", "AE": "AL"}[order]
    reasons = _reasons(problem, order.replace("A", ""), released)
    if order != "A" and order.startswith("A"):
        text = f"{answer} BECAUSE: {reasons}" if reasons.strip() or released else answer
    else:
        text = f"{reasons} {answer}" if order != "A" else answer
    return _without_label(_tidy(f"Answer: {text}", released), "Answer: ", released)


def _reasons(problem: Problem, order: str, released: bool) -> str:
    texts = {"L": problem.lecture, "E": problem.solution}
    text = " ".join(texts[part] for part in order)
    return text.replace("\\n", "\n") if released else text


def _tidy(text: str, released: bool) -> str:
    if not released:
        return re.sub(" {2,}", " ", text).strip()
    text = text.replace("  ", " ").strip()
    # the converter removes the word everywhere
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def _without_label(text: str, label: str, released: bool) -> str:
    if not released:
        return text.removeprefix(label)
    return text.replace(label, "") if text.startswith(label) else text


def _ask_lettered(problem: Problem) -> str:
    lines = [IMAGE_MARKER] if problem.image else []
    lines += [f"Context: {problem.hint}"] if problem.hint else []
    choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
    return _tidy("\n".join([*lines, problem.question, *choices]), released=False)
