"""Open a checkpoint of any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_core.checkpoints import checkpoint
from llava_core.checkpoints.description import Opened, check_facts
from llava_core.checkpoints.formats import hf, lora, mmpretrain, original, projector  # noqa: F401 - enter their layouts
from llava_core.checkpoints.formats.common import LAYOUTS, Options
from llava_core.runtime import CheckpointError, shown

_ORDER = ("llava", "lora", "hf", "original", "mmpretrain", "projector")


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
