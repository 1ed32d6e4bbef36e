"""From sample numbers to packed rows with what their images need, one step ahead of the trainer."""

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

from llava_core.checkpoints.checkpoint import Loaded
from llava_core.config import RunConfig
from llava_core.constants import IGNORE_INDEX
from llava_core.data.feature_cache import FeatureCache
from llava_core.data.packing import PackedRow, pack
from llava_core.models.llava import Llava
from llava_core.ops.packed_mask import Segments
from llava_core.runtime import rank, resolve, world_size
from llava_core.train.dataset import Normalise, TrainingSet

LAYERS = (-2, -1)
"""Layers of the tower whose features are kept: one pass gives both, and the ablation of the layer needs the other."""

TOWER_BATCH = 32
FEATURES = "data/features"


@dataclass
class RowBatch:
    """A packed row and its images.

    Attributes:
        row: see `llava_core.data.packing.PackedRow`.
        images: (N, P, D) features of the row's different images from the cache, or their pixels uint8 (N, H, W, 3).
        blocks: (blocks,) which of `images` stands in each image block of the row.
    """

    row: PackedRow
    images: torch.Tensor | None
    blocks: torch.Tensor


@dataclass
class Batch:
    """An optimizer step's share of one rank.

    Attributes:
        rows: the packed rows.
        supervised: supervised tokens of the samples.
        tokens: tokens of the samples, as each would have them alone.
        samples: how many there are.
    """

    rows: list[RowBatch]
    supervised: int
    tokens: int
    samples: int


class Batches:
    """Makes batches of a training set.

    Args:
        data: the samples.
        capacity: most tokens of a row.
        features: the tower's features, kept; None: images are decoded and go through the tower at every use.
        layer: which of the layers kept.
        share: compute common beginnings of samples once.
    """

    def __init__(
        self,
        data: TrainingSet,
        capacity: int,
        features: FeatureCache | None = None,
        layer: int = 0,
        share: bool = True,
    ) -> None:
        self.data, self.capacity, self.features, self.layer, self.share = data, capacity, features, layer, share

    def make(self, numbers: Sequence[int]) -> Batch:
        """The batch of some samples."""
        items = [self.data.encoded(k) for k in numbers]
        images = [self.data.samples[k].image for k in numbers]
        rows = pack(items, images, self.capacity, self.share)
        return Batch(
            [self._with_images(row) for row in rows],
            supervised=sum(label != IGNORE_INDEX for item in items for label in item.labels[1:]),
            tokens=sum(len(item.input_ids) for item in items),
            samples=len(items),
        )

    def _with_images(self, row: PackedRow) -> RowBatch:
        different = list(dict.fromkeys(row.images))
        place = {key: k for k, key in enumerate(different)}
        return RowBatch(row, self._images(different), torch.tensor([place[key] for key in row.images]))

    def _images(self, keys: Sequence[Hashable]) -> torch.Tensor | None:
        paths = [Path(str(key)) for key in keys]
        if not paths:
            return None
        if self.features is not None:
            return self.features.get(paths, self.layer)
        return torch.from_numpy(np.stack([self.data.pixels(path) for path in paths]))

    def ahead(self, steps: Iterable[Sequence[int]]) -> Iterator[tuple[Batch, float]]:
        """Give the batch of each step, and the seconds that the caller waited for it; the next one is being made."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            coming: Future[Batch] | None = None
            for numbers in steps:
                following = pool.submit(self.make, numbers)
                if coming is not None:
                    yield _await(coming)
                coming = following
            if coming is not None:
                yield _await(coming)


def _await(coming: Future[Batch]) -> tuple[Batch, float]:
    begin = time.monotonic()
    return coming.result(), time.monotonic() - begin


def row_loss(model: Llava, batch: RowBatch, normalise: Normalise, device: torch.device) -> torch.Tensor:
    """Loss of a row, summed over its supervised tokens; call it inside `packed_attention`."""

    def tensor(numbers: Any) -> torch.Tensor:
        return torch.as_tensor(numbers, dtype=torch.long).to(device, non_blocking=True)

    row, features = batch.row, batch.images
    if features is not None:
        if features.dtype == torch.uint8:
            pixels = torch.from_numpy(normalise(features.numpy())).to(device)
            features = model.tower_features(pixels)
        features = features.to(device, non_blocking=True)
        if len(batch.blocks) != len(features):  # an image that stands in several blocks
            features = features.index_select(0, batch.blocks.to(device))
    ends = torch.as_tensor(row.ends, dtype=torch.int32)[None]
    return model.packed_loss(
        tensor(row.input_ids)[None], tensor(row.position_ids)[None], Segments(ends).to(device),
        tensor(row.sources), tensor(row.targets), features,
    )  # fmt: skip


def open_features(
    loaded: Loaded, config: RunConfig, train_set: TrainingSet, held_out: TrainingSet, device: torch.device
) -> FeatureCache | None:
    """The features of a run's images, computed where they are missing; None where keeping them does not pay.

    It pays where images repeat: over epochs, over samples of one image, or over runs with other seeds. Where the disk
    has no room for them the reason is printed, and every use of an image runs the tower.
    """
    tower, processor = loaded.model.vision_tower, loaded.processor
    if loaded.model.feature_layer not in LAYERS:
        return None
    samples = [s for data in (train_set, held_out) for s in data.samples if s.image is not None]
    images = list(dict.fromkeys(s.image for s in samples if s.image is not None))
    repeats = config.experiment.train.epochs > 1 or len(samples) > len(images) or len(config.scale.seeds) > 1
    if not images or not repeats:
        return None
    dtype = next(tower.parameters()).dtype
    facts = {
        "tower": tower_hash(tower), "layers": LAYERS, "dtype": str(dtype), "preprocessing": processor.to_dict(),
    }  # fmt: skip
    shape = (len(LAYERS), loaded.model.n_image_tokens, tower.config.hidden_size)
    cache = FeatureCache(resolve(FEATURES), facts, shape, dtype)
    if (reason := cache.room(len(cache.missing(images)))) is not None:
        sys.stderr.write(f"images go through the tower at every use: {reason}\n")
        return None

    @torch.no_grad()
    def compute(paths: Sequence[Path]) -> torch.Tensor:
        parts = []
        for begin in range(0, len(paths), TOWER_BATCH):
            pixels = np.stack([train_set.pixels(path) for path in paths[begin : begin + TOWER_BATCH]])
            values = torch.from_numpy(processor.normalise(pixels)).to(device, dtype)
            hidden = tower(pixel_values=values, output_hidden_states=True).hidden_states
            parts.append(torch.stack([hidden[layer][:, 1:] for layer in LAYERS], 1).cpu())
        return torch.cat(parts)

    cache.fill(images[rank() :: world_size()], compute)
    if world_size() > 1:
        torch.distributed.barrier()
        cache = FeatureCache(resolve(FEATURES), facts, shape, dtype)  # with what the other ranks have made
    return cache


def tower_hash(tower: Any) -> str:
    """SHA-256 over names and values of a tower's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
