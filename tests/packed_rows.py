"""Packed rows for the tests of attention."""

from __future__ import annotations

import random

import torch

from llava_core.ops import PackedMask

ROWS = {
    "one sample": [[7] * 7],
    "three samples": [[3] * 3 + [4] + [9] * 5],
    "two with a shared prefix": [[12] * 5 + [8] * 3 + [12] * 4],
    # a system text for all, two images under it, the first with three conversations
    "two levels": [[22] * 3 + [14] * 4 + [9] * 2 + [11] * 2 + [14] * 3 + [22] * 8],
    "two rows, padded": [[9] * 2 + [5] * 3 + [9] * 4 + [10, 11], [11] * 11],
    "a prefix and single tokens": [[6] * 3 + [4, 5, 6]],
}


def packed_row(name: str) -> PackedMask:
    return PackedMask(torch.tensor(ROWS[name], dtype=torch.int32))


def random_row(seed: int, width: int = 75) -> PackedMask:
    """A random tree of prefixes, single tokens, padding."""
    draw, ends = random.Random(seed), [0] * width

    def fill(start: int, stop: int, depth: int) -> None:
        while start < stop:
            end = draw.randint(start + 1, stop)
            own = draw.randint(start + 1, end) if depth < 3 else end
            ends[start:own] = [end] * (own - start)
            fill(own, end, depth + 1)
            start = end

    real = draw.randint(1, width)
    fill(0, real, 0)
    ends[real:] = range(real + 1, width + 1)
    return PackedMask(torch.tensor([ends], dtype=torch.int32))
