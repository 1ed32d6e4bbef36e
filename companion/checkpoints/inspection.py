"""`llava inspect`: what a folder or file is, without running anything in it or loading its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from companion.checkpoints.delta import DELTA
from llava_core.checkpoints.description import PARTS, Opened, check, no_downloads, open_tokenizer
from llava_core.checkpoints.formats.common import Options
from llava_core.checkpoints.formats.original import is_delta
from llava_core.checkpoints.open import layout_of, open_checkpoint
from llava_core.checkpoints.tensors import has_file, open_folder
from llava_core.runtime import CheckpointError, CompanionError, shown

RELEASED_SYSTEMS = {  # system sentences of the released code by the first digits of their SHA-256
    "ace78a978005f68a": "Vicuna v0's, of v0 training and 1.0 inference",
    "1fa69e2371b762d1": "Vicuna v1.1's, of v1 training",
    "3f908dd26b246e8f": "the first one of v0's ScienceQA evaluation",
    "814c7daa66d0a204": "the first demo's",
    "845e5d64fced4486": "the later v0 demo's",
    "563c2a621b1102ed": "the mmtag templates'",
    "790f4cfc05523b0e": "the LLaMA-2 template's",
}


def inspect(path: Path, options: Options | None = None, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Say what a checkpoint is and what is wrong with it.

    Args:
        path: folder or file, in any state.
        options: base model and tower, where the files do not hold them.
        facts: what the files leave open or say wrongly, as in `description.USE_FACTS`.

    Returns:
        `path`, `layout`, `parts`, `parameters`, `dtypes`, `template`, `system`, `image`, `facts`, `notes`, `left_out`
        and `problems`, a list of single lines; fields that could not be read are None.
    """
    result: dict[str, Any] = {
        "path": shown(path), "layout": None, "parts": [], "parameters": None, "dtypes": [], "template": None,
        "system": None, "image": None, "facts": {}, "notes": [], "left_out": {}, "problems": [],
    }  # fmt: skip
    try:
        with no_downloads():
            result["layout"] = layout_of(path)
            if result["layout"] == "original" and is_delta(tensors := open_folder(path)):
                parameters = sum(int(torch.Size(t.shape).numel()) for t in tensors.values())
                recorded = (
                    "its base's fingerprint is recorded" if has_file(path, DELTA) else "of which base, it does not say"
                )
                notes = [f"differences to a language model: `llava delta apply` makes them a model; {recorded}"]
                return result | {"layout": "delta", "parameters": parameters, "notes": notes}
            opened = open_checkpoint(path, options, facts)
            result |= _facts(opened)
            if "language_model" in opened.parts:
                _check_use(opened)
            else:
                check(opened)
    except (CompanionError, OSError) as error:
        result["problems"].append(" ".join(str(error).split()))
    return result


def _facts(opened: Opened) -> dict[str, Any]:
    description = opened.description
    template = description.facts.get("template")
    return {
        "parts": list(opened.parts), "parameters": opened.parameters, "template": template,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in opened.tensors.values()}),
        "system": _system(description.facts.get("system")), "image": description.image, "notes": opened.notes,
        "facts": {
            "projector": description.projector, "feature_layer": description.feature_layer,
            "image_position": description.facts.get("image_position"),
            "image_delimiters": description.facts.get("image_delimiters"),
            "prompt_format": description.facts.get("prompt_format"),
            "vision_tower": "inside" if "vision_tower" in opened.parts else description.tower_source or "not named",
        },
        "left_out": opened.left_out,
    }  # fmt: skip


def _system(text: str | None) -> str:
    if text is None:
        return "the template's own"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{len(text)} characters, {digest}: {RELEASED_SYSTEMS.get(digest, 'not one of the released code')}"


def _check_use(opened: Opened) -> None:
    """Whether tower, weights and tokenizer fit each other, as `load` needs it."""
    where = shown(opened.path)
    check(opened.need(*PARTS))
    if opened.tokenizer is None:
        raise CheckpointError(f"{where}: no tokenizer (tokenizer.json or tokenizer.model); fix: copy it from the base")
    words, rows = vocabulary(opened), opened.description.language_model["vocab_size"]
    if words > rows:
        raise CheckpointError(
            f"{where}: its tokenizer knows {words} tokens, the word embeddings have {rows} rows; fix: take the "
            "tokenizer that belongs to these weights"
        )


def vocabulary(opened: Opened) -> int:
    """Tokens that an opened checkpoint's tokenizer can give, padding aside (it never is embedded)."""
    assert opened.tokenizer is not None
    tokenizer = open_tokenizer(opened.tokenizer, opened.description.language_model)
    # v0's released tokenizer lists its padding token behind the table
    return 1 + max(k for token, k in tokenizer.get_vocab().items() if token != tokenizer.pad_token)
