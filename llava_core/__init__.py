"""The LLaVA model (*Visual Instruction Tuning*, NeurIPS 2023), its attention kernels, trainers and checkpoints.

Dimensions: B samples, N images (a text-only sample has none), H x W pixels of an image, P patches of an image (256 for
224 px and patch 14), D_vision width of the tower's features (1024 for CLIP ViT-L/14), T tokens of a sequence with image
positions, D width of the language model (4096 for 7B, 5120 for 13B), V vocabulary entries, M supervised positions.
Tensors: pixel_values (N, 3, H, W), input_ids (B, T), labels (B, T) with -100 for positions that carry no loss,
inputs_embeds (B, T, D); in attention (B, heads, T, head_dim).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__version__ = "0.1.0"


def load(path: str | Path, **options: Any) -> Any:
    """Load a checkpoint of any format: `load(DIR).ask(image, "question")`, `.caption(image)`, `.chat(image)`.

    `path` is a folder, a file for formats of one file, or an id of the hub ("org/name"); `options` are those of
    `llava_core.chat.open_assistant`.
    """
    from llava_core.chat import open_assistant  # here, so that `import llava_core` loads no torch

    return open_assistant(path, **options)
