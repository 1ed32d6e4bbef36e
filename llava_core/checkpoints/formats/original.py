"""The format of the original releases, v0 to 1.5: LLaMA's names, the projector among them, `mm_*` in `config.json`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llava_core.checkpoints.configs import language_config
from llava_core.checkpoints.describe import DESCRIPTION_KEY, IMAGE_DELIMITERS, Checkpoint, Description, Options
from llava_core.checkpoints.files import error_at, has_file, read_config
from llava_core.checkpoints.formats.common import CheckpointFormat, check_supported, check_unchanged, new_checkpoint
from llava_core.checkpoints.formats.names import import_name
from llava_core.checkpoints.tensors import LazyTensor, has_weights, open_folder
from llava_core.checkpoints.tokenizer import tokenizer_folder
from llava_core.models.projector import PROJECTORS

RULES = (
    ("multi_modal_projector.", "model.mm_projector."),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("vision_tower.", "model.vision_tower.vision_model."),  # read only: saved without FSDP before 1.0
    ("language_model.model.", "model."),
    ("language_model.", ""),
)
DELTA = "delta.json"  # file next to delta weights with the fingerprint of their base
_LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llama": "llama", "llava_mistral": "mistral"}
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": (None, "patch"),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "square", "pad"),
    "s2": (None, False),
    "s2_scales": (None,),
    "X": (None,),  # the modalities of video models
}
_READ = {  # every other field mm_* belongs to a part that this model does not have: resamplers, video towers, ...
    "mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer", "mm_use_im_start_end", "mm_use_im_patch_token",
    "mm_projector_lr", "mm_vision_tower_lr", "mm_tunable_parts",
}  # fmt: skip
_SINCE_1_0 = {"mm_use_im_patch_token", "image_aspect_ratio"}  # fields that no earlier code wrote
_TEMPLATES = {  # by the family of the tokenizer, and whether the tokenizer stripped white space beside images
    ("v0", True): "v0_exact", ("v0", False): "v0_exact_1_0", ("v1", True): "v1_tight", ("v1", False): "v1",
}  # fmt: skip


def mm_config(path: Path) -> dict[str, Any]:
    """Return `config.json` of a folder if it has the original code's `mm_*` fields, else an empty dict."""
    config = read_config(path, "config.json") if path.is_dir() and has_file(path, "config.json") else {}
    return config if any(name.startswith("mm_") for name in config) else {}


def detect(path: Path) -> bool:
    return bool(mm_config(path)) and has_weights(path) and not has_file(path, "adapter_config.json")


def read_description(
    path: Path, config: dict[str, Any], options: Options, notes: list[str], tensors: Iterable[str],
    tokenizer: Path | None, pad: str | None = None,
) -> Description:  # fmt: skip
    """Return the description of a checkpoint of the original code from its `config.json`; `notes` gets assumptions.

    Args:
        tensors: names of the checkpoint's tensors.
        tokenizer: folder of the tokenizer, which shows the era.
        pad: padding token that is not in that folder.
    """
    where = path / "config.json"
    supported = _SUPPORTED | {"mm_projector_type": (None, *PROJECTORS.names())}
    others = {name for name in config if name.startswith("mm_") and config[name]} - _READ - supported.keys()
    check_supported(config, where, supported | dict.fromkeys(sorted(others), ()))
    trained = config.get("unfreeze_mm_vision_tower") or "vision_tower" in str(config.get("mm_tunable_parts"))
    if trained and not any("vision_tower." in name for name in tensors):
        raise error_at(where, "its vision tower was trained, and the files lack it; fix: get the complete checkpoint")
    if DESCRIPTION_KEY in config:
        stored = Description.from_dict(config[DESCRIPTION_KEY], where)
        check_unchanged(config, where, {
            "mm_vision_select_layer": stored.feature_layer, "mm_hidden_size": stored.d_vision,
            "mm_projector_type": stored.projector, "vocab_size": stored.language_model["vocab_size"],
        })  # fmt: skip
        chosen = options.vision_tower if stored.vision_tower is None else None
        return replace(stored, tower_source=chosen or stored.tower_source)
    model_type = str(config.get("model_type"))
    if model_type not in _LANGUAGE_MODELS:
        raise error_at(where, f"model_type {model_type!r} is not one of {', '.join(_LANGUAGE_MODELS)}")
    layer = config.get("mm_vision_select_layer")
    if layer is None:
        notes.append("feature layer -2 (the paper's) assumed: config.json does not say it")
    width = config.get("mm_hidden_size", 1024)
    tower = config.get("mm_vision_tower")
    if type(width) is not int or not isinstance(tower, str | None):
        raise error_at(where, f"mm_hidden_size {width!r} or mm_vision_tower {tower!r} has a wrong type")
    description = Description(
        language_model=language_config(config | {"model_type": _LANGUAGE_MODELS[model_type]}, where),
        tower_source=options.vision_tower or tower,
        d_vision=width,
        projector=config.get("mm_projector_type") or "linear",
        feature_layer=-2 if layer is None else layer,
        usage=_usage(config, tokenizer, pad, notes),
    )
    return description if tower is None else description.with_tower_name(tower)


def _usage(config: dict[str, Any], tokenizer: Path | None, pad: str | None, notes: list[str]) -> dict[str, Any]:
    delimiters = IMAGE_DELIMITERS if config.get("mm_use_im_start_end") else None
    since_1_0 = bool(_SINCE_1_0 & config.keys())
    family, reason = _family(tokenizer, pad)
    if since_1_0 and delimiters and "transformers_version" not in config:
        reason += "; config.json does not say the version of transformers (fix: --assume template=...)"
    if family == "v1" and re.search(
        r"mistral|llama-2", f"{config.get('model_type')} {config.get('_name_or_path')}".lower()
    ):
        reason += "; if it was trained with [INST] prompts, there is no template for it here"
    # before 1.0 each image was many added tokens; 1.0 splits the text at images before it is tokenised
    template = _TEMPLATES[family, not since_1_0 or (bool(delimiters) and _strips_white_space(config))]
    position, era = ("first", "version 1.0 and later") if since_1_0 else ("last", "the releases before 1.0")
    notes.append(f"template {template}: {reason}")
    notes.append(f"image position {position}, as the evaluation of {era} had it")
    return {
        "template": template, "image_position": position, "image_delimiters": delimiters,
        "image_mode": "pad" if config.get("image_aspect_ratio") == "pad" else "crop",
    }  # fmt: skip


def _strips_white_space(config: dict[str, Any]) -> bool:
    """Whether the slow tokenizer of the training stripped white space beside added tokens: transformers before 4.35."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("transformers_version")))
    if version is None:
        return "mm_patch_merge_type" not in config  # since 1.6, which needs 4.37
    return (int(version[1]), int(version[2])) < (4, 35)


def _family(tokenizer: Path | None, pad: str | None) -> tuple[str, str]:
    """Return "v0" or "v1", and what shows it: each version of the code sets its own padding token."""
    tokens: dict[str, Any] = {"pad_token": pad}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        fields = read_config(tokenizer, name) if tokenizer is not None and has_file(tokenizer, name) else {}
        for token in ("pad_token", "bos_token"):
            value = fields.get(token)
            tokens[token] = tokens.get(token) or (value.get("content") if isinstance(value, dict) else value)
    pad, bos = tokens["pad_token"], tokens.get("bos_token")
    if pad in ("[PAD]", "<unk>"):
        return ("v0" if pad == "[PAD]" else "v1"), f"the tokenizer's padding token is {pad}"
    if bos == "</s>":
        return "v0", "the tokenizer's BOS token is </s>"
    return "v1", "assumed, the tokenizer's files do not show it (fix: --assume template=...)"


def read(path: Path, options: Options) -> Checkpoint:
    notes: list[str] = []
    tensors, tokenizer = open_folder(path), tokenizer_folder(path)
    description = read_description(path, mm_config(path), options, notes, tensors, tokenizer)
    if not any("mm_projector" in name for name in tensors):
        raise error_at(path, "no model.mm_projector, so the model could not use an image; fix: get the complete file")
    checkpoint = new_checkpoint(
        FORMAT.name, path, tensors, partial(import_name, rules=RULES), description, tokenizer, notes
    )
    if is_delta(path, checkpoint.tensors):
        raise error_at(path, f"delta weights (near zero, or with {DELTA}), not a model; fix: `llava delta apply`")
    return checkpoint


def is_delta(path: Path, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether weights are differences: their folder says so, or the norms' scales, near one in a model, are near 0."""
    if has_file(path, DELTA):
        return True
    scales = [float(t.read().float().abs().mean()) for name, t in tensors.items() if name.endswith("norm.weight")]
    return bool(scales) and statistics.median(scales) < 0.05


FORMAT = CheckpointFormat("original", detect, read)
