"""The format of a projector by itself: `mm_projector.bin`, with or without word embeddings trained with it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from llava_core.checkpoints.describe import IMAGE_DELIMITERS, USAGE_OF_V1, Checkpoint, Description, Options
from llava_core.checkpoints.files import error_at, has_file
from llava_core.checkpoints.formats.common import EMBEDDINGS, PROJECTOR, CheckpointFormat, with_tower_settings
from llava_core.checkpoints.formats.original import mm_config, read_description
from llava_core.checkpoints.tensors import LazyTensor, has_weights, lone_weights_file, open_file
from llava_core.checkpoints.tokenizer import tokenizer_folder
from llava_core.runtime import display_path

_PREFIXES = (
    "base_model.model.model.mm_projector.", "model.mm_projector.", "mm_projector.", "multi_modal_projector.",
    "model.lang_encoder.model.mm_projector.",
)  # fmt: skip


def _weights_file(path: Path) -> Path | None:
    """Return the projector's file: the path itself, `mm_projector.bin`, or the only weights file of a folder."""
    if path.is_dir() and has_file(path, "mm_projector.bin") and not has_weights(path):  # a release has both
        return path / "mm_projector.bin"
    file = lone_weights_file(path)
    names = open_file(file) if file else {}
    return file if any(n.startswith(_PREFIXES) for n in names) and not any(".layers." in n for n in names) else None


def detect(path: Path) -> bool:
    return _weights_file(path) is not None


def read(path: Path, options: Options, base: Checkpoint | None = None) -> Checkpoint:
    file = _weights_file(path)
    assert file is not None
    notes: list[str] = []
    projector, names, words = _split(file)
    kind = "mlp2x_gelu" if f"{PROJECTOR}0.weight" in projector else "linear"
    weight = projector.get(f"{PROJECTOR}0.weight", projector.get(f"{PROJECTOR}weight"))
    if weight is None or len(weight.shape) != 2:
        raise error_at(file, f"no projector's weight among {', '.join([*names.values(), *words][:4])}")
    d_model, d_vision = weight.shape
    config, own = mm_config(path), tokenizer_folder(path) if path.is_dir() else None
    tokenizer = own or (base.tokenizer if base else None)
    if config:
        description = read_description(path, config, options, notes, projector, tokenizer)
    else:
        notes.append("template v1, image position first and feature layer -2 assumed: there is no config.json")
        description = Description(
            {"hidden_size": d_model}, tower_source=options.vision_tower, d_vision=d_vision, projector=kind,
            usage=dict(USAGE_OF_V1),
        )  # fmt: skip
    description = with_tower_settings(description, notes, path)
    if base is None:
        left_out = dict.fromkeys(words, "word embeddings: they need the language model (--base)")
        return Checkpoint(FORMAT.name, path, description, projector, names, left_out, tokenizer, notes)
    language = base.description.language_model
    width = language.get("hidden_size")
    if width != d_model:
        raise error_at(
            file, f"projector into width {d_model}, but {display_path(base.path)} has {width}; fix: --base DIR"
        )
    named = {**description.usage.get("base", {}), "language_model": str(options.base)}
    usage = description.usage | {"base": named, "base_hash": {}}
    taken = {name: tensor for name, tensor in base.tensors.items() if name.startswith("language_model.")}
    checkpoint = replace(
        base, format=FORMAT.name, path=path, tensors=projector | taken, names=base.names | names, left_out={},
        description=replace(description, language_model=language, usage=usage), notes=notes, uses_base=True,
    )  # fmt: skip
    return _with_word_embeddings(checkpoint, words, file)


def _split(file: Path) -> tuple[dict[str, LazyTensor], dict[str, str], dict[str, LazyTensor]]:
    """Return the projector's tensors under our names, our name -> the file's, and the file's word embeddings."""
    projector, names, words = {}, {}, {}
    for theirs, tensor in open_file(file).items():
        prefix = next((prefix for prefix in _PREFIXES if theirs.startswith(prefix)), None)
        if prefix is not None:
            name = PROJECTOR + theirs.removeprefix(prefix).replace("linear_1.", "0.").replace("linear_2.", "2.")
            projector[name], names[name] = tensor, theirs
        elif theirs.endswith("embed_tokens.weight"):
            words[theirs] = tensor
        else:
            raise error_at(file, f"{theirs} is no part of a projector file; it would be lost")
    return projector, names, words


def _with_word_embeddings(checkpoint: Checkpoint, words: dict[str, LazyTensor], file: Path) -> Checkpoint:
    """Put trained word embeddings into the model: all rows, or the two of the image delimiters."""
    key = EMBEDDINGS[0]
    for theirs, rows in words.items():
        table = checkpoint.tensors[key]  # of a checked base
        if table.shape == rows.shape:
            checkpoint.tensors[key] = rows
            checkpoint.names[key] = theirs
        elif rows.shape == (2, table.shape[1]) and checkpoint.tokenizer is not None:
            ids = _delimiter_ids(checkpoint)
            checkpoint.tensors[key] = table.map(partial(_put_rows, ids=ids, rows=rows))
            checkpoint.description.usage["image_delimiters"] = IMAGE_DELIMITERS
        else:
            raise error_at(
                file,
                f"its word embeddings are {rows.shape}, the base's {table.shape}; fix: --base with a "
                "language model (and tokenizer) whose vocabulary was extended as in training, or take the projector "
                "that was trained without image tokens",
            )
    return checkpoint


def _put_rows(table: torch.Tensor, ids: list[int], rows: LazyTensor) -> torch.Tensor:
    table = table.clone()
    table[ids] = rows.read().to(table.dtype)
    return table


def _delimiter_ids(checkpoint: Checkpoint) -> list[int]:
    vocabulary = checkpoint.open_tokenizer().get_vocab()
    for token in IMAGE_DELIMITERS:
        if token not in vocabulary:
            raise error_at(checkpoint.path, f"the base's tokenizer has no {token}; fix: use the checkpoint's own")
    return [vocabulary[token] for token in IMAGE_DELIMITERS]


FORMAT = CheckpointFormat("projector", detect, read, base_of=lambda path, options: options.base)
