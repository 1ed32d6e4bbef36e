"""Block states of packed masks equal those of the dense mask, for random rows."""

from __future__ import annotations

import pytest
import torch
from packed_rows import random_row
from torch.nn import functional as F

from llava_core.ops import PackedMask
from llava_core.ops.block_mask import EMPTY, FULL, PARTIAL, block_states, block_table, causal_mask
from llava_core.ops.reference import dense_mask

BLOCK_SIZES = [(16, 16), (8, 32), (32, 8), (4, 4), (64, 64)]


@pytest.mark.parametrize("blocks", BLOCK_SIZES)
@pytest.mark.parametrize("seed", range(12))
def test_block_states_equal_dense_mask(seed: int, blocks: tuple[int, int]) -> None:
    packed_mask, (block_q, block_k) = random_row(seed), blocks
    seen = dense_mask(75, packed_mask, torch.device("cpu"))[0, 0]
    actual = block_states(packed_mask, block_q, block_k)[0]
    for i, row in enumerate(actual.tolist()):
        for j, state in enumerate(row):
            pairs = seen[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            full = bool(pairs.all()) and pairs.shape[1] == block_k
            assert state == (FULL if full else PARTIAL if bool(pairs.any()) else EMPTY)


@pytest.mark.parametrize("of", ["q", "k"])
@pytest.mark.parametrize("seed", range(4))
def test_block_table_lists_each_block_once_full_first(seed: int, of: str) -> None:
    packed_mask = random_row(seed)
    actual = block_states(packed_mask, 16, 8)[0]
    actual = actual if of == "q" else actual.T
    for row, kinds in zip(packed_mask.cached(block_table, 16, 8, of)[0].tolist(), actual.tolist(), strict=True):
        full_end, partial_end, *indices = row
        assert sorted(indices) == list(range(len(kinds)))
        assert [kinds[b] for b in indices] == (
            [FULL] * (full_end - 2) + [PARTIAL] * (partial_end - full_end) + [EMPTY] * (len(kinds) + 2 - partial_end)
        )


def test_block_table_is_computed_once_for_all_layers() -> None:
    packed_mask = random_row(1)
    assert packed_mask.cached(block_table, 16, 16, "q") is packed_mask.cached(block_table, 16, 16, "q")
    assert causal_mask(2, 9, torch.device("cpu")) is causal_mask(2, 9, torch.device("cpu"))
    assert packed_mask.to("cpu") is packed_mask
    assert packed_mask.to("meta") is packed_mask.to("meta")


def test_most_blocks_of_a_packed_row_are_empty() -> None:
    packed_mask = PackedMask.from_lengths([[64] * 8])
    assert int((block_states(packed_mask, 32, 32) != EMPTY).sum()) == 8 * 3
    assert F.one_hot(block_states(packed_mask, 64, 64)[0]).sum((0, 1)).tolist() == [0, 8, 56]
