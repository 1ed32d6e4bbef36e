"""Batched answers to questions about images, with the template and image settings of a checkpoint's manifest."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.data.conversation import TEMPLATES
from llava_core.data.images import load_image
from llava_core.data.tokenization import Turn, token_ids
from llava_core.runtime import DataError, progress

if TYPE_CHECKING:
    from llava_core.checkpoints.load import Loaded


def prompt_ids(
    loaded: Loaded,
    turns: Sequence[Turn],
    has_image: bool,
    answer_prefix: str = "",
    key: str = "",
    max_ids: int | None = None,
) -> list[int]:
    """Ids of a conversation whose last answer is to be generated.

    Args:
        loaded: its manifest gives `template` (default "v0"), `system` (the template's own), `image_position` ("data")
            and `image_delimiters` (none), as in training.
        turns: earlier turns with their answers, then (question, None).
        has_image: puts the image into the first question, unless a question has a marker. For the position "data" the
            template decides: before the question, in `v0_exact` after it.
        answer_prefix: text that the answer begins with (second pass of ScienceQA).
        key: record id, for the image position "random".
        max_ids: a longer prompt loses the first tokens of `answer_prefix`.
    """
    manifest = loaded.manifest
    template = TEMPLATES.get(manifest.get("template", "v0"))
    if has_image:
        turns = template.with_image(turns, manifest.get("image_position", "data"), key)
    ids = template.encode(
        turns, loaded.tokenizer, loaded.model.n_image_tokens,
        system=manifest.get("system"), delimiters=manifest.get("image_delimiters"),
    ).input_ids  # fmt: skip
    prefix = token_ids(loaded.tokenizer, f" {answer_prefix}", continues=True) if answer_prefix else []
    excess = 0 if max_ids is None else max(0, len(ids) + len(prefix) - max_ids)
    return ids + prefix[excess:]


def answer_questions(
    loaded: Loaded,
    rows: Sequence[Mapping[str, Any]],
    images: Path | None = None,
    *,
    max_new_tokens: int = 48,
    batch: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    answer_prefixes: Mapping[str, str] | None = None,
    desc: str | None = "answers",
    reserve: int = 0,
) -> dict[str, str]:
    """Answer each question once; returns the texts by question id.

    Args:
        rows: `{question_id, text, image}`; `image` is a file name under `images`, or None for a question without image.
        max_new_tokens: longest answer in tokens; fewer if the language model's positions end before.
        batch: rows generated together; it does not change the result.
        temperature: 0 is greedy; a sampled answer depends on `seed` and its question's id, not on the batch.
        answer_prefixes: per question id, text that the answer begins with.
        reserve: positions to leave free after an answer.

    Raises:
        DataError: two questions of one id, or one whose prompt fills the language model's positions.
    """
    import numpy as np
    import torch

    from llava_core.models.generation import GenerationSettings, generate

    template = TEMPLATES.get(loaded.manifest.get("template", "v0"))
    settings = GenerationSettings(max_new_tokens, temperature, stop=template.stop)
    positions = getattr(loaded.model.language_model.config.get_text_config(), "max_position_embeddings", None)
    prefixes, prompts = answer_prefixes or {}, {}
    for row in rows:
        name, max_ids = str(row["question_id"]), positions and positions - max_new_tokens
        turns, has_image = [(row["text"], None)], bool(row.get("image"))
        if name in prompts:
            raise DataError(f"question {name} is there twice; fix: give each question an id of its own")
        prompts[name] = prompt_ids(loaded, turns, has_image, prefixes.get(name, ""), name, max_ids)
        if positions is not None and (length := len(prompts[name])) >= positions:
            raise DataError(
                f"question {name}: its prompt of {length} tokens leaves no room for an answer in the language model's "
                f"{positions} positions; fix: shorten the question"
            )
    room = {name: (positions or sys.maxsize) - reserve - len(ids) for name, ids in prompts.items()}
    if short := [name for name, left in room.items() if left < max_new_tokens]:
        sys.stderr.write(
            f"{len(short)} of {len(rows)} answers have room for fewer than {max_new_tokens} tokens, the first is that "
            f"to question {short[0]}, with {max(1, room[short[0]])}\n"
        )
    ordered = sorted(rows, key=lambda r: len(prompts[str(r["question_id"])]))
    answers: dict[str, str] = {}
    for k in progress(range(0, len(ordered), batch), desc or "", leave=False, disable=desc is None):
        part = ordered[k : k + batch]
        pixels = [loaded.processor(load_image((images or Path()) / r["image"])) for r in part if r.get("image")]
        values = torch.from_numpy(np.stack(pixels)).to(loaded.model.language_model.device) if pixels else None
        names = [str(r["question_id"]) for r in part]
        row_settings = [
            # a seed per question: its answer depends neither on the batch nor on other questions
            replace(
                settings, seed=zlib.crc32(name.encode(), seed), max_new_tokens=max(1, min(max_new_tokens, room[name]))
            )
            for name in names
        ]
        texts = generate(loaded.model, loaded.tokenizer, [prompts[name] for name in names], values, row_settings)
        answers |= dict(zip(names, texts, strict=True))
    return {str(r["question_id"]): answers[str(r["question_id"])] for r in rows}
