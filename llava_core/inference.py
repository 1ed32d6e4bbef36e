"""Let a model answer questions about images, in batches, with the template and image settings of its manifest."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.data.conversation import TEMPLATES, Turn, token_ids
from llava_core.data.images import load_image
from llava_core.runtime import progress

if TYPE_CHECKING:
    from llava_core.checkpoints.load import Loaded


def prompt_ids(
    loaded: Loaded,
    turns: Sequence[Turn],
    has_image: bool,
    begin: str = "",
    key: str = "",
    most: int | None = None,
) -> list[int]:
    """Ids of a conversation whose last answer is to be generated.

    Args:
        loaded: its manifest tells, each with what holds where it says nothing, `template` ("v0"), `system` (the
            template's own), `image_position` ("data") and `image_delimiters` (none), as the model was trained.
        turns: earlier turns with their answers, then (question, None).
        has_image: puts the image into the first question unless a question carries a marker; the position "data" does
            not say where, so the template does: before the question, in `v0_exact` behind it.
        begin: text that the answer already begins with (second pass of ScienceQA).
        key: record id, read by the image position "random".
        most: of a prompt with more ids than these, `begin` loses its first ones.

    Raises:
        DataError: an image delimiter is no token of the tokenizer.
    """
    manifest = loaded.manifest
    template = TEMPLATES.get(manifest.get("template", "v0"))
    if has_image:
        turns = template.with_image(turns, manifest.get("image_position", "data"), key)
    ids = template.encode(
        turns, loaded.tokenizer, loaded.model.n_image_tokens,
        system=manifest.get("system"), delimiters=manifest.get("image_delimiters"),
    ).input_ids  # fmt: skip
    begun = token_ids(loaded.tokenizer, f" {begin}", continues=True) if begin else []
    return ids + (begun if most is None else begun[max(0, len(ids) + len(begun) - most) :])


def answer_questions(
    loaded: Loaded,
    rows: Sequence[Mapping[str, Any]],
    images: Path | None = None,
    *,
    max_new_tokens: int = 48,
    batch: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    begins: Mapping[str, str] | None = None,
    desc: str | None = "answers",
    room: int = 0,
) -> dict[str, str]:
    """Answer each question once.

    Args:
        loaded: model, tokenizer, image settings, manifest.
        rows: `{question_id, text, image}`; `image` is a file name under `images`, or None to ask without an image.
        images: folder of the images.
        max_new_tokens: longest answer in tokens; fewer where the language model's positions end.
        batch: rows generated together (result does not depend on it).
        temperature: 0 is greedy; a sampled answer depends on its question's id, not on the batch.
        seed: of sampled answers; another one gives another run.
        begins: per question id, text the answer already begins with.
        desc: of the progress bar; None for none.
        room: positions to leave free behind an answer.

    Returns:
        Answer text by question id.
    """
    import numpy as np
    import torch

    from llava_core.models.generation import GenerationSettings, generate

    template = TEMPLATES.get(loaded.manifest.get("template", "v0"))
    settings = GenerationSettings(max_new_tokens, temperature, stop=template.stop)
    positions = getattr(loaded.model.language_model.config.get_text_config(), "max_position_embeddings", None)
    prompts = {
        str(r["question_id"]): prompt_ids(
            loaded,
            [(r["text"], None)],
            bool(r.get("image")),
            (begins or {}).get(str(r["question_id"]), ""),
            str(r["question_id"]),
            positions and positions - max_new_tokens,
        )
        for r in rows
    }
    ordered = sorted(rows, key=lambda r: len(prompts[str(r["question_id"])]))
    answers: dict[str, str] = {}
    for k in progress(range(0, len(ordered), batch), desc or "", leave=False, disable=desc is None):
        part = ordered[k : k + batch]
        pixels = [loaded.processor(load_image((images or Path()) / r["image"])) for r in part if r.get("image")]
        values = torch.from_numpy(np.stack(pixels)).to(loaded.model.language_model.device) if pixels else None
        names = [str(r["question_id"]) for r in part]
        # each question has draws of its own: they depend neither on the batch nor on what other questions draw
        each = [replace(settings, seed=zlib.crc32(name.encode(), seed)) for name in names]
        if positions is not None:
            left = [max(1, positions - room - len(prompts[name])) for name in names]
            each = [replace(s, max_new_tokens=min(max_new_tokens, n)) for s, n in zip(each, left, strict=True)]
        texts = generate(loaded.model, loaded.tokenizer, [prompts[name] for name in names], values, each)
        answers |= dict(zip(names, texts, strict=True))
    return {str(r["question_id"]): answers[str(r["question_id"])] for r in rows}
