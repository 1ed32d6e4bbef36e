"""The definitions: slow, obvious, in the dtype they are given."""

from __future__ import annotations

import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
    """Causal softmax attention, written out.

    Args:
        q: (B, heads, T, head_dim).
        k, v: (B, kv_heads, T, head_dim); heads is a multiple of kv_heads (grouped-query attention).
        segments: (B, T) integers; a token attends only to tokens of its own segment. None: one segment per row.

    Returns:
        (B, heads, T, head_dim).

    Source: Vaswani et al. 2017, eq. 1; grouped queries as in Ainslie et al. 2023.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed(q.shape[2], segments, q.device), float("-inf")).softmax(-1) @ v


def allowed(length: int, segments: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Who may see whom: True at (..., query, key), (T, T) or (B, 1, T, T) with segments."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if segments is None else causal & (segments[:, None, :, None] == segments[:, None, None, :])
