"""`llava inspect`: describe a checkpoint without running code of it or loading its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.base_models import no_downloads
from llava_core.checkpoints.describe import MODEL_PARTS, Checkpoint, Options, check
from llava_core.checkpoints.files import has_file
from llava_core.checkpoints.formats import original
from llava_core.checkpoints.open import detect_format, open_checkpoint
from llava_core.checkpoints.tensors import open_folder
from llava_core.runtime import CompanionError, display_path

CHECKED_BYTES = 2_000_000_000
RELEASED_SYSTEMS = {  # system sentences of the released code by the first digits of their SHA-256
    "ace78a978005f68a": "Vicuna v0's, of v0 training and 1.0 inference",
    "1fa69e2371b762d1": "Vicuna v1.1's, of v1 training",
    "3f908dd26b246e8f": "the first one of v0's ScienceQA evaluation",
    "814c7daa66d0a204": "the first demo's",
    "845e5d64fced4486": "the later v0 demo's",
    "563c2a621b1102ed": "the mmtag templates'",
    "790f4cfc05523b0e": "the LLaMA-2 template's",
}


def inspect(path: Path, options: Options | None = None, usage: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe a checkpoint, in any state, and find its first problem.

    Of checkpoints up to `CHECKED_BYTES` the values are read, too, as NaN or infinity is a problem.

    Args:
        path: folder or file.
        options: base model and tower, where the files do not contain them.
        usage: values that the files lack or have wrong, as in `describe.USAGE_FIELDS`.

    Returns:
        Among other fields `problems`, a list of single lines; fields that could not be read are None.
    """
    result: dict[str, Any] = {
        "path": display_path(path), "layout": None, "parts": [], "parameters": None, "dtypes": [], "template": None,
        "system": None, "image": None, "facts": {}, "notes": [], "left_out": {}, "problems": [],
    }  # fmt: skip
    try:
        with no_downloads():
            detected = detect_format(path)
            result["layout"] = None if detected is None else detected.name
            if detected is original.FORMAT and original.is_delta(path, tensors := open_folder(path)):
                parameters = sum(int(torch.Size(t.shape).numel()) for t in tensors.values())
                known = has_file(path, original.DELTA)
                recorded = "its base's fingerprint is recorded" if known else "its base is not recorded"
                notes = [f"differences to a language model: `llava delta apply` makes them a model; {recorded}"]
                return result | {"layout": "delta", "parameters": parameters, "notes": notes}
            checkpoint = open_checkpoint(path, options, usage)
            result |= _summary(checkpoint)
            if "language_model" in checkpoint.parts:
                _check_loadable(checkpoint)
            else:
                check(checkpoint)
            _check_values(checkpoint)
    except (CompanionError, OSError) as error:
        result["problems"].append(" ".join(str(error).split()))
    return result


def _check_values(checkpoint: Checkpoint) -> None:
    size = sum(tensor.bytes for tensor in checkpoint.tensors.values())
    if size > CHECKED_BYTES:
        checkpoint.notes.append(
            f"{size / 1e9:.0f} GB of values were not read: loading and converting check them for NaN"
        )
        return
    for tensor in checkpoint.tensors.values():
        tensor.read()


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    description, usage = checkpoint.description, checkpoint.description.usage
    tower = "inside" if "vision_tower" in checkpoint.parts else description.tower_source or "not named"
    return {
        "parts": list(checkpoint.parts), "parameters": checkpoint.parameters, "template": usage.get("template"),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()}),
        "system": _system(usage.get("system")), "image": description.image, "notes": checkpoint.notes,
        "facts": {
            "projector": description.projector, "feature_layer": description.feature_layer,
            **{name: usage.get(name) for name in ("image_position", "image_delimiters", "prompt_format")},
            "vision_tower": tower,
        },
        "left_out": checkpoint.left_out,
    }  # fmt: skip


def _system(text: str | None) -> str:
    if text is None:
        return "the template's own"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{len(text)} characters, {digest}: {RELEASED_SYSTEMS.get(digest, 'not one of the released code')}"


def _check_loadable(checkpoint: Checkpoint) -> None:
    check(checkpoint.require(*MODEL_PARTS))
    checkpoint.open_tokenizer()
