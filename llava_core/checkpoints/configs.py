"""transformers' configurations of the base models: completed, checked, and built without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.files import error_at
from llava_core.models.projector import PROJECTORS
from llava_core.runtime import CheckpointError, CompanionError

MAX_LAYERS = 512  # a larger number can only be a mistake, and building the model would take minutes
_UNUSED_FIELDS = {"transformers_version", "id2label", "label2id", "architectures", "dtype", "output_attentions"}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off transformers' progress bars and loading reports; missing weights are checked by our own code."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def tower_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' complete CLIPVisionConfig for the configuration of a CLIP model or of its tower."""
    from transformers import CLIPVisionConfig

    fields = config.get("vision_config", config)
    if not isinstance(fields, dict):
        raise CheckpointError(f"vision_config is {fields!r}, not an object; fix: download config.json again")
    full = _complete(CLIPVisionConfig, {k: v for k, v in fields.items() if k != "model_type"}, "vision tower")
    for name in ("image_size", "patch_size"):
        if type(full[name]) is not int or full[name] < 1:
            raise CheckpointError(f"vision tower: {name} is {full[name]!r}, not a number of pixels")
    return full


def language_config(config: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """Return transformers' complete configuration of a language model, without unknown fields."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise error_at(where, f"no language model of model_type {model_type!r} is known; fix: check config.json")
    return _complete(CONFIG_MAPPING[model_type], config, where)


def _complete(config_class: Any, fields: dict[str, Any], where: str | Path) -> dict[str, Any]:
    known = {k: v for k, v in fields.items() if not k.startswith(("mm_", "_", "auto_map"))}
    vocab_size = known.get("vocab_size") if isinstance(known.get("vocab_size"), int) else 1 << 40
    for token in ("pad_token_id", "bos_token_id"):  # -1 in old configurations would index the last row
        if isinstance(known.get(token), int) and not 0 <= known[token] < vocab_size:
            known[token] = None
    try:
        full: dict[str, Any] = config_class.from_dict(known).to_dict()
    except Exception as error:  # huggingface's validators raise classes of their own
        raise error_at(where, f"impossible configuration ({' '.join(str(error).split())[:200]})") from error
    plain = json.loads(json.dumps(full, default=str))
    defaults = config_class().to_dict()
    names = {name for name in plain if name in defaults and not name.startswith("_")} | {"model_type"}
    return {name: plain[name] for name in sorted(names - _UNUSED_FIELDS)}


def build_on_meta(part: str, config: Mapping[str, Any]) -> Any:
    """Build a part of the model on the meta device: names and shapes without weights (one second for 13B).

    `config` is transformers' configuration; for the projector it has `name`, `d_vision` and `d_model`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        if part == "vision_tower":
            return CLIPVisionModel(CLIPVisionConfig.from_dict(dict(config)))
        if part == "language_model":
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        return PROJECTORS.get(config["name"])(config["d_vision"], config["d_model"])


def part_shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a part's tensors; an impossible configuration is a CheckpointError."""
    layers = config.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise CheckpointError(f"{part}: num_hidden_layers is {layers!r}, not 1 to {MAX_LAYERS}")
    try:
        return _part_shapes(part, json.dumps(config, sort_keys=True))
    except CompanionError:
        raise
    except Exception as error:  # transformers' code can fail in any way on a wrong configuration
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{part}: its configuration is impossible ({reason[:200]})") from error


@lru_cache(maxsize=8)
def _part_shapes(part: str, config: str) -> dict[str, tuple[int, ...]]:
    model = build_on_meta(part, json.loads(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
