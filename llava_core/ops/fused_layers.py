"""The layers around the matrix products of a Llama-type model, in fewer passes over memory and with less of it.

transformers writes RMSNorm, rotary positions and SwiGLU as chains of small operations. Each keeps a tensor of a row's
size for the backward pass and moves it through memory several times. Here each is one function with its own gradient
that keeps only its inputs, and works through them in pieces that a CPU's cache holds. And of the last layer, whose
outputs only the loss sees, what follows attention is computed only where the loss looks.

The modules stay where they are and are called as before (adapters, hooks and gradient checkpointing see no difference);
only what their `forward` does is replaced, for as long as `fused_layers` lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PIECE_BYTES = 2**18  # of a tensor of which a piece is worked on: some of them fit a CPU core's own cache

FAMILIES = ("Llama", "Mistral", "Qwen2")
"""Model families whose modules compute what the functions here do; the others' modules stay as they are."""


def _pieces(x: torch.Tensor) -> Iterator[slice]:
    """Ranges of rows (x is rows x features); on a GPU all rows at once."""
    size = max(1, PIECE_BYTES // (x.shape[1] * 4)) if x.device.type == "cpu" else max(1, len(x))
    return (slice(begin, begin + size) for begin in range(0, len(x), size))


class _RMSNorm(torch.autograd.Function):
    """x * rstd * weight, where rstd is one over the root of the mean square; computed in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows, precise = x.reshape(-1, x.shape[-1]), torch.promote_types(x.dtype, torch.float32)
        rstd = torch.empty(len(rows), 1, dtype=precise, device=x.device)
        out = torch.empty_like(rows)
        for piece in _pieces(rows):
            values = rows[piece].to(precise)
            squares = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_()
            rstd[piece] = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul((values * rstd[piece]).to(x.dtype), weight, out=out[piece])
        ctx.save_for_backward(rows, weight, rstd)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        rows, weight, rstd = ctx.saved_tensors
        grad, precise = grads[0].reshape(rows.shape), rstd.dtype
        of_rows = torch.empty_like(rows)
        scale = weight.to(precise)
        of_weight = torch.zeros_like(scale) if ctx.needs_input_grad[1] else None
        for piece in _pieces(rows):
            x, g, r = rows[piece].to(precise), grad[piece].to(precise), rstd[piece]
            product = g * x
            if of_weight is not None:
                of_weight += r[:, 0] @ product
            along = (product @ scale)[:, None] * (r.pow(3) / rows.shape[1])
            of_rows[piece] = (g * scale).mul_(r).addcmul_(x, along, value=-1)
        return of_rows.view(grads[0].shape), None if of_weight is None else of_weight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        g, u = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        out = torch.empty_like(g)
        for piece in _pieces(g):
            torch.mul(F.silu(g[piece]), u[piece], out=out[piece])
        return out.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        g, u, d = (x.reshape(-1, x.shape[-1]) for x in (gate, up, grads[0]))
        of_gate, of_up = torch.empty_like(g), torch.empty_like(u)
        for piece in _pieces(g):
            torch.mul(F.silu(g[piece]), d[piece], out=of_up[piece])
            of_gate[piece] = torch.ops.aten.silu_backward(d[piece] * u[piece], g[piece])
        return of_gate.view(gate.shape), of_up.view(up.shape)


class _Rotate(torch.autograd.Function):
    """Rotary positions: the halves of a head's features turned by an angle per position and feature."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """x (B, T, heads, head_dim) turned; cos and sin are (B, T, 1, head_dim), their halves equal."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
    return out


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
    return out


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    attention_mask: Any = None,
    wanted: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    shape = (*hidden_states.shape[:2], -1, self.head_dim)
    q, k, v = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
    cos, sin = (x.unsqueeze(2) for x in position_embeddings)
    q, k = _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)
    out, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
        self, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attention_mask,
        dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling,
        sliding_window=getattr(self, "sliding_window", getattr(self.config, "sliding_window", None)), **kwargs,
    )  # fmt: skip
    return self.o_proj(_wanted(out.flatten(2), wanted)), None


def _last_layer(
    self: Any, hidden_states: torch.Tensor, sources: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), wanted=sources, **kwargs)
    hidden_states = _wanted(hidden_states, sources) + attended
    out: torch.Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
    return out


def _wanted(x: torch.Tensor, sources: torch.Tensor | None) -> torch.Tensor:
    """Of x (B, T, D) the tokens `sources`, counted through all rows, as one row (1, M, D)."""
    return x if sources is None else x.flatten(0, 1).index_select(0, sources)[None]


REPLACED: dict[str, Callable[..., Any]] = {"RMSNorm": _norm, "MLP": _mlp, "Attention": _attention}


def _kind(module: nn.Module) -> str | None:
    """What a module is in one of `FAMILIES`; None: something else."""
    name = type(module).__name__
    kind = next((name.removeprefix(family) for family in FAMILIES if name.startswith(family)), None)
    if kind == "MLP" and getattr(module.config, "hidden_act", None) not in ("silu", "swish"):
        return None
    return kind


@contextmanager
def fused_layers(language_model: Any) -> Iterator[None]:
    """Let a causal language model of one of `FAMILIES` train in fewer passes over memory; others stay as they are.

    It belongs inside `llava_core.ops.transformers_backend.packed_attention`, with the backward pass in it: attention
    must be one that transformers looks up by name, and no cache of earlier tokens is kept.

    Args:
        language_model: transformers' causal language model, with or without peft's adapters.
    """
    decoder = language_model.get_decoder()
    changed = []
    for module in decoder.modules():
        replacement = REPLACED.get(_kind(module) or "")
        if replacement is not None and "forward" not in vars(module):  # somebody else has replaced it
            module.forward = MethodType(replacement, module)
            changed.append(module)
    last: Any = _last(decoder)
    whole: Any = None
    if last is not None and last.self_attn in changed and "forward" not in vars(last):
        # by its class: transformers' checkpointing of a layer is, from 5.23 on, in the forward of its class
        whole = type(last)
        last.__class__ = _with_sources(whole)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
        if last is not None and whole is not None:
            last.__class__ = whole


def _last(decoder: Any) -> Any:
    """The layer whose outputs are the decoder's; None: this is not such a decoder."""
    layers = getattr(decoder, "layers", None)
    if not layers or len(layers) != decoder.config.num_hidden_layers or _kind(layers[-1]) != "DecoderLayer":
        return None
    return layers[-1]


@cache
def _with_sources(layer: Any) -> Any:
    return type(layer.__name__, (layer,), {"forward": _last_layer, "takes_sources": True})


def takes_sources(decoder: Any) -> bool:
    """Whether a decoder can be called with `sources`, and then gives the hidden states of these tokens only."""
    return getattr(_last(decoder), "takes_sources", False)
