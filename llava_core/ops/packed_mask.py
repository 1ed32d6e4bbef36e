"""Packed rows: several samples behind each other, which may have their beginning in common.

A row is a forest. A node is a run of tokens; its children follow it at once, one after the other, each with all that
follows from it. Two conversations about one image are a node (system text, image) with two children. A token sees its
own node up to itself, and the whole of the nodes above: just what it would see if every sample had a row of its own.

Written down this takes one number per token: `ends[k]`, where the tokens end that may see token k. Token q sees token k
if `k <= q < ends[k]`. Samples without anything in common are nodes without children, `ends` is the end of each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

Plan = TypeVar("Plan")


@dataclass(frozen=True, eq=False)
class Segments:
    """Which tokens of packed rows may see which.

    Attributes:
        ends: (B, T) int32; token q of a row sees token k if `k <= q < ends[k]`. For padding `ends[k] = k + 1`.
    """

    ends: torch.Tensor
    # a field and no cached property, whose lock torch.compile cannot follow
    _plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Segments:
        """Rows of samples that have nothing in common, by the samples' lengths; shorter rows are padded."""
        width = max(sum(lengths) for lengths in rows)
        ends = torch.arange(1, width + 1, dtype=torch.int32).repeat(len(rows), 1)
        for b, lengths in enumerate(rows):
            stop = torch.tensor(lengths).cumsum(0)
            ends[b, : int(stop[-1])] = torch.repeat_interleave(stop, torch.tensor(lengths)).int()
        return cls(ends)

    def to(self, device: torch.device | str) -> Segments:
        """The same on a device, copied there once."""
        there = torch.device(device)
        if self.ends.device.type == there.type and there.index in (None, self.ends.device.index):
            return self
        if there not in self._plans:
            self._plans[there] = Segments(self.ends.to(there))
        found: Segments = self._plans[there]
        return found

    def plan(self, make: Callable[..., Plan], *details: Hashable) -> Plan:
        """What a backend works out about these rows, `make(segments, *details)`, once for all layers."""
        if (make, details) not in self._plans:
            self._plans[make, details] = make(self, *details)
        found: Plan = self._plans[make, details]
        return found

    @cached_property
    def samples(self) -> list[list[list[tuple[int, int]]]]:
        """Per row and sample the ranges of positions that it consists of, from the beginning that it shares to its end.

        Every position is in one sample at least; the first sample that has a position follows it without a gap.
        """
        return [_samples(row) for row in self.ends.cpu()]


def positions(segments: Segments) -> torch.Tensor:
    """The position of each token in the samples that it is part of: how many tokens before itself it sees.

    Returns:
        position_ids (B, T) int64; 0 for padding.
    """
    rows, width = segments.ends.shape
    over = torch.zeros(rows, width + 1, dtype=torch.long, device=segments.ends.device)
    over.scatter_add_(1, segments.ends.long(), torch.ones_like(over[:, :-1]))
    return torch.arange(width, device=over.device) - over.cumsum(1)[:, :-1]


def _samples(ends: torch.Tensor) -> list[list[tuple[int, int]]]:
    changes = (torch.diff(ends).nonzero().flatten() + 1).tolist()
    starts = [0, *changes]
    stops = [*changes, len(ends)]
    found: list[list[tuple[int, int]]] = []
    above: list[tuple[int, int, int]] = []  # (start, stop, end) of the nodes that the next one may stand under
    for start, stop, end in zip(starts, stops, ends[starts].tolist(), strict=True):
        while above and above[-1][2] <= start:
            above.pop()
        above.append((start, stop, end))
        if end == stop:  # nothing follows from it: the sample ends here
            ranges: list[tuple[int, int]] = []
            for first, last, _ in above:
                if ranges and ranges[-1][1] == first:
                    ranges[-1] = (ranges[-1][0], last)
                else:
                    ranges.append((first, last))
            found.append(ranges)
    return found
