"""Base models and checkpoints.

A checkpoint is one directory that describes itself: `model.safetensors`, the tokenizer and `manifest.json` (kind, base
models with their hashes, conversation template, image settings, feature layer, prompt format, run id). Loaders read the
manifest, never the folder's name; keys are strict both ways.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llava_core.data.image_processor import ImageProcessor
from llava_core.models.llava import Llava
from llava_core.runtime import CheckpointError, fingerprint, read_json, sha256_file, shown, verify_files, write_json

FORMAT_VERSION = 1
Kind = Literal["full", "projector"]
_PARTS = {"full": ("multi_modal_projector.", "language_model."), "projector": ("multi_modal_projector.",)}


@dataclass
class Loaded:
    """A model ready to use with what belongs to it; `manifest` is empty for a model fresh from its base models."""

    model: Llava
    tokenizer: Any
    processor: ImageProcessor
    manifest: dict[str, Any]


def base_hash(source: str) -> str:
    """12 hex digits that identify a base model's weights: from its checked manifest, or the hub id itself.

    Raises:
        CheckpointError: a file of the model is missing or differs from the manifest's SHA-256.
    """
    folder = Path(source)
    if not folder.is_absolute():
        return fingerprint(source)
    return fingerprint(verify_files(folder))


def load_language_model(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Causal language model and tokenizer from a directory or hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{shown(source)}: language model cannot be read: {str(error).splitlines()[0]}"
        ) from error
    _no_fresh_weights(source, info)
    return model, tokenizer


def load_vision_tower(source: str, dtype: torch.dtype) -> tuple[Any, ImageProcessor]:
    """CLIPVisionModel and image settings from the directory or hub id of a CLIPModel."""
    from transformers import CLIPVisionModel
    from transformers.utils import cached_file

    try:
        with quiet():  # reports each key of the text half, which a tower leaves out
            tower, info = CLIPVisionModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
        settings = read_json(cached_file(source, "preprocessor_config.json"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{shown(source)}: vision tower cannot be read: {str(error).splitlines()[0]}") from error
    _no_fresh_weights(source, info)
    mean, std = settings["image_mean"], settings["image_std"]
    return tower, ImageProcessor(tower.config.image_size, "crop", tuple(mean), tuple(std))


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no reports while transformers loads: what matters of them is checked here, strictly."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _no_fresh_weights(source: str, info: dict[str, Any]) -> None:
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointError(
            f"{shown(source)}: weights missing ({names} ...); they would start random; fix: get the file whole"
        )


def build(
    language_model: str, vision_tower: str, dtype: torch.dtype, projector: str = "linear", feature_layer: int = -2
) -> Loaded:
    """A model with a fresh projector between two base models (directories or hub ids)."""
    hashes = {"language_model": base_hash(language_model), "vision_tower": base_hash(vision_tower)}
    llm, tokenizer = load_language_model(language_model, dtype)
    tower, processor = load_vision_tower(vision_tower, dtype)
    model = Llava(tower, llm, projector, feature_layer)
    manifest = {
        "base": {"language_model": shown(language_model), "vision_tower": shown(vision_tower)},
        "base_hash": hashes,
    }
    return Loaded(model, tokenizer, processor, manifest)


def save_checkpoint(path: Path, loaded: Loaded, kind: Kind, **facts: Any) -> Path:
    """Write a checkpoint directory, whole or not at all.

    Args:
        path: directory; replaced if it exists.
        loaded: model, tokenizer, image settings and base models.
        kind: "projector" stores the projector alone, "full" projector and language model.
        facts: further manifest fields: template, image_position, prompt_format, run_id, ...
    """
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in loaded.model.state_dict().items()
        if name.startswith(_PARTS[kind])
    }
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    loaded.tokenizer.save_pretrained(temporary)
    loaded.model.language_model.config.save_pretrained(temporary / "language_model")
    manifest = {
        **loaded.manifest, **facts, "format_version": FORMAT_VERSION, "kind": kind, "image": loaded.processor.to_dict(),
        "projector": loaded.model.projector_name, "feature_layer": loaded.model.feature_layer,
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "sha256": sha256_file(temporary / "model.safetensors"),
    }  # fmt: skip
    write_json(temporary / "manifest.json", manifest)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    return path


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The checked tensors of a checkpoint directory."""
    manifest, file = read_manifest(path), path / "model.safetensors"
    if not file.is_file() or sha256_file(file) != manifest["sha256"]:
        raise CheckpointError(f"{shown(file)}: missing or damaged (SHA-256 differs); fix: copy it again or train again")
    return load_file(file)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: there is none, or a newer format wrote it.
    """
    if not (path / "manifest.json").is_file():
        raise CheckpointError(
            f"{shown(path)}: not a checkpoint (no manifest.json); fix: name a run's checkpoint directory"
        )
    manifest: dict[str, Any] = read_json(path / "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{shown(path)}: format version {manifest.get('format_version')}, this code reads {FORMAT_VERSION}"
        )
    return manifest


def load_into(model: Llava, path: Path, parts: tuple[str, ...] | None = None) -> None:
    """Copy a checkpoint's tensors into a model, strict both ways.

    Args:
        model: receives the tensors.
        path: checkpoint directory.
        parts: prefixes to take (of a full checkpoint, say, the projector alone); the kind's own when None.

    Raises:
        CheckpointError: a key is missing, too many, or of another shape.
    """
    prefixes = parts or _PARTS[read_manifest(path)["kind"]]
    tensors = {k: v for k, v in load_tensors(path).items() if k.startswith(prefixes)}
    own = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    for name in sorted(own.keys() ^ tensors.keys()):
        side = "missing in" if name in own else "unknown to the model, found in"
        raise CheckpointError(
            f"{shown(path)}: {name} is {side} the checkpoint; fix: use the base model named in its manifest"
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{shown(path)}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(own[name].shape)}; "
                "fix: a projector fits only the language model and tower it was trained with"
            )
    model.load_state_dict(tensors, strict=False)


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Loaded:
    """Load a checkpoint directory for inference.

    Args:
        path: directory with a manifest.
        dtype: of the weights in memory.
        device: where they go.

    Raises:
        CheckpointError: anything missing, damaged, or not of the base models named in the manifest.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from llava_core.runtime import resolve

    path = resolve(path)
    manifest = read_manifest(path)
    tower_source = _source(manifest["base"]["vision_tower"])
    if base_hash(tower_source) != manifest["base_hash"]["vision_tower"]:
        raise CheckpointError(
            f"{shown(path)}: made with another vision tower than {shown(tower_source)}; fix: restore that tower"
        )
    tower, _ = load_vision_tower(tower_source, dtype)
    if manifest["kind"] == "full":
        llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path / "language_model"), dtype=dtype)
    else:
        llm_source = _source(manifest["base"]["language_model"])
        if base_hash(llm_source) != manifest["base_hash"]["language_model"]:
            raise CheckpointError(
                f"{shown(path)}: made with another language model than {shown(llm_source)}; fix: restore that model"
            )
        llm, _ = load_language_model(llm_source, dtype)
    model = Llava(tower, llm, manifest["projector"], manifest["feature_layer"])
    load_into(model, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return Loaded(model.to(device).eval(), tokenizer, ImageProcessor.from_dict(manifest["image"]), manifest)


def _source(name: str) -> str:
    """A base model's directory, or its hub id where no such directory exists."""
    from llava_core.runtime import resolve

    return str(resolve(name)) if resolve(name).is_dir() else name
