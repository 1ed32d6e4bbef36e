"""Base models and checkpoints.

A checkpoint is one directory that describes itself: weights, the tokenizer and `manifest.json` (what is inside, base
models with their hashes, conversation template, image settings, feature layer, prompt format, run id). Loaders read the
manifest, never the folder's name; keys are strict both ways. It is one of the layouts of `layouts`; `load` takes any.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from llava_core.checkpoints.description import (
    PARTS,
    Description,
    Opened,
    check,
    folder_of,
    in_order,
    language_config,
    open_tokenizer,
    tokenizer_folder,
    tower_config,
    tower_images,
)
from llava_core.checkpoints.formats.common import (
    LAYOUTS,
    Layout,
    Options,
    copy_tokenizer,
    open_language_model,
    write_settings,
)
from llava_core.checkpoints.tensors import (
    SHARD_BYTES,
    Lazy,
    ShardWriter,
    has_file,
    inside,
    open_folder,
    read_settings,
    weight_files,
)
from llava_core.data.images import ImageProcessor
from llava_core.models.llava import Llava
from llava_core.runtime import (
    CheckpointError,
    DataError,
    fingerprint,
    located,
    sha256_file,
    shown,
    verify_files,
    write_json,
)

FORMAT_VERSION = 2
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
    """What identifies a base model's weights: `files:` and a hash of them, checked against a manifest; or `name:`.

    A hub id is known by its name alone, so it can be compared with another id, but not with files.

    Raises:
        CheckpointError: a file of the model is missing or differs from the manifest's SHA-256.
    """
    folder = located(source)
    if not folder.is_dir() and not Path(source).is_absolute():
        return f"name:{fingerprint(source)}"
    if not folder.is_dir() or (has_file(folder, "manifest.json") and "files" in read_settings(folder, "manifest.json")):
        return f"files:{fingerprint(verify_files(folder))}"
    return f"files:{fingerprint({f.name: sha256_file(f) for f in weight_files(folder)})}"


def load_language_model(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Causal language model and tokenizer from a directory or hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{shown(source)}: language model cannot be read: {str(error).splitlines()[0]}"
        ) from error
    _no_fresh_weights(source, info)
    return model, tokenizer


def load_vision_tower(source: str, dtype: torch.dtype) -> tuple[Any, ImageProcessor]:
    """CLIPVisionModel and image settings from the directory or hub id of a CLIPModel."""
    from transformers import CLIPVisionModel

    folder = folder_of(source)
    try:
        with quiet():  # reports each key of the text half, which a tower leaves out
            tower, info = CLIPVisionModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{shown(source)}: vision tower cannot be read: {str(error).splitlines()[0]}") from error
    _no_fresh_weights(source, info)
    return tower, tower_images(folder, tower.config.image_size)


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
    model = loaded.model
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    loaded.tokenizer.save_pretrained(temporary)
    description = Description(
        language_config(model.language_model.config.to_dict(), "language model"), None,
        loaded.manifest["base"]["vision_tower"], model.vision_tower.config.hidden_size, model.projector_name,
        model.feature_layer, loaded.processor.to_dict(), {**loaded.manifest, **facts},
    )  # fmt: skip
    tensors = {n: Lazy.of(t.detach()) for n, t in model.state_dict().items() if n.startswith(_PARTS[kind])}
    if description.tied:
        tensors.pop("language_model.lm_head.weight", None)
    _write(Opened("llava", temporary, description, tensors, {}), temporary, SHARD_BYTES)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    return path


def load_into(model: Llava, path: Path, parts: tuple[str, ...] | None = None) -> None:
    """Copy a checkpoint's tensors into a model, strict both ways.

    Args:
        model: receives the tensors.
        path: checkpoint directory.
        parts: prefixes to take (of a full checkpoint, say, the projector alone); all that is inside when None.

    Raises:
        CheckpointError: a key is missing, too many, or of another shape.
    """
    opened = _read(path, Options())
    prefixes = parts or tuple(f"{part}." for part in opened.parts)
    tensors = {k: v for k, v in opened.tensors.items() if k.startswith(prefixes)}
    own = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    for name in sorted(own.keys() ^ tensors.keys()):
        side = "missing in" if name in own else "unknown to the model, found in"
        raise CheckpointError(
            f"{shown(path)}: {name} is {side} the checkpoint; fix: use the base model named in its manifest"
        )
    for name, tensor in tensors.items():
        if tuple(own[name].shape) != tensor.shape:
            raise CheckpointError(
                f"{shown(path)}: {name} has shape {tensor.shape}, the model needs {tuple(own[name].shape)}; "
                "fix: a projector fits only the language model and tower it was trained with"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor.read())


def load(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    options: Options | None = None,
    **facts: Any,
) -> Loaded:
    """Load a checkpoint of any layout for inference.

    Args:
        path: directory or file.
        dtype: of the weights in memory.
        device: where they go.
        options: base model and tower of a checkpoint that does not hold or name them.
        facts: what the checkpoint leaves open or says wrongly about its use, as in `description.USE_FACTS`.

    Raises:
        CheckpointError: anything missing, damaged, or not of the base models named in the manifest.
    """
    from llava_core.checkpoints.open import open_checkpoint

    opened = open_checkpoint(located(path), options, facts).need(*PARTS)
    check(opened)
    if opened.tokenizer is None or opened.description.image is None:
        raise CheckpointError(f"{shown(opened.path)}: no tokenizer or image settings; fix: --base, --vision-tower")
    tokenizer = open_tokenizer(opened.tokenizer, opened.description.language_model)
    processor = ImageProcessor.from_dict(opened.description.image)
    return Loaded(assemble(opened, dtype).to(device).eval(), tokenizer, processor, opened.description.facts)


def with_bases(opened: Opened, options: Options) -> Opened:
    """Open the base models that a checkpoint of ours refers to, and make sure that they are the very ones.

    Raises:
        CheckpointError: a base model is not here, damaged or another one.
    """
    facts = opened.description.facts
    for part in ("vision_tower", "language_model"):
        if part in opened.parts:
            continue
        named = facts["base"].get(part)
        source = (options.base if part == "language_model" else options.vision_tower) or named
        if source is None:
            raise CheckpointError(f"{shown(opened.path)}: neither holds nor names its {part.replace('_', ' ')}")
        wanted, found = str(facts["base_hash"].get(part, "")), base_hash(source)
        if wanted.partition(":")[0] != found.partition(":")[0]:
            opened.notes.append(f"{part.replace('_', ' ')} {shown(source)}: taken unchecked, only its name is recorded")
        elif wanted != found:
            raise CheckpointError(
                f"{shown(opened.path)}: made with another {part.replace('_', ' ')} than {shown(source)}; fix: restore "
                "that one"
            )
        if part == "language_model":
            base = open_language_model(source)
            opened = replace(
                opened, tensors=opened.tensors | base.tensors, names=opened.names | base.names, uses_base=True
            )
    return in_order(opened)


def assemble(opened: Opened, dtype: torch.dtype) -> Llava:
    """The model of a checked checkpoint, on the CPU; of a file that is mapped, only what is used comes into memory."""
    from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

    description = opened.description
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**description.language_model))
    language = _filled(type(language), language.config, opened, "language_model.", dtype)
    tower_settings = CLIPVisionConfig.from_dict(description.vision_tower)
    tower = _filled(CLIPVisionModel, tower_settings, opened, "vision_tower.", dtype)
    model = Llava(tower, language, description.projector, description.feature_layer)
    model.multi_modal_projector.to(dtype)
    with torch.no_grad():
        for name, parameter in model.multi_modal_projector.named_parameters():
            parameter.copy_(opened.tensors[f"multi_modal_projector.{name}"].read())
    return model


def _filled(model_class: Any, config: Any, opened: Opened, prefix: str, dtype: torch.dtype) -> Any:
    state = {n.removeprefix(prefix): t.read() for n, t in opened.tensors.items() if n.startswith(prefix)}
    with quiet():
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    if not opened.description.tied:
        _no_fresh_weights(str(opened.path), info)
    return model


# ------------------------------------------------------------------------------------------------ the layout


def _found(path: Path) -> bool:
    return path.is_dir() and has_file(path, "manifest.json") and has_file(path, "language_model")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: there is none, another format wrote it, or a field is missing or of a wrong type.
    """
    if not has_file(path, "manifest.json"):
        raise CheckpointError(
            f"{shown(path)}: not a checkpoint (no manifest.json); fix: name a run's checkpoint directory"
        )
    manifest = read_settings(path, "manifest.json")
    where = shown(path / "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format version {manifest.get('format_version')}, this code reads {FORMAT_VERSION}"
        )
    fields = {
        "kind": str, "parts": list, "base": dict, "base_hash": dict, "projector": str, "feature_layer": int,
        "d_vision": int, "image": dict, "files": dict,
    }  # fmt: skip
    for name, kind in fields.items():
        if not isinstance(manifest.get(name), kind):
            raise CheckpointError(f"{where}: {name} is missing or no {kind.__name__}; fix: copy the checkpoint again")
    return manifest


_STRUCTURE = ("format_version", "kind", "parts", "projector", "feature_layer", "d_vision", "image", "files", "dtype")


def _read(path: Path, options: Options) -> Opened:
    manifest = read_manifest(path)
    for name, digest in manifest["files"].items():
        if sha256_file(inside(path, name)) != digest:
            raise CheckpointError(
                f"{shown(path / name)}: damaged (SHA-256 is not the manifest's); fix: copy it again or train again"
            )
    unlisted = [file.name for file in weight_files(path) if file.name not in manifest["files"]]
    if unlisted:
        raise CheckpointError(
            f"{shown(path / unlisted[0])}: the manifest does not list it; fix: copy the checkpoint again"
        )
    tensors = open_folder(path)
    strangers = {name.split(".")[0] for name in tensors} ^ set(map(str, manifest["parts"]))
    if strangers:
        raise CheckpointError(f"{shown(path)}: manifest and weights disagree about {sorted(strangers)[0]}")
    own_tower = "vision_tower" in manifest["parts"]
    tower = tower_config(read_settings(path / "vision_tower", "config.json")) if own_tower else None
    language = read_settings(path / "language_model", "config.json")
    try:
        image = ImageProcessor.from_dict(manifest["image"]).to_dict()
    except DataError as error:
        raise CheckpointError(f"{shown(path / 'manifest.json')}: {error}") from error
    source = None if own_tower else options.vision_tower or manifest["base"].get("vision_tower")
    facts = {k: v for k, v in manifest.items() if k not in _STRUCTURE}
    description = Description(
        language_config(language, shown(path / "language_model")), tower, source, manifest["d_vision"],
        manifest["projector"], manifest["feature_layer"], image, facts,
    )  # fmt: skip
    names = {name: name for name in tensors}
    return in_order(Opened("llava", path, description, tensors, names, tokenizer=tokenizer_folder(path)))


def _write(opened: Opened, folder: Path, shard_bytes: int) -> None:
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in opened.tensors.items():
        writer.add(name, tensor.read())
    description = opened.description
    copy_tokenizer(opened, folder)
    write_settings(folder / "language_model", description.language_model)
    if "vision_tower" in opened.parts:
        write_settings(folder / "vision_tower", description.vision_tower or {})
    _write_manifest(folder, opened, writer.close())


def _write_manifest(folder: Path, opened: Opened, files: dict[str, str]) -> None:
    """Write `manifest.json` for weights files with their SHA-256."""
    description = opened.description
    bases = {"vision_tower": description.tower_source} if description.tower_source else {}
    facts = {"base": {}, "base_hash": {}, **description.facts}
    for name, source in bases.items():
        if facts["base"].get(name) != source or name not in facts["base_hash"]:
            facts["base"] = facts["base"] | {name: source}
            facts["base_hash"] = facts["base_hash"] | {name: base_hash(source)}
    kind = "full" if "language_model" in opened.parts else "projector"
    dtypes = [tensor.dtype for name, tensor in opened.tensors.items() if not name.startswith("vision_tower.")]
    write_json(
        folder / "manifest.json",
        {
            **facts, "format_version": FORMAT_VERSION, "kind": kind, "parts": list(opened.parts),
            "image": description.image, "projector": description.projector, "feature_layer": description.feature_layer,
            "d_vision": description.d_vision, "dtype": str(dtypes[0]).removeprefix("torch."), "files": files,
        },
    )  # fmt: skip


LAYOUTS.register("llava")(Layout("llava", "this project's self-describing directory", _found, _read, _write))
