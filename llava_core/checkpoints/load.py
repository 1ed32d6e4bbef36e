"""Load a checkpoint of any format into a model, and save a model as a checkpoint of our own format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llava_core.checkpoints.base_models import (
    base_hash,
    check_no_missing_weights,
    checkpoint_path,
    load_language_model,
    load_vision_tower,
    map_language_model,
)
from llava_core.checkpoints.configs import build_on_meta, language_config, quiet_transformers
from llava_core.checkpoints.describe import MODEL_PARTS, Adapter, Checkpoint, Description, Options, check
from llava_core.checkpoints.files import atomic_folder, error_at
from llava_core.checkpoints.formats import lora, native
from llava_core.checkpoints.open import open_checkpoint
from llava_core.checkpoints.tensors import SHARD_BYTES, LazyTensor
from llava_core.data.images import ImageProcessor
from llava_core.models.llava import Llava
from llava_core.runtime import display_path, rank

Kind = Literal["full", "projector", "adapter"]
_SAVED = {
    "full": ("multi_modal_projector", "language_model"), "projector": ("multi_modal_projector",),
    "adapter": ("multi_modal_projector",),
}  # fmt: skip


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

    `path` is a folder, a file, or an id of the hub ("org/name"), which is downloaded where that is allowed.

    Raises:
        CheckpointError: anything missing, damaged, or not of the base models named in the manifest.
    """
    checkpoint = open_checkpoint(checkpoint_path(path), options, usage).require(*MODEL_PARTS)
    check(checkpoint)
    description = checkpoint.description
    if checkpoint.tokenizer is None or description.image is None:
        raise error_at(checkpoint.path, "no tokenizer or image settings; fix: --base, --vision-tower")
    if "chat_template" in description.usage and "template" not in description.usage:
        raise error_at(
            checkpoint.path, "its chat template is none of ours; fix: name one (`--assume template=v1`, in Python "
            "`template=\"v1\"`), or ask with transformers' processor",
        )  # fmt: skip
    tokenizer = checkpoint.open_tokenizer()
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


def load_into(
    model: Llava, path: Path, parts: tuple[str, ...] | None = None, base_hash: Mapping[str, str] | None = None
) -> None:
    """Copy a checkpoint of our own format into a model; names and shapes must match exactly.

    `parts` are prefixes of tensors to take, such as the projector of a full checkpoint; None takes all of them.
    `base_hash` has the hashes of the model's base models, which must be those that the checkpoint was trained with.
    """
    checkpoint = native.read(path, Options())
    for part, own_hash in (base_hash or {}).items():
        trained = checkpoint.description.usage["base_hash"].get(part, own_hash)
        # files are compared with files, an id with an id
        if trained != own_hash and trained.partition(":")[0] == own_hash.partition(":")[0]:
            raise error_at(path, f"trained with another {part.replace('_', ' ')} than this run's; fix: train it again")
    if checkpoint.adapter is not None and parts is None:
        raise error_at(path, "its adapter would be left out; fix: merge it (`llava convert --to llava`), or name parts")
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
    language_model: str, vision_tower: str, dtype: torch.dtype, projector: str = "linear", feature_layer: int = -2,
    bits: Literal[4] | None = None, mapped: bool = False,
) -> Loaded:  # fmt: skip
    """Return a model with a new projector between two base models (folders or hub ids).

    `bits` as in `load_language_model`; `mapped` leaves the language model on disk as `map_language_model` does.
    """
    hashes = {"language_model": base_hash(language_model), "vision_tower": base_hash(vision_tower)}
    if mapped and bits is None:
        llm, tokenizer = map_language_model(language_model)
    else:
        llm, tokenizer = load_language_model(language_model, dtype, bits)
    tower, processor = load_vision_tower(vision_tower, dtype)
    model = Llava(tower, llm, projector, feature_layer)
    names = {"language_model": display_path(language_model), "vision_tower": display_path(vision_tower)}
    nf4 = {} if bits is None else {"base_nf4": str(dtype).removeprefix("torch.")}
    return Loaded(model, tokenizer, processor, {"base": names, "base_hash": hashes, **nf4})


def save_checkpoint(
    path: Path, loaded: Loaded, kind: Kind, tensors: Mapping[str, LazyTensor] | None = None,
    dtype: torch.dtype | None = None, **manifest: Any,
) -> Path:  # fmt: skip
    """Write or replace a checkpoint directory, completely or not at all; all ranks call it, and rank 0 writes.

    Args:
        kind: "full", "projector", or "adapter" for LoRA adapters and projector.
        tensors: whole tensors by their name in `model.state_dict()`, which is None's default. Each that `kind` needs is
            read once, in the same order on all ranks.
        dtype: of the language model's weights; None leaves them as they are.
        manifest: further manifest fields.
    """
    model = loaded.model
    if "base" not in loaded.manifest:
        raise error_at(path, "the model names no base models in its manifest; fix: `llava convert` its checkpoint")
    description = Description(
        language_model=language_config(model.language_model.config.to_dict(), "language model"),
        tower_source=loaded.manifest["base"]["vision_tower"],
        d_vision=model.vision_tower.config.hidden_size,
        projector=model.projector_name,
        feature_layer=model.feature_layer,
        image=loaded.processor.to_dict(),
        usage={**loaded.manifest, **manifest},
    )
    if tensors is None:
        tensors = {name: LazyTensor.of(t.detach()) for name, t in model.state_dict().items()}
    stored = {name: t for name, t in tensors.items() if name.startswith(_SAVED[kind])}
    if dtype is not None:
        stored = {name: t.to(dtype) if name.startswith("language_model.") else t for name, t in stored.items()}
    if description.tied:
        stored.pop("language_model.lm_head.weight", None)
    adapter = _adapter(loaded, tensors, path) if kind == "adapter" else None
    checkpoint = Checkpoint(native.FORMAT.name, path, description, stored, {}, adapter=adapter)
    check(checkpoint)
    if missing := set(_SAVED[kind]) - set(checkpoint.parts):
        raise error_at(path, f"the tensors to save lack {', '.join(missing)}; fix: give all of `model.state_dict()`")
    if rank() > 0:
        for tensor in (*stored.values(), *(t for pair in (adapter.matrices.values() if adapter else ()) for t in pair)):
            tensor.read()
        return path
    with atomic_folder(path, overwrite=True) as folder:
        loaded.tokenizer.save_pretrained(folder)
        native.write(checkpoint, folder, SHARD_BYTES)
    return path


def _adapter(loaded: Loaded, tensors: Mapping[str, LazyTensor], path: Path) -> Adapter:
    """The language model's adapter, with base model, in peft's settings and names."""
    settings = loaded.model.language_model.peft_config["default"].to_dict()
    settings |= {"inference_mode": True, "base_model_name_or_path": loaded.manifest["base"]["language_model"]}
    matrices = {n.removeprefix("language_model."): t for n, t in tensors.items() if ".lora_" in n}
    return lora.new_adapter(json.loads(json.dumps(settings, default=sorted)), matrices, path)
