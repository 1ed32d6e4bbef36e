from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest

from llava_core.config import load_experiment
from llava_core.train.order import BatchOrder


@pytest.mark.parametrize("ranks", [1, 2])
def test_epoch_shuffles_samples_or_images(ranks: int) -> None:
    images = ["a", "b", "c", None, "a", "d", None, "b", "a", "e", "f", "c"]

    samples = [SimpleNamespace(image=image) for image in images]

    def order(name: str, seed: int = 0) -> list[list[int]]:
        config = load_experiment("pretrain", "mini", {"train.order": name, "train.seed": seed, "train.global_batch": 4})
        shares = [list(BatchOrder(samples, config.experiment.train, rank, ranks).after(0)) for rank in range(ranks)]
        return [[k for share in shares for k in share[step]] for step in range(3)]

    for name in ("samples", "images"):
        steps = order(name)
        assert [len(step) for step in steps] == [4, 4, 4]
        assert sorted(k for step in steps for k in step) == list(range(12))
        assert order(name, 1) != steps == order(name)
    together = [images[k] for step in order("images") for k in step]
    changes = sum(a != b or a is None for a, b in pairwise(together))
    assert changes == len({*images} - {None}) + images.count(None) - 1
    assert together != [images[k] for step in order("samples") for k in step]
