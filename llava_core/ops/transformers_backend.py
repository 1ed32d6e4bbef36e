"""Our attention inside transformers' models: packed rows through public arguments, without a mask of T x T.

transformers looks its attention up by name. Under the name that `packed_attention` sets, each attention layer of a
Llama- or Qwen-type model calls the op of this folder with the `segments` that the model was called with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from llava_core.ops.attention import BACKENDS, attention
from llava_core.ops.packed_mask import Segments, positions
from llava_core.runtime import CompanionError, ConfigError

NAME = "llava_packed"
"""The name of the implementation; with a backend other than "auto" the backend's name follows."""

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
    segments: Segments | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    backend: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    rows, _, length, size = query.shape
    if segments is None:
        raise ConfigError(
            f"the language model runs packed rows ('{NAME}') but was called without `segments`; "
            "fix: model(..., segments=Segments(ends)), or leave `packed_attention` for rows of one sample"
        )
    if segments.ends.shape != (rows, length) or key.shape[2] != length:
        raise ConfigError(
            f"segments describe rows of {tuple(segments.ends.shape)}, the queries are {(rows, length)} and the keys "
            f"{(key.shape[0], key.shape[2])}; fix: segments of these rows, and no cache of earlier tokens"
        )
    _refuse_mask(attention_mask)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    reasons = {
        "attention that is not causal": not causal,
        f"dropout of {dropout}": dropout > 0,
        f"a sliding window of {sliding_window}": sliding_window is not None and sliding_window < length,
        **{f"`{name}`": kwargs.get(name) is not None for name in UNSUPPORTED},
    }
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise ConfigError(f"packed attention does not support {', '.join(found)}; fix: a model without it")
    if getattr(module, "layer_idx", 0) == 0 and position_ids is not None and not torch.compiler.is_compiling():
        _check_positions(position_ids, segments)
    if scaling is not None and scaling != size**-0.5:
        query = query * (scaling * size**0.5)  # the op itself divides by the root of head_dim
    return attention(query, key, value, segments=segments, backend=backend).transpose(1, 2), None


def _check_positions(position_ids: torch.Tensor, segments: Segments) -> None:
    """A model that is not told positions counts through the row: the loss then looks right and is not."""
    if position_ids.device.type != "cpu" or position_ids.dim() != 2:
        return  # elsewhere the comparison would stop the device in every step
    expected = segments.plan(positions)
    alone = (expected == 0) & (segments.ends.cpu() == torch.arange(1, expected.shape[1] + 1))  # padding, say
    if bool(((position_ids != expected) & ~alone).any()):
        raise ConfigError(
            "position_ids do not count the tokens that each token sees, so positions run on from sample to sample; "
            "fix: model(..., position_ids=positions(segments))"
        )


def _refuse_mask(mask: Any) -> None:
    if mask is not None:
        raise ConfigError(
            "packed rows take no attention_mask: `segments` say what is padding; fix: leave attention_mask out"
        )


def _no_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> None:
    """What transformers asks for a mask: there is none."""
    _refuse_mask(attention_mask)


def _register(backend: str) -> str:
    name = NAME if backend == "auto" else f"{NAME}_{BACKENDS.get(backend).name}"
    if name not in AttentionInterface().valid_keys():
        AttentionInterface.register(name, partial(_forward, backend=backend))
        AttentionMaskInterface.register(name, _no_mask)
    return name


_register("auto")


@contextmanager
def packed_attention(language_model: Any, backend: str = "auto") -> Iterator[None]:
    """Let a causal language model attend within the samples of packed rows.

    Inside, the model is called as `language_model(..., segments=segments, position_ids=positions(segments))`. The
    backward pass belongs inside too: gradient checkpointing runs the attention layers again, under the name that is
    set then, and stops with a CheckpointError where that is another one.

    Args:
        language_model: transformers' causal language model, with or without peft's adapters.
        backend: a name in `BACKENDS`, or "auto".

    Raises:
        ConfigError: unknown backend; in the model's call: no segments, segments of other rows, positions that run on
            from sample to sample, an attention mask, or something that the op does not have (dropout, a sliding window
            shorter than the row, soft-capped scores, attention sinks, attention that is not causal).
        CompanionError: the model does not look its attention up by name.
    """
    name = _register(backend)
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation(name)
    try:
        if language_model.config._attn_implementation != name:
            raise CompanionError(
                f"{type(language_model).__name__} does not let its attention be replaced; "
                "fix: a model that uses transformers' AttentionInterface"
            )
        yield
    finally:
        language_model.set_attn_implementation(before)
