"""FlashAttention-2 for packed rows, in Triton: no T x T matrix, empty blocks are skipped, full blocks need no mask.

Forward: a block of queries loops over the blocks of keys that it attends to. Of the scores only the logarithm of the
sum of their exponentials (`lse`, one number per query) is saved; the backward pass computes the probabilities again.

Backward in two kernels, so that every output has one writer and no atomic addition is needed: `_bwd_dq` over blocks of
queries, `_bwd_dkdv` over blocks of keys. Equal inputs give equal bits on equal hardware.

Sums, scores and exponentials are in fp32, products in the dtype of the inputs; fp32 inputs are multiplied exactly
unless `torch.set_float32_matmul_precision` allows TF32.

Source: Dao et al. 2022 (online softmax, recomputation), Dao 2023 (loop order).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from llava_core.ops.block_mask import block_table, causal_mask
from llava_core.ops.packed_mask import PackedMask

LOG2_E = 1.4426950408889634


class Blocks(NamedTuple):
    """Block sizes of queries and keys, warps, and stages of the software pipeline."""

    q: int
    k: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"block_q": self.q, "block_k": self.k, "num_warps": self.warps, "num_stages": self.stages}


def blocks(head_dim: int, dtype: torch.dtype) -> tuple[Blocks, Blocks, Blocks]:
    """Sizes for `_fwd`, `_bwd_dq` and `_bwd_dkdv`.

    Not tuned on a GPU. They are chosen by the compiler's report: each kernel fits in the 99 KiB of shared memory that
    every GPU of compute capability 8.0 to 9.0 has, and keeps its accumulators in registers.
    """
    if dtype == torch.float32:
        same = Blocks(32, 32, 4 if head_dim <= 64 else 8, 1)
        return same, same, same
    if head_dim <= 64:
        return Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)
    return Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)


@triton.jit
def _tile(
    base: tl.tensor, rows: tl.tensor, stride: tl.tensor, length: tl.tensor, head_dim: tl.constexpr,
    block_d: tl.constexpr, operand: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load rows of a (T, head_dim) matrix; zeros after its end and after head_dim."""
    columns = tl.arange(0, block_d)
    inside = (rows < length)[:, None]
    if head_dim != block_d:
        inside = inside & (columns < head_dim)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(operand)


@triton.jit
def _store(
    base: tl.tensor, rows: tl.tensor, stride: tl.tensor, length: tl.tensor, value: tl.tensor, head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> None:  # fmt: skip
    """Store rows of a (T, head_dim) matrix."""
    columns = tl.arange(0, block_d)
    inside = (rows < length)[:, None] & (columns < head_dim)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _apply_mask(scores: tl.tensor, queries: tl.tensor, keys: tl.tensor, ends: tl.tensor) -> tl.tensor:
    """Query q attends to key k if k <= q < ends[k]; other scores become -inf."""
    return tl.where((keys <= queries) & (queries < ends), scores, float("-inf"))


@triton.jit
def _fwd(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, lse: tl.tensor, ends: tl.tensor, table: tl.tensor,
    stride_qb: tl.tensor, stride_qh: tl.tensor, stride_qt: tl.tensor, stride_kb: tl.tensor, stride_kh: tl.tensor,
    stride_kt: tl.tensor, stride_vb: tl.tensor, stride_vh: tl.tensor, stride_vt: tl.tensor, stride_ob: tl.tensor,
    stride_oh: tl.tensor, stride_ot: tl.tensor, stride_ends: tl.tensor, stride_table: tl.tensor, heads: tl.tensor,
    groups: tl.tensor, length: tl.tensor, scale: tl.tensor, head_dim: tl.constexpr, block_d: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    """One block of queries of one head: its outputs, and per query log2 of the sum of 2^scores."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks have most keys: they start first
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    queries = block * block_q + tl.arange(0, block_q)
    table += (row * tl.num_programs(0) + block) * stride_table
    ends += row * stride_ends
    k += row * stride_kb + head // groups * stride_kh
    v += row * stride_vb + head // groups * stride_vh
    q_i = _tile(q + row * stride_qb + head * stride_qh, queries, stride_qt, length, head_dim, block_d, operand)
    m_i = tl.full((block_q,), float("-inf"), tl.float32)  # running maximum of the scores
    l_i = tl.zeros((block_q,), tl.float32)  # running sum of the exponentials
    acc = tl.zeros((block_q, block_d), tl.float32)  # running weighted sum of the values
    full_end, partial_end = tl.load(table), tl.load(table + 1)
    for masked in tl.static_range(2):  # full blocks, then partial blocks
        for j in range(full_end if masked else 2, partial_end if masked else full_end):
            keys = tl.load(table + j) * block_k + tl.arange(0, block_k)
            k_j = _tile(k, keys, stride_kt, length, head_dim, block_d, operand)
            scores = tl.dot(q_i, tl.trans(k_j), input_precision=precision) * scale
            if masked:
                end = tl.load(ends + keys, mask=keys < length, other=0)
                scores = _apply_mask(scores, queries[:, None], keys[None, :], end[None, :])
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            shift = m_new
            if masked:  # a query without any key so far: -inf minus -inf is not a number
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(scores - shift[:, None])
            alpha = tl.exp2(m_i - shift)
            l_i = l_i * alpha + tl.sum(p, 1)
            v_j = _tile(v, keys, stride_vt, length, head_dim, block_d, operand)
            acc = acc * alpha[:, None]
            acc = tl.dot(p.to(operand), v_j, acc, input_precision=precision)
            m_i = m_new
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # queries after the end of the row have no keys
    _store(out + row * stride_ob + head * stride_oh, queries, stride_ot, length, acc / l_i[:, None], head_dim, block_d)
    tl.store(lse + (row * heads + head) * length + queries, m_i + tl.log2(l_i), mask=queries < length)


@triton.jit
def _bwd_preprocess(
    out: tl.tensor, grad: tl.tensor, delta: tl.tensor, stride_ob: tl.tensor, stride_oh: tl.tensor, stride_ot: tl.tensor,
    stride_gb: tl.tensor, stride_gh: tl.tensor, stride_gt: tl.tensor, heads: tl.tensor, length: tl.tensor,
    head_dim: tl.constexpr, block_d: tl.constexpr, block_q: tl.constexpr,
) -> None:  # fmt: skip
    """Per query `delta`, the inner product of the output and its gradient."""
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    queries = tl.program_id(0) * block_q + tl.arange(0, block_q)
    o = _tile(out + row * stride_ob + head * stride_oh, queries, stride_ot, length, head_dim, block_d, tl.float32)
    g = _tile(grad + row * stride_gb + head * stride_gh, queries, stride_gt, length, head_dim, block_d, tl.float32)
    tl.store(delta + (row * heads + head) * length + queries, tl.sum(o * g, 1), mask=queries < length)


@triton.jit
def _bwd_dq(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad: tl.tensor, lse: tl.tensor, delta: tl.tensor, dq: tl.tensor,
    ends: tl.tensor, table: tl.tensor, stride_qb: tl.tensor, stride_qh: tl.tensor, stride_qt: tl.tensor,
    stride_kb: tl.tensor, stride_kh: tl.tensor, stride_kt: tl.tensor, stride_vb: tl.tensor, stride_vh: tl.tensor,
    stride_vt: tl.tensor, stride_gb: tl.tensor, stride_gh: tl.tensor, stride_gt: tl.tensor, stride_dqb: tl.tensor,
    stride_dqh: tl.tensor, stride_dqt: tl.tensor, stride_ends: tl.tensor, stride_table: tl.tensor, heads: tl.tensor,
    groups: tl.tensor, length: tl.tensor, scale: tl.tensor, factor: tl.tensor, head_dim: tl.constexpr,
    block_d: tl.constexpr, block_q: tl.constexpr, block_k: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of one block of queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    queries = block * block_q + tl.arange(0, block_q)
    table += (row * tl.num_programs(0) + block) * stride_table
    ends += row * stride_ends
    k += row * stride_kb + head // groups * stride_kh
    v += row * stride_vb + head // groups * stride_vh
    q_i = _tile(q + row * stride_qb + head * stride_qh, queries, stride_qt, length, head_dim, block_d, operand)
    g_i = _tile(grad + row * stride_gb + head * stride_gh, queries, stride_gt, length, head_dim, block_d, operand)
    place = (row * heads + head) * length + queries
    lse_i = tl.load(lse + place, mask=queries < length, other=0.0)
    delta_i = tl.load(delta + place, mask=queries < length, other=0.0)
    acc = tl.zeros((block_q, block_d), tl.float32)
    full_end, partial_end = tl.load(table), tl.load(table + 1)
    for masked in tl.static_range(2):  # full blocks, then partial blocks
        for j in range(full_end if masked else 2, partial_end if masked else full_end):
            keys = tl.load(table + j) * block_k + tl.arange(0, block_k)
            k_j = _tile(k, keys, stride_kt, length, head_dim, block_d, operand)
            v_j = _tile(v, keys, stride_vt, length, head_dim, block_d, operand)
            scores = tl.dot(q_i, tl.trans(k_j), input_precision=precision) * scale
            if masked:
                end = tl.load(ends + keys, mask=keys < length, other=0)
                scores = _apply_mask(scores, queries[:, None], keys[None, :], end[None, :])
            p = tl.exp2(scores - lse_i[:, None])
            dp = tl.dot(g_i, tl.trans(v_j), input_precision=precision)
            ds = p * (dp - delta_i[:, None])
            acc = tl.dot(ds.to(operand), k_j, acc, input_precision=precision)
    _store(dq + row * stride_dqb + head * stride_dqh, queries, stride_dqt, length, acc * factor, head_dim, block_d)


@triton.jit
def _bwd_dkdv(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad: tl.tensor, lse: tl.tensor, delta: tl.tensor, dk: tl.tensor,
    dv: tl.tensor, ends: tl.tensor, table: tl.tensor, stride_qb: tl.tensor, stride_qh: tl.tensor, stride_qt: tl.tensor,
    stride_kb: tl.tensor, stride_kh: tl.tensor, stride_kt: tl.tensor, stride_vb: tl.tensor, stride_vh: tl.tensor,
    stride_vt: tl.tensor, stride_gb: tl.tensor, stride_gh: tl.tensor, stride_gt: tl.tensor, stride_dkb: tl.tensor,
    stride_dkh: tl.tensor, stride_dkt: tl.tensor, stride_dvb: tl.tensor, stride_dvh: tl.tensor, stride_dvt: tl.tensor,
    stride_ends: tl.tensor, stride_table: tl.tensor, kv_heads: tl.tensor, groups: tl.tensor, length: tl.tensor,
    scale: tl.tensor, factor: tl.tensor, head_dim: tl.constexpr, block_d: tl.constexpr, block_q: tl.constexpr,
    block_k: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    """The gradients of one block of keys and values of one key head, summed over the query heads that share it.

    All matrices are keys x queries, so that no product needs a transposed operand from registers.
    """
    block = tl.program_id(0)  # the first blocks have most queries
    row, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    keys = block * block_k + tl.arange(0, block_k)
    table += (row * tl.num_programs(0) + block) * stride_table
    end = tl.load(ends + row * stride_ends + keys, mask=keys < length, other=0)
    k_j = _tile(k + row * stride_kb + kv_head * stride_kh, keys, stride_kt, length, head_dim, block_d, operand)
    v_j = _tile(v + row * stride_vb + kv_head * stride_vh, keys, stride_vt, length, head_dim, block_d, operand)
    dk_acc = tl.zeros((block_k, block_d), tl.float32)
    dv_acc = tl.zeros((block_k, block_d), tl.float32)
    full_end, partial_end = tl.load(table), tl.load(table + 1)
    for member in range(groups):
        head = kv_head * groups + member
        q_head_base, g_head_base = q + row * stride_qb + head * stride_qh, grad + row * stride_gb + head * stride_gh
        place = (row * kv_heads * groups + head) * length
        for masked in tl.static_range(2):
            for i in range(full_end if masked else 2, partial_end if masked else full_end):
                queries = tl.load(table + i) * block_q + tl.arange(0, block_q)
                q_i = _tile(q_head_base, queries, stride_qt, length, head_dim, block_d, operand)
                g_i = _tile(g_head_base, queries, stride_gt, length, head_dim, block_d, operand)
                # after the end of the row q and g are zeros, so that these queries add nothing
                lse_i = tl.load(lse + place + queries, mask=queries < length, other=0.0)
                delta_i = tl.load(delta + place + queries, mask=queries < length, other=0.0)
                scores = tl.dot(k_j, tl.trans(q_i), input_precision=precision) * scale
                if masked:
                    scores = _apply_mask(scores, queries[None, :], keys[:, None], end[:, None])
                p = tl.exp2(scores - lse_i[None, :])
                dv_acc = tl.dot(p.to(operand), g_i, dv_acc, input_precision=precision)
                dp = tl.dot(v_j, tl.trans(g_i), input_precision=precision)
                ds = p * (dp - delta_i[None, :])
                dk_acc = tl.dot(ds.to(operand), q_i, dk_acc, input_precision=precision)
    _store(dk + row * stride_dkb + kv_head * stride_dkh, keys, stride_dkt, length, dk_acc * factor, head_dim, block_d)
    _store(dv + row * stride_dvb + kv_head * stride_dvh, keys, stride_dvt, length, dv_acc, head_dim, block_d)


INTERPRETED: bool = not any(isinstance(f, triton.JITFunction) for f in (_fwd, tl.zeros))
"""Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1 before triton is first loaded)."""


def not_interpreted() -> str | None:
    """The reason why the kernels do not run on CPU tensors; None if they do."""
    if not INTERPRETED:
        return "TRITON_INTERPRET=1 was set after triton was loaded"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7):
        return f"the interpreter of triton {triton.__version__} fails at loops of computed length; 3.7 does not"
    return None


def _empty_token_major(like: torch.Tensor) -> torch.Tensor:
    """An empty (B, heads, T, head_dim), in memory (B, T, heads, head_dim): the layout that the next layer reads."""
    rows, heads, length, size = like.shape
    return like.new_empty(rows, length, heads, size).transpose(1, 2)


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    row, head, token, _ = x.stride()
    return row, head, token


def _table_strides(ends: torch.Tensor, table: torch.Tensor) -> tuple[int, int]:
    return ends.stride(0), table.stride(1)


def _constants(q: torch.Tensor) -> dict[str, Any]:
    head_dim = q.shape[-1]
    # the interpreter multiplies bf16 matrices wrongly, so its operands are fp32
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, table: torch.Tensor, table_q: torch.Tensor,
    table_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rows, heads, length, size = q.shape
    out, lse = _empty_token_major(q), q.new_empty(rows, heads, length, dtype=torch.float32)
    fwd_blocks = blocks(size, q.dtype)[0]
    with torch.cuda.device_of(q):  # Triton launches on the current GPU, wherever the tensors are
        _fwd[(table.shape[1], rows * heads)](
            q, k, v, out, lse, ends, table, *_strides(q), *_strides(k), *_strides(v), *_strides(out),
            *_table_strides(ends, table), heads, heads // k.shape[1], length, size**-0.5 * LOG2_E,
            **_constants(q), **fwd_blocks.options(),
        )  # fmt: skip
    return out, lse


@_attention.register_fake
def _attention_fake(q: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("llava_core::triton_attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    ends: torch.Tensor, table_q: torch.Tensor, table_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rows, heads, length, size = q.shape
    kv_heads = k.shape[1]
    scale, fixed = size**-0.5 * LOG2_E, _constants(q)
    dq, dk, dv = _empty_token_major(q), _empty_token_major(k), _empty_token_major(v)
    _, dq_blocks, dkdv_blocks = blocks(size, q.dtype)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        _bwd_preprocess[(triton.cdiv(length, 64), rows * heads)](
            out, grad, delta, *_strides(out), *_strides(grad), heads, length,
            head_dim=fixed["head_dim"], block_d=fixed["block_d"], block_q=64,
        )  # fmt: skip
        _bwd_dq[(table_q.shape[1], rows * heads)](
            q, k, v, grad, lse, delta, dq, ends, table_q, *_strides(q), *_strides(k), *_strides(v), *_strides(grad),
            *_strides(dq), *_table_strides(ends, table_q), heads, heads // kv_heads, length, scale, size**-0.5,
            **fixed, **dq_blocks.options(),
        )  # fmt: skip
        _bwd_dkdv[(table_k.shape[1], rows * kv_heads)](
            q, k, v, grad, lse, delta, dk, dv, ends, table_k, *_strides(q), *_strides(k), *_strides(v), *_strides(grad),
            *_strides(dk), *_strides(dv), *_table_strides(ends, table_k), kv_heads, heads // kv_heads, length, scale,
            size**-0.5, **fixed, **dkdv_blocks.options(),
        )  # fmt: skip
    return dq, dk, dv


@_attention_backward.register_fake
def _attention_backward_fake(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_token_major(q), _empty_token_major(k), _empty_token_major(v)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ends, _, table_q, table_k = inputs
    ctx.save_for_backward(q, k, v, *output, ends, table_q, table_k)


def _backward(ctx: Any, grad: torch.Tensor, lse_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = _attention_backward(_contiguous_features(grad), *ctx.saved_tensors)
    return (*gradients, None, None, None, None)


_attention.register_autograd(_backward, setup_context=_setup_context)


def _contiguous_features(x: torch.Tensor) -> torch.Tensor:
    """The last stride must be 1; the others are arguments of the kernels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def triton_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask | None = None
) -> torch.Tensor:
    """Causal attention of packed rows; see `llava_core.ops.attention`. The result is in memory (B, T, heads, head_dim).

    q is (B, heads, T, head_dim), k and v (B, kv_heads, T, head_dim), all in fp32, fp16 or bf16; head_dim up to 128.
    """
    packed_mask = causal_mask(q.shape[0], q.shape[2], q.device) if packed_mask is None else packed_mask.to(q.device)
    fwd, dq, dkdv = blocks(q.shape[3], q.dtype)
    tables = [packed_mask.cached(block_table, size.q, size.k, of) for size, of in ((fwd, "q"), (dq, "q"), (dkdv, "k"))]
    out: torch.Tensor
    out, _ = _attention(*(_contiguous_features(x) for x in (q, k, v)), packed_mask.ends, *tables)
    return out
