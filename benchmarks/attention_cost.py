"""Blocks, products and bytes of the Triton kernel, counted from the mask, and a roofline per GPU.

Nothing is run. A count follows from the mask and the kernel's block sizes; a time is the larger of products at the
GPU's peak and bytes at its bandwidth, which no kernel reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.attention import HEADS, Case, Shape, instruct_cases
from benchmarks.common import circumstances
from companion.planner import FACTS
from llava_core.ops.block_mask import EMPTY, FULL, block_states, causal_mask
from llava_core.ops.packed_mask import PackedMask
from llava_core.ops.reference import dense_mask
from llava_core.ops.triton_attention import blocks

GPUS = {"A100-80": 2039, "H100-80": 3350, "H200": 4800}
"""GPU of companion/planner.yaml, which has its peak -> memory bandwidth in GB/s, from the data sheets (SXM)."""

PRODUCTS = {"forward": 2, "backward dq": 3, "backward dk, dv": 4}
"""Products of a block of queries with a block of keys in each kernel; the backward kernels compute scores again."""

# tensors that a kernel reads or writes once, if the cache holds them between blocks: per query head, per key head
TENSORS = {"forward": (2, 2), "backward dq": (3, 2), "backward dk, dv": (2, 4)}  # (q, out), (q, grad, dq), (q, grad)


def needed_blocks(packed_mask: PackedMask, block_q: int, block_k: int) -> torch.Tensor:
    """Whether any query of a block attends to any key of a block, by the definition of the mask: (B, blocks, blocks).

    Args:
        packed_mask: of (B, T) rows.
        block_q, block_k: positions of a block.
    """
    length = packed_mask.ends.shape[1]
    dense = dense_mask(length, packed_mask, torch.device("cpu"))[:, 0]  # (B, T, T)
    padded = torch.zeros(len(dense), -(-length // block_q) * block_q, -(-length // block_k) * block_k, dtype=torch.bool)
    padded[:, :length, :length] = dense
    return padded.unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q)).any(4).any(2)


def count(case: Case, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Count blocks, products and bytes of each kernel on the rows of a case: one dict per kernel.

    Args:
        case: packed rows; without a mask, plain causal ones.
        heads, kv_heads, head_dim: of the attention.
        dtype: of q, k and v; it decides the block sizes.

    Returns:
        `full`, `partial`, `empty`: blocks of one head; `unneeded`: partial blocks in which no query attends to a key;
        `computed`: pairs of positions that are computed per pair that is needed; `gflop`; `mb`: each tensor moved once.
    """
    mask = case.packed_mask or causal_mask(case.rows, case.length, torch.device("cpu"))
    needed = int(dense_mask(case.length, mask, torch.device("cpu")).sum())
    rows = []
    for (kernel, products), size in zip(PRODUCTS.items(), blocks(head_dim, dtype), strict=True):
        states = block_states(mask, size.q, size.k)
        visited = states != EMPTY
        pairs = int(visited.sum()) * size.q * size.k
        per_head, per_kv_head = TENSORS[kernel]
        values = case.rows * case.length * head_dim * (per_head * heads + per_kv_head * kv_heads)
        rows.append(
            {
                "kernel": kernel, "block_q": size.q, "block_k": size.k,
                "full": int((states == FULL).sum()), "partial": int((visited & (states != FULL)).sum()),
                "empty": int((states == EMPTY).sum()),
                "unneeded": int((visited & ~needed_blocks(mask, size.q, size.k)).sum()),
                "computed": pairs / needed, "gflop": 2 * products * pairs * head_dim * heads / 1e9,
                "mb": values * dtype.itemsize / 1e6,
            }
        )  # fmt: skip
    return rows


def roofline_ms(gflop: float, mb: float, gpu: str) -> float:
    """Return the shortest time in milliseconds at the peak and the bandwidth of a GPU."""
    return max(gflop / FACTS["gpus"][gpu]["tflops"], mb / GPUS[gpu])


def bench_attention_cost(
    shapes: Sequence[Shape] = ("vicuna-7b", "llama-3.2-1b"), length: int = 2048, rows: int = 8
) -> dict[str, Any]:
    """Count what the Triton kernel computes on rows like LLaVA-Instruct's in bf16; nothing is run.

    Args:
        shapes: names of `HEADS`.
        length: tokens of a row.
        rows: of the batch.

    Returns:
        `cases`: a row per shape, case and kernel, with the milliseconds of the roofline on each GPU.
    """
    cases = []
    for shape in shapes:
        heads, kv_heads, head_dim = HEADS[shape]
        for case in instruct_cases(length, rows):
            for row in count(case, heads, kv_heads, head_dim, torch.bfloat16):
                bounds = {f"{gpu} (ms)": round(roofline_ms(row["gflop"], row["mb"], gpu), 4) for gpu in GPUS}
                row |= {name: round(row[name], 3) for name in ("computed", "gflop", "mb")}
                given = {"case": case.name, "shape": shape, "rows": rows, "length": length}
                cases.append({**given, **row, **bounds, **circumstances(torch.device("cpu"))})
    return {"cases": cases}
