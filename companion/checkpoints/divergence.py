"""The first tensor or module, in the order of a forward pass, in which two checkpoints or models differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.configs import quiet_transformers
from llava_core.checkpoints.describe import Checkpoint
from llava_core.checkpoints.formats.names import export_name
from llava_core.checkpoints.load import assemble
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.runtime import CheckpointError, progress

_IN_MEMORY = (  # prefixes of the modules of Llava and of LlavaForConditionalGeneration
    ("multi_modal_projector.0.", "model.multi_modal_projector.linear_1."),
    ("multi_modal_projector.2.", "model.multi_modal_projector.linear_2."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.", "model.vision_tower."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
)
TOLERANCE = 1e-4
"""Largest difference of two fp32 runs of the same function, as a share of an output's size."""


@dataclass(frozen=True)
class Divergence:
    """The first tensor in which two checkpoints differ, with its name in llava_core.

    `largest` is the largest absolute difference of its values, NaN if it is missing or of another shape.
    """

    name: str
    text: str
    largest: float = float("nan")

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def first_divergence(one: Checkpoint, other: Checkpoint, tolerance: float = 0.0) -> Divergence | None:
    """Return the first tensor in which two checkpoints differ, or None; one tensor of each is in memory.

    `other` may have further parts; an absolute difference of at most `tolerance` counts as equal.
    """
    for name in progress(list(one.tensors), "comparing", leave=False, disable=None):
        if name not in other.tensors:
            return Divergence(name, "is missing in the second")
        first, second = one.tensors[name], other.tensors[name]
        if first.shape != second.shape:
            return Divergence(name, f"has shape {first.shape} and {second.shape}")
        a, b = first.read(), second.read()
        if not torch.equal(a, b):
            largest = float((a.double() - b.double()).abs().max())
            if not largest <= tolerance:
                return Divergence(name, f"differs by up to {largest:.3g}", largest)
    extra = [name for name in other.tensors if name not in one.tensors and name.split(".")[0] in one.parts]
    return Divergence(extra[0], "is missing in the first") if extra else None


@dataclass(frozen=True)
class ModuleDifference:
    """Output of one module in two models: largest absolute difference, and largest absolute value in `Llava`."""

    name: str
    shape: tuple[int, ...]
    largest: float
    size: float

    @property
    def relative(self) -> float:
        return self.largest / max(self.size, 1e-30)


def module_differences(
    model: Any, reference: Any, image_token: int, words: int = 9, seed: int = 0
) -> list[ModuleDifference]:
    """Compare the output of each module of `Llava` and of the `reference`, in the order of the forward pass.

    The input is a random image and random words. The `reference` is a LlavaForConditionalGeneration with the same
    weights and `image_token` as the id of its image token.
    """
    generator = torch.Generator().manual_seed(seed)
    size, vocabulary = model.vision_tower.config.image_size, model.language_model.config.vocab_size
    text = torch.randint(3, min(vocabulary, image_token), (words,), generator=generator).tolist()
    ids = torch.tensor([[text[0], *[IMAGE_TOKEN_ID] * model.n_image_tokens, *text[1:]]])
    pixels = torch.randn(1, 3, size, size, generator=generator).to(model.language_model.dtype)
    with torch.inference_mode(), _outputs(model) as outputs, _outputs(reference) as reference_outputs:
        model(ids, pixels)
        reference(input_ids=ids.masked_fill(ids == IMAGE_TOKEN_ID, image_token), pixel_values=pixels)
    differences = []
    for name, value in outputs.items():
        partner = reference_outputs.get(_in_memory(name))
        if partner is None or partner.numel() < value.numel():
            continue
        partner = partner.reshape(*value.shape[:-1], -1)[..., : value.shape[-1]]  # the export may have padding rows
        if name.endswith("embed_tokens"):  # embeddings at image positions are replaced later, so they may differ
            value, partner = value[ids != IMAGE_TOKEN_ID], partner[ids != IMAGE_TOKEN_ID]
        difference = (value.double() - partner.double()).abs().max()
        differences.append(ModuleDifference(name, tuple(value.shape), float(difference), float(value.abs().max())))
    compared = {d.name for d in differences}
    for name in ("vision_tower.encoder.layers.0", "multi_modal_projector", "language_model.model.layers.0"):
        if name not in compared or "language_model.lm_head" not in compared:
            raise CheckpointError(f"{name} or the output layer is missing in one of the models, so nothing is compared")
    return differences


def first_module(differences: list[ModuleDifference], tolerance: float = TOLERANCE) -> ModuleDifference | None:
    """Return the first module whose outputs differ by more than a share `tolerance` of their size, or None."""
    return next((d for d in differences if not d.relative <= tolerance), None)


def verify_export(source: Checkpoint, folder: Path) -> list[ModuleDifference]:
    """Compare all modules of a checkpoint with those of its export in format "hf", loaded by transformers, in fp32."""
    from transformers import LlavaForConditionalGeneration

    with quiet_transformers():
        reference = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return module_differences(assemble(source, torch.float32).eval(), reference, reference.config.image_token_id)


def _in_memory(name: str) -> str:
    return export_name(f"{name}.", _IN_MEMORY).removesuffix(".")


@contextmanager
def _outputs(model: Any) -> Iterator[Mapping[str, torch.Tensor]]:
    """Record the first output tensor of each module, in the order in which the modules return."""
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                outputs.setdefault(name, value.detach())

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
