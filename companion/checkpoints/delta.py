"""Delta weights: the difference between a checkpoint and its base language model, published without the base.

Of word embeddings and output layer, whose vocabularies differ, only the leading rows, as many as the base has, are
differences. The projector is stored as it is.
Source: make_delta.py and apply_delta.py of haotian-liu/LLaVA at 8959d5c.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.base_models import model_folder
from llava_core.checkpoints.files import atomic_folder, contained_file, error_at, has_file, read_config
from llava_core.checkpoints.formats.names import export_name
from llava_core.checkpoints.formats.original import DELTA, RULES, is_delta, mm_config
from llava_core.checkpoints.open import detect_format, open_checkpoint
from llava_core.checkpoints.tensors import (
    SHARD_BYTES,
    LazyTensor,
    check_finite,
    has_weights,
    open_folder,
    write_tensors,
)
from llava_core.checkpoints.tokenizer import copy_tokenizer
from llava_core.runtime import display_path, write_json

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_COMPUTED = "rotary_emb.inv_freq"


def _plan(checkpoint: dict[str, LazyTensor], base: dict[str, LazyTensor], where: Path) -> dict[str, Any]:
    """Return the treatment of the tensors: number `added` completely, rows of the `blocks`, names `stored`."""
    added, blocks, stored = 0, {}, []
    for name, tensor in checkpoint.items():
        if name not in base:
            stored.append(name)
        elif tensor.shape == base[name].shape:
            added += 1
        elif name in _VOCABULARY and len(tensor.shape) == 2 and tensor.shape[1:] == base[name].shape[1:] and (
            tensor.shape > base[name].shape
        ):  # fmt: skip
            blocks[name] = base[name].shape[0]
        else:
            fix = "--base with the model (size and vocabulary) that the delta belongs to"
            raise error_at(where, f"{name} is {tensor.shape}, in the base {base[name].shape}; fix: {fix}")
    unused = sorted(name for name in base if name not in checkpoint and not name.endswith(_COMPUTED))
    if unused:
        raise error_at(where, f"the base's {unused[0]} is missing in it ({len(unused)} in all)")
    if not added:
        raise error_at(where, "shares no tensor with the base; fix: --base DIR")
    foreign = [name for name in stored if "mm_projector" not in name and "vision_tower" not in name]
    if foreign:
        raise error_at(where, f"{foreign[0]} is neither in the base nor of a projector or tower")
    return {"added": added, "blocks": blocks, "stored": stored}


def _open(folder: Path) -> dict[str, LazyTensor]:
    return {name: t for name, t in open_folder(folder).items() if not name.endswith(_COMPUTED)}


def _open_base(folder: Path) -> dict[str, LazyTensor]:
    """Open a language model, or that of a LLaVA of any format, under LLaMA's names."""
    if detect_format(folder) is None:
        return _open(folder)
    tensors = open_checkpoint(folder).require("language_model").tensors
    return {export_name(name, RULES): t for name, t in tensors.items() if name.startswith("language_model.")}


def _shift(value: torch.Tensor, name: str, base: LazyTensor | None, sign: int, source: Path) -> torch.Tensor:
    """Add the base to a tensor (+1) or subtract it (-1), in fp32; of a longer tensor only the leading rows change."""
    value = value.clone()
    if base is not None:
        block = value if base.shape == tuple(value.shape) else value[: base.shape[0]]
        block.copy_(block.float() + sign * base.read().float())
    return check_finite(value, f"{name}, {'added to' if sign > 0 else 'without'} the base,", source)


def _run(
    base: str, source: Path, out: Path, shard_bytes: int = SHARD_BYTES, dry_run: bool = False, *, sign: int
) -> dict[str, Any]:
    """Subtract a base language model (folder or hub id) from a LLaVA in the original format (-1), or add it (+1).

    Returns:
        `added`, `blocks`, `stored`, `bytes`, and `fingerprint`: of the base; of +1 "matches", or why it could not be
        checked.

    Raises:
        CheckpointError: shapes or names do not fit, or the base is not the one that the delta records.
    """
    if not mm_config(source) or not has_weights(source):
        problem = "not a folder with a LLaVA in the original format (config.json, weights)"
        raise error_at(source, f"{problem}; fix: check the path, or `llava convert --to original`")
    base_folder = model_folder(base)
    base_tensors, tensors = _open_base(base_folder), _open(source)
    if is_delta(source, tensors) != (sign > 0):
        model = f"a model already, no delta (its norms are not near zero, and it has no {DELTA})"
        what = model if sign > 0 else "a delta already"
        raise error_at(source, f"is {what}; fix: name the {'delta' if sign > 0 else 'model'}")
    plan = _plan(tensors, base_tensors, source)
    fingerprint = _fingerprint(base_tensors, source, sign)
    report = {
        "base": display_path(base_folder), **plan,
        "bytes": sum(t.bytes for t in tensors.values()), "fingerprint": fingerprint, "written": not dry_run,
    }  # fmt: skip
    if dry_run:
        return report
    shifted = {
        name: tensor.map(partial(_shift, name=name, base=base_tensors.get(name), sign=sign, source=source))
        for name, tensor in tensors.items()
    }
    with atomic_folder(out) as folder:
        write_tensors(folder, shifted, shard_bytes)
        copy_tokenizer(source, folder)
        for name in ("config.json", "generation_config.json"):
            if has_file(source, name):
                shutil.copyfile(contained_file(source, name), folder / name)
        if sign < 0:
            write_json(folder / DELTA, {"base": str(base), "base_fingerprint": fingerprint})
    return report


make = partial(_run, sign=-1)
apply = partial(_run, sign=+1)


def _fingerprint(base: dict[str, LazyTensor], source: Path, sign: int) -> str:
    if sign > 0 and not has_file(source, DELTA):
        return "not recorded in the delta; the shapes fit"
    actual = fingerprint_tensors(base)
    if sign < 0:
        return actual
    recorded = read_config(source, DELTA).get("base_fingerprint")
    if recorded != actual:
        problem = f"its base's fingerprint is {str(recorded)[:12]}..., the given base's {actual[:12]}..."
        raise error_at(source, f"{problem}; fix: --base with the model that the delta was computed from")
    return "matches"


def fingerprint_tensors(tensors: Mapping[str, LazyTensor]) -> str:
    """Return 64 hex digits of names, shapes and values; equal for the same values in fp16, bf16 or fp32."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].read().to(torch.float32).contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()
