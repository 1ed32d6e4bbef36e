"""The first tensor or module, in the order of a forward pass, in which two checkpoints or models differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava_core.checkpoints.configs import quiet_transformers
from llava_core.checkpoints.describe import Checkpoint
from llava_core.checkpoints.files import error_at
from llava_core.checkpoints.formats.names import export_name
from llava_core.checkpoints.load import Loaded, assemble
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.data.images import ImageProcessor
from llava_core.data.tokenization import Turn
from llava_core.inference import prompt_ids
from llava_core.models.generation import GenerationSettings, generate_tokens
from llava_core.runtime import CheckpointError, progress

_IN_MEMORY = (  # prefixes of the modules of Llava and of LlavaForConditionalGeneration
    ("multi_modal_projector.0.", "model.multi_modal_projector.linear_1."),
    ("multi_modal_projector.2.", "model.multi_modal_projector.linear_2."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.", "model.vision_tower."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
)
_TEXTS = ("What is in the image?", " two  spaces", "a\nline", "tabs\tand $ 3.14", "naïve 犬 🐶", "")
_DIALOGUES: tuple[tuple[Turn, ...], ...] = (
    (("What is in  the image?", None),), (("What is this?\nOne word.", "A red car."), ("And  behind it?", None)),
)  # fmt: skip
_NEW, _PIXELS = 8, 2e-3  # greedy tokens; the difference of two image processors, in standard deviations of a channel
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
    model: Any, reference: Any, ids: torch.Tensor, pixels: torch.Tensor, image_token: int
) -> list[ModuleDifference]:
    """Compare the output of each module of `Llava` and of the `reference`, in the order of the forward pass.

    Args:
        model: a `Llava`.
        reference: a LlavaForConditionalGeneration with the same weights.
        ids: of a prompt (1, T) with an image.
        pixels: of that image (1, 3, S, S).
        image_token: id of the image token in the reference.
    """
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
    """Compare a checkpoint with its export in format "hf", opened by transformers alone, in fp32 and on real prompts.

    Returns:
        The differences of all modules; `first_module` finds the first that matters.

    Raises:
        CheckpointError: the tokens of a text, a prompt, the pixels or the greedy tokens differ.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    description, usage = source.description, dict(source.description.usage)
    if description.image is None:
        raise error_at(source.path, "no image settings; fix: --vision-tower")
    if usage.get("image_position") == "random":  # the chat template has one place
        usage["image_position"] = "data"
    tokenizer = source.open_tokenizer()
    image_processor = ImageProcessor.from_dict(description.image)
    ours = Loaded(assemble(source, torch.float32).eval(), tokenizer, image_processor, usage)
    with quiet_transformers():
        processor = AutoProcessor.from_pretrained(folder)
        reference = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for text in _TEXTS:
        tokens = [t(text, add_special_tokens=False)["input_ids"] for t in (processor.tokenizer, tokenizer)]
        _check_equal(f"tokens of {text!r}", *tokens)
    image, image_token = _picture(image_processor.size), reference.config.image_token_id
    for turns in _DIALOGUES:
        prompt = processor.apply_chat_template(_messages(turns), add_generation_prompt=True)
        batch = processor(images=image, text=prompt, return_tensors="pt")
        ids = batch["input_ids"].masked_fill(batch["input_ids"] == image_token, IMAGE_TOKEN_ID)
        if "template" in usage or "chat_template" not in usage:
            _check_equal(f"the prompt of {turns[-1][0]!r}", ids[0].tolist(), prompt_ids(ours, turns, has_image=True))
    pixels = torch.from_numpy(image_processor(image))[None]
    if not torch.allclose(batch["pixel_values"], pixels, atol=_PIXELS):
        raise error_at(folder, "its image processor gives other pixels")
    differences = module_differences(ours.model, reference, ids, pixels, image_token)
    if first_module(differences) is None:
        with torch.inference_mode():
            greedy = reference.generate(**batch, max_new_tokens=_NEW)[0, ids.shape[1] :].tolist()
        steps = generate_tokens(ours.model, [ids[0].tolist()], pixels, GenerationSettings(len(greedy)))
        _check_equal("greedy tokens", greedy, [int(token[0]) for token in steps])
    return differences


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A dialogue in the form of chat templates, with an image in its first question."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        shown = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _picture(size: int) -> Image.Image:
    """A picture of random pixels, wider than high."""
    values = torch.randint(0, 256, (size, size * 3 // 2, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(values.to(torch.uint8).numpy())


def _check_equal(what: str, theirs: list[int], ours: list[int]) -> None:
    if theirs != ours:
        shorter = min(len(theirs), len(ours))
        k = next((k for k in range(shorter) if theirs[k] != ours[k]), shorter)
        raise CheckpointError(f"{what}: from {k} on {theirs[k : k + 6]} in the export, {ours[k : k + 6]} here")


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
