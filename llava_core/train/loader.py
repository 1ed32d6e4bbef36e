"""From sample indices to packed rows on the device: encoding, packing, images or cached features, prefetch."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_core.checkpoints.load import Loaded
from llava_core.config import RunConfig
from llava_core.constants import IGNORE_INDEX
from llava_core.data.feature_cache import FeatureCache
from llava_core.data.packing import PackedRow, pack
from llava_core.models.vision_tower import patch_features
from llava_core.ops.packed_mask import PackedMask
from llava_core.runtime import DataError, display_path, rank, resolve, world_size
from llava_core.train.dataset import TrainingSet
from llava_core.train.state import all_ranks

CACHED_LAYERS = (-2, -1)
"""Tower layers in the feature cache: one pass computes both, and the ablation of the feature layer needs the other."""

TOWER_BATCH = 32
FEATURES = "data/features"


@dataclass
class RowInputs:
    """The model's inputs for one packed row of T tokens.

    Attributes:
        input_ids, position_ids: (1, T) int64.
        packed_mask: attention mask of the row.
        logit_positions, targets: (M,) int64; see `Llava.packed_loss`.
        images: (N, P, D_vision) cached features of the row's distinct images, or their pixels (N, H, W, 3) uint8.
        image_index: (blocks,) index into `images` per image block.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    packed_mask: PackedMask
    logit_positions: torch.Tensor
    targets: torch.Tensor
    images: torch.Tensor | None
    image_index: torch.Tensor

    @classmethod
    def of(cls, row: PackedRow, images: torch.Tensor | None, image_index: Sequence[int]) -> RowInputs:
        """The inputs of a packed row, on the CPU."""
        input_ids, position_ids, logit_positions, targets = (
            torch.as_tensor(values, dtype=torch.long)
            for values in (row.input_ids, row.position_ids, row.logit_positions, row.targets)
        )
        return cls(
            input_ids[None], position_ids[None], PackedMask(torch.as_tensor(row.ends, dtype=torch.int32)[None]),
            logit_positions, targets, images, torch.tensor(image_index, dtype=torch.long),
        )  # fmt: skip


def padding_row() -> RowInputs:
    """A row of two tokens without targets: its loss and its gradients are 0."""
    ids, positions, ends, nothing = (np.array(values, dtype=np.int64) for values in ([0, 0], [0, 1], [2, 2], []))
    row = PackedRow(ids, positions, ends, nothing, nothing, images=[], samples=[])
    return RowInputs.of(row, None, [])


@dataclass
class StepBatch:
    """One rank's share of an optimizer step; `tokens` counts a shared prefix for each of its samples."""

    rows: list[RowInputs]
    supervised: int
    tokens: int
    samples: int


class Loader:
    """Batches of packed rows of up to `max_tokens`, with features of the cached layer of index `layer`.

    Without a cache of `features`, images are decoded and the tower runs at every use.
    """

    def __init__(
        self, data: TrainingSet, max_tokens: int, features: FeatureCache | None = None, layer: int = 0
    ) -> None:
        self.data, self.max_tokens, self.features, self.layer = data, max_tokens, features, layer

    def batch(self, indices: Sequence[int]) -> StepBatch:
        items = [self.data.encoded(k) for k in indices]
        images = [self.data.samples[k].image for k in indices]
        return StepBatch(
            [self._row_inputs(row) for row in pack(items, images, self.max_tokens)],
            supervised=sum(label != IGNORE_INDEX for item in items for label in item.labels[1:]),
            tokens=sum(len(item.input_ids) for item in items),
            samples=len(items),
        )

    def prefetch(self, steps: Iterable[Sequence[int]]) -> Iterator[tuple[StepBatch, float]]:
        """The batch of each step and the seconds spent waiting for it; a thread prepares the next one meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            pending: Future[StepBatch] | None = None
            for indices in steps:
                following = pool.submit(self.batch, indices)
                if pending is not None:
                    yield _wait(pending)
                pending = following
            if pending is not None:
                yield _wait(pending)

    def _row_inputs(self, row: PackedRow) -> RowInputs:
        index = {key: k for k, key in enumerate(dict.fromkeys(row.images))}
        return RowInputs.of(row, self._images(list(index)), [index[key] for key in row.images])

    def _images(self, keys: Sequence[Hashable]) -> torch.Tensor | None:
        paths = [Path(str(key)) for key in keys]
        if not paths:
            return None
        if self.features is not None:
            return self.features.get(paths, self.layer)
        return torch.from_numpy(np.stack([self.data.pixels(path) for path in paths]))


def _wait(pending: Future[StepBatch]) -> tuple[StepBatch, float]:
    begin = time.monotonic()
    return pending.result(), time.monotonic() - begin


def open_features(
    loaded: Loaded, config: RunConfig, train_set: TrainingSet, held_out: TrainingSet, device: torch.device
) -> FeatureCache | None:
    """Open the feature cache and compute the features that it lacks.

    None, with the tower run at every use of an image: no image is used twice (over epochs, samples or seeds), the
    feature layer is none of `CACHED_LAYERS`, or, with a printed reason, the disk has not enough space.
    """
    tower, processor = loaded.model.vision_tower, loaded.processor
    if loaded.model.feature_layer not in CACHED_LAYERS:
        return None
    uses = [s.image for data in (train_set, held_out) for s in data.samples if s.image is not None]
    images = list(dict.fromkeys(uses))
    repeats = config.experiment.train.epochs > 1 or len(uses) > len(images) or len(config.scale.seeds) > 1
    if not images or not repeats:
        return None
    dtype = next(tower.parameters()).dtype
    facts = {
        "tower": tower_hash(tower), "layers": CACHED_LAYERS, "dtype": str(dtype), "preprocessing": processor.to_dict(),
    }  # fmt: skip
    shape = (len(CACHED_LAYERS), loaded.model.n_image_tokens, tower.config.hidden_size)
    cache = FeatureCache(resolve(FEATURES), facts, shape, dtype)
    # one decision: the ranks' disks may differ, and one of them may be filling this one already
    reasons = all_ranks(cache.disk_shortage(len(cache.missing(images))))
    if (reason := next(filter(None, reasons), None)) is not None:
        sys.stderr.write(f"images go through the tower at every use: {reason}\n")
        return None

    def compute(paths: Sequence[Path]) -> torch.Tensor:
        parts = []
        for begin in range(0, len(paths), TOWER_BATCH):
            pixels = np.stack([train_set.pixels(path) for path in paths[begin : begin + TOWER_BATCH]])
            values = torch.from_numpy(processor.normalise(pixels)).to(device)
            parts.append(torch.stack(patch_features(tower, values, CACHED_LAYERS), 1).cpu())
        return torch.cat(parts)  # (N, layers, P, D_vision)

    cache.fill(images[rank() :: world_size()], compute)
    if world_size() > 1:
        torch.distributed.barrier()
        cache = FeatureCache(resolve(FEATURES), facts, shape, dtype)  # now with the features of the other ranks
        if missing := cache.missing(images):
            raise DataError(
                f"{display_path(cache.folder)}: no features of {len(missing)} images, the first is {missing[0]}; "
                "fix: put the repository on a file system that all nodes share"
            )
    return cache


def tower_hash(tower: Any) -> str:
    """SHA-256 of names and values of a tower's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
