"""What the checkpoint formats share: the record that each of them fills in, and common steps of reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.base_models import model_folder, tower_settings
from llava_core.checkpoints.configs import language_config
from llava_core.checkpoints.describe import DESCRIPTION_KEY, Checkpoint, Description, Options
from llava_core.checkpoints.files import error_at, read_config
from llava_core.checkpoints.formats.names import rename_tensors
from llava_core.checkpoints.tensors import LazyTensor, open_folder
from llava_core.checkpoints.tokenizer import tokenizer_folder
from llava_core.runtime import CheckpointError, display_path

PROJECTOR = "multi_modal_projector."
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


@dataclass(frozen=True)
class CheckpointFormat:
    """One format of checkpoints on disk; `detect` looks at the content, `name` is what `llava inspect` shows.

    If there is a `base_of` and it names a model, that is opened first and is the third argument of `read`.
    """

    name: str
    detect: Callable[[Path], bool]
    read: Callable[..., Checkpoint]
    base_of: Callable[[Path, Options], str | None] | None = None


def new_checkpoint(
    format_name: str, path: Path, tensors: Mapping[str, LazyTensor], rename: Callable[[str], str],
    description: Description, tokenizer: Path | None, notes: list[str],
) -> Checkpoint:  # fmt: skip
    """Return the checkpoint of a format's tensors; a tower among them takes precedence over one that is named."""
    ours, names, left_out = rename_tensors(tensors, rename, path)
    description = with_tower_settings(description, notes, path, ours)
    _drop_tied_head(path, description, ours, names, left_out)
    return Checkpoint(format_name, path, description, ours, names, left_out, tokenizer, notes)


def _drop_tied_head(
    path: Path, description: Description, ours: dict[str, LazyTensor], names: dict[str, str], left_out: dict[str, str]
) -> None:
    words, head = EMBEDDINGS
    if not description.tied or head not in ours or words not in ours:
        return
    if not torch.equal(ours.pop(head).read(), ours[words].read()):
        raise error_at(path, 'tied embeddings that differ; fix: set "tie_word_embeddings": false in its configuration')
    left_out[names.pop(head)] = "repeats the input embedding (tied)"


def with_tower_settings(
    description: Description, notes: list[str], path: Path, tensors: Iterable[str] = ()
) -> Description:
    """Fill in configuration and image settings of the tower that a description names, if it is available.

    They are needed if the `tensors`, under our names, have the tower's weights, which then take precedence.
    """
    inside = any(name.startswith("vision_tower.") for name in tensors)
    usage = dict(description.usage)
    mode = usage.pop("image_mode", None)
    description = replace(description, usage=usage)
    fix = "fix: --vision-tower DIR gives configuration and image settings, the weights stay those inside"
    if inside and description.vision_tower is None and description.tower_source is None:
        raise error_at(path, f"contains a vision tower without configuration; {fix}")
    if description.image is not None or description.tower_source is None:
        return description
    try:
        folder = model_folder(description.tower_source)
        config, image = tower_settings(folder)
    except CheckpointError as error:
        if inside:
            raise error_at(path, f"contains a vision tower, but its settings are elsewhere: {error}; {fix}") from error
        notes.append(f"the vision tower is not available: {error}")
        return description
    read = "settings of the vision tower inside" if inside else "vision tower"
    notes.append(f"{read} read from {display_path(folder)}, which the files or the caller name")
    return replace(description, vision_tower=config, image=replace(image, mode=mode or image.mode).to_dict())


def one_layer(tensors: Mapping[str, LazyTensor], where: Path) -> dict[str, LazyTensor]:
    """Return tensors with the projector's two linear layers, which transformers' LLaVA always has, as one layer."""
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(PROJECTOR)}
    w1, b1, w2, b2 = (tensors.get(f"{PROJECTOR}{name}") for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    if w1 is None or b1 is None or w2 is None or b2 is None or not (
        len(b1.shape) == 1 and b1.shape == b2.shape == w1.shape[:-1] and w2.shape == 2 * b1.shape
    ):  # fmt: skip
        what = "multi_modal_projector.linear_1 or linear_2 is missing or of another width"
        raise error_at(where, f"{what}; fix: get the complete file")
    second, shift = w2.read(), b2.read()
    if not torch.equal(second, torch.eye(len(second), dtype=second.dtype)) or shift.any():
        w1 = w1.map(lambda w: (second.float() @ w.float()).to(w.dtype))
        b1 = b1.map(lambda b: (second.float() @ b.float() + shift.float()).to(b.dtype))
    return rest | {f"{PROJECTOR}weight": w1, f"{PROJECTOR}bias": b1}


def open_language_model(source: str) -> Checkpoint:
    """Open a plain language model (folder or hub id) under our names."""
    folder = model_folder(source)
    config = language_config(read_config(folder, "config.json"), folder)
    tensors = open_folder(folder)
    if not tensors:
        raise error_at(folder, "has no weights; fix: download the complete language model")
    tokenizer = tokenizer_folder(folder)
    return new_checkpoint(
        "language model", folder, tensors, lambda name: f"language_model.{name}", Description(config), tokenizer, []
    )


def check_supported(config: Mapping[str, Any], where: Path, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Check the fields of a configuration whose other values our model does not implement; None stands for absent."""
    for name, values in supported.items():
        if config.get(name) not in values:
            known = ", ".join(str(value) for value in values if value) or "models without it"
            raise error_at(
                where,
                f"{name} is {config[name]!r}, which changes the computation; only {known} can be represented; fix: run "
                "it with the code that it was trained with",
            )


def check_unchanged(config: Mapping[str, Any], where: Path, fields: Mapping[str, Any]) -> None:
    """Check that nobody changed a configuration file since we wrote it together with our description."""
    for name, value in fields.items():
        if config.get(name) != value:
            raise error_at(
                where,
                f"{name} is {config.get(name)!r} and was {value!r} when it was exported; fix: remove "
                f"'{DESCRIPTION_KEY}' from it, so that the other fields count",
            )
