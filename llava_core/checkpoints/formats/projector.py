"""A projector alone: `mm_projector.bin`, with or without word embeddings that were trained with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.description import Description, Opened, in_order, open_tokenizer, tokenizer_folder
from llava_core.checkpoints.formats.common import (
    ASSUMED,
    DELIMITERS,
    LAYOUTS,
    Layout,
    Options,
    open_language_model,
    to_theirs,
    with_tower_settings,
)
from llava_core.checkpoints.formats.original import RULES, describe_original, mm_config, original_config
from llava_core.checkpoints.tensors import PICKLES, Lazy, has_file, has_weights, open_file, single_weights_file
from llava_core.runtime import CheckpointError, shown, write_json

_PREFIXES = (
    "base_model.model.model.mm_projector.", "model.mm_projector.", "mm_projector.", "multi_modal_projector.",
    "model.lang_encoder.model.mm_projector.",
)  # fmt: skip


def _file(path: Path) -> Path | None:
    """File of a projector: the path itself, `mm_projector.bin`, or the only weights file of a folder."""
    if path.is_dir():
        if has_weights(path) or has_file(path, "adapter_config.json"):  # releases have mm_projector.bin beside the rest
            return None
        if has_file(path, "mm_projector.bin"):
            return path / "mm_projector.bin"
        file = single_weights_file(path)
    else:
        file = path if path.suffix in (".safetensors", *PICKLES) else None
    names = open_file(file) if file else {}
    blind = not any(n.startswith(_PREFIXES) for n in names) or any(".layers." in n for n in names)
    return None if blind else file


def _found(path: Path) -> bool:
    return _file(path) is not None


def _read(path: Path, options: Options) -> Opened:
    file = _file(path)
    assert file is not None
    found = open_file(file)
    notes: list[str] = []
    projector, names, rest = {}, {}, {}
    for theirs, tensor in found.items():
        prefix = next((p for p in _PREFIXES if theirs.startswith(p)), None)
        if prefix:
            end = theirs[len(prefix) :].replace("linear_1.", "0.").replace("linear_2.", "2.")
            projector[f"multi_modal_projector.{end}"], names[f"multi_modal_projector.{end}"] = tensor, theirs
        else:
            rest[theirs] = tensor
    kind = "mlp2x_gelu" if "multi_modal_projector.0.weight" in projector else "linear"
    first = projector.get("multi_modal_projector.0.weight" if kind == "mlp2x_gelu" else "multi_modal_projector.weight")
    if first is None or len(first.shape) != 2:
        raise CheckpointError(f"{shown(file)}: no projector's weight among {', '.join(sorted(found)[:4])}")
    d_model, d_vision = first.shape
    config = mm_config(path) if path.is_dir() else {}
    base = open_language_model(options.base) if options.base else None
    if config:
        description = describe_original(path, config, options, notes)
    else:
        notes.append("template v1, image position first and feature layer -2 assumed: there is no config.json")
        description = Description(
            {"hidden_size": d_model}, None, options.vision_tower, d_vision, kind, -2, None, dict(ASSUMED)
        )  # fmt: skip
    if base is not None:
        width = base.description.language_model.get("hidden_size")
        if width != d_model:
            raise CheckpointError(
                f"{shown(file)}: a projector into width {d_model}, but {shown(base.path)} has {width}; fix: --base "
                "with the very language model that it was trained with"
            )
        facts = description.facts | {"base": {"language_model": str(options.base)}, "base_hash": {}}
        description = replace(description, language_model=base.description.language_model, facts=facts)
    description = with_tower_settings(description, notes)
    tensors = projector | (base.tensors if base else {})
    opened = Opened(
        "projector", path, description, tensors, names | (base.names if base else {}),
        tokenizer=base.tokenizer if base else tokenizer_folder(path) if path.is_dir() else None, notes=notes,
        uses_base=base is not None,
    )  # fmt: skip
    return _with_words(in_order(opened), rest, file)


def _with_words(opened: Opened, rest: dict[str, Lazy], file: Path) -> Opened:
    """Put trained word embeddings of a projector file (all rows, or the two of the image delimiters) into the model."""
    for theirs, rows in rest.items():
        if not theirs.endswith("embed_tokens.weight"):
            raise CheckpointError(f"{shown(file)}: {theirs} is no part of a projector file; it would be lost")
        key = "language_model.model.embed_tokens.weight"
        words = opened.tensors.get(key)
        if words is None:
            opened.left_out[theirs] = "word embeddings: they need the language model (--base)"
        elif words.shape == rows.shape:
            opened.tensors[key] = rows
            opened.names[key] = theirs
        elif rows.shape == (2, words.shape[1]) and opened.tokenizer is not None:
            places = [_token_id(opened.tokenizer, token, opened.description.language_model) for token in DELIMITERS]
            opened.tensors[key] = words.then(lambda table, p=places, r=rows: _put_rows(table, p, r.read()))  # type: ignore[misc]
            opened.description.facts["image_delimiters"] = DELIMITERS
        else:
            raise CheckpointError(
                f"{shown(file)}: its word embeddings are {rows.shape}, the base's {words.shape}; fix: --base with a "
                "language model (and tokenizer) whose vocabulary was extended as in training, or take the projector "
                "that was trained without image tokens"
            )
    return opened


def _put_rows(table: torch.Tensor, places: list[int], rows: torch.Tensor) -> torch.Tensor:
    table = table.clone()
    table[places] = rows.to(table.dtype)
    return table


def _token_id(folder: Path, token: str, language_model: dict[str, Any]) -> int:
    found = open_tokenizer(folder, language_model).get_vocab().get(token)
    if found is None:
        raise CheckpointError(f"{shown(folder)}: its tokenizer has no {token}; fix: take the checkpoint's own")
    return int(found)


def _write(opened: Opened, folder: Path, shard_bytes: int) -> None:
    write_json(folder / "config.json", original_config(opened))
    named = {to_theirs(name, RULES): tensor.read().clone() for name, tensor in opened.tensors.items()}
    torch.save(named, folder / "mm_projector.bin")


_LAYOUT = Layout(
    "projector", "a projector alone, mm_projector.bin", _found, _read, _write, RULES, ("multi_modal_projector",),
    alone=True,
)  # fmt: skip
LAYOUTS.register("projector")(_LAYOUT)
