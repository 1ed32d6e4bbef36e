"""The format of the original releases, v0 to 1.5: LLaMA's names, the projector among them, `mm_*` in `config.json`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_core.checkpoints.configs import language_config
from llava_core.checkpoints.describe import DESCRIPTION_KEY, IMAGE_DELIMITERS, Checkpoint, Description, Options
from llava_core.checkpoints.files import error_at, has_file, read_config
from llava_core.checkpoints.formats.common import CheckpointFormat, check_supported, check_unchanged, new_checkpoint
from llava_core.checkpoints.formats.names import import_name
from llava_core.checkpoints.tensors import LazyTensor, has_weights, open_folder
from llava_core.checkpoints.tokenizer import tokenizer_folder

RULES = (
    ("multi_modal_projector.", "model.mm_projector."),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)
DELTA = "delta.json"  # file next to delta weights with the fingerprint of their base
_LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llama": "llama", "llava_mistral": "mistral"}
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": (None, "patch"),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "square", "pad"),
    "mm_projector_type": (None, "linear", "mlp2x_gelu"),
}


def mm_config(path: Path) -> dict[str, Any]:
    """Return `config.json` of a folder if it has the original code's `mm_*` fields, else an empty dict."""
    config = read_config(path, "config.json") if path.is_dir() and has_file(path, "config.json") else {}
    return config if "mm_vision_tower" in config or "mm_hidden_size" in config else {}


def detect(path: Path) -> bool:
    return bool(mm_config(path)) and has_weights(path) and not has_file(path, "adapter_config.json")


def read_description(path: Path, config: dict[str, Any], options: Options, notes: list[str]) -> Description:
    """Return the description of a checkpoint of the original code from its `config.json`; `notes` gets assumptions."""
    where = path / "config.json"
    if DESCRIPTION_KEY in config:
        stored = Description.from_dict(config[DESCRIPTION_KEY], where)
        check_unchanged(stored, config, where, {
            "mm_vision_select_layer": stored.feature_layer, "mm_hidden_size": stored.d_vision,
            "mm_projector_type": stored.projector, "vocab_size": stored.language_model["vocab_size"],
        })  # fmt: skip
        return replace(stored, tower_source=options.vision_tower or stored.tower_source)
    check_supported(config, where, _SUPPORTED)
    model_type = str(config.get("model_type"))
    if model_type not in _LANGUAGE_MODELS:
        raise error_at(where, f"model_type {model_type!r} is not one of {', '.join(_LANGUAGE_MODELS)}")
    layer = config.get("mm_vision_select_layer")
    if layer is None:
        notes.append("feature layer -2 (the paper's) assumed: config.json does not say it")
    width = config.get("mm_hidden_size", 1024)
    tower = options.vision_tower or config.get("mm_vision_tower")
    if type(width) is not int or not isinstance(tower, str | None):
        raise error_at(where, f"mm_hidden_size {width!r} or mm_vision_tower {tower!r} has a wrong type")
    return Description(
        language_model=language_config(config | {"model_type": _LANGUAGE_MODELS[model_type]}, where),
        tower_source=tower,
        d_vision=width,
        projector=config.get("mm_projector_type") or "linear",
        feature_layer=-2 if layer is None else layer,
        usage=_usage(path, config, notes),
    )


def _usage(path: Path, config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    delimiters = IMAGE_DELIMITERS if config.get("mm_use_im_start_end") else None
    template = _template(path, notes)
    before_v1 = delimiters is not None or template == "v0_exact"
    position, era = ("last", "the releases before 1.0") if before_v1 else ("first", "version 1.0 and later")
    notes.append(f"image position {position}, as the evaluation of {era} had it")
    return {
        "template": template, "image_position": position, "image_delimiters": delimiters,
        "image_mode": "pad" if config.get("image_aspect_ratio") == "pad" else "crop",
    }  # fmt: skip


def _template(path: Path, notes: list[str]) -> str:
    """Return the template of a release: only the tokenizers of v0 have `</s>` as BOS token."""
    bos = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        token = read_config(path, name).get("bos_token") if has_file(path, name) else None
        bos = bos or (token.get("content") if isinstance(token, dict) else token)
    template = "v0_exact" if bos == "</s>" else "v1"
    notes.append(f"template {template}: the tokenizer's BOS token is {bos or 'not in its files'}")
    return template


def read(path: Path, options: Options) -> Checkpoint:
    notes: list[str] = []
    description = read_description(path, mm_config(path), options, notes)
    tensors = open_folder(path)
    if not any("mm_projector" in name for name in tensors):
        raise error_at(path, "no model.mm_projector, so the model could not use an image; fix: get the complete file")
    tokenizer = tokenizer_folder(path)
    checkpoint = new_checkpoint(FORMAT.name, path, tensors, from_original, description, tokenizer, notes)
    if is_delta(path, checkpoint.tensors):
        raise error_at(path, f"delta weights (near zero, or with {DELTA}), not a model; fix: `llava delta apply`")
    return checkpoint


def from_original(name: str) -> str:
    """Return our name for one of the original code."""
    return import_name(name, RULES)


def is_delta(path: Path, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether weights are differences: their folder says so, or the norms' scales, near one in a model, are near 0."""
    if has_file(path, DELTA):
        return True
    scales = [float(t.read().float().abs().mean()) for name, t in tensors.items() if name.endswith("norm.weight")]
    return bool(scales) and statistics.median(scales) < 0.05


FORMAT = CheckpointFormat("original", detect, read)
