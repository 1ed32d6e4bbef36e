"""The kernel's work on paper: counted blocks against the mask's definition, products and bytes by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention import Case, instruct_cases
from benchmarks.attention_cost import bench_attention_cost, count, needed_blocks, roofline_ms
from llava_core.ops import PackedMask
from llava_core.ops.block_mask import EMPTY, block_states

pytest.importorskip("triton")
CASES = instruct_cases(700, rows=2, scale=0.3)[1:]


@pytest.mark.parametrize("sizes", [(128, 64), (64, 64), (64, 32), (32, 64), (16, 16)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_needed_block_is_skipped(case: Case, sizes: tuple[int, int]) -> None:
    assert case.packed_mask is not None
    visited = block_states(case.packed_mask, *sizes) != EMPTY
    assert not (needed_blocks(case.packed_mask, *sizes) & ~visited).any()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_computed_block_is_needed(case: Case, head_dim: int) -> None:
    for row in count(case, 2, 2, head_dim, torch.bfloat16):
        assert row["unneeded"] == 0


def test_counts_of_two_samples_by_hand() -> None:
    mask = PackedMask(torch.tensor([[128] * 128 + [256] * 128], dtype=torch.int32))
    forward, dq, dkdv = count(Case("two", mask, 1, 256), 4, 2, 64, torch.bfloat16)
    # blocks of 128 x 64: each sample has one block of queries and two of keys, none of them full
    assert [forward[name] for name in ("full", "partial", "empty", "unneeded")] == [0, 4, 4, 0]
    pairs = 4 * 128 * 64
    assert forward["computed"] == pytest.approx(pairs / (2 * 128 * 129 / 2))
    assert forward["gflop"] == pytest.approx(2 * 2 * pairs * 64 * 4 / 1e9)
    assert forward["mb"] == pytest.approx(2 * 256 * 64 * (2 * 4 + 2 * 2) / 1e6)
    # blocks of 64 x 64: per sample one full and two on the diagonal
    assert [dq[name] for name in ("full", "partial", "empty")] == [2, 4, 10]
    assert dkdv["gflop"] / dq["gflop"] == pytest.approx(4 / 3)


def test_roofline_is_the_larger_of_products_and_bytes() -> None:
    assert roofline_ms(312.0, 0.0, "A100-80") == pytest.approx(1)
    assert roofline_ms(0.0, 2039.0, "A100-80") == pytest.approx(1)
    assert roofline_ms(989.0, 48000.0, "H200") == pytest.approx(10)


def test_rows_of_the_benchmark() -> None:
    rows = bench_attention_cost(("64",), length=1536, rows=1)["cases"]
    assert len(rows) == 9
    packed, shared = (next(r for r in rows if r["case"] == c) for c in ("packed", "packed, shared prefixes"))
    causal = rows[0]
    assert packed["gflop"] < causal["gflop"]
    assert shared["full"] + shared["partial"] + shared["empty"] == causal["full"] + causal["partial"] + causal["empty"]
