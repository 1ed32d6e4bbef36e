"""Attention of packed rows on a CPU: sample by sample, as matrix products, and nothing that no token sees.

A CPU computes a masked attention as if everything were allowed, and a mask of a packed row is mostly forbidden. So here
each sample's tokens ask the sample's keys, in blocks, each block up to its own last token; a beginning that several
samples share asks only once. Short samples that begin alike are stacked, longer ones read where they lie. PyTorch's own
kernel for a CPU takes longer, above all in the backward pass: it multiplies matrices too small for the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llava_core.ops.packed_mask import Segments

BLOCK = 96
"""Queries of a block: with more, more pairs are computed that nobody sees; with fewer, the products are small."""

STACKED, SLACK, MOST_PADDING = 128, 8, 1.125
"""Samples of at most so many own tokens are stacked, if the longest has no more than so many, or so many times, more
than the shortest."""

KEPT_BYTES = 2**24
"""A call keeps its probabilities for the backward pass if they are no more than this; else they are computed again."""

Range = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """Samples that are computed together, in rows counted as one.

    Attributes:
        first, last: where there is one sample: the range of its own tokens, which no sample before it has computed.
        own: (samples x longest,) own tokens of all of them, the shorter ones padded with any token.
        seen: (samples x n,) the tokens that these see: what comes before their own, and these.
        padding: where `own` is padded.
        samples: how many there are.
    """

    first: int
    last: int
    own: torch.Tensor
    seen: torch.Tensor
    padding: torch.Tensor
    samples: int

    @property
    def blocks(self) -> list[tuple[slice, int]]:
        """Own tokens in blocks, and how many keys the last of each sees."""
        longest, n = len(self.own) // self.samples, len(self.seen) // self.samples
        ends = [min(begin + BLOCK, longest) for begin in range(0, longest, BLOCK)]
        return [(slice(begin, end), n - longest + end) for begin, end in zip([0, *ends], ends, strict=False)]

    @property
    def pairs(self) -> list[int]:
        """Queries times keys of each block, of all samples."""
        return [self.samples * (block.stop - block.start) * seen for block, seen in self.blocks]


@dataclass(frozen=True)
class Plan:
    """What is to be computed: calls, and tokens that see themselves only, as padding does."""

    calls: list[Call]
    alone: torch.Tensor


def make_plan(segments: Segments) -> Plan:
    """Find out who computes what."""
    width = segments.ends.shape[1]
    alike: dict[tuple[Range, ...], list[Range]] = {}  # own tokens, by what comes before them
    alone = []
    for b, row in enumerate(segments.samples):
        done = b * width
        for ranges in row:
            places = [(first + b * width, last + b * width) for first, last in ranges]
            own = (done, done := places[-1][1])
            before = tuple((first, min(last, own[0])) for first, last in places if first < own[0])
            if not before and own[1] - own[0] == 1:
                alone.append(own[0])
            else:
                alike.setdefault(before, []).append(own)
    calls = []
    for before, samples in alike.items():
        stacks: list[list[Range]] = []
        for own in sorted(samples, key=_length):
            shortest = _length(stacks[-1][0]) if stacks else 0
            if not stacks or _length(own) > min(STACKED, max(shortest + SLACK, MOST_PADDING * shortest)):
                stacks.append([])
            stacks[-1].append(own)
        calls += [_call(stack, before) for stack in stacks]
    return Plan(calls, torch.tensor(alone, dtype=torch.long))


def _length(own: Range) -> int:
    return own[1] - own[0]


def _call(samples: list[Range], before: Sequence[Range]) -> Call:
    longest = _length(samples[-1])
    prefix = torch.tensor([token for first, last in before for token in range(first, last)], dtype=torch.long)
    own = torch.stack([F.pad(torch.arange(*sample), (0, longest - _length(sample))) for sample in samples])
    padding = torch.arange(longest) >= torch.tensor([_length(sample) for sample in samples])[:, None]
    seen = torch.cat([prefix.expand(len(samples), -1), own], 1)
    return Call(*samples[0], own.flatten(), seen.flatten(), padding.flatten().nonzero()[:, 0], len(samples))


def _stacked(x: torch.Tensor, tokens: torch.Tensor, call: Call) -> torch.Tensor:
    """The tokens `call.own` or `call.seen` of x (tokens, heads, head_dim), as (samples x heads, ..., head_dim)."""
    if call.samples == 1 and len(tokens) == call.last - call.first:
        return x[call.first : call.last].transpose(0, 1)
    rows = x.index_select(0, tokens)
    if tokens is call.own:
        rows.index_fill_(0, call.padding, 0)
    return rows.unflatten(0, (call.samples, -1)).transpose(1, 2).flatten(0, 1)


def _add_back(part: torch.Tensor, tokens: torch.Tensor, call: Call, x: torch.Tensor) -> None:
    """The reverse of `_stacked`, added to x."""
    rows = part.unflatten(0, (call.samples, -1)).transpose(1, 2).flatten(0, 1)
    if tokens is call.own:
        rows.index_fill_(0, call.padding, 0)
    x.index_add_(0, tokens, rows)


def _probabilities(q: torch.Tensor, keys: torch.Tensor, future: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Softmax of the scores of queries q (heads, m, head_dim), the last m of the keys, in a piece of memory."""
    group, m, n = len(q) // len(keys), q.shape[1], keys.shape[1]
    scores = memory[: len(q) * m * n].view(len(q), m, n)
    for j in range(group):
        torch.bmm(q[j::group], keys.transpose(1, 2), out=scores[j::group])
    scores[:, :, n - m :].add_(future[:m, :m])
    return torch.softmax(scores, -1, out=scores)


def _summed_products(a: torch.Tensor, b: torch.Tensor, group: int) -> torch.Tensor:
    """a^T b per head, summed over the query heads of a key's head."""
    total = torch.bmm(a[::group].transpose(1, 2), b[::group])
    for j in range(1, group):
        total.add_(torch.bmm(a[j::group].transpose(1, 2), b[j::group]))
    return total


class _PerSample(torch.autograd.Function):
    """On q (tokens, heads, head_dim), already divided by the root of head_dim; k, v (tokens, kv_heads, head_dim)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
        heads, group = q.shape[1], q.shape[1] // k.shape[1]
        sizes = [heads * pairs for call in plan.calls for pairs in call.pairs]
        keep = any(ctx.needs_input_grad) and sum(sizes) * q.element_size() <= KEPT_BYTES
        memory, at = q.new_empty(sum(sizes) if keep else max(sizes, default=0)), 0
        future = q.new_full((BLOCK, BLOCK), float("-inf")).triu_(1)
        out = torch.zeros_like(q)
        for call in plan.calls:
            queries, keys, values = (_stacked(x, t, call) for x, t in ((q, call.own), (k, call.seen), (v, call.seen)))
            made = torch.empty_like(queries) if call.samples > 1 else _stacked(out, call.own, call)
            for block, n in call.blocks:
                p = _probabilities(queries[:, block], keys[:, :n], future, memory[at:])
                at += p.numel() if keep else 0
                for j in range(group):
                    torch.bmm(p[j::group], values[:, :n], out=made[j::group, block])
            if call.samples > 1:
                _add_back(made, call.own, call, out)
        if len(plan.alone):
            out[plan.alone] = v[plan.alone].repeat_interleave(group, 1)
        ctx.plan, ctx.future = plan, future
        ctx.save_for_backward(q, k, v, memory if keep else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), plan, (q, k, v, kept) = grads, ctx.plan, ctx.saved_tensors
        heads, group = q.shape[1], q.shape[1] // k.shape[1]
        most = max((heads * pairs for call in plan.calls for pairs in call.pairs), default=0)
        of_p, at = q.new_empty(most), 0
        memory = q.new_empty(most) if kept is None else kept
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for call in plan.calls:
            queries, g = _stacked(q, call.own, call), _stacked(grad, call.own, call)
            keys, values = _stacked(k, call.seen, call), _stacked(v, call.seen, call)
            of_queries = torch.empty_like(queries) if call.samples > 1 else _stacked(dq, call.own, call)
            of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
            for block, n in call.blocks:
                if kept is None:
                    p = _probabilities(queries[:, block], keys[:, :n], ctx.future, memory)
                else:
                    p = memory[at:][: len(queries) * (block.stop - block.start) * n].view(len(queries), -1, n)
                    at += p.numel()
                ds = of_p[: p.numel()].view_as(p)
                for j in range(group):
                    torch.bmm(g[j::group, block], values[:, :n].transpose(1, 2), out=ds[j::group])
                of_values[:, :n].add_(_summed_products(p, g[:, block], group))
                ds = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
                of_keys[:, :n].add_(_summed_products(ds, queries[:, block], group))
                for j in range(group):
                    torch.bmm(ds[j::group], keys[:, :n], out=of_queries[j::group, block])
            if call.samples > 1:
                _add_back(of_queries, call.own, call, dq)
            _add_back(of_keys, call.seen, call, dk)
            _add_back(of_values, call.seen, call, dv)
        if len(plan.alone):
            dv[plan.alone] = grad[plan.alone].unflatten(1, (-1, group)).sum(2)
        return dq, dk, dv, None


def per_sample(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    """Attention as `llava_core.ops.attention` says."""
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
    if q.dtype in (torch.bfloat16, torch.float16):  # scores rounded to it err more than PyTorch's kernel
        return per_sample(q.float(), k.float(), v.float(), segments).to(q.dtype)
    plan: Plan = segments.plan(make_plan)
    rows, heads, width, size = q.shape
    # (B x T, heads, head_dim): a view, since heads are split off the features of a token
    q, k, v = (x.transpose(1, 2).reshape(rows * width, -1, size) for x in (q * size**-0.5, k, v))
    return _PerSample.apply(q, k, v, plan).view(rows, width, heads, size).transpose(1, 2)
