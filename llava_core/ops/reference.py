"""The definitions: slow, obvious, in the dtype they are given."""

from __future__ import annotations

import torch

from llava_core.ops.packed_mask import Segments


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None = None) -> torch.Tensor:
    """Causal softmax attention, written out.

    Args:
        q: (B, heads, T, head_dim).
        k, v: (B, kv_heads, T, head_dim); heads is a multiple of kv_heads (grouped-query attention).
        segments: which tokens of a packed row belong together. None: one segment per row.

    Returns:
        (B, heads, T, head_dim).

    Source: Vaswani et al. 2017, eq. 1; grouped queries as in Ainslie et al. 2023.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed(q.shape[2], segments, q.device), float("-inf")).softmax(-1) @ v


def allowed(length: int, segments: Segments | None, device: torch.device) -> torch.Tensor:
    """Who may see whom: True at (..., query, key), (T, T) or (B, 1, T, T) with segments."""
    position = torch.arange(length, device=device)
    causal = position[:, None] >= position
    if segments is None:
        return causal
    return causal & (position[:, None] < segments.ends.to(device)[:, None, None, :])
