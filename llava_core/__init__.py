"""The LLaVA model (*Visual Instruction Tuning*, NeurIPS 2023), its attention kernels, trainers and checkpoints.

Tensor dimensions in the docstrings of this package:

========  ==========================================================================
B         samples of a batch
N         images of a batch (N <= B: a text-only sample has none)
H, W      height and width of an image in pixels
P         patches of an image (256 for 224 px and patch 14)
D_vision  width of the vision tower's features (1024 for CLIP ViT-L/14)
T         tokens of a sequence, image positions included
D         width of the language model's embeddings (4096 for 7B, 5120 for 13B)
V         entries of the vocabulary
M         supervised positions
========  ==========================================================================

``pixel_values (N, 3, H, W)``, ``input_ids (B, T)``, ``labels (B, T)`` with -100 for positions that carry no loss,
``inputs_embeds (B, T, D)``; attention tensors are ``(B, heads, T, head_dim)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__version__ = "0.1.0"


def load(path: str | Path, **options: Any) -> Any:
    """Load a checkpoint of any format: `load(DIR).ask(image, "question")`, `.caption(image)`, `.chat(image)`.

    Args:
        path: folder, or a file for formats of one file.
        options: as in `llava_core.chat.open_assistant`: `device`, `dtype`, `base`, `vision_tower`, `template`, ...

    Returns:
        A `llava_core.chat.Assistant`.
    """
    from llava_core.chat import open_assistant  # here, so that `import llava_core` loads no torch

    return open_assistant(path, **options)
