"""A model's answers to ScienceQA: by the prompt format of its manifest, second pass included, in batches, resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.constants import IMAGE_MARKER
from llava_core.data.scienceqa import Problem, answer_prompt, format_problem, load_problems
from llava_core.evaluate.answer import answer_questions
from llava_core.evaluate.predictions import append, checkpoint_id, resume
from llava_core.runtime import DataError, fingerprint, progress

if TYPE_CHECKING:
    from llava_core.weights.checkpoint import Loaded

MAX_NEW_TOKENS, ANSWER_TOKENS = 1024, 64
"""Longest first and second reply. Source: llava/eval/model_vqa_science.py@8959d5c."""
_BRIDGE_TOKENS = 16  # what the second pass puts between reasoning and answer never needs more


def science_answers(loaded: Loaded, problems: Sequence[Problem], **options: Any) -> dict[str, str]:
    """Answer problems and return the texts by id, in the order of the problems.

    Args:
        loaded: the model; the manifest's `prompt_format` decides how it is asked and whether in two passes.
        problems: what `load_problems` gave.
        options: images (True; without them the same questions are asked as text), released (False; ask in the words of
            the released converter, see `format_problem`), max_new_tokens (1024; fewer where the model's positions end),
            answer_tokens (64; of a second pass), temperature (0.0, greedy; the released evaluation of the paper's time
            drew at 0.7), batch (64; the answers do not depend on it).

    Raises:
        DataError: the manifest names no prompt format.
    """
    answers = {key: text for part in _batches(loaded, problems, **options) for key, text in part.items()}
    return {problem.id: answers[problem.id] for problem in problems}


def predict_science_qa(
    loaded: Loaded,
    checkpoint: str | Path,
    folder: str | Path,
    out: str | Path,
    *,
    split: str = "test",
    limit: int | None = None,
    **options: Any,
) -> dict[str, str]:
    """Answer a split of ScienceQA into a file that says how it was made; an interrupted file is gone on with.

    Args:
        loaded: the model.
        checkpoint: where it was loaded from; the file keeps its hash.
        folder: ScienceQA's official files.
        out: JSONL file; see `predictions`.
        split: which problems.
        limit: at most so many of them.
        options: as in `science_answers`.

    Returns:
        The answers by problem id, in the order of the split.

    Raises:
        DataError: the file was begun with other settings.
    """
    problems = load_problems(folder, split)[:limit]
    made_with = _settings(loaded, checkpoint, problems, split, options)
    known = resume(out, made_with)
    left = [problem for problem in problems if problem.id not in known]
    for answers in _batches(loaded, left, **options):
        append(out, answers, made_with)
        known |= answers
    return {problem.id: known[problem.id] for problem in problems}


def _settings(
    loaded: Loaded, checkpoint: str | Path, problems: Sequence[Problem], split: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    manifest, released = loaded.manifest, options.get("released", False)
    name = _prompt_format(loaded)
    asked = [[p.id, str(p.image and p.image.name), format_problem(p, name, released).turns[0][0]] for p in problems]
    return {
        "task": "science_qa", "split": split, "n": len(problems), "questions": fingerprint(asked),
        "prompt_format": name, "released_texts": released, "images": options.get("images", True),
        "template": manifest.get("template", "v0"), "system": manifest.get("system"),
        "image_position": manifest.get("image_position", "data"),
        "image_delimiters": manifest.get("image_delimiters"),
        "checkpoint": checkpoint_id(checkpoint), "run_id": manifest.get("run_id"),
        "dtype": str(loaded.model.language_model.dtype).removeprefix("torch."),
        "generation": {
            "max_new_tokens": options.get("max_new_tokens", MAX_NEW_TOKENS),
            "answer_tokens": options.get("answer_tokens", ANSWER_TOKENS) if answer_prompt(name) else None,
            "temperature": options.get("temperature", 0.0), "seed": "CRC-32 of the question's id",
        },
    }  # fmt: skip


def _prompt_format(loaded: Loaded) -> str:
    name = loaded.manifest.get("prompt_format")
    if name is None:
        raise DataError("the checkpoint names no prompt format; say which it was trained with (prompt_format=QCM-LEPA)")
    return str(name)


def _batches(
    loaded: Loaded,
    problems: Sequence[Problem],
    *,
    images: bool = True,
    released: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    temperature: float = 0.0,
    batch: int = 64,
) -> Iterator[dict[str, str]]:
    """Both passes of one batch after the other, so that an interrupted run keeps what it has; like lengths together."""
    name = _prompt_format(loaded)
    bridge = answer_prompt(name, released)
    rows = []
    for problem in problems:
        text, look = format_problem(problem, name, released).turns[0][0], images and problem.image is not None
        text = text if look else text.replace(IMAGE_MARKER, "").strip()
        rows.append({"question_id": problem.id, "text": text, "image": str(problem.image) if look else None})
    rows.sort(key=lambda row: (row["image"] is not None, len(str(row["text"]))))
    for k in progress(range(0, len(rows), batch), f"ScienceQA {name}", leave=False):
        part = rows[k : k + batch]
        room = answer_tokens + _BRIDGE_TOKENS if bridge else 0
        common: dict[str, Any] = {"batch": batch, "temperature": temperature, "desc": None}
        answers = answer_questions(loaded, part, max_new_tokens=max_new_tokens, room=room, **common)
        if bridge is not None:
            begins = {key: text + bridge for key, text in answers.items()}
            letters = answer_questions(loaded, part, max_new_tokens=answer_tokens, begins=begins, **common)
            answers = {key: f"{text}\n The answer is {letters[key].strip()}" for key, text in answers.items()}
        yield answers
