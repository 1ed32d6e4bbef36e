"""Packed attention without any mask: one causal SDPA call for all samples of about the same length.

A CPU computes a masked attention as if everything were allowed, and a mask of a packed row is mostly forbidden. So the
samples are taken out of the row, beginnings that several share as often as they are shared, padded on the right to the
longest of their call, where causality alone hides the padding; and what is theirs is put back. The layers around, where
nearly all computing is, still see each shared token once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from llava_core.ops.segments import Segments

SLACK, MOST_PADDING = (
    16,
    1.125,
)  # samples of one call: at most so many tokens, or so many times, longer than the shortest


@dataclass(frozen=True)
class Plan:
    """Where the tokens of rows (flattened, B x T) go in the calls, and where their outputs come from.

    Attributes:
        calls: (samples, length) of each SDPA call; the slots of all calls follow each other.
        take: (slots,) token of each slot; of padding, any.
        own: (tokens,) the slot whose output is the token's.
        owner: (slots,) the token whose output it is, or the number of tokens where it is none's.
        again: ranges (slot, token, length) of tokens in further slots than their own.
    """

    calls: list[tuple[int, int]]
    take: torch.Tensor
    own: torch.Tensor
    owner: torch.Tensor
    again: list[tuple[int, int, int]]


def make_plan(segments: Segments) -> Plan:
    """Put samples of similar lengths together."""
    rows, width = segments.ends.shape
    samples = [
        [(first + b * width, last + b * width) for first, last in ranges]
        for b, row in enumerate(segments.samples)
        for ranges in row
    ]
    owned = torch.full((rows * width,), -1, dtype=torch.long)
    order = sorted(range(len(samples)), key=lambda k: _length(samples[k]))
    groups: list[list[int]] = []
    for k in order:
        if not groups or _length(samples[k]) > MOST_PADDING * _length(samples[groups[-1][0]]) + SLACK:
            groups.append([])
        groups[-1].append(k)
    calls, take, again, slot = [], [], [], 0
    places: dict[int, int] = {}
    for group in groups:
        longest = _length(samples[group[-1]])
        calls.append((len(group), longest))
        for k in group:
            places[k] = slot
            index = torch.cat([torch.arange(first, last) for first, last in samples[k]])
            take.append(F.pad(index, (0, longest - len(index))))
            slot += longest
    for k, ranges in enumerate(samples):  # in the row's order: the first sample that has a token owns it
        at = places[k]
        for first, last in ranges:
            if owned[first] < 0:
                owned[first:last] = torch.arange(at, at + last - first)
            else:
                # a range may be owned up to where the last sample branched off
                free = (owned[first:last] < 0).nonzero()
                shared = int(free[0]) if len(free) else last - first
                again.append((at, first, shared))
                owned[first + shared : last] = torch.arange(at + shared, at + last - first)
            at += last - first
    owner = torch.full((slot,), rows * width, dtype=torch.long)
    owner[owned] = torch.arange(rows * width)
    return Plan(calls, torch.cat(take), owned, owner, again)


def _length(ranges: list[tuple[int, int]]) -> int:
    return sum(last - first for first, last in ranges)


class _Take(torch.autograd.Function):
    """Tokens (T, ...) into slots (S, ...); PyTorch's own gradient adds token by token, which takes longer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.take)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        total = grad.index_select(0, ctx.plan.own)
        for slot, token, length in ctx.plan.again:
            total[token : token + length] += grad[slot : slot + length]
        return total, None


class _Give(torch.autograd.Function):
    """Outputs of slots (S, ...) to the tokens that own them (T, ...)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.own)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])]).index_select(0, ctx.plan.owner), None


def per_sample(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    """Attention as `llava_core.ops.attention` says."""
    groups = q.shape[1] // k.shape[1]
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
    plan: Plan = segments.plan(make_plan)
    rows, heads, width, size = q.shape
    # (B x T, heads, head_dim): a view, since heads are split off the features of a token
    slots = [_Take.apply(x.transpose(1, 2).reshape(rows * width, -1, size), plan) for x in (q, k, v)]
    done, begin = [], 0
    for count, longest in plan.calls:
        parts = [x[begin : begin + count * longest].view(count, longest, -1, size).transpose(1, 2) for x in slots]
        parts[1:] = [x.repeat_interleave(groups, 1) if groups > 1 else x for x in parts[1:]]
        out = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        done.append(out.transpose(1, 2).reshape(count * longest, heads, size))
        begin += count * longest
    out = _Give.apply(done[0] if len(done) == 1 else torch.cat(done), plan)
    return out.view(rows, width, heads, size).transpose(1, 2)
