"""Open a checkpoint of any layout, and convert it into another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_core.runtime import CheckpointError, shown
from llava_core.weights import checkpoint, hf, lora, mmpretrain, original, projector  # noqa: F401 - enter their layouts
from llava_core.weights.description import Opened, check, check_facts
from llava_core.weights.divergence import first_divergence, first_module, verify_export
from llava_core.weights.layouts import LAYOUTS, Options, to_theirs
from llava_core.weights.tensors import SHARD_BYTES, whole_folder

_ORDER = ("llava", "lora", "hf", "original", "mmpretrain", "projector")


def targets() -> list[str]:
    """Names of the layouts that can be written."""
    return [name for name in LAYOUTS.names() if LAYOUTS.get(name).write is not None]


def layout_of(path: Path) -> str | None:
    """Name of the layout of a folder or file, by its content; None if it is none of a LLaVA's.

    Raises:
        CheckpointError: the path does not exist, or its files cannot be read.
    """
    if not path.exists():
        raise CheckpointError(f"{shown(path)}: there is no such file or folder; fix: check the path")
    return next((name for name in _ORDER if LAYOUTS.get(name).found(path)), None)


def open_checkpoint(path: Path, options: Options | None = None, facts: Mapping[str, Any] | None = None) -> Opened:
    """Open a checkpoint of any layout; its tensors stay on disk until they are asked for.

    Args:
        path: folder, or file where the layout is one.
        options: base model and tower that the files do not hold.
        facts: what the files leave open or say wrongly, as in `description.USE_FACTS`.

    Raises:
        CheckpointError: no LLaVA checkpoint, or a damaged one; the message names file and fix.
    """
    name = layout_of(path)
    if name is None:
        raise CheckpointError(f"{shown(path)}: not a LLaVA checkpoint ({_content(path)}); fix: check the path")
    options = options or Options()
    opened = LAYOUTS.get(name).read(path, options)
    check_facts(opened)
    if name == "llava":
        opened = checkpoint.with_bases(opened, options)
    unused = {
        "--base": options.base is not None and not opened.uses_base,
        "--vision-tower": options.vision_tower not in (None, opened.description.tower_source),
    }
    for option in (option for option, given in unused.items() if given):
        raise CheckpointError(f"{shown(path)}: holds what {option} names, so that would be ignored; fix: leave it out")
    if facts:
        opened.description = opened.description.with_facts(facts)
        said = tuple(name.replace("_", " ") for name in facts)
        opened.notes = [note for note in opened.notes if not note.startswith(said)]
        check_facts(opened)
    return opened


def _content(path: Path) -> str:
    if path.is_file():
        return "a single file of another kind"
    names = sorted(entry.name for entry in path.iterdir())
    return "it is empty" if not names else f"it holds {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"


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
