"""This project's own format: one directory with weights, tokenizer, configurations and `manifest.json`.

Readers use the manifest and never the folder's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_core.checkpoints.base_models import base_hash
from llava_core.checkpoints.configs import language_config, tower_config
from llava_core.checkpoints.describe import Checkpoint, Description, Options, checked_image_settings
from llava_core.checkpoints.files import contained_file, error_at, has_file, read_config
from llava_core.checkpoints.formats import lora
from llava_core.checkpoints.formats.common import CheckpointFormat
from llava_core.checkpoints.tensors import open_folder, weight_files, write_tensors
from llava_core.checkpoints.tokenizer import tokenizer_folder
from llava_core.runtime import sha256_file, write_json

FORMAT_VERSION = 2
_FIELD_TYPES = {
    "kind": str, "parts": list, "base": dict, "base_hash": dict, "projector": str, "feature_layer": int,
    "d_vision": int, "image": dict, "files": dict,
}  # fmt: skip
_NOT_USAGE = {*_FIELD_TYPES, "format_version", "dtype"} - {"base", "base_hash"}


def detect(path: Path) -> bool:
    return path.is_dir() and has_file(path, "manifest.json") and has_file(path, "language_model")


def read(path: Path, options: Options) -> Checkpoint:
    """Open a directory, with every weights file checked against the manifest's SHA-256."""
    manifest = _read_manifest(path)
    tensors = open_folder(path)  # before a file is read whole: its header fits its size
    adapter = lora.open_adapter(path) if lora.detect(path) else None
    weights = {*(file.name for file in weight_files(path)), lora.WEIGHTS, lora.CONFIG}
    for name, digest in manifest["files"].items():
        if name not in weights:
            raise error_at(path, f"its manifest lists {name}, no weights; fix: copy the checkpoint again")
        if sha256_file(contained_file(path, name)) != digest:
            raise error_at(path / name, "damaged (SHA-256 is not the manifest's); fix: copy it again or train again")
    files = [*weight_files(path), *([adapter.path, path / lora.CONFIG] if adapter is not None else [])]
    unlisted = [file.name for file in files if file.name not in manifest["files"]]
    if unlisted:
        raise error_at(path / unlisted[0], "the manifest does not list it; fix: copy the checkpoint again")
    if (manifest["kind"] == "adapter") != (adapter is not None):
        raise error_at(path, "manifest and files disagree about an adapter; fix: copy the checkpoint again")
    contradicted = {name.split(".")[0] for name in tensors} ^ set(map(str, manifest["parts"]))
    if contradicted:
        raise error_at(path, f"manifest and weights disagree about {sorted(contradicted)[0]}")
    own_tower, tower = "vision_tower" in manifest["parts"], path / "vision_tower"
    description = Description(
        language_model=language_config(read_config(path / "language_model", "config.json"), path / "language_model"),
        vision_tower=tower_config(read_config(tower, "config.json"), tower) if own_tower else None,
        tower_source=None if own_tower else options.vision_tower or manifest["base"].get("vision_tower"),
        d_vision=manifest["d_vision"],
        projector=manifest["projector"],
        feature_layer=manifest["feature_layer"],
        image=checked_image_settings(manifest["image"], path / "manifest.json"),
        usage={name: value for name, value in manifest.items() if name not in _NOT_USAGE},
    )
    names = {name: name for name in tensors}
    tokenizer = tokenizer_folder(path)
    return Checkpoint(FORMAT.name, path, description, tensors, names, tokenizer=tokenizer, adapter=adapter)


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_config(path, "manifest.json")
    where = path / "manifest.json"
    if manifest.get("format_version") != FORMAT_VERSION:
        raise error_at(where, f"format version {manifest.get('format_version')}, this code reads {FORMAT_VERSION}")
    for name, kind in _FIELD_TYPES.items():
        if type(manifest.get(name)) is not kind:
            raise error_at(where, f"{name} is missing or no {kind.__name__}; fix: copy the checkpoint again")
    return manifest


def write(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    """Write weights, tokenizer, configurations and `manifest.json` into an existing folder."""
    description = checkpoint.description
    if description.image is None:
        problem = f"its vision tower {description.tower_source} is not here, and so are its image settings"
        raise error_at(checkpoint.path, f"{problem}; fix: --vision-tower DIR")
    files = write_tensors(folder, checkpoint.tensors, shard_bytes)
    if checkpoint.adapter is not None:
        files |= lora.write_adapter(checkpoint.adapter, folder, lora.IN_LANGUAGE_MODEL)
        kind = "adapter"
    else:
        kind = "full" if "language_model" in checkpoint.parts else "projector"
    checkpoint.copy_tokenizer(folder)
    (folder / "language_model").mkdir(exist_ok=True)
    write_json(folder / "language_model" / "config.json", description.language_model)
    if "vision_tower" in checkpoint.parts:
        (folder / "vision_tower").mkdir(exist_ok=True)
        write_json(folder / "vision_tower" / "config.json", description.vision_tower)
    usage = {"base": {}, "base_hash": {}, **description.usage}
    source = None if "vision_tower" in checkpoint.parts else description.tower_source
    if source and (usage["base"].get("vision_tower") != source or "vision_tower" not in usage["base_hash"]):
        usage["base"] = usage["base"] | {"vision_tower": source}
        usage["base_hash"] = usage["base_hash"] | {"vision_tower": base_hash(source)}
    dtypes = [tensor.dtype for name, tensor in checkpoint.tensors.items() if not name.startswith("vision_tower.")]
    write_json(
        folder / "manifest.json",
        {
            **usage, "format_version": FORMAT_VERSION, "kind": kind, "parts": list(checkpoint.parts),
            "image": description.image, "projector": description.projector, "feature_layer": description.feature_layer,
            "d_vision": description.d_vision, "dtype": str(dtypes[-1]).removeprefix("torch."), "files": files,
        },
    )  # fmt: skip


FORMAT = CheckpointFormat("llava", detect, read)
