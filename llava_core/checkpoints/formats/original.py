"""The layout of the original releases, v0 to 1.5: LLaMA's names, the projector beside them, `mm_*` in `config.json`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_core.checkpoints.description import Description, Opened, language_config, tokenizer_folder
from llava_core.checkpoints.formats.common import (
    BLOCK,
    DELIMITERS,
    LAYOUTS,
    Layout,
    Options,
    copy_tokenizer,
    open_renamed,
    to_ours,
    to_theirs,
    unchanged,
)
from llava_core.checkpoints.tensors import Lazy, ShardWriter, has_file, has_weights, open_folder, read_settings
from llava_core.runtime import CheckpointError, shown, write_json

RULES = (
    ("multi_modal_projector.", "model.mm_projector."),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)


def mm_config(path: Path) -> dict[str, Any]:
    """`config.json` of a folder if it is of the original code, which names its additions `mm_*`; else empty."""
    config = read_settings(path, "config.json") if path.is_dir() and has_file(path, "config.json") else {}
    return config if "mm_vision_tower" in config or "mm_hidden_size" in config else {}


def _found(path: Path) -> bool:
    return bool(mm_config(path)) and has_weights(path) and not has_file(path, "adapter_config.json")


_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": (None, "patch"),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "square", "pad"),
    "mm_projector_type": (None, "linear", "mlp2x_gelu"),
}


def describe_original(path: Path, config: dict[str, Any], options: Options, notes: list[str]) -> Description:
    """Description of a checkpoint of the original code from its `config.json`."""
    where = shown(path / "config.json")
    if BLOCK in config:
        told = Description.from_dict(config[BLOCK], where)
        unchanged(told, config, where, {"mm_vision_select_layer": told.feature_layer, "mm_hidden_size": told.d_vision,
            "mm_projector_type": told.projector, "vocab_size": told.language_model["vocab_size"]})  # fmt: skip
        return replace(told, tower_source=options.vision_tower or told.tower_source)
    for name, values in _KNOWN_VALUES.items():
        if config.get(name) not in values:
            raise CheckpointError(
                f"{where}: {name} is {config[name]!r}; only {', '.join(map(str, values[1:]))} can be represented"
            )
    kind = str(config.get("model_type"))
    kinds = {"llava": "llama", "llava_llama": "llama", "llama": "llama", "llava_mistral": "mistral"}
    if kind not in kinds:
        raise CheckpointError(f"{where}: model_type {kind!r} is not of LLaVA's language models ({', '.join(kinds)})")
    layer = config.get("mm_vision_select_layer")
    if layer is None:
        notes.append("feature layer -2 (the paper's) assumed: config.json does not say it")
    width = config.get("mm_hidden_size", 1024)
    tower = options.vision_tower or config.get("mm_vision_tower")
    if type(width) is not int or not isinstance(tower, str | None):
        raise CheckpointError(f"{where}: mm_hidden_size {width!r} or mm_vision_tower {tower!r} is not of its type")
    delimiters = DELIMITERS if config.get("mm_use_im_start_end") else None
    template = _template_of(path, notes)
    before_1 = delimiters is not None or template == "v0_exact"
    facts: dict[str, Any] = {
        "template": template, "image_position": "last" if before_1 else "first", "image_delimiters": delimiters
    }  # fmt: skip
    era = "the releases before 1.0" if before_1 else "version 1.0 and later"
    notes.append(f"image position {facts['image_position']}, as the evaluation of {era} had it")
    return Description(
        language_config(config | {"model_type": kinds[kind]}, where), None,
        tower, width, config.get("mm_projector_type") or "linear", -2 if layer is None else layer,
        None, facts | {"image_mode": "pad" if config.get("image_aspect_ratio") == "pad" else "crop"},
    )  # fmt: skip


def _template_of(path: Path, notes: list[str]) -> str:
    """Template of a release: only the tokenizers of v0 open a sequence with the end token."""
    bos = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_settings(path, name).get("bos_token") if has_file(path, name) else None
        bos = bos or (found.get("content") if isinstance(found, dict) else found)
    template = "v0_exact" if bos == "</s>" else "v1"
    notes.append(f"template {template}: the tokenizer opens a sequence with {bos or 'nothing that its files name'}")
    return template


def from_original(name: str) -> str:
    """Our name for one of the original code."""
    return to_ours(name, RULES)


def _read(path: Path, options: Options) -> Opened:
    notes: list[str] = []
    config = mm_config(path)
    description = describe_original(path, config, options, notes)
    tensors = open_folder(path)
    if not any("mm_projector" in name for name in tensors):
        raise CheckpointError(
            f"{shown(path)}: the projector (model.mm_projector...) is missing; the model would be blind; fix: get the "
            "checkpoint whole, or take its mm_projector.bin"
        )
    opened = open_renamed("original", path, tensors, from_original, description, tokenizer_folder(path), notes)
    if is_delta(opened.tensors):
        raise CheckpointError(
            f"{shown(path)}: these are delta weights (their norms are near zero), not a model; fix: `llava delta apply`"
        )
    return opened


def is_delta(tensors: Mapping[str, Lazy]) -> bool:
    """Whether weights of a LLaMA are differences: the scales of its norms, around one in a model, are near zero."""
    norms = [float(t.read().float().abs().mean()) for n, t in tensors.items() if n.endswith("norm.weight")]
    return bool(norms) and statistics.median(norms) < 0.05


def original_config(opened: Opened) -> dict[str, Any]:
    """`config.json` of the original code for an opened checkpoint; our whole description stands in it, too."""
    description = opened.description
    image = description.image or {}
    inside_tower = "vision_tower" in opened.parts
    tower = description.tower_source or description.facts.get("base", {}).get("vision_tower")
    kinds = {"llama": ("llava", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
    if description.language_model["model_type"] not in kinds:
        raise CheckpointError(
            f"{shown(opened.path)}: the original code has no {description.language_model['model_type']}; fix: --to hf"
        )
    kind, architecture = kinds[description.language_model["model_type"]]
    theta = (description.language_model.get("rope_parameters") or {}).get("rope_theta")
    return {
        **description.language_model, **({"rope_theta": theta} if theta else {}),
        "model_type": kind, "architectures": [architecture],
        "mm_vision_tower": tower,
        "mm_hidden_size": description.d_vision, "mm_projector_type": description.projector,
        "mm_vision_select_layer": description.feature_layer, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": bool(description.facts.get("image_delimiters")), "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if image.get("mode") == "pad" else "square", "use_mm_proj": True,
        "unfreeze_mm_vision_tower": inside_tower, BLOCK: description.to_dict(),
    }  # fmt: skip


def _write(opened: Opened, folder: Path, shard_bytes: int) -> None:
    write_json(folder / "config.json", original_config(opened))
    copy_tokenizer(opened, folder)
    named = {to_theirs(name, RULES): tensor for name, tensor in opened.tensors.items()}
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in named.items():
        writer.add(name, tensor.read())
    writer.close()


LAYOUTS.register("original")(Layout("original", "the original releases (v0, v1, 1.5)", _found, _read, _write, RULES))
