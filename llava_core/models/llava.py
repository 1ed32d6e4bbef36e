"""LLaVA, as in the paper's Figure 1: a vision tower, a projector and a causal language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.models.projector import PROJECTORS
from llava_core.models.vision_tower import image_token_count, patch_features
from llava_core.ops.linear_cross_entropy import linear_cross_entropy
from llava_core.ops.packed_mask import PackedMask

TRAINABLE = {"projector": "multi_modal_projector", "language_model": "language_model"}


class Llava(nn.Module):
    """LLaVA: transformers' CLIPVisionModel (frozen, in eval mode), a projector and a causal language model.

    `feature_layer` is the hidden state of the tower that is projected (-2: before its last layer).
    """

    def __init__(
        self, vision_tower: Any, language_model: Any, projector: str = "linear", feature_layer: int = -2
    ) -> None:
        super().__init__()
        d_vision, d_model = vision_tower.config.hidden_size, language_model.config.hidden_size
        self.vision_tower = vision_tower.eval().requires_grad_(False)
        self.multi_modal_projector = PROJECTORS.get(projector)(d_vision, d_model)
        self.language_model = language_model
        self.projector_name, self.feature_layer = projector, feature_layer

    @property
    def n_image_tokens(self) -> int:
        """Visual tokens per image, P."""
        return image_token_count(self.vision_tower)

    def set_trainable(self, parts: Iterable[str]) -> list[str]:
        """Freeze all parameters but those of `parts`, keys of `TRAINABLE`; returns the names of the trainable ones."""
        self.requires_grad_(False)
        for part in parts:
            getattr(self, TRAINABLE[part]).requires_grad_(True)
        return [name for name, p in self.named_parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> Llava:
        """Training mode for projector and language model; the tower stays in eval mode."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    def tower_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch features (N, P, D_vision) of images (N, 3, H, W), without a graph."""
        (features,) = patch_features(self.vision_tower, pixel_values, [self.feature_layer])
        return features

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Patch features (N, P, D_vision) as visual tokens (N, P, D), in the projector's dtype."""
        dtype = next(self.multi_modal_projector.parameters()).dtype
        visual_tokens: torch.Tensor = self.multi_modal_projector(features.to(dtype))
        return visual_tokens

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Visual tokens (N, P, D) of images (N, 3, H, W)."""
        return self.project(self.tower_features(pixel_values))

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Word embeddings (B, T, D), with visual tokens in place of the image blocks.

        Args:
            input_ids: (B, T); each image is a block of `n_image_tokens` times `IMAGE_TOKEN_ID`.
            pixel_values: (N, 3, H, W), the images in the order of their blocks; None without images.
            image_features: (N, P, D), an earlier result of `encode_images`, instead of `pixel_values`.

        Raises:
            ValueError: the number of image tokens differs from the number of visual tokens, or images are given twice.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("pixel_values and image_features are two forms of the same images; fix: give one of them")
        is_image = input_ids == IMAGE_TOKEN_ID  # (B, T)
        n_images = next((len(images) for images in (pixel_values, image_features) if images is not None), 0)
        n_expected = n_images * self.n_image_tokens
        if int(is_image.sum()) != n_expected:
            raise ValueError(
                f"{int(is_image.sum())} image tokens in the text but {n_expected} image features; "
                "fix: one <image> per image, and never truncate inside an image block"
            )
        embeds: torch.Tensor = self.language_model.get_input_embeddings()(input_ids.clamp(min=0))  # (B, T, D)
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values)  # (N, P, D)
        if image_features is None:
            return embeds
        return embeds.masked_scatter(is_image[..., None], image_features.to(embeds.dtype))

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output, with logits (B, T, V), for a padded batch; training uses `packed_loss`.

        Args:
            input_ids: (B, T) with image blocks.
            pixel_values: (N, 3, H, W) or None.
            attention_mask: (B, T), 1 for tokens and 0 for padding; None without padding.
            position_ids: (B, T); the language model counts them from the mask if None.
            image_features: (N, P, D) from `encode_images`, instead of `pixel_values`.
        """
        # 1. Vision tower and projector: pixels (N, 3, H, W) -> visual tokens (N, P, D).
        # 2. Word embeddings (B, T, D), with the visual tokens in place of the image blocks.
        embeds = self.embed(input_ids, pixel_values, image_features)
        # 3. Language model: (B, T, D) -> logits (B, T, V).
        return self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def packed_loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        packed_mask: PackedMask,
        logit_positions: torch.Tensor,
        targets: torch.Tensor,
        tower_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy of packed rows, summed over the supervised tokens: a scalar in fp32.

        The language model must run inside `llava_core.ops.transformers_backend.packed_attention`. The caller divides
        by the number of supervised tokens of the global batch.

        Args:
            input_ids: (B, T) with image blocks.
            position_ids: (B, T), the position of each token in its sample.
            packed_mask: attention mask of the rows.
            logit_positions: (M,) indices into the B x T positions whose logits are supervised.
            targets: (M,) token ids.
            tower_features: (N, P, D_vision) from `tower_features`, one per image block; None without images.
        """
        # 1. Projector: patch features (N, P, D_vision) -> visual tokens (N, P, D). Without images it runs on zeros:
        #    ranks that share sharded weights must all gather them, in the same order.
        no_image = tower_features is None
        if tower_features is None:
            tower_features = torch.zeros(1, 1, self.vision_tower.config.hidden_size, device=input_ids.device)
        image_features = self.project(tower_features)
        # 2. Word embeddings (B, T, D), with the visual tokens in place of the image blocks.
        embeds = self.embed(input_ids, image_features=None if no_image else image_features)
        if no_image:
            embeds = embeds + 0 * image_features.sum().to(embeds.dtype)
        # 3. Decoder layers: attention stays within each sample.
        hidden = self.language_model.get_decoder()(
            inputs_embeds=embeds, position_ids=position_ids, packed_mask=packed_mask, use_cache=False
        ).last_hidden_state
        # 4. Hidden states of the supervised positions: (B, T, D) -> (M, D).
        hidden = hidden.flatten(0, 1).index_select(0, logit_positions)
        # 5. Output layer and loss, without the logits (M, V) in memory at once.
        return linear_cross_entropy(hidden, self.language_model.get_output_embeddings().weight, targets)
