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

_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")  # those whose packed attention is tested
_BOUNDS: dict[str, tuple[float, float]] = {  # a value outside can only be a mistake, and may take minutes to build
    "num_hidden_layers": (1, 256), "hidden_size": (1, 2**16), "intermediate_size": (1, 2**18), "vocab_size": (1, 2**22),
    "num_attention_heads": (1, 2**10), "num_key_value_heads": (1, 2**10), "head_dim": (1, 2**12),
    "max_position_embeddings": (1, 2**27), "image_size": (1, 2**12), "patch_size": (1, 2**12),
    "rms_norm_eps": (1e-20, 1.0), "layer_norm_eps": (1e-20, 1.0), "rope_theta": (1, 1e15),
}  # fmt: skip
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {  # fields that change the computation -> values that do not; None: absent
    "partial_rotary_factor": (None, 1), "rotary_pct": (None, 1), "alibi": (None, False), "clip_qkv": (None,),
    "use_qk_norm": (None, False), "qk_layernorm": (None, False), "no_rope_layers": (None, []),
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1), "logits_scaling": (None, 1), "embedding_multiplier": (None, 1), "scale_emb": (None, 1),
    "residual_multiplier": (None, 1), "attention_multiplier": (None,), "scale_depth": (None,),
    "dim_model_base": (None,),
    "num_local_experts": (None, 0), "num_experts": (None, 0), "n_routed_experts": (None, 0), "num_channels": (None, 3),
}  # fmt: skip
_UNUSED_FIELDS = {
    "transformers_version", "id2label", "label2id", "num_labels", "architectures", "dtype", "torch_dtype",
    "output_attentions", "output_hidden_states", "return_dict",
}  # fmt: skip
_MOST, _MOST_CHARACTERS = 2**53, 100_000  # of any other number, and of all fields


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


def tower_config(config: dict[str, Any], where: str | Path = "vision tower") -> dict[str, Any]:
    """Return transformers' complete CLIPVisionConfig for the configuration of a CLIP model or of its tower."""
    from transformers import CLIPVisionConfig

    fields = config.get("vision_config", config)
    if not isinstance(fields, dict):
        raise error_at(where, f"vision_config is {fields!r}, not an object; fix: download it again")
    model_type = fields.get("model_type", "clip_vision_model")
    if model_type not in ("clip", "clip_vision_model"):
        raise error_at(where, f"a vision tower of model_type {model_type!r}; fix: take a LLaVA with a CLIP tower")
    full = _complete(CLIPVisionConfig, {k: v for k, v in fields.items() if k != "model_type"}, where)
    for name in ("image_size", "patch_size"):
        if type(full[name]) is not int or full["patch_size"] > full["image_size"]:
            raise error_at(where, f"{name} is {full[name]!r}, not a number of pixels; fix: download it again")
    return full


def language_config(config: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """Return transformers' complete configuration of a language model, without unknown fields."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in _LANGUAGE_MODELS:
        known = ", ".join(_LANGUAGE_MODELS)
        raise error_at(where, f"no language model of model_type {model_type!r} is known; fix: take one of {known}")
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings", 2048)
    if model_type == "llama" and isinstance(window, int) and isinstance(positions, int) and window < positions:
        raise error_at(where, f"sliding_window is {window}, which a model of type llama ignores; fix: correct one")
    full = _complete(CONFIG_MAPPING[model_type], config, where)
    heads, groups, kinds = full["num_attention_heads"], full.get("num_key_value_heads"), full.get("layer_types") or ()
    if groups and heads % groups:
        raise error_at(where, f"num_key_value_heads is {groups}, no divisor of {heads}; fix: download it again")
    if not {*kinds} <= {"full_attention", "sliding_attention"}:
        raise error_at(where, f"layer_types are {kinds!r}, which are not implemented; fix: take a model without them")
    return full


def _complete(config_class: Any, fields: dict[str, Any], where: str | Path) -> dict[str, Any]:
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = {k: v for k, v in fields.items() if not k.startswith(("mm_", "_", "auto_map")) and k not in _UNUSED_FIELDS}
    rope = [known[name] for name in ("rope_parameters", "rope_scaling") if isinstance(known.get(name), dict)]
    for stated in (known, *rope):
        _check_fields(stated, where)
    vocab_size = known.get("vocab_size") if isinstance(known.get("vocab_size"), int) else 1 << 40
    for token in ("pad_token_id", "bos_token_id"):  # -1 in old configurations would index the last row
        if isinstance(known.get(token), int) and not 0 <= known[token] < vocab_size:
            known[token] = None
    try:
        with quiet_transformers():
            full: dict[str, Any] = config_class.from_dict(known).to_dict()
    except Exception as error:  # huggingface's validators raise classes of their own
        raise error_at(where, f"impossible configuration ({' '.join(str(error).split())[:200]})") from error
    kinds = (full.get("rope_parameters") or {}).get("rope_type", "default")
    for name, value, implemented in (
        ("hidden_act", full["hidden_act"], ACT2FN), ("rope_type", kinds, {"default", *ROPE_INIT_FUNCTIONS})
    ):  # fmt: skip
        if not isinstance(value, str) or value not in implemented:
            raise error_at(where, f"{name} is {value!r}; fix: give one of {', '.join(sorted(implemented))}")
    text = json.dumps(full, default=str)
    if len(text) > _MOST_CHARACTERS:
        raise error_at(where, f"its configuration has {len(text):,} characters; fix: download it again")
    plain = json.loads(text)
    defaults = config_class().to_dict()
    names = {name for name in plain if name in defaults and not name.startswith("_")} | {"model_type"}
    return {name: plain[name] for name in sorted(names - _UNUSED_FIELDS)}


def _check_fields(fields: Mapping[str, Any], where: str | Path) -> None:
    for name, (least, most) in _BOUNDS.items():
        value = fields.get(name)
        kinds = (int,) if isinstance(most, int) else (int, float)
        if value is not None and (type(value) not in kinds or not least <= value <= most):
            raise error_at(where, f"{name} is {value!r}, not {least} to {most}; fix: download it again")
    for name, value in fields.items():
        if isinstance(value, int | float) and not abs(value) <= _MOST:
            raise error_at(where, f"{name} is {value!r}, more than any size; fix: download it again")
    for name, values in _IMPLEMENTED.items():
        if fields.get(name) not in values:
            raise error_at(where, f"{name} is {fields[name]!r}, which is not implemented; fix: take a model without it")


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
