"""Which blocks of a packed row have anything to do with each other, worked out once for all layers.

A kernel walks over blocks of queries and blocks of keys. Of most pairs of blocks nothing is allowed, and of most of the
others everything: the first are left out, the second need no mask. For a block of keys two numbers decide, the lowest
and the highest of its `ends`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional as F

from llava_core.ops.packed_mask import Segments


@lru_cache(maxsize=8)
def one_sample(rows: int, length: int, device: torch.device) -> Segments:
    """Rows without segments, said in segments: every token is seen by all that follow."""
    return Segments(torch.full((rows, length), length, dtype=torch.int32, device=device))


def states(segments: Segments, block_q: int, block_k: int) -> torch.Tensor:
    """What is allowed between each block of queries and each block of keys: 0 everything, 1 something, 2 nothing.

    Returns:
        (B, query blocks, key blocks) int64.
    """
    ends, width = segments.ends.long(), segments.ends.shape[1]
    blocks_q, blocks_k = -(-width // block_q), -(-width // block_k)
    tail = blocks_k * block_k - width
    highest = F.pad(ends, (0, tail), value=0).unflatten(1, (blocks_k, block_k)).amax(-1)[:, None]
    lowest = F.pad(ends, (0, tail), value=width).unflatten(1, (blocks_k, block_k)).amin(-1)[:, None]
    first_q = torch.arange(blocks_q, device=ends.device)[:, None] * block_q
    last_q = (first_q + block_q).clamp(max=width) - 1
    first_k = torch.arange(blocks_k, device=ends.device) * block_k
    something = (first_k <= last_q) & (highest > first_q)
    everything = (first_k + block_k - 1 <= first_q) & (lowest > last_q)
    return 2 - something.long() - everything.long()


def visits(segments: Segments, block_q: int, block_k: int, of: str) -> torch.Tensor:
    """The blocks that each block of queries (`of` "q") or of keys ("k") has to visit; for `Segments.plan`.

    Returns:
        (B, blocks, 2 + blocks of the other kind) int32: where the visits without a mask end and where all end, counted
        from the row's beginning, then the blocks, those that need no mask first.
    """
    found = states(segments, block_q, block_k)
    found = found if of == "q" else found.transpose(1, 2)
    stops = torch.stack([(found == 0).sum(-1), (found < 2).sum(-1)], -1) + 2
    return torch.cat([stops, found.argsort(stable=True, dim=-1)], -1).int()
