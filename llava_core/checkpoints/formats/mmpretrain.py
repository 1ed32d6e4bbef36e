"""mmpretrain's format: one `.pth` with the original names after `model.lang_encoder.`, and no configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from llava_core.checkpoints.base_models import model_folder
from llava_core.checkpoints.configs import language_config
from llava_core.checkpoints.describe import (
    DESCRIPTION_KEY,
    IMAGE_DELIMITERS,
    USAGE_OF_V1,
    Checkpoint,
    Description,
    Options,
)
from llava_core.checkpoints.files import error_at, read_config
from llava_core.checkpoints.formats import original
from llava_core.checkpoints.formats.common import CheckpointFormat, new_checkpoint
from llava_core.checkpoints.formats.names import import_name
from llava_core.checkpoints.tensors import PICKLE_SUFFIXES, LazyTensor, load_pickle, lone_weights_file, open_file
from llava_core.checkpoints.tokenizer import tokenizer_folder

_PREFIX = "model.lang_encoder."
RULES = tuple((ours, _PREFIX + theirs) for ours, theirs in original.RULES)


def detect(path: Path) -> bool:
    file = lone_weights_file(path)
    return bool(file and file.suffix in PICKLE_SUFFIXES and any(name.startswith(_PREFIX) for name in open_file(file)))


def read(path: Path, options: Options) -> Checkpoint:
    file = lone_weights_file(path)
    assert file is not None
    tensors = open_file(file)
    notes: list[str] = []
    tokenizer = tokenizer_folder(path) if path.is_dir() else None
    meta = load_pickle(file).get("meta")
    stored = meta.get(DESCRIPTION_KEY) if isinstance(meta, dict) else None
    if stored is not None:
        description = Description.from_dict(stored, file)
        description = replace(description, tower_source=options.vision_tower or description.tower_source)
    elif options.base is None:
        raise error_at(file, "weights without a configuration; fix: --base and --vision-tower with its base models")
    else:
        base = model_folder(options.base)
        tokenizer = tokenizer or tokenizer_folder(base)
        description = _assumed_description(tensors, base, options.vision_tower)
        notes.append("feature layer -2: how the weights were trained (mmpretrain itself reads the last layer)")
        notes.append("template v1 and image position first assumed")
    rename = partial(import_name, rules=RULES)
    checkpoint = new_checkpoint(FORMAT.name, path, tensors, rename, description, tokenizer, notes)
    return replace(checkpoint, uses_base=stored is None)


def _assumed_description(tensors: Mapping[str, LazyTensor], base: Path, vision_tower: str | None) -> Description:
    """Return a description from the shapes of the tensors and the configuration of the base language model."""
    config = language_config(read_config(base, "config.json"), base)
    words = tensors.get(_PREFIX + "model.embed_tokens.weight")
    if words:
        config["vocab_size"] = words.shape[0]  # training may have added rows to the base's vocabulary
    mlp = any(".mm_projector.0." in name for name in tensors)
    width = next((t.shape[-1] for n, t in tensors.items() if re.search(r"mm_projector\.(0\.)?weight$", n)), 0)
    # mmpretrain's own pipeline resizes to a square, whatever the image's aspect ratio
    usage = {**USAGE_OF_V1, "image_delimiters": None if mlp else IMAGE_DELIMITERS, "image_mode": "resize"}
    projector = "mlp2x_gelu" if mlp else "linear"
    return Description(config, tower_source=vision_tower, d_vision=width, projector=projector, usage=usage)


FORMAT = CheckpointFormat("mmpretrain", detect, read)
