"""LLaVA: a frozen vision tower, a projector and a causal language model, driven by their public arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.models.projector import PROJECTORS
from llava_core.models.vision_tower import image_features, image_token_count
from llava_core.ops.fused_layers import takes_sources
from llava_core.ops.linear_cross_entropy import linear_cross_entropy
from llava_core.ops.packed_mask import Segments

TRAINABLE = {"projector": "multi_modal_projector", "language_model": "language_model"}


class Llava(nn.Module):
    """The model of the paper's Figure 1.

    Args:
        vision_tower: transformers' CLIPVisionModel; kept frozen and in eval mode.
        language_model: transformers' causal language model.
        projector: name in `PROJECTORS`.
        feature_layer: which hidden state of the tower is projected (-2: before its last layer).
    """

    def __init__(
        self, vision_tower: Any, language_model: Any, projector: str = "linear", feature_layer: int = -2
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower.eval().requires_grad_(False)
        d_model = language_model.config.hidden_size
        self.multi_modal_projector = PROJECTORS.get(projector)(vision_tower.config.hidden_size, d_model)
        self.language_model = language_model
        self.projector_name, self.feature_layer = projector, feature_layer

    @property
    def n_image_tokens(self) -> int:
        """Visual tokens per image."""
        return image_token_count(self.vision_tower)

    def set_trainable(self, parts: Iterable[str]) -> list[str]:
        """Freeze everything but `parts` ("projector", "language_model"); the tower stays frozen.

        Returns:
            Names of the parameters that train.
        """
        self.requires_grad_(False)
        for part in parts:
            getattr(self, TRAINABLE[part]).requires_grad_(True)
        return [name for name, p in self.named_parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> Llava:
        """Training mode for all but the tower."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected features of images: what `embed` puts in the place of their blocks.

        Args:
            pixel_values: (N, 3, H, W).

        Returns:
            image_features (N, P, D), in the projector's dtype.
        """
        return self.project(self.tower_features(pixel_values))

    def tower_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (N, P, D_vision) of images (N, 3, H, W), of the layer that is projected; no graph is kept."""
        return image_features(self.vision_tower, pixel_values, self.feature_layer)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The tower's features (N, P, D_vision) as visual tokens (N, P, D), in the projector's dtype."""
        projected: torch.Tensor = self.multi_modal_projector(
            features.to(next(self.multi_modal_projector.parameters()).dtype)
        )
        return projected

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Word embeddings with each image block replaced by its projected features.

        Args:
            input_ids: (B, T); each image is a run of `n_image_tokens` times `IMAGE_TOKEN_ID`.
            pixel_values: (N, 3, H, W), images in the order in which they stand in the batch; None where there is none.
            image_features: (N, P, D) that `encode_images` gave earlier, in place of `pixel_values`.

        Returns:
            inputs_embeds (B, T, D).

        Raises:
            ValueError: the number of image tokens is not the number of image features, or images are given twice.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("pixel_values and image_features are two forms of the same images; fix: give one of them")
        is_image = input_ids == IMAGE_TOKEN_ID
        embeds = self.language_model.get_input_embeddings()(input_ids.clamp(min=0))
        n_images = next((len(given) for given in (pixel_values, image_features) if given is not None), 0)
        n_expected = n_images * self.n_image_tokens
        if int(is_image.sum()) != n_expected:
            raise ValueError(
                f"{int(is_image.sum())} image tokens in the text but {n_expected} image features; "
                "fix: one <image> per image, and never truncate inside an image block"
            )
        projected = self.encode_images(pixel_values) if pixel_values is not None else image_features
        if projected is None:
            return embeds
        return embeds.masked_scatter(is_image[..., None], projected.to(embeds.dtype))

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output for a batch of text and images.

        Args:
            input_ids: (B, T) with image blocks.
            pixel_values: (N, 3, H, W) or None.
            attention_mask: (B, T), 1 for real tokens; None if nothing is padded.
            position_ids: (B, T); counted from the mask by the language model when None.
            image_features: (N, P, D) of `encode_images`, in place of `pixel_values`.
            kwargs: further public arguments of the language model (`past_key_values`, `use_cache`, ...).

        Returns:
            transformers' output with `logits` (B, T, V).
        """
        embeds = self.embed(input_ids, pixel_values, image_features)
        return self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def packed_loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: Segments,
        sources: torch.Tensor,
        targets: torch.Tensor,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy summed over supervised tokens of packed rows; the caller divides by those of the global batch.

        The language model must run `llava_core.ops.transformers_backend.packed_attention`.

        Args:
            input_ids: (B, T) with image blocks.
            position_ids: (B, T) place of each token in its sample.
            segments: which tokens belong together.
            sources: (M,) tokens, counted through all rows, whose hidden states predict.
            targets: (M,) token ids that they predict.
            image_features: (N, P, D_vision) of the vision tower, per image block in the rows' order, or None.

        Returns:
            A scalar, in fp32.
        """
        embeds = self.embed(input_ids, None, None if image_features is None else self.project(image_features))
        decoder, head = self.language_model.get_decoder(), self.language_model.get_output_embeddings()
        lean = {"sources": sources} if takes_sources(decoder) else {}
        output = decoder(inputs_embeds=embeds, position_ids=position_ids, segments=segments, use_cache=False, **lean)
        hidden = output.last_hidden_state.flatten(0, 1)
        if not lean:
            hidden = hidden.index_select(0, sources)
        return linear_cross_entropy(hidden, head.weight, targets)
