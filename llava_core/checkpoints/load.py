"""Load a checkpoint of any format into a model, and save a model as a checkpoint of our own format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llava_core.checkpoints.base_models import (
    base_hash,
    check_no_missing_weights,
    load_language_model,
    load_vision_tower,
)
from llava_core.checkpoints.configs import build_on_meta, language_config, quiet_transformers
from llava_core.checkpoints.describe import MODEL_PARTS, Checkpoint, Description, Options, check
from llava_core.checkpoints.files import atomic_folder, error_at
from llava_core.checkpoints.formats import native
from llava_core.checkpoints.open import open_checkpoint
from llava_core.checkpoints.tensors import SHARD_BYTES, LazyTensor
from llava_core.checkpoints.tokenizer import open_tokenizer
from llava_core.data.images import ImageProcessor
from llava_core.models.llava import Llava
from llava_core.runtime import display_path, user_path

Kind = Literal["full", "projector"]
_SAVED = {"full": ("multi_modal_projector.", "language_model."), "projector": ("multi_modal_projector.",)}


@dataclass
class Loaded:
    """A model with its tokenizer and image settings; `manifest` has its usage, and its base models with hashes."""

    model: Llava
    tokenizer: Any
    processor: ImageProcessor
    manifest: dict[str, Any]


def load(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    options: Options | None = None,
    **usage: Any,
) -> Loaded:
    """Load a checkpoint of any format for inference; `options` and `usage` as in `open_checkpoint`.

    Raises:
        CheckpointError: anything missing, damaged, or not of the base models named in the manifest.
    """
    checkpoint = open_checkpoint(user_path(path), options, usage).require(*MODEL_PARTS)
    check(checkpoint)
    description = checkpoint.description
    if checkpoint.tokenizer is None or description.image is None:
        raise error_at(checkpoint.path, "no tokenizer or image settings; fix: --base, --vision-tower")
    tokenizer = open_tokenizer(checkpoint.tokenizer, description.language_model)
    processor = ImageProcessor.from_dict(description.image)
    return Loaded(assemble(checkpoint, dtype).to(device).eval(), tokenizer, processor, description.usage)


def assemble(checkpoint: Checkpoint, dtype: torch.dtype) -> Llava:
    """Return the model of a checked checkpoint, on the CPU; memory-mapped files are read only where used."""
    description = checkpoint.description
    tower = _with_weights("vision_tower", description.vision_tower or {}, checkpoint, dtype)
    language_model = _with_weights("language_model", description.language_model, checkpoint, dtype)
    model = Llava(tower, language_model, description.projector, description.feature_layer)
    model.multi_modal_projector.to(dtype)
    with torch.no_grad():
        for name, parameter in model.multi_modal_projector.named_parameters():
            parameter.copy_(checkpoint.tensors[f"multi_modal_projector.{name}"].read())
    return model


def _with_weights(part: str, config: dict[str, Any], checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    empty = build_on_meta(part, config)
    prefix = f"{part}."
    state = {n.removeprefix(prefix): t.read() for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
    with quiet_transformers():  # `from_pretrained` also fills the buffers that are not stored
        model, info = type(empty).from_pretrained(
            None, config=empty.config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    if not checkpoint.description.tied:
        check_no_missing_weights(str(checkpoint.path), info)
    return model


def load_into(model: Llava, path: Path, parts: tuple[str, ...] | None = None) -> None:
    """Copy a checkpoint of our own format into a model; names and shapes must match exactly.

    `parts` are prefixes of tensors to take, such as the projector of a full checkpoint; None takes all of them.
    """
    checkpoint = native.read(path, Options())
    prefixes = parts or tuple(f"{part}." for part in checkpoint.parts)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefixes)}
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    for name in own | tensors:
        stored, needed = (tuple(side[name].shape) if name in side else "missing" for side in (tensors, own))
        if stored != needed:
            raise error_at(path, f"{name} is {stored} here and {needed} in the model; fix: use its base models")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor.read())


def build(
    language_model: str, vision_tower: str, dtype: torch.dtype, projector: str = "linear", feature_layer: int = -2
) -> Loaded:
    """Return a model with a new projector between two base models (folders or hub ids)."""
    hashes = {"language_model": base_hash(language_model), "vision_tower": base_hash(vision_tower)}
    llm, tokenizer = load_language_model(language_model, dtype)
    tower, processor = load_vision_tower(vision_tower, dtype)
    model = Llava(tower, llm, projector, feature_layer)
    names = {"language_model": display_path(language_model), "vision_tower": display_path(vision_tower)}
    return Loaded(model, tokenizer, processor, {"base": names, "base_hash": hashes})


def save_checkpoint(path: Path, loaded: Loaded, kind: Kind, **manifest: Any) -> Path:
    """Write or replace a checkpoint directory, completely or not at all; `manifest` has further manifest fields."""
    model = loaded.model
    description = Description(
        language_model=language_config(model.language_model.config.to_dict(), "language model"),
        tower_source=loaded.manifest["base"]["vision_tower"],
        d_vision=model.vision_tower.config.hidden_size,
        projector=model.projector_name,
        feature_layer=model.feature_layer,
        image=loaded.processor.to_dict(),
        usage={**loaded.manifest, **manifest},
    )
    state = model.state_dict()
    tensors = {name: LazyTensor.of(t.detach()) for name, t in state.items() if name.startswith(_SAVED[kind])}
    if description.tied:
        tensors.pop("language_model.lm_head.weight", None)
    with atomic_folder(path, overwrite=True) as folder:
        loaded.tokenizer.save_pretrained(folder)
        native.write(Checkpoint(native.FORMAT.name, folder, description, tensors, {}), folder, SHARD_BYTES)
    return path
