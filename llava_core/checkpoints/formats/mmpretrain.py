"""mmpretrain's format: one `.pth` with the original names after `model.lang_encoder.`, and no configuration.

Its converter writes no vision tower; a model saved by mmengine has mmpretrain's own, which is CLIP's under other names
and without the last norm, which LLaVA does not use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from llava_core.checkpoints.describe import (
    DESCRIPTION_KEY,
    IMAGE_DELIMITERS,
    USAGE_OF_V1,
    Checkpoint,
    Description,
    Options,
)
from llava_core.checkpoints.files import error_at
from llava_core.checkpoints.formats import original
from llava_core.checkpoints.formats.common import CheckpointFormat, new_checkpoint
from llava_core.checkpoints.formats.names import import_name
from llava_core.checkpoints.pickles import load_pickle
from llava_core.checkpoints.tensors import PICKLE_SUFFIXES, LazyTensor, lone_weights_file, open_file
from llava_core.checkpoints.tokenizer import tokenizer_folder

_PREFIX = "model.lang_encoder."
RULES = tuple((ours, _PREFIX + theirs) for ours, theirs in original.RULES)
_TOWER = "model.vision_tower."
_TOWER_RULES = (  # patterns of names in mmpretrain's VisionTransformer -> names in CLIP
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^patch_embed\.projection\.", "embeddings.patch_embedding."),
    (r"^pre_norm\.", "pre_layrnorm."),
    (r"^ln1\.", "post_layernorm."),
    (r"\.ln([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^layers\.", "encoder.layers."),
)


def detect(path: Path) -> bool:
    file = lone_weights_file(path)
    return bool(file and file.suffix in PICKLE_SUFFIXES and any(name.startswith(_PREFIX) for name in open_file(file)))


def read(path: Path, options: Options, base: Checkpoint | None = None) -> Checkpoint:
    file = lone_weights_file(path)
    assert file is not None
    tensors = _with_clip_names(open_file(file), file)
    notes: list[str] = []
    tokenizer = tokenizer_folder(path) if path.is_dir() else None
    meta = load_pickle(file).get("meta")
    stored = meta.get(DESCRIPTION_KEY) if isinstance(meta, dict) else None
    if stored is not None:
        description = Description.from_dict(stored, file)
        description = replace(description, tower_source=options.vision_tower or description.tower_source)
    elif base is None:
        raise error_at(file, "weights without a configuration; fix: --base and --vision-tower with its base models")
    else:
        tokenizer = tokenizer or base.tokenizer
        description = _assumed_description(tensors, base, options.vision_tower)
        notes.append("feature layer -2: how the weights were trained; mmpretrain itself reads layer -1")
        notes.append("template v1 and image position first assumed; mmpretrain's own prompts have no BOS token")
    rename = partial(import_name, rules=RULES)
    checkpoint = new_checkpoint(FORMAT.name, path, tensors, rename, description, tokenizer, notes)
    return replace(checkpoint, uses_base=stored is None)


def _with_clip_names(tensors: Mapping[str, LazyTensor], file: Path) -> dict[str, LazyTensor]:
    """Return the tensors with those of mmpretrain's vision tower under the original code's names, its qkv divided."""
    renamed: dict[str, LazyTensor] = {}
    clip = _PREFIX + dict(original.RULES)["vision_tower."]
    for theirs, tensor in tensors.items():
        name = theirs.removeprefix(_TOWER)
        if name == theirs:
            renamed[theirs] = tensor
        elif ".attn.qkv." in name and tensor.shape and tensor.shape[0] % 3 == 0:
            for k, letter in enumerate("qkv"):
                part = name.replace(".attn.qkv.", f".self_attn.{letter}_proj.")
                shape = (tensor.shape[0] // 3, *tensor.shape[1:])
                renamed[f"{clip}encoder.{part}"] = tensor.map(partial(_third, k=k), shape)
        else:
            new = name
            for pattern, replacement in _TOWER_RULES:
                new = re.sub(pattern, replacement, new)
            if new == name:
                raise error_at(file, f"{theirs} is no part of a CLIP vision tower; fix: use the tower of LLaVA")
            axes = {"cls_token": 2, "pos_embed": 1}.get(name, 0)  # of length 1
            if tensor.shape[:axes] != (1,) * axes:
                raise error_at(file, f"{theirs} is {tensor.shape}; fix: get the complete file")
            shape = tensor.shape[axes:]
            renamed[clip + new] = tensor.map(partial(torch.reshape, shape=shape), shape)
    if norm := renamed.get(f"{clip}pre_layrnorm.weight"):
        for end, value in (("weight", 1.0), ("bias", 0.0)):
            full = torch.full(norm.shape, value, dtype=norm.dtype)
            renamed.setdefault(f"{clip}post_layernorm.{end}", LazyTensor.of(full))
    return renamed


def _third(qkv: torch.Tensor, k: int) -> torch.Tensor:
    return qkv.chunk(3)[k]


def _assumed_description(tensors: Mapping[str, LazyTensor], base: Checkpoint, vision_tower: str | None) -> Description:
    """Return a description from the shapes of the tensors and the configuration of the base language model."""
    config = dict(base.description.language_model)
    words = tensors.get(_PREFIX + "model.embed_tokens.weight")
    if words and words.shape:
        config["vocab_size"] = words.shape[0]  # training may have added rows to the base's vocabulary
    mlp = any(".mm_projector.0." in name for name in tensors)
    width = next(
        (t.shape[-1] for n, t in tensors.items() if re.search(r"mm_projector\.(0\.)?weight$", n) if t.shape), 0
    )
    # mmpretrain's own pipeline resizes to a square, whatever the image's aspect ratio
    usage = {**USAGE_OF_V1, "image_delimiters": None if mlp else IMAGE_DELIMITERS, "image_mode": "resize"}
    projector = "mlp2x_gelu" if mlp else "linear"
    return Description(config, tower_source=vision_tower, d_vision=width, projector=projector, usage=usage)


FORMAT = CheckpointFormat("mmpretrain", detect, read, base_of=lambda path, options: options.base)
