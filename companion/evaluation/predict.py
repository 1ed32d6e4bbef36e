"""Answers of a checkpoint, generated in batches into files that are resumed: any questions, and ScienceQA.

The prompt format in the manifest of the checkpoint decides how ScienceQA is asked, and whether in two passes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.data_tools.scienceqa import Problem, answer_prompt, format_problem, load_problems
from companion.evaluation.predictions import checkpoint_id, write_predictions
from llava_core.constants import IMAGE_MARKER
from llava_core.inference import answer_questions
from llava_core.runtime import DataError, display_path, fingerprint, progress

if TYPE_CHECKING:
    from llava_core.checkpoints.load import Loaded

MAX_NEW_TOKENS, ANSWER_TOKENS = 1024, 64
"""Longest first and second reply. Source: llava/eval/model_vqa_science.py@8959d5c."""
_BRIDGE_TOKENS = 16  # upper bound of the text between reasoning and answer in the second pass
_DEFAULTS = {
    "template": "v0",
    "system": None,
    "image_position": "data",
    "image_delimiters": None,
    "prompt_format": None,
}


def conditions(loaded: Loaded, checkpoint: str | Path, **more: Any) -> dict[str, Any]:
    """Return all that decides an answer besides the question: model, dtype, prompt, image processing, and `more`."""
    manifest = loaded.manifest
    settings = {
        "checkpoint": checkpoint_id(checkpoint), "base": manifest.get("base"), "run_id": manifest.get("run_id"),
        "dtype": str(loaded.model.language_model.dtype).removeprefix("torch."),
        **{name: manifest.get(name, default) for name, default in _DEFAULTS.items()},
        "feature_layer": loaded.model.feature_layer, "image": loaded.processor.to_dict(), **more,
    }  # fmt: skip
    copied: dict[str, Any] = json.loads(json.dumps(settings))  # as read from a file: lists, no tuples
    return copied


def predict_questions(
    loaded: Loaded,
    checkpoint: str | Path,
    rows: Sequence[Mapping[str, Any]],
    images: Path | None,
    out: str | Path,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 64,
    desc: str = "answers",
) -> dict[str, Any]:
    """Answer questions `{question_id, text, image}` into a JSONL file; a file of an interrupted run is resumed.

    Returns:
        answers, new (generated now), conditions, file.

    Raises:
        DataError: the file has answers to other questions or with other settings.
    """
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings, new = conditions(loaded, checkpoint, **generation), 0

    def answer(left: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
        nonlocal new
        new = len(left)
        for k in progress(range(0, new, batch), desc, leave=False):
            yield answer_questions(loaded, left[k : k + batch], images, batch=batch, desc=None, **generation)

    answers = write_predictions(out, rows, settings, answer)
    return {"answers": len(answers), "new": new, "conditions": settings, "file": display_path(out)}


def science_answers(loaded: Loaded, problems: Sequence[Problem], **options: Any) -> dict[str, str]:
    """Answer problems and return the texts by id, in the order of the problems.

    Args:
        options: images (True; False asks the same questions as text), released (False; True uses the wording of the
            released converter, see `format_problem`), max_new_tokens (1024), answer_tokens (64; of a second pass),
            temperature (0.0; the released evaluation of the time sampled at 0.7), batch (64).
    """
    rows = _rows(loaded, problems, options)
    answers = {key: text for part in _batches(loaded, rows, **options) for key, text in part.items()}
    return {problem.id: answers[problem.id] for problem in problems}


def letters_after(
    loaded: Loaded, problems: Sequence[Problem], first_passes: Mapping[str, str], **options: Any
) -> dict[str, str]:
    """Run the second pass only, after given texts in place of the first one's; complete answers by id.

    Args:
        first_passes: by problem id, as the first pass would end: without the `###`.
        options: as for `science_answers`.

    Raises:
        DataError: the checkpoint's prompt format has no second pass.
    """
    bridge = answer_prompt(name := _prompt_format(loaded), options.get("released", False))
    if bridge is None:
        raise DataError(f"prompt format {name} asks for no letter in a second pass; take a checkpoint of QCM-LEPA")
    rows = _rows(loaded, problems, options)
    tokens, batch = options.get("answer_tokens", ANSWER_TOKENS), options.get("batch", 64)
    return _second_pass(loaded, rows, first_passes, bridge, max_new_tokens=tokens, batch=batch, desc=None)


def _second_pass(
    loaded: Loaded, rows: Sequence[Mapping[str, Any]], texts: Mapping[str, str], bridge: str, **generation: Any
) -> dict[str, str]:
    prefixes = {str(row["question_id"]): texts[str(row["question_id"])] + bridge for row in rows}
    letters = answer_questions(loaded, rows, answer_prefixes=prefixes, **generation)
    return {key: f"{texts[key]}\n The answer is {letter.strip()}" for key, letter in letters.items()}


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
    """Answer a split of ScienceQA into a file, with the options of `science_answers`; an interrupted run is resumed.

    Raises:
        DataError: the file has answers with other settings.
    """
    problems = load_problems(folder, split)[:limit]
    rows, name = _rows(loaded, problems, options), _prompt_format(loaded)
    asked = [[p.id, str(p.image and p.image.name), row["text"]] for p, row in zip(problems, rows, strict=True)]
    settings = conditions(
        loaded, checkpoint, task="science_qa", split=split, n=len(problems), questions=fingerprint(asked),
        released_texts=options.get("released", False), images=options.get("images", True),
        max_new_tokens=options.get("max_new_tokens", MAX_NEW_TOKENS),
        answer_tokens=options.get("answer_tokens", ANSWER_TOKENS) if answer_prompt(name) else None,
        temperature=options.get("temperature", 0.0), seed=0,
    )  # fmt: skip
    return write_predictions(out, rows, settings, lambda left: _batches(loaded, left, **options))


def _prompt_format(loaded: Loaded) -> str:
    name = loaded.manifest.get("prompt_format")
    if name is None:
        raise DataError("the checkpoint names no prompt format; give the one of its training (prompt_format=QCM-LEPA)")
    return str(name)


def _rows(loaded: Loaded, problems: Sequence[Problem], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    name, rows = _prompt_format(loaded), []
    for problem in problems:
        text = format_problem(problem, name, options.get("released", False)).turns[0][0]
        with_image = options.get("images", True) and problem.image is not None
        text = text if with_image else text.replace(IMAGE_MARKER, "").strip()
        rows.append({"question_id": problem.id, "text": text, "image": str(problem.image) if with_image else None})
    return rows


def _batches(
    loaded: Loaded,
    rows: Sequence[Mapping[str, Any]],
    *,
    images: bool = True,
    released: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    temperature: float = 0.0,
    batch: int = 64,
) -> Iterator[dict[str, str]]:
    """Both passes of a batch come before the next batch; rows of similar length share one."""
    name = _prompt_format(loaded)
    bridge = answer_prompt(name, released)
    rows = sorted(rows, key=lambda row: (row["image"] is not None, len(row["text"])))
    for k in progress(range(0, len(rows), batch), f"ScienceQA {name}", leave=False):
        part = rows[k : k + batch]
        reserve = answer_tokens + _BRIDGE_TOKENS if bridge else 0
        common: dict[str, Any] = {"batch": batch, "temperature": temperature, "desc": None}
        answers = answer_questions(loaded, part, max_new_tokens=max_new_tokens, reserve=reserve, **common)
        if bridge is not None:
            answers = _second_pass(loaded, part, answers, bridge, max_new_tokens=answer_tokens, **common)
        yield answers
