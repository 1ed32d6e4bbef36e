"""Variable-length attention for a CPU: each sample of a packed row is computed separately, as matrix products.

A CPU computes masked attention over all pairs of a row, most of them masked. Here the queries of each sample meet the
keys of that sample only, in blocks, each up to its own last key. A shared prefix is computed once. Short samples of
similar length with the same prefix form a group, one batch. PyTorch's own CPU kernel is slower, mostly in the backward
pass: its matrix products are too small for the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llava_core.ops.packed_mask import PackedMask

BLOCK = 96
"""Queries per block: larger blocks compute more masked pairs, smaller blocks have smaller matrix products."""

MAX_BATCHED_LEN, LEN_SLACK, MAX_PADDING = 128, 8, 1.125
"""Samples with at most MAX_BATCHED_LEN queries form a group if the longest has at most LEN_SLACK queries more than the
shortest, or MAX_PADDING times as many."""

MAX_SAVED_BYTES = 2**24
"""Probabilities are saved for the backward pass up to this size; larger ones are recomputed."""

Range = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Samples that are computed as one batch; the rows of the input are concatenated.

    Attributes:
        first, last: range of the queries of the first sample.
        queries: (samples x longest,) the tokens of each sample that no earlier sample has computed, padded.
        keys: (samples x n,) the tokens that these attend to: the prefixes, then the queries' own.
        padding: indices of padding in `queries`.
        samples: their number.
    """

    first: int
    last: int
    queries: torch.Tensor
    keys: torch.Tensor
    padding: torch.Tensor
    samples: int

    @property
    def blocks(self) -> list[tuple[slice, int]]:
        """Blocks of queries, and the number of keys of the last query of each."""
        longest, n = len(self.queries) // self.samples, len(self.keys) // self.samples
        ends = [min(begin + BLOCK, longest) for begin in range(0, longest, BLOCK)]
        return [(slice(begin, end), n - longest + end) for begin, end in zip([0, *ends], ends, strict=False)]

    @property
    def pairs(self) -> list[int]:
        """Computed pairs of a query and a key, per block."""
        return [self.samples * (block.stop - block.start) * n for block, n in self.blocks]


@dataclass(frozen=True)
class Schedule:
    """The groups of a packed mask, and singletons: tokens that attend to themselves only, such as padding."""

    groups: list[Group]
    singletons: torch.Tensor


def make_schedule(packed_mask: PackedMask) -> Schedule:
    """Assign every token of the rows to a group or to the singletons."""
    width = packed_mask.ends.shape[1]
    by_prefix: dict[tuple[Range, ...], list[Range]] = {}
    singletons = []
    for b, row in enumerate(packed_mask.samples):
        done = b * width
        for ranges in row:
            shifted = [(first + b * width, last + b * width) for first, last in ranges]
            own = (done, done := shifted[-1][1])
            prefix = tuple((first, min(last, own[0])) for first, last in shifted if first < own[0])
            if not prefix and own[1] - own[0] == 1:
                singletons.append(own[0])
            else:
                by_prefix.setdefault(prefix, []).append(own)
    groups = []
    for prefix, samples in by_prefix.items():
        batches: list[list[Range]] = []
        for own in sorted(samples, key=_length):
            shortest = _length(batches[-1][0]) if batches else 0
            longest_allowed = min(MAX_BATCHED_LEN, max(shortest + LEN_SLACK, MAX_PADDING * shortest))
            if not batches or _length(own) > longest_allowed:
                batches.append([])
            batches[-1].append(own)
        groups += [_group(batch, prefix) for batch in batches]
    return Schedule(groups, torch.tensor(singletons, dtype=torch.long))


def _length(own: Range) -> int:
    return own[1] - own[0]


def _group(samples: list[Range], prefix: Sequence[Range]) -> Group:
    longest = _length(samples[-1])
    before = torch.tensor([token for first, last in prefix for token in range(first, last)], dtype=torch.long)
    own = torch.stack([F.pad(torch.arange(*sample), (0, longest - _length(sample))) for sample in samples])
    padding = torch.arange(longest) >= torch.tensor([_length(sample) for sample in samples])[:, None]
    keys = torch.cat([before.expand(len(samples), -1), own], 1)
    return Group(*samples[0], own.flatten(), keys.flatten(), padding.flatten().nonzero()[:, 0], len(samples))


def _gather(x: torch.Tensor, tokens: torch.Tensor, group: Group) -> torch.Tensor:
    """`group.queries` or `group.keys` of x (tokens, heads, head_dim), as (samples x heads, length, head_dim)."""
    if group.samples == 1 and len(tokens) == group.last - group.first:
        return x[group.first : group.last].transpose(0, 1)
    rows = x.index_select(0, tokens)
    if tokens is group.queries:
        rows.index_fill_(0, group.padding, 0)
    return rows.unflatten(0, (group.samples, -1)).transpose(1, 2).flatten(0, 1)


def _scatter_add(part: torch.Tensor, tokens: torch.Tensor, group: Group, x: torch.Tensor) -> None:
    """The inverse of `_gather`, added to x."""
    rows = part.unflatten(0, (group.samples, -1)).transpose(1, 2).flatten(0, 1)
    if tokens is group.queries:
        rows.index_fill_(0, group.padding, 0)
    x.index_add_(0, tokens, rows)


def _probabilities(q: torch.Tensor, keys: torch.Tensor, future: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Softmax of the scores of queries q (heads, m, head_dim), which are the last m keys; written into a buffer."""
    n_groups, m, n = len(q) // len(keys), q.shape[1], keys.shape[1]
    scores = buffer[: len(q) * m * n].view(len(q), m, n)
    for j in range(n_groups):
        torch.bmm(q[j::n_groups], keys.transpose(1, 2), out=scores[j::n_groups])
    scores[:, :, n - m :].add_(future[:m, :m])
    return torch.softmax(scores, -1, out=scores)


def _summed_products(a: torch.Tensor, b: torch.Tensor, n_groups: int) -> torch.Tensor:
    """a^T b per head, summed over the query heads of each key head."""
    total = torch.bmm(a[::n_groups].transpose(1, 2), b[::n_groups])
    for j in range(1, n_groups):
        total.add_(torch.bmm(a[j::n_groups].transpose(1, 2), b[j::n_groups]))
    return total


class _CpuVarlen(torch.autograd.Function):
    """q (tokens, heads, head_dim), already divided by sqrt(head_dim); k, v (tokens, kv_heads, head_dim)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: Schedule) -> torch.Tensor:
        heads, n_groups = q.shape[1], q.shape[1] // k.shape[1]
        sizes = [heads * pairs for group in schedule.groups for pairs in group.pairs]
        save = any(ctx.needs_input_grad) and sum(sizes) * q.element_size() <= MAX_SAVED_BYTES
        buffer, offset = q.new_empty(sum(sizes) if save else max(sizes, default=0)), 0
        future = q.new_full((BLOCK, BLOCK), float("-inf")).triu_(1)
        out = torch.zeros_like(q)
        for group in schedule.groups:
            queries, keys = _gather(q, group.queries, group), _gather(k, group.keys, group)
            values = _gather(v, group.keys, group)
            outputs = torch.empty_like(queries) if group.samples > 1 else _gather(out, group.queries, group)
            for block, n in group.blocks:
                p = _probabilities(queries[:, block], keys[:, :n], future, buffer[offset:])
                offset += p.numel() if save else 0
                for j in range(n_groups):
                    torch.bmm(p[j::n_groups], values[:, :n], out=outputs[j::n_groups, block])
            if group.samples > 1:
                _scatter_add(outputs, group.queries, group, out)
        if len(schedule.singletons):
            out[schedule.singletons] = v[schedule.singletons].repeat_interleave(n_groups, 1)
        ctx.schedule, ctx.future = schedule, future
        ctx.save_for_backward(q, k, v, buffer if save else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), schedule, (q, k, v, saved) = grads, ctx.schedule, ctx.saved_tensors
        heads, n_groups = q.shape[1], q.shape[1] // k.shape[1]
        largest = max((heads * pairs for group in schedule.groups for pairs in group.pairs), default=0)
        ds_buffer, offset = q.new_empty(largest), 0
        buffer = q.new_empty(largest) if saved is None else saved
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for group in schedule.groups:
            queries, g = _gather(q, group.queries, group), _gather(grad, group.queries, group)
            keys, values = _gather(k, group.keys, group), _gather(v, group.keys, group)
            dq_group = torch.empty_like(queries) if group.samples > 1 else _gather(dq, group.queries, group)
            dk_group, dv_group = torch.zeros_like(keys), torch.zeros_like(values)
            for block, n in group.blocks:
                if saved is None:
                    p = _probabilities(queries[:, block], keys[:, :n], ctx.future, buffer)
                else:
                    p = buffer[offset:][: len(queries) * (block.stop - block.start) * n].view(len(queries), -1, n)
                    offset += p.numel()
                ds = ds_buffer[: p.numel()].view_as(p)
                for j in range(n_groups):
                    torch.bmm(g[j::n_groups, block], values[:, :n].transpose(1, 2), out=ds[j::n_groups])
                dv_group[:, :n].add_(_summed_products(p, g[:, block], n_groups))
                ds = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
                dk_group[:, :n].add_(_summed_products(ds, queries[:, block], n_groups))
                for j in range(n_groups):
                    torch.bmm(ds[j::n_groups], keys[:, :n], out=dq_group[j::n_groups, block])
            if group.samples > 1:
                _scatter_add(dq_group, group.queries, group, dq)
            _scatter_add(dk_group, group.keys, group, dk)
            _scatter_add(dv_group, group.keys, group, dv)
        if len(schedule.singletons):
            dv[schedule.singletons] = grad[schedule.singletons].unflatten(1, (-1, n_groups)).sum(2)
        return dq, dk, dv, None


def cpu_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask | None) -> torch.Tensor:
    """Causal attention of packed rows; see `llava_core.ops.attention`."""
    if packed_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
    if q.dtype in (torch.bfloat16, torch.float16):  # scores rounded to it have a larger error than PyTorch's kernel
        return cpu_varlen(q.float(), k.float(), v.float(), packed_mask).to(q.dtype)
    schedule: Schedule = packed_mask.cached(make_schedule)
    rows, heads, width, size = q.shape
    # (B x T, heads, head_dim): a view, since the model splits the features of a token into heads
    q, k, v = (x.transpose(1, 2).reshape(rows * width, -1, size) for x in (q * size**-0.5, k, v))
    return _CpuVarlen.apply(q, k, v, schedule).view(rows, width, heads, size).transpose(1, 2)
