"""The order of the samples: which of them each rank takes in each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llava_core.config import TrainConfig
from llava_core.data.instruct import Sample
from llava_core.train.dataset import steps_of


class BatchOrder:
    """Batches of sample indices. They depend on seed and epoch only, so a run can resume at any step."""

    def __init__(self, samples: Sequence[Sample], config: TrainConfig, rank: int, world: int) -> None:
        self.samples, self.config, self.rank, self.world = samples, config, rank, world
        self.steps = steps_of(len(samples), config)
        self.steps_per_epoch = self.steps // config.epochs
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))  # the cached epoch and its order

    def indices(self, step: int) -> list[int]:
        """This rank's samples of an optimizer step; the last batch of an epoch may be smaller."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        batch = self._epoch[1][k * self.config.global_batch : (k + 1) * self.config.global_batch]
        return [int(i) for i in np.array_split(batch, self.world)[self.rank]]

    def after(self, step: int) -> Iterator[list[int]]:
        """This rank's samples of each step from `step` to the last one."""
        return (self.indices(k) for k in range(step, self.steps))

    def seed(self, step: int) -> int:
        """The seed of what this rank draws in a step (dropout of adapters), so that a resumed run draws the same."""
        return int(np.random.default_rng((self.config.seed, step, self.rank)).integers(2**63))

    def _shuffled(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.samples))
        if self.config.order == "samples":
            return order
        # samples of one image follow the first of them; samples without an image keep their position
        first: dict[Any, int] = {}
        positions = []
        for position, k in enumerate(order):
            image = self.samples[k].image
            positions.append(position if image is None else first.setdefault(image, position))
        return order[np.argsort(positions, kind="stable")]
