"""Which blocks have anything to do with each other: exactly what the definition says, for any forest."""

from __future__ import annotations

import pytest
import torch
from packed_rows import forest
from torch.nn import functional as F

from llava_core.ops import Segments
from llava_core.ops.block_mask import one_sample, states, visits
from llava_core.ops.reference import allowed

CUTS = [(16, 16), (8, 32), (32, 8), (4, 4), (64, 64)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("seed", range(12))
def test_a_pair_of_blocks_is_what_its_pairs_of_tokens_are(seed: int, cut: tuple[int, int]) -> None:
    segments, (block_q, block_k) = forest(seed), cut
    seen = allowed(75, segments, torch.device("cpu"))[0, 0]
    found = states(segments, block_q, block_k)[0]
    for i, row in enumerate(found.tolist()):
        for j, state in enumerate(row):
            pairs = seen[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            whole = bool(pairs.all()) and pairs.shape[1] == block_k
            assert state == (0 if whole else 1 if bool(pairs.any()) else 2)


@pytest.mark.parametrize("of", ["q", "k"])
@pytest.mark.parametrize("seed", range(4))
def test_visits_list_each_block_once_and_those_without_a_mask_first(seed: int, of: str) -> None:
    segments = forest(seed)
    found = states(segments, 16, 8)[0]
    found = found if of == "q" else found.T
    for row, kinds in zip(segments.plan(visits, 16, 8, of)[0].tolist(), found.tolist(), strict=True):
        free, stop, *blocks = row
        assert sorted(blocks) == list(range(len(kinds)))
        assert [kinds[b] for b in blocks] == [0] * (free - 2) + [1] * (stop - free) + [2] * (len(kinds) + 2 - stop)


def test_visits_are_worked_out_once_for_all_layers() -> None:
    segments = forest(1)
    assert segments.plan(visits, 16, 16, "q") is segments.plan(visits, 16, 16, "q")
    assert one_sample(2, 9, torch.device("cpu")) is one_sample(2, 9, torch.device("cpu"))
    assert segments.to("cpu") is segments
    assert segments.to("meta") is segments.to("meta")


def test_most_of_a_packed_row_is_not_visited() -> None:
    segments = Segments.of([[64] * 8])
    assert int((states(segments, 32, 32) < 2).sum()) == 8 * 3
    assert F.one_hot(states(segments, 64, 64)[0]).sum((0, 1)).tolist() == [0, 8, 56]
