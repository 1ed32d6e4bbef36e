"""mmpretrain's layout: one `.pth` with the original names behind `model.lang_encoder.`, and no configuration."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from llava_core.checkpoints.description import Description, Opened, folder_of, language_config, tokenizer_folder
from llava_core.checkpoints.formats.common import (
    ASSUMED,
    BLOCK,
    DELIMITERS,
    LAYOUTS,
    Layout,
    Options,
    copy_tokenizer,
    open_renamed,
    to_ours,
    to_theirs,
)
from llava_core.checkpoints.formats.original import RULES as ORIGINAL
from llava_core.checkpoints.tensors import (
    has_file,
    has_weights,
    load_pickle,
    open_file,
    read_settings,
    single_weights_file,
)
from llava_core.runtime import CheckpointError, shown, write_json

RULES = tuple((ours, f"model.lang_encoder.{theirs}") for ours, theirs in ORIGINAL)


def _pth_of(path: Path) -> Path | None:
    if path.is_dir():
        file = None if has_weights(path) or has_file(path, "manifest.json") else single_weights_file(path)
        return _pth_of(file) if file else None
    return path if path.suffix in (".pth", ".pt", ".bin") and path.exists() else None


def _found(path: Path) -> bool:
    file = _pth_of(path)
    return file is not None and any(name.startswith("model.lang_encoder.") for name in open_file(file))


def _read(path: Path, options: Options) -> Opened:
    file = _pth_of(path)
    assert file is not None
    meta = load_pickle(file).get("meta")
    block = meta.get(BLOCK) if isinstance(meta, dict) else None
    tensors = open_file(file)
    notes: list[str] = []
    tokenizer = tokenizer_folder(path) if path.is_dir() else None
    if block is not None:
        description = Description.from_dict(block, shown(file))
        description = replace(description, tower_source=options.vision_tower or description.tower_source)
    elif options.base is None:
        raise CheckpointError(
            f"{shown(file)}: weights without a configuration; fix: --base DIR with config.json and tokenizer of its "
            "language model, and --vision-tower DIR"
        )
    else:
        folder = folder_of(options.base)
        config = language_config(read_settings(folder, "config.json"), shown(folder))
        tokenizer = tokenizer or tokenizer_folder(folder)
        mlp = any(".mm_projector.0." in name for name in tensors)
        width = next((t.shape[-1] for n, t in tensors.items() if re.search(r"mm_projector\.(0\.)?weight$", n)), 0)
        words = tensors.get("model.lang_encoder.model.embed_tokens.weight")
        config["vocab_size"] = words.shape[0] if words else config["vocab_size"]  # the delta's rows, not the base's
        notes.append("feature layer -2: how the weights were trained (mmpretrain itself reads the last layer)")
        notes.append("template v1 and image position first assumed")
        # mmpretrain's own pipeline resizes straight to a square, whatever the image's shape
        facts = {**ASSUMED, "image_delimiters": None if mlp else DELIMITERS, "image_mode": "resize"}
        description = Description(
            config, None, options.vision_tower, width, "mlp2x_gelu" if mlp else "linear", -2, None, facts
        )

    def rename(name: str) -> str:
        return to_ours(name, RULES)

    opened = open_renamed("mmpretrain", path, tensors, rename, description, tokenizer, notes)
    return replace(opened, uses_base=block is None)


def _write(opened: Opened, folder: Path, shard_bytes: int) -> None:
    copy_tokenizer(opened, folder)
    write_json(folder / "config.json", opened.description.language_model)  # of its lang_encoder
    named = {to_theirs(name, RULES): tensor.read().contiguous() for name, tensor in opened.tensors.items()}
    torch.save({"meta": {BLOCK: opened.description.to_dict()}, "state_dict": named}, folder / "model.pth")


LAYOUTS.register("mmpretrain")(Layout("mmpretrain", "one .pth of mmpretrain", _found, _read, _write, RULES))
