"""The definition of attention over packed rows, in plain PyTorch; it computes in the dtype of its inputs."""

from __future__ import annotations

import torch

from llava_core.ops.packed_mask import PackedMask


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask | None = None) -> torch.Tensor:
    """Causal softmax attention (B, heads, T, head_dim); without a packed_mask each row is one sample.

    q is (B, heads, T, head_dim), k and v (B, kv_heads, T, head_dim); kv_heads divides heads (grouped-query attention).

    Source: Vaswani et al. 2017, eq. 1; grouped queries as in Ainslie et al. 2023.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, T, T)
    return scores.masked_fill(~dense_mask(q.shape[2], packed_mask, q.device), float("-inf")).softmax(-1) @ v


def dense_mask(length: int, packed_mask: PackedMask | None, device: torch.device) -> torch.Tensor:
    """The mask as a matrix, True where the query attends to the key: (T, T), or (B, 1, T, T) for packed rows."""
    position = torch.arange(length, device=device)
    causal = position[:, None] >= position
    if packed_mask is None:
        return causal
    return causal & (position[:, None] < packed_mask.ends.to(device)[:, None, None, :])
