"""A padded batch, as other trainers have it; this project's trainer packs rows (`llava_core.train.loader`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from llava_core.constants import IGNORE_INDEX
from llava_core.train.dataset import Item, Normalise


@dataclass
class PaddedBatch:
    """Padded tensors of some samples: ids, labels, mask (B, T) and pixel values (N, 3, H, W) or None."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor | None

    def to(self, device: torch.device) -> PaddedBatch:
        pixels = None if self.pixel_values is None else self.pixel_values.to(device)
        return PaddedBatch(self.input_ids.to(device), self.labels.to(device), self.attention_mask.to(device), pixels)


def collate(items: Sequence[Item], normalise: Normalise) -> PaddedBatch:
    """Pad samples on the right and normalise their pixels."""
    ids = [torch.tensor(encoded.input_ids) for encoded, _ in items]
    labels = [torch.tensor(encoded.labels) for encoded, _ in items]
    pixels = [p for _, p in items if p is not None]
    return PaddedBatch(
        pad_sequence(ids, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        torch.from_numpy(normalise(np.stack(pixels))) if pixels else None,
    )
