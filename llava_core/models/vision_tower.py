"""The frozen vision tower: transformers' CLIPVisionModel, read at one of its layers."""

from __future__ import annotations

from typing import Any

import torch


def image_token_count(tower: Any) -> int:
    """Visual tokens of one image: the patches, without the class token (256 for 224 px and patch 14)."""
    config = tower.config
    return int(config.image_size // config.patch_size) ** 2


@torch.no_grad()
def image_features(tower: Any, pixel_values: torch.Tensor, feature_layer: int = -2) -> torch.Tensor:
    """Grid features before (-2) or after (-1) the last transformer layer, class token dropped.

    Args:
        tower: CLIPVisionModel in eval mode; never trained, so no graph is kept.
        pixel_values: (N, 3, H, W), already normalised.
        feature_layer: index into the tower's hidden states; neither -2 nor -1 passes the post-layernorm.

    Returns:
        Patch features (N, P, D_vision).

    Source:
        Paper 4.1 and 5.2; `hidden_states[layer][:, 1:]` in llava/model/llava.py at 7c63df1.
    """
    output = tower(pixel_values=pixel_values.to(tower.dtype), output_hidden_states=True)
    features: torch.Tensor = output.hidden_states[feature_layer][:, 1:]
    return features
