"""Full, partial and empty blocks of a packed mask, computed once for all layers.

A kernel loops over blocks of queries and blocks of keys. Empty blocks are skipped, and full blocks need no mask. For a
block of keys the lowest and the highest of its `ends` decide.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional as F

from llava_core.ops.packed_mask import PackedMask

FULL, PARTIAL, EMPTY = 0, 1, 2


@lru_cache(maxsize=8)
def causal_mask(rows: int, length: int, device: torch.device) -> PackedMask:
    """The plain causal mask: one sample per row."""
    return PackedMask(torch.full((rows, length), length, dtype=torch.int32, device=device))


def block_states(packed_mask: PackedMask, block_q: int, block_k: int) -> torch.Tensor:
    """FULL, PARTIAL or EMPTY for each block of queries and block of keys: (B, query blocks, key blocks) int64."""
    ends, width = packed_mask.ends.long(), packed_mask.ends.shape[1]
    blocks_q, blocks_k = -(-width // block_q), -(-width // block_k)
    tail = blocks_k * block_k - width
    highest = F.pad(ends, (0, tail), value=0).unflatten(1, (blocks_k, block_k)).amax(-1)[:, None]
    lowest = F.pad(ends, (0, tail), value=width).unflatten(1, (blocks_k, block_k)).amin(-1)[:, None]
    first_q = torch.arange(blocks_q, device=ends.device)[:, None] * block_q
    last_q = (first_q + block_q).clamp(max=width) - 1
    first_k = torch.arange(blocks_k, device=ends.device) * block_k
    not_empty = (first_k <= last_q) & (highest > first_q)
    full = (first_k + block_k - 1 <= first_q) & (lowest > last_q)
    return EMPTY - not_empty.long() - full.long()


def block_table(packed_mask: PackedMask, block_q: int, block_k: int, of: str) -> torch.Tensor:
    """The block indices that a kernel loops over, per block of queries (`of` "q") or of keys ("k").

    Returns:
        (B, blocks, 2 + blocks of the other kind) int32: the end of the full blocks and the end of the partial blocks,
        both as indices into the last dimension; then the block indices, full before partial before empty.
    """
    states = block_states(packed_mask, block_q, block_k)
    states = states if of == "q" else states.transpose(1, 2)
    ends = torch.stack([(states == FULL).sum(-1), (states != EMPTY).sum(-1)], -1) + 2
    return torch.cat([ends, states.argsort(stable=True, dim=-1)], -1).int()
