"""Names of tensors, ours and those of each format: a format's rules are pairs of prefixes (ours, the format's)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llava_core.checkpoints.describe import Checkpoint
from llava_core.checkpoints.files import error_at
from llava_core.checkpoints.tensors import LazyTensor

_COMPUTED = {
    r"(^|\.)rotary_emb\.inv_freq$": "computed from the configuration",
    r"(^|\.)embeddings\.position_ids$": "a counter, not a weight",
}


def export_name(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Return a format's name for one of ours."""
    return next((theirs + name[len(ours) :] for ours, theirs in rules if name.startswith(ours)), name)


def import_name(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Return our name for one of a format's."""
    return next((ours + name[len(theirs) :] for ours, theirs in rules if name.startswith(theirs)), name)


def export_tensors(checkpoint: Checkpoint, rules: Iterable[tuple[str, str]]) -> dict[str, LazyTensor]:
    return {export_name(name, rules): tensor for name, tensor in checkpoint.tensors.items()}


def rename_tensors(
    tensors: Mapping[str, LazyTensor], rename: Callable[[str], str], where: Path
) -> tuple[dict[str, LazyTensor], dict[str, str], dict[str, str]]:
    """Return tensors under our names, their former names, and former name -> reason for those left out."""
    ours: dict[str, LazyTensor] = {}
    names: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for theirs, tensor in tensors.items():
        reason = next((text for pattern, text in _COMPUTED.items() if re.search(pattern, theirs)), None)
        if reason:
            left_out[theirs] = reason
            continue
        name = rename(theirs)
        if name in ours:
            raise error_at(where, f"{theirs} and {names[name]} are both {name}; remove one")
        ours[name], names[name] = tensor, theirs
    return ours, names, left_out
