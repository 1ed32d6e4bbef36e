"""The frozen vision tower: transformers' CLIPVisionModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def image_token_count(tower: Any) -> int:
    """Visual tokens per image: its patches, without the class token (256 for 224 px and patch 14)."""
    config = tower.config
    return int(config.image_size // config.patch_size) ** 2


@torch.no_grad()
def patch_features(tower: Any, pixel_values: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
    """Patch features (N, P, D_vision) per layer, without the class token, of normalised images (N, 3, H, W).

    `layers` are indices into the tower's hidden states: -2 before the last transformer layer, -1 after it. Neither
    passes the post-layernorm.

    Source: Paper 4.1 and 5.2; `hidden_states[layer][:, 1:]` in llava/model/llava.py at 7c63df1.
    """
    hidden_states = tower(pixel_values=pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
    return [hidden_states[layer][:, 1:] for layer in layers]  # drop the class token
