"""Attention of packed rows in one kernel: no T x T matrix, and no work between samples that do not see each other.

Forward as in FlashAttention: a block of queries walks over the blocks of keys that it may see and keeps, per query, the
highest score so far, the sum of the exponentials and the weighted sum of the values. What is kept for the backward pass
is one number per query, the logarithm of that sum; the probabilities are computed again.

Backward twice, so that every output has one writer and no atomic addition is needed: once over blocks of queries for
their gradient, once over blocks of keys for the gradients of keys and values, where one program adds up all query heads
that share a key head. Equal inputs thus give equal bits on equal hardware, always; there is no faster variant to ask
for that would not.

Sums, scores and exponentials are in fp32, products in the dtype of the inputs; fp32 inputs are multiplied exactly
unless `torch.set_float32_matmul_precision` allows TF32.

Source: Dao et al. 2022 (the online softmax, the recomputation), Dao 2023 (the order of the loops); which tokens see
each other is ours, see `llava_core.ops.packed_mask`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from llava_core.ops.block_mask import one_sample, visits
from llava_core.ops.packed_mask import Segments

LOG2_E = 1.4426950408889634


class Blocks(NamedTuple):
    """How a kernel cuts its work: queries and keys per step, warps, and loads under way at the same time."""

    q: int
    k: int
    warps: int
    stages: int


def blocks(head_dim: int, dtype: torch.dtype) -> tuple[Blocks, Blocks, Blocks]:
    """Sizes for the forward kernel, the gradient of queries, the gradients of keys and values.

    Not tuned: nobody has timed these on a GPU. They are chosen by what the compiler says: with them each kernel fits in
    the 99 KiB of shared memory that every GPU of compute capability 8.0 to 9.0 has, and keeps its sums in registers.
    """
    if dtype == torch.float32:
        alike = Blocks(32, 32, 4 if head_dim <= 64 else 8, 1)
        return alike, alike, alike
    if head_dim <= 64:
        return Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)
    return Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)


# ------------------------------------------------------------------------------------------------ what kernels share


@triton.jit
def _tile(
    base: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    length: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    operand: tl.constexpr,
) -> tl.tensor:
    """Rows of a (T, head_dim) matrix; zeros behind its end and behind head_dim."""
    columns = tl.arange(0, block_d)
    inside = (rows < length)[:, None]
    if head_dim != block_d:
        inside = inside & (columns < head_dim)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(operand)


@triton.jit
def _store(
    base: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    length: tl.tensor,
    value: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    columns = tl.arange(0, block_d)
    inside = (rows < length)[:, None] & (columns < head_dim)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _hide(scores: tl.tensor, queries: tl.tensor, keys: tl.tensor, ends: tl.tensor) -> tl.tensor:
    """Scores of pairs that do not see each other become -inf: token q sees token k if k <= q < ends[k]."""
    return tl.where((keys <= queries) & (queries < ends), scores, float("-inf"))


# ------------------------------------------------------------------------------------------------ forward


@triton.jit
def _attend(
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    q: tl.tensor,
    queries: tl.tensor,
    k_base: tl.tensor,
    k_stride: tl.tensor,
    v_base: tl.tensor,
    v_stride: tl.tensor,
    ends: tl.tensor,
    visit: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_k: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
    masked: tl.constexpr,
) -> tl.tensor:
    """Let a block of queries see the blocks of keys that it visits from `first` to `last`."""
    for i in range(first, last):
        keys = tl.load(visit + i) * block_k + tl.arange(0, block_k)
        k = _tile(k_base, keys, k_stride, length, head_dim, block_d, operand)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        if masked:
            end = tl.load(ends + keys, mask=keys < length, other=0)
            scores = _hide(scores, queries[:, None], keys[None, :], end[None, :])
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = higher
        if masked:  # a query may have seen nothing yet: -inf less -inf is no number
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        v = _tile(v_base, keys, v_stride, length, head_dim, block_d, operand)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(operand), v, acc, input_precision=precision)
        top = higher
    return top, total, acc


@triton.jit
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    ends: tl.tensor,
    visit: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    o_row: tl.tensor,
    o_head: tl.tensor,
    o_token: tl.tensor,
    ends_row: tl.tensor,
    visit_row: tl.tensor,
    visit_block: tl.tensor,
    heads: tl.tensor,
    groups: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """One block of queries of one head: its outputs, and per query log2 of the sum of 2^scores."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks see most: they start first
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    queries = block * block_q + tl.arange(0, block_q)
    visit += row * visit_row + block * visit_block
    ends += row * ends_row
    k += row * k_row + head // groups * k_head
    v += row * v_row + head // groups * v_head
    mine = _tile(q + row * q_row + head * q_head, queries, q_token, length, head_dim, block_d, operand)
    top = tl.full((block_q,), float("-inf"), tl.float32)
    total = tl.zeros((block_q,), tl.float32)
    acc = tl.zeros((block_q, block_d), tl.float32)
    free, stop = tl.load(visit), tl.load(visit + 1)
    top, total, acc = _attend(
        top, total, acc, mine, queries, k, k_token, v, v_token, ends, visit, 2, free, length, scale,
        head_dim, block_d, block_k, operand, precision, False,
    )  # fmt: skip
    top, total, acc = _attend(
        top, total, acc, mine, queries, k, k_token, v, v_token, ends, visit, free, stop, length, scale,
        head_dim, block_d, block_k, operand, precision, True,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # queries behind the row's end, which see nothing
    _store(out + row * o_row + head * o_head, queries, o_token, length, acc / total[:, None], head_dim, block_d)
    place = (row * heads + head) * length + queries
    tl.store(lse + place, top + tl.log2(total), mask=queries < length)


# ------------------------------------------------------------------------------------------------ backward


@triton.jit
def _overlap(
    out: tl.tensor,
    grad: tl.tensor,
    delta: tl.tensor,
    o_row: tl.tensor,
    o_head: tl.tensor,
    o_token: tl.tensor,
    g_row: tl.tensor,
    g_head: tl.tensor,
    g_token: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_q: tl.constexpr,
) -> None:
    """Per query the product of the output and its gradient, which both backward kernels subtract."""
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    queries = tl.program_id(0) * block_q + tl.arange(0, block_q)
    o = _tile(out + row * o_row + head * o_head, queries, o_token, length, head_dim, block_d, tl.float32)
    g = _tile(grad + row * g_row + head * g_head, queries, g_token, length, head_dim, block_d, tl.float32)
    tl.store(delta + (row * heads + head) * length + queries, tl.sum(o * g, 1), mask=queries < length)


@triton.jit
def _add_to_q(
    acc: tl.tensor,
    q: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    queries: tl.tensor,
    k_base: tl.tensor,
    k_stride: tl.tensor,
    v_base: tl.tensor,
    v_stride: tl.tensor,
    ends: tl.tensor,
    visit: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_k: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
    masked: tl.constexpr,
) -> tl.tensor:
    """Gradient of a block of queries from the blocks of keys that it visits from `first` to `last`."""
    for i in range(first, last):
        keys = tl.load(visit + i) * block_k + tl.arange(0, block_k)
        k = _tile(k_base, keys, k_stride, length, head_dim, block_d, operand)
        v = _tile(v_base, keys, v_stride, length, head_dim, block_d, operand)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        if masked:
            end = tl.load(ends + keys, mask=keys < length, other=0)
            scores = _hide(scores, queries[:, None], keys[None, :], end[None, :])
        p = tl.exp2(scores - lse[:, None])
        of_p = tl.dot(grad, tl.trans(v), input_precision=precision)
        of_scores = p * (of_p - delta[:, None])
        acc = tl.dot(of_scores.to(operand), k, acc, input_precision=precision)
    return acc


@triton.jit
def _backward_q(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dq: tl.tensor,
    ends: tl.tensor,
    visit: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    g_row: tl.tensor,
    g_head: tl.tensor,
    g_token: tl.tensor,
    dq_row: tl.tensor,
    dq_head: tl.tensor,
    dq_token: tl.tensor,
    ends_row: tl.tensor,
    visit_row: tl.tensor,
    visit_block: tl.tensor,
    heads: tl.tensor,
    groups: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """One block of queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    queries = block * block_q + tl.arange(0, block_q)
    visit += row * visit_row + block * visit_block
    ends += row * ends_row
    k += row * k_row + head // groups * k_head
    v += row * v_row + head // groups * v_head
    mine = _tile(q + row * q_row + head * q_head, queries, q_token, length, head_dim, block_d, operand)
    g = _tile(grad + row * g_row + head * g_head, queries, g_token, length, head_dim, block_d, operand)
    place = (row * heads + head) * length + queries
    own_lse = tl.load(lse + place, mask=queries < length, other=0.0)
    own_delta = tl.load(delta + place, mask=queries < length, other=0.0)
    acc = tl.zeros((block_q, block_d), tl.float32)
    free, stop = tl.load(visit), tl.load(visit + 1)
    acc = _add_to_q(
        acc, mine, g, own_lse, own_delta, queries, k, k_token, v, v_token, ends, visit, 2, free, length, scale,
        head_dim, block_d, block_k, operand, precision, False,
    )  # fmt: skip
    acc = _add_to_q(
        acc, mine, g, own_lse, own_delta, queries, k, k_token, v, v_token, ends, visit, free, stop, length, scale,
        head_dim, block_d, block_k, operand, precision, True,
    )  # fmt: skip
    _store(dq + row * dq_row + head * dq_head, queries, dq_token, length, acc * factor, head_dim, block_d)


@triton.jit
def _add_to_kv(
    dk: tl.tensor,
    dv: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    keys: tl.tensor,
    end: tl.tensor,
    q_base: tl.tensor,
    q_stride: tl.tensor,
    g_base: tl.tensor,
    g_stride: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    visit: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_q: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
    masked: tl.constexpr,
) -> tl.tensor:
    """Gradients of a block of keys and values from the blocks of queries of one head, from `first` to `last`.

    Everything lies on its side, keys by queries, so that no product needs a turned operand from registers.
    """
    for i in range(first, last):
        queries = tl.load(visit + i) * block_q + tl.arange(0, block_q)
        q = _tile(q_base, queries, q_stride, length, head_dim, block_d, operand)
        g = _tile(g_base, queries, g_stride, length, head_dim, block_d, operand)
        # behind the row's end q and g are zeros, so that whatever comes of these does not count
        own_lse = tl.load(lse + queries, mask=queries < length, other=0.0)
        own_delta = tl.load(delta + queries, mask=queries < length, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=precision) * scale
        if masked:
            scores = _hide(scores, queries[None, :], keys[:, None], end[:, None])
        p = tl.exp2(scores - own_lse[None, :])
        dv = tl.dot(p.to(operand), g, dv, input_precision=precision)
        of_p = tl.dot(v, tl.trans(g), input_precision=precision)
        of_scores = p * (of_p - own_delta[None, :])
        dk = tl.dot(of_scores.to(operand), q, dk, input_precision=precision)
    return dk, dv


@triton.jit
def _backward_kv(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    ends: tl.tensor,
    visit: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    g_row: tl.tensor,
    g_head: tl.tensor,
    g_token: tl.tensor,
    dk_row: tl.tensor,
    dk_head: tl.tensor,
    dk_token: tl.tensor,
    dv_row: tl.tensor,
    dv_head: tl.tensor,
    dv_token: tl.tensor,
    ends_row: tl.tensor,
    visit_row: tl.tensor,
    visit_block: tl.tensor,
    kv_heads: tl.tensor,
    groups: tl.tensor,
    length: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    operand: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """One block of keys and values of one key head, over all query heads that share it."""
    block = tl.program_id(0)  # the first blocks are seen by most
    row, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    keys = block * block_k + tl.arange(0, block_k)
    visit += row * visit_row + block * visit_block
    end = tl.load(ends + row * ends_row + keys, mask=keys < length, other=0)
    own_k = _tile(k + row * k_row + kv_head * k_head, keys, k_token, length, head_dim, block_d, operand)
    own_v = _tile(v + row * v_row + kv_head * v_head, keys, v_token, length, head_dim, block_d, operand)
    sum_k = tl.zeros((block_k, block_d), tl.float32)
    sum_v = tl.zeros((block_k, block_d), tl.float32)
    free, stop = tl.load(visit), tl.load(visit + 1)
    for member in range(groups):
        head = kv_head * groups + member
        own_q, own_g = q + row * q_row + head * q_head, grad + row * g_row + head * g_head
        place = (row * kv_heads * groups + head) * length
        sum_k, sum_v = _add_to_kv(
            sum_k, sum_v, own_k, own_v, keys, end, own_q, q_token, own_g, g_token, lse + place, delta + place,
            visit, 2, free, length, scale, head_dim, block_d, block_q, operand, precision, False,
        )  # fmt: skip
        sum_k, sum_v = _add_to_kv(
            sum_k, sum_v, own_k, own_v, keys, end, own_q, q_token, own_g, g_token, lse + place, delta + place,
            visit, free, stop, length, scale, head_dim, block_d, block_q, operand, precision, True,
        )  # fmt: skip
    _store(dk + row * dk_row + kv_head * dk_head, keys, dk_token, length, sum_k * factor, head_dim, block_d)
    _store(dv + row * dv_row + kv_head * dv_head, keys, dv_token, length, sum_v, head_dim, block_d)


# ------------------------------------------------------------------------------------------------ launching

INTERPRETED: bool = not any(isinstance(f, triton.JITFunction) for f in (_forward, tl.zeros))
"""Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1 before triton is first loaded)."""


def not_interpreted() -> str | None:
    """Why the kernels do not run on CPU tensors; None: they do."""
    if not INTERPRETED:
        return "TRITON_INTERPRET=1 was set after triton was loaded"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7):
        return f"the interpreter of triton {triton.__version__} fails at loops of computed length; 3.7 does not"
    return None


def _tokens_first(like: torch.Tensor) -> torch.Tensor:
    """Memory for (B, heads, T, head_dim) in which the heads of a token lie together, as the next layer reads them."""
    rows, heads, length, size = like.shape
    return like.new_empty(rows, length, heads, size).transpose(1, 2)


def _steps(x: torch.Tensor) -> tuple[int, int, int]:
    row, head, token, _ = x.stride()
    return row, head, token


def _table_steps(ends: torch.Tensor, visit: torch.Tensor) -> tuple[int, int, int]:
    return ends.stride(0), visit.stride(0), visit.stride(1)


def _constants(q: torch.Tensor) -> dict[str, Any]:
    head_dim = q.shape[-1]
    # the interpreter's products of bf16 matrices are not products; they are made in fp32 there
    operand = torch.float32 if INTERPRETED and q.dtype == torch.bfloat16 else q.dtype
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "head_dim": head_dim,
        "block_d": max(16, triton.next_power_of_2(head_dim)),
        "operand": {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[operand],
        "precision": "ieee" if exact else "tf32",
    }


@torch.library.custom_op("llava_core::triton_attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: torch.Tensor,
    visit: torch.Tensor,
    visit_q: torch.Tensor,
    visit_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, length, size = q.shape
    out, lse = _tokens_first(q), q.new_empty(rows, heads, length, dtype=torch.float32)
    cut = blocks(size, q.dtype)[0]
    with torch.cuda.device_of(q):  # Triton launches on the current GPU, wherever the tensors are
        _forward[(visit.shape[1], rows * heads)](
            q, k, v, out, lse, ends, visit, *_steps(q), *_steps(k), *_steps(v), *_steps(out),
            *_table_steps(ends, visit), heads, heads // k.shape[1], length, size**-0.5 * LOG2_E,
            **_constants(q), block_q=cut.q, block_k=cut.k, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return out, lse


@_attention.register_fake
def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: torch.Tensor,
    visit: torch.Tensor,
    visit_q: torch.Tensor,
    visit_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _tokens_first(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("llava_core::triton_attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    ends: torch.Tensor,
    visit_q: torch.Tensor,
    visit_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, heads, length, size = q.shape
    kv_heads = k.shape[1]
    scale, fixed = size**-0.5 * LOG2_E, _constants(q)
    dq, dk, dv = _tokens_first(q), _tokens_first(k), _tokens_first(v)
    _, for_q, for_k = blocks(size, q.dtype)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        _overlap[(triton.cdiv(length, 64), rows * heads)](
            out, grad, delta, *_steps(out), *_steps(grad), heads, length,
            head_dim=fixed["head_dim"], block_d=fixed["block_d"], block_q=64,
        )  # fmt: skip
        _backward_q[(visit_q.shape[1], rows * heads)](
            q, k, v, grad, lse, delta, dq, ends, visit_q, *_steps(q), *_steps(k), *_steps(v), *_steps(grad),
            *_steps(dq), *_table_steps(ends, visit_q), heads, heads // kv_heads, length, scale, size**-0.5,
            **fixed, block_q=for_q.q, block_k=for_q.k, num_warps=for_q.warps, num_stages=for_q.stages,
        )  # fmt: skip
        _backward_kv[(visit_k.shape[1], rows * kv_heads)](
            q, k, v, grad, lse, delta, dk, dv, ends, visit_k, *_steps(q), *_steps(k), *_steps(v), *_steps(grad),
            *_steps(dk), *_steps(dv), *_table_steps(ends, visit_k), kv_heads, heads // kv_heads, length, scale,
            size**-0.5, **fixed, block_q=for_k.q, block_k=for_k.k, num_warps=for_k.warps, num_stages=for_k.stages,
        )  # fmt: skip
    return dq, dk, dv


@_attention_backward.register_fake
def _attention_backward_fake(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    ends: torch.Tensor,
    visit_q: torch.Tensor,
    visit_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _tokens_first(q), _tokens_first(k), _tokens_first(v)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ends, _, visit_q, visit_k = inputs
    ctx.save_for_backward(q, k, v, *output, ends, visit_q, visit_k)


def _differentiate(ctx: Any, grad: torch.Tensor, of_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = _attention_backward(_rows_of_memory(grad), *ctx.saved_tensors)
    return (*gradients, None, None, None, None)


_attention.register_autograd(_differentiate, setup_context=_save)


def _rows_of_memory(x: torch.Tensor) -> torch.Tensor:
    """The features of a token must lie together; everything else may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def triton_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None = None
) -> torch.Tensor:
    """Attention as `llava_core.ops.attention` says.

    Args:
        q: (B, heads, T, head_dim), head_dim up to 128; fp32, fp16 or bf16.
        k, v: (B, kv_heads, T, head_dim), in q's dtype.
        segments: which tokens belong together; None where a row is one sample.

    Returns:
        (B, heads, T, head_dim); in memory the heads of a token lie together.
    """
    segments = one_sample(q.shape[0], q.shape[2], q.device) if segments is None else segments.to(q.device)
    forward, for_q, for_k = blocks(q.shape[3], q.dtype)
    plans = [segments.plan(visits, cut.q, cut.k, of) for cut, of in ((forward, "q"), (for_q, "q"), (for_k, "k"))]
    out, _ = _attention(*(_rows_of_memory(x) for x in (q, k, v)), segments.ends, *plans)
    result: torch.Tensor = out
    return result
