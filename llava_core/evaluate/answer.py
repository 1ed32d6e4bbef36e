"""Let a model answer questions about images, in batches, with the template and image settings of its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES, Turn, encode, place_image
from llava_core.data.image_processor import load_image
from llava_core.runtime import progress

if TYPE_CHECKING:
    from llava_core.weights.checkpoint import Loaded


def prompt_ids(loaded: Loaded, turns: Sequence[Turn], has_image: bool, begin: str = "", key: str = "") -> list[int]:
    """Ids of a conversation whose last answer is to be generated.

    Args:
        loaded: its manifest names template and image position ("v0" and "first" for a model without one).
        turns: earlier turns with their answers, then (question, None).
        has_image: puts the image into the first question unless it carries a marker.
        begin: text that the answer already begins with (second pass of ScienceQA).
        key: record id, read by the image position "random".
    """
    template = TEMPLATES.get(loaded.manifest.get("template", "v0"))
    (first, answer), *later = turns
    if has_image and IMAGE_MARKER not in first:
        first = f"{IMAGE_MARKER}\n{first}"
    first = place_image(first, loaded.manifest.get("image_position", "data"), key)
    segments = template.render([(first, answer), *later])
    ids = encode(segments, loaded.tokenizer, loaded.model.n_image_tokens).input_ids
    return ids + (loaded.tokenizer(f" {begin}", add_special_tokens=False)["input_ids"] if begin else [])


def answer_questions(
    loaded: Loaded,
    rows: Sequence[Mapping[str, Any]],
    images: Path | None = None,
    *,
    max_new_tokens: int = 48,
    batch: int = 64,
    temperature: float = 0.0,
    begins: Mapping[str, str] | None = None,
    desc: str = "answers",
) -> dict[str, str]:
    """Answer each question once.

    Args:
        loaded: model, tokenizer, image settings, manifest.
        rows: `{question_id, text, image}`; `image` is a file name under `images`, or None to ask without an image.
        images: folder of the images.
        max_new_tokens: longest answer in tokens.
        batch: rows generated together (result does not depend on it).
        temperature: 0 is greedy.
        begins: per question id, text the answer already begins with.

    Returns:
        Answer text by question id.
    """
    import numpy as np
    import torch

    from llava_core.models.generation import GenerationSettings, generate

    template = TEMPLATES.get(loaded.manifest.get("template", "v0"))
    settings = GenerationSettings(max_new_tokens, temperature, stop=template.stop)
    prompts = {
        str(r["question_id"]): prompt_ids(
            loaded,
            [(r["text"], None)],
            bool(r.get("image")),
            (begins or {}).get(str(r["question_id"]), ""),
            str(r["question_id"]),
        )
        for r in rows
    }
    ordered = sorted(rows, key=lambda r: len(prompts[str(r["question_id"])]))
    answers: dict[str, str] = {}
    for k in progress(range(0, len(ordered), batch), desc, leave=False):
        part = ordered[k : k + batch]
        pixels = [loaded.processor(load_image((images or Path()) / r["image"])) for r in part if r.get("image")]
        values = torch.from_numpy(np.stack(pixels)).to(loaded.model.language_model.device) if pixels else None
        texts = generate(
            loaded.model, loaded.tokenizer, [prompts[str(r["question_id"])] for r in part], values, settings
        )
        answers |= {str(r["question_id"]): text for r, text in zip(part, texts, strict=True)}
    return {str(r["question_id"]): answers[str(r["question_id"])] for r in rows}
