"""The checkpoint formats that `llava convert` writes, by name; `llava_core.checkpoints` reads all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from companion.checkpoints.hf_export import rope_fields, write_hf
from llava_core.checkpoints.describe import DESCRIPTION_KEY, MODEL_PARTS, Checkpoint
from llava_core.checkpoints.files import error_at
from llava_core.checkpoints.formats import hf, mmpretrain, native, original
from llava_core.checkpoints.formats.names import export_tensors
from llava_core.checkpoints.tensors import write_tensors
from llava_core.runtime import write_json

_ARCHITECTURES = {  # model_type is that of code 1.6; earlier code had "llava", which is transformers' own since 4.36
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")
}  # fmt: skip


@dataclass(frozen=True)
class Writer:
    """How one format is written.

    Attributes:
        write: writes a checkpoint into an empty folder, in shards of so many bytes.
        rules: pairs (our prefix, the format's prefix), the longest first.
        required_parts: what a checkpoint must contain to be written; a vision tower may else be named only.
        only_required_parts: whether nothing but `required_parts` is written.
    """

    summary: str
    write: Callable[[Checkpoint, Path, int], None]
    rules: tuple[tuple[str, str], ...] = ()
    required_parts: tuple[str, ...] = ("multi_modal_projector", "language_model")
    only_required_parts: bool = False


def original_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return `config.json` of the original code for a checkpoint; it also contains our description."""
    description = checkpoint.description
    language_model, usage = description.language_model, description.usage
    model_type = language_model.get("model_type")
    if model_type is None:  # of a projector by itself
        raise error_at(checkpoint.path, "has no configuration of its language model; fix: --base with that model")
    if model_type not in _ARCHITECTURES:
        raise error_at(checkpoint.path, f"the original code has no {model_type}; fix: --to hf")
    original_type, architecture = _ARCHITECTURES[model_type]
    tower = usage.get("base", {}).get("vision_tower") or description.tower_source
    if tower is None:
        raise error_at(checkpoint.path, "names no vision tower, and the original code loads it by its name; fix: "
                       "--vision-tower NAME (hub id or folder)")  # fmt: skip
    kind = (language_model.get("rope_parameters") or {}).get("rope_type", "default")
    if kind not in ("default", "linear", "dynamic"):
        raise error_at(checkpoint.path, f"the original code has no rope scaling {kind!r}; fix: --to hf")
    return {
        **language_model, **rope_fields(language_model),
        "model_type": original_type, "architectures": [architecture],
        "mm_vision_tower": tower,
        "mm_hidden_size": description.d_vision, "mm_projector_type": description.projector,
        "mm_vision_select_layer": description.feature_layer, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": bool(usage.get("image_delimiters")), "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if (description.image or {}).get("mode") == "pad" else "square",
        "use_mm_proj": True, "unfreeze_mm_vision_tower": "vision_tower" in checkpoint.parts,
        DESCRIPTION_KEY: description.to_dict(),
    }  # fmt: skip


def write_original(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    write_json(folder / "config.json", original_config(checkpoint))
    checkpoint.copy_tokenizer(folder)
    write_tensors(folder, export_tensors(checkpoint, original.RULES), shard_bytes)


def write_mmpretrain(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    checkpoint.copy_tokenizer(folder)
    write_json(folder / "config.json", checkpoint.description.language_model)  # of its lang_encoder
    tensors = {name: t.read().contiguous() for name, t in export_tensors(checkpoint, mmpretrain.RULES).items()}
    meta = {DESCRIPTION_KEY: checkpoint.description.to_dict()}
    torch.save({"meta": meta, "state_dict": tensors}, folder / "model.pth")


def write_projector(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    write_json(folder / "config.json", original_config(checkpoint))
    tensors = {name: tensor.read().clone() for name, tensor in export_tensors(checkpoint, original.RULES).items()}
    torch.save(tensors, folder / "mm_projector.bin")


WRITERS = {
    "llava": Writer("this project's self-describing directory", native.write),
    "hf": Writer("transformers' LlavaForConditionalGeneration", write_hf, hf.RULES, MODEL_PARTS),
    "original": Writer("the original releases (v0, v1, 1.5)", write_original, original.RULES),
    "mmpretrain": Writer("one .pth of mmpretrain", write_mmpretrain, mmpretrain.RULES),
    "projector": Writer(
        "a projector by itself, mm_projector.bin", write_projector, original.RULES, ("multi_modal_projector",),
        only_required_parts=True,
    ),
}  # fmt: skip
