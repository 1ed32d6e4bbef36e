"""One attention op, several backends.

A backend is a record: what it needs, why it is not to be had here, and how it runs. `auto` takes the first that can
run; a backend named explicitly never falls back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from llava_core.ops import reference
from llava_core.ops.per_sample import per_sample
from llava_core.ops.segments import Segments
from llava_core.registry import Registry
from llava_core.runtime import CompanionError

log = logging.getLogger(__name__)
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments | None], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """How an implementation runs, and why it cannot for these tensors (None: it can)."""

    name: str
    run: Run
    unavailable: Callable[[torch.Tensor], str | None] = lambda q: None


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    mask = reference.allowed(q.shape[2], segments, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


BACKENDS: Registry[Backend] = Registry("attention backend")
for _backend in (
    Backend("sdpa", _sdpa),
    Backend("per_sample", per_sample),
    Backend("reference", reference.attention),
):
    BACKENDS.register(_backend.name)(_backend)


def choose(device: torch.device, segments: Segments | None) -> str:
    """The backend that `auto` stands for."""
    return "per_sample" if segments is not None and device.type == "cpu" else "sdpa"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    segments: Segments | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention within the samples of packed rows, which may have their beginnings in common.

    Args:
        q: (B, heads, T, head_dim).
        k, v: (B, kv_heads, T, head_dim).
        segments: which tokens belong together; None where a row is one sample.
        backend: a name in `BACKENDS`, or "auto": see `choose`.

    Returns:
        (B, heads, T, head_dim).

    Raises:
        ConfigError: unknown backend.
        CompanionError: the named backend cannot run here; the message says why.
    """
    if backend == "auto":
        backend = choose(q.device, segments)
        log.debug("attention backend auto -> %s", backend)
    chosen = BACKENDS.get(backend)
    if (reason := chosen.unavailable(q)) is not None:
        raise CompanionError(
            f"attention backend '{backend}' cannot run on {q.device}: {reason}; fix: use backend='auto'"
        )
    return chosen.run(q, k, v, segments)
