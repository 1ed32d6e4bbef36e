"""Delta weights: what a checkpoint adds to its base language model, so that it can be given away without the base.

Every tensor that both have in the same shape is target minus base; of the word embeddings and the output layer, whose
vocabularies differ, the leading block of the base's rows is; everything else (the projector) is stored as it is.

Source: make_delta.py and apply_delta.py of haotian-liu/LLaVA at 8959d5c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.description import TOKENIZER_FILES, folder_of
from llava_core.checkpoints.formats.original import is_delta, mm_config
from llava_core.checkpoints.tensors import (
    SHARD_BYTES,
    Lazy,
    ShardWriter,
    fingerprint_tensors,
    has_file,
    has_weights,
    inside,
    open_folder,
    read_settings,
    whole_folder,
)
from llava_core.runtime import CheckpointError, shown, write_json

DELTA = "delta.json"  # our note beside the weights: which base they belong to
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Plan:
    """What will be done with each tensor of a checkpoint.

    Attributes:
        whole: names that the base has in the same shape.
        blocks: name -> rows of the base, for tensors of which only the leading block counts.
        stored: names that the base does not have.
    """

    whole: list[str]
    blocks: dict[str, int]
    stored: list[str]


def _plan(checkpoint: dict[str, Lazy], base: dict[str, Lazy], where: Path) -> Plan:
    whole, blocks, stored = [], {}, []
    for name, tensor in checkpoint.items():
        if name not in base:
            stored.append(name)
        elif tensor.shape == base[name].shape:
            whole.append(name)
        elif name in _VOCABULARY and tensor.shape[1:] == base[name].shape[1:] and tensor.shape[0] > base[name].shape[0]:
            blocks[name] = base[name].shape[0]
        else:
            raise CheckpointError(
                f"{shown(where)}: {name} is {tensor.shape}, in the base {base[name].shape}; fix: --base with the very "
                "model (size and vocabulary) that the delta was made from"
            )
    unused = sorted(name for name in base if name not in checkpoint and not name.endswith(_COMPUTED))
    if unused:
        raise CheckpointError(f"{shown(where)}: the base's {unused[0]} is missing in it ({len(unused)} in all)")
    if not whole:
        raise CheckpointError(f"{shown(where)}: shares no tensor with the base; fix: --base DIR")
    foreign = [name for name in stored if "mm_projector" not in name and "vision_tower" not in name]
    if foreign:
        raise CheckpointError(f"{shown(where)}: {foreign[0]} is neither in the base nor of a projector or tower")
    return Plan(whole, blocks, stored)


def _open(folder: Path) -> dict[str, Lazy]:
    return {name: t for name, t in open_folder(folder).items() if not name.endswith(_COMPUTED)}


def _changed(
    checkpoint: dict[str, Lazy], base: dict[str, Lazy], plan: Plan, sign: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors, one by one, with the base subtracted (-1) or added (+1)."""
    for name, tensor in checkpoint.items():
        value = tensor.read().clone()
        if name in plan.whole:
            value = (value.float() + sign * base[name].read().float()).to(value.dtype)
        elif name in plan.blocks:
            rows = plan.blocks[name]
            value[:rows] = (value[:rows].float() + sign * base[name].read().float()).to(value.dtype)
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name} is not finite after the base was {'added' if sign > 0 else 'subtracted'}")
        yield name, value


def make(base: str, target: Path, out: Path, shard_bytes: int = SHARD_BYTES, dry_run: bool = False) -> dict[str, Any]:
    """Subtract a base language model from a checkpoint in the original layout.

    Args:
        base: folder or hub id of the language model.
        target: checkpoint folder.
        out: delta folder to write.
        shard_bytes: largest size of one weights file.
        dry_run: report and write nothing.

    Returns:
        `added`, `blocks`, `stored`, `bytes`, `fingerprint` of the base.
    """
    return _run(base, target, out, -1, shard_bytes, dry_run)


def apply(base: str, delta: Path, out: Path, shard_bytes: int = SHARD_BYTES, dry_run: bool = False) -> dict[str, Any]:
    """Add a base language model to delta weights.

    Args:
        base: folder or hub id of the language model that the delta was made from.
        delta: folder with delta weights, configuration and tokenizer.
        out: checkpoint folder to write, in the original layout.
        shard_bytes: largest size of one weights file.
        dry_run: report and write nothing.

    Returns:
        `added`, `blocks`, `stored`, `bytes`, `fingerprint`: "matches", or why it could not be checked.

    Raises:
        CheckpointError: shapes or names do not fit, or the base is another one than the delta records.
    """
    return _run(base, delta, out, +1, shard_bytes, dry_run)


def _run(base: str, source: Path, out: Path, sign: int, shard_bytes: int, dry_run: bool) -> dict[str, Any]:
    if not mm_config(source) or not has_weights(source):
        raise CheckpointError(
            f"{shown(source)}: not a folder with a LLaVA in the original layout (config.json, weights); fix: check the "
            "path, or `llava convert --to original`"
        )
    base_folder = folder_of(base)
    base_tensors, tensors = _open(base_folder), _open(source)
    if is_delta(tensors) != (sign > 0):
        what = "a model already, no delta (its norms are not near zero)" if sign > 0 else "a delta already"
        raise CheckpointError(f"{shown(source)}: is {what}; fix: name the {'delta' if sign > 0 else 'model'}")
    plan = _plan(tensors, base_tensors, source)
    fingerprint = _fingerprint(base_tensors, source, sign)
    report = {
        "base": shown(base_folder), "added": len(plan.whole), "blocks": plan.blocks, "stored": plan.stored,
        "bytes": sum(t.bytes for t in tensors.values()), "fingerprint": fingerprint, "written": not dry_run,
    }  # fmt: skip
    if dry_run:
        return report
    with whole_folder(out) as folder:
        writer = ShardWriter(folder, shard_bytes)
        for name, value in _changed(tensors, base_tensors, plan, sign):
            writer.add(name, value)
        writer.close()
        for name in (*TOKENIZER_FILES, "config.json", "generation_config.json"):
            if has_file(source, name):
                (folder / name).write_bytes(inside(source, name).read_bytes())
        if sign < 0:
            write_json(folder / DELTA, {"base": str(base), "base_fingerprint": fingerprint})
    return report


def _fingerprint(base: dict[str, Lazy], source: Path, sign: int) -> str:
    if sign > 0 and not has_file(source, DELTA):
        return "not recorded in the delta; the shapes fit"
    found = fingerprint_tensors(base)
    if sign < 0:
        return found
    wanted = read_settings(source, DELTA).get("base_fingerprint")
    if wanted != found:
        raise CheckpointError(
            f"{shown(source)}: was made from a base whose weights have the fingerprint {str(wanted)[:12]}..., this one "
            f"has {found[:12]}...; fix: --base with that very model"
        )
    return "matches"
