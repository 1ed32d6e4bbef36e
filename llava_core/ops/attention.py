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
from llava_core.registry import Registry
from llava_core.runtime import CompanionError

log = logging.getLogger(__name__)
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """How an implementation runs, and why it cannot on this device (None: it can)."""

    name: str
    run: Run
    unavailable: Callable[[torch.device], str | None] = lambda device: None


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    mask = reference.allowed(q.shape[2], segments, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _per_segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """One causal SDPA call per run of equal segment numbers: no mask is ever built (segments must be contiguous)."""
    if segments is None:
        return _sdpa(q, k, v, None)
    rows = []
    for b in range(q.shape[0]):
        lengths = torch.unique_consecutive(segments[b], return_counts=True)[1].tolist()
        parts = zip(*(x[b : b + 1].split(lengths, 2) for x in (q, k, v)), strict=True)
        rows.append(torch.cat([_sdpa(q1, k1, v1, None) for q1, k1, v1 in parts], 2))
    return torch.cat(rows)


BACKENDS: Registry[Backend] = Registry("attention backend")
for _backend in (
    Backend("sdpa", _sdpa),
    Backend("per_segment", _per_segment),
    Backend("reference", reference.attention),
):
    BACKENDS.register(_backend.name)(_backend)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    segments: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention within segments.

    Args:
        q: (B, heads, T, head_dim).
        k, v: (B, kv_heads, T, head_dim).
        segments: (B, T) integers, equal for tokens of one packed sample; None where a row is one sample.
        backend: a name in `BACKENDS`, or "auto": per_segment on a CPU with segments, sdpa otherwise.

    Returns:
        (B, heads, T, head_dim).

    Raises:
        ConfigError: unknown backend.
        CompanionError: the named backend cannot run on this device; the message says why.
    """
    if backend == "auto":
        backend = "per_segment" if segments is not None and q.device.type == "cpu" else "sdpa"
        log.debug("attention backend auto -> %s", backend)
    chosen = BACKENDS.get(backend)
    if (reason := chosen.unavailable(q.device)) is not None:
        raise CompanionError(
            f"attention backend '{backend}' cannot run on {q.device}: {reason}; fix: use backend='auto'"
        )
    return chosen.run(q, k, v, segments)
