"""Packed attention in transformers' models, through their public AttentionInterface and without a T x T mask.

transformers looks up its attention by name. Under the name that `packed_attention` sets, each attention layer of a
Llama- or Qwen-type model calls `llava_core.ops.attention` with the model's keyword argument `packed_mask`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from llava_core.ops.attention import BACKENDS, attention
from llava_core.ops.packed_mask import PackedMask, positions
from llava_core.runtime import CompanionError, ConfigError

NAME = "llava_packed"
"""The name of the implementation, followed by the name of a backend other than "auto"."""

UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # further arguments of some models that change the scores


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_mask: PackedMask | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    backend: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    rows, _, length, size = query.shape
    if packed_mask is None:
        raise ConfigError(
            f"the language model runs packed rows ('{NAME}') but was called without `packed_mask`; "
            "fix: model(..., packed_mask=PackedMask(ends)), or leave `packed_attention` for rows of one sample"
        )
    if packed_mask.ends.shape != (rows, length) or key.shape[2] != length:
        raise ConfigError(
            f"packed_mask has rows of {tuple(packed_mask.ends.shape)}, the queries are {(rows, length)} and the keys "
            f"{(key.shape[0], key.shape[2])}; fix: a packed_mask of these rows, and no KV cache"
        )
    _reject_dense_mask(attention_mask)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    reasons = {
        "attention that is not causal": not causal,
        f"dropout of {dropout}": dropout > 0,
        f"a sliding window of {sliding_window}": sliding_window is not None and sliding_window < length,
        **{f"`{name}`": kwargs.get(name) is not None for name in UNSUPPORTED},
    }
    if unsupported := [reason for reason, applies in reasons.items() if applies]:
        raise ConfigError(f"packed attention does not support {', '.join(unsupported)}; fix: a model without it")
    if getattr(module, "layer_idx", 0) == 0 and position_ids is not None and not torch.compiler.is_compiling():
        _check_positions(position_ids, packed_mask)
    if scaling is not None and scaling != size**-0.5:
        query = query * (scaling * size**0.5)  # `attention` itself divides by sqrt(head_dim)
    return attention(query, key, value, packed_mask=packed_mask, backend=backend).transpose(1, 2), None


def _check_positions(position_ids: torch.Tensor, packed_mask: PackedMask) -> None:
    """Without position_ids a model counts through the row: the loss is then wrong, but looks plausible."""
    if position_ids.device.type != "cpu" or position_ids.dim() != 2:
        return  # on a GPU the comparison would synchronise in every step
    expected = packed_mask.cached(positions)
    padding = (expected == 0) & (packed_mask.ends.cpu() == torch.arange(1, expected.shape[1] + 1))
    if bool(((position_ids != expected) & ~padding).any()):
        raise ConfigError(
            "position_ids do not restart with each sample: positions continue from sample to sample; "
            "fix: model(..., position_ids=positions(packed_mask))"
        )


def _reject_dense_mask(mask: Any) -> None:
    if mask is not None:
        raise ConfigError(
            "packed rows take no attention_mask: `packed_mask` covers padding; fix: leave attention_mask out"
        )


def _no_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> None:
    """The mask function of transformers: no dense mask is built."""
    _reject_dense_mask(attention_mask)


def _register(backend: str) -> str:
    name = NAME if backend == "auto" else f"{NAME}_{BACKENDS.get(backend).name}"
    if name not in AttentionInterface().valid_keys():
        AttentionInterface.register(name, partial(_forward, backend=backend))
        AttentionMaskInterface.register(name, _no_mask)
    return name


_register("auto")


@contextmanager
def packed_attention(language_model: Any, backend: str = "auto") -> Iterator[None]:
    """Use packed attention in a causal language model, with or without peft's adapters, within this context.

    Inside, call `language_model(..., packed_mask=packed_mask, position_ids=positions(packed_mask))`. The backward pass
    must be inside too: gradient checkpointing runs the attention layers again under the name that is set then, and
    raises a CheckpointError if it has changed.

    Raises:
        ConfigError: unknown backend. From the model's call: no packed_mask, one of another shape, positions that
            continue from sample to sample, an attention mask, or an unsupported feature (dropout, a sliding window
            shorter than the row, soft-capped scores, attention sinks, attention that is not causal).
        CompanionError: the model does not look up its attention by name.
    """
    name = _register(backend)
    previous = language_model.config._attn_implementation
    language_model.set_attn_implementation(name)
    try:
        if language_model.config._attn_implementation != name:
            raise CompanionError(
                f"{type(language_model).__name__} does not support another attention implementation; "
                "fix: a model that uses transformers' AttentionInterface"
            )
        yield
    finally:
        language_model.set_attn_implementation(previous)
