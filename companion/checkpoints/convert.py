"""Open a checkpoint of any layout, and convert it into another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from companion.checkpoints.divergence import first_divergence, first_module, verify_export
from llava_core.checkpoints.description import Opened, check
from llava_core.checkpoints.formats import (
    hf,  # noqa: F401 - enter their layouts
    lora,  # noqa: F401 - enter their layouts
    mmpretrain,  # noqa: F401 - enter their layouts
    original,  # noqa: F401 - enter their layouts
    projector,  # noqa: F401 - enter their layouts
)
from llava_core.checkpoints.formats.common import LAYOUTS, Options, to_theirs
from llava_core.checkpoints.open import open_checkpoint
from llava_core.checkpoints.tensors import SHARD_BYTES, whole_folder
from llava_core.runtime import CheckpointError, shown


def targets() -> list[str]:
    """Names of the layouts that can be written."""
    return [name for name in LAYOUTS.names() if LAYOUTS.get(name).write is not None]


def key_map(opened: Opened, to: str) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """The weight map: for each tensor its name in its own layout, ours, the name in layout `to`, and its shape."""
    rules = LAYOUTS.get(to).rules
    return [(opened.names.get(n, n), n, to_theirs(n, rules), t.shape) for n, t in opened.tensors.items()]


def convert(
    source: Path,
    target: Path,
    to: str,
    options: Options | None = None,
    facts: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint in another layout, read it back and compare every tensor.

    Args:
        source: folder or file of any layout.
        target: folder that does not exist yet.
        to: name of a layout that can be written.
        options, facts: as in `open_checkpoint`.
        shard_bytes: largest size of one weights file.
        verify: for "hf", also run both models in fp32 and compare the output of every module; needs memory for both.

    Returns:
        `layout` of the source, `to`, `tensors`, `parameters`, `bytes`, `left_out`, `notes`, `largest_difference` of
        verified modules as a share of their output.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; or what was written differs from what was
            read, with the first tensor or module of a forward pass that differs. Nothing is left behind.
    """
    layout = LAYOUTS.get(to)
    if layout.write is None:
        raise CheckpointError(f"layout '{to}' is only read; these can be written: {', '.join(targets())}")
    if verify and to != "hf":
        raise CheckpointError(
            f"only what is written as 'hf' can be run by other code; '{to}' is compared tensor by tensor"
        )
    opened = open_checkpoint(source, options, facts).need(*layout.parts)
    check(opened)
    if layout.alone:
        opened.tensors = {n: t for n, t in opened.tensors.items() if n.startswith(layout.parts)}
    with whole_folder(target) as folder:
        layout.write(opened, folder, shard_bytes)
        written = open_checkpoint(folder)
        difference = first_divergence(opened, written)
        if difference is not None:
            raise CheckpointError(f"{shown(source)}: converted to '{to}' it is not the same: {difference}")
        modules = verify_export(opened, folder) if verify else []
        wrong = first_module(modules)
        if wrong is not None:
            raise CheckpointError(
                f"{shown(source)}: in transformers the first module that differs is {wrong.name}, by "
                f"{wrong.largest:.3g} of {wrong.size:.3g}"
            )
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return {
        "layout": opened.layout, "to": to, "tensors": len(written.tensors), "parameters": written.parameters,
        "bytes": size, "left_out": opened.left_out, "notes": opened.notes, "path": shown(target),
        "largest_difference": max((m.relative for m in modules), default=None),
    }  # fmt: skip
