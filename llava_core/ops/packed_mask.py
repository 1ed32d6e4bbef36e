"""The attention mask of packed rows, as one number per key.

A packed row holds several samples. Samples may share a prefix (system text, image), which is stored once: the row is a
tree in depth-first order, and what continues a prefix follows it directly. A token attends to its own sequence up to
itself and to all of the prefixes above it, as if every sample had a row of its own.

`ends[k]` is the exclusive end of the queries that attend to key k, one column of FlashMask (arXiv 2410.01359). Without
shared prefixes it is the end of the sample. `llava_core.ops.reference.dense_mask` writes the mask as a (T, T) matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class PackedMask:
    """`ends` (B, T) int32: query q attends to key k if `k <= q < ends[k]`; for padding `ends[k] = k + 1`."""

    ends: torch.Tensor
    # not a cached_property: torch.compile cannot trace its lock
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_lengths(cls, rows: Sequence[Sequence[int]]) -> PackedMask:
        """The mask of rows of samples without shared prefixes, by the samples' lengths; shorter rows are padded."""
        width = max(sum(lengths) for lengths in rows)
        ends = torch.arange(1, width + 1, dtype=torch.int32).repeat(len(rows), 1)
        for b, lengths in enumerate(rows):
            stop = torch.tensor(lengths).cumsum(0)
            ends[b, : int(stop[-1])] = torch.repeat_interleave(stop, torch.tensor(lengths)).int()
        return cls(ends)

    def to(self, device: torch.device | str) -> PackedMask:
        """The mask on a device; the copy is cached."""
        target = torch.device(device)
        if self.ends.device.type == target.type and target.index in (None, self.ends.device.index):
            return self
        if target not in self._cache:
            self._cache[target] = PackedMask(self.ends.to(target))
        return self._cache[target]

    def cached(self, function: Callable[..., Result], *args: Hashable) -> Result:
        """`function(self, *args)`, computed once for all layers."""
        if (function, args) not in self._cache:
            self._cache[function, args] = function(self, *args)
        return self._cache[function, args]

    @cached_property
    def samples(self) -> list[list[list[tuple[int, int]]]]:
        """Per row and sample the ranges of its positions: its prefixes and its own tokens.

        Every position is in at least one sample. The first sample that has a position has no gap before it.
        """
        return [_samples(row) for row in self.ends.cpu()]


def positions(packed_mask: PackedMask) -> torch.Tensor:
    """position_ids (B, T) int64: per token the number of keys before it that it attends to; 0 for padding."""
    rows, width = packed_mask.ends.shape
    ended = torch.zeros(rows, width + 1, dtype=torch.long, device=packed_mask.ends.device)
    ended.scatter_add_(1, packed_mask.ends.long(), torch.ones_like(ended[:, :-1]))
    return torch.arange(width, device=ended.device) - ended.cumsum(1)[:, :-1]


def _samples(ends: torch.Tensor) -> list[list[tuple[int, int]]]:
    changes = (torch.diff(ends).nonzero().flatten() + 1).tolist()
    starts = [0, *changes]
    stops = [*changes, len(ends)]
    samples: list[list[tuple[int, int]]] = []
    prefixes: list[tuple[int, int, int]] = []  # (start, stop, end) of the sequences that the next one may continue
    for start, stop, end in zip(starts, stops, ends[starts].tolist(), strict=True):
        while prefixes and prefixes[-1][2] <= start:
            prefixes.pop()
        prefixes.append((start, stop, end))
        if end == stop:  # nothing continues it: the sample ends here
            ranges: list[tuple[int, int]] = []
            for first, last, _ in prefixes:
                if ranges and ranges[-1][1] == first:
                    ranges[-1] = (ranges[-1][0], last)
                else:
                    ranges.append((first, last))
            samples.append(ranges)
    return samples
