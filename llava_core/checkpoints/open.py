"""Open a checkpoint of any format."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_core.checkpoints.base_models import base_hash, model_folder
from llava_core.checkpoints.describe import Checkpoint, Options, check, check_usage
from llava_core.checkpoints.files import error_at
from llava_core.checkpoints.formats import hf, lora, mmpretrain, native, original, projector
from llava_core.checkpoints.formats.common import CheckpointFormat, open_language_model
from llava_core.checkpoints.refusals import refuse
from llava_core.runtime import CheckpointError, display_path

FORMATS: tuple[CheckpointFormat, ...] = (
    native.FORMAT, lora.FORMAT, hf.FORMAT, original.FORMAT, mmpretrain.FORMAT, projector.FORMAT
)  # fmt: skip
"""All formats, in the order in which they are tried. A new one is a module in `formats` and an entry here."""

_MOST_BASES = 8  # of which each is the base of the one before
_OPENING: ContextVar[tuple[Path, ...]] = ContextVar("opening", default=())  # base models that are being opened


def detect_format(path: Path) -> CheckpointFormat | None:
    """Return the format of a folder or file, by its content; None if it is not a LLaVA checkpoint."""
    try:
        exists = path.exists()
    except OSError as error:  # a folder above it may not be entered
        raise error_at(path, f"cannot be read ({error.strerror}); fix: change the permissions of its folder") from None
    if not exists:
        raise error_at(path, "there is no such file or folder; fix: check the path")
    refuse(path)
    return next((candidate for candidate in FORMATS if candidate.detect(path)), None)


def open_checkpoint(
    path: Path, options: Options | None = None, usage: Mapping[str, Any] | None = None, merge: bool = True,
    name_tower: bool = False,
) -> Checkpoint:  # fmt: skip
    """Open a checkpoint of any format; its tensors stay on disk until they are used.

    Args:
        path: folder, or file where the format is one.
        options: base model and tower that the files do not contain.
        usage: what the files leave open or say wrongly; names as in `describe.USAGE_FIELDS`.
        merge: merge an adapter into the weights; else it is the checkpoint's `adapter`.
        name_tower: the tower of `options` names the one in the checkpoint, where its files do not name it.
    """
    detected = detect_format(path)
    if detected is None:
        raise error_at(path, f"not a LLaVA checkpoint ({_content(path)}); fix: check the path")
    options = options or Options()
    base = detected.base_of(path, options) if detected.base_of else None
    checkpoint = detected.read(path, options, *([_open_base(base, options)] if base else []))
    check_usage(checkpoint)
    if detected is native.FORMAT:
        checkpoint = with_bases(checkpoint, options)
    checkpoint = (lora.merge(checkpoint) if merge else checkpoint).in_forward_order()
    name_tower = name_tower and "vision_tower" in checkpoint.parts
    if name_tower and options.vision_tower:
        checkpoint.description = checkpoint.description.with_tower_name(options.vision_tower)
    unused = {
        "--base": options.base is not None and not checkpoint.uses_base,
        "--vision-tower": not name_tower and options.vision_tower not in (None, checkpoint.description.tower_source),
    }
    for option in (option for option, is_unused in unused.items() if is_unused):
        raise error_at(path, f"contains what {option} names, which would be ignored; fix: omit it")
    if usage:
        checkpoint.description = checkpoint.description.with_usage(usage)
        corrected = tuple(name.replace("_", " ") for name in usage)
        checkpoint.notes = [note for note in checkpoint.notes if not note.startswith(corrected)]
        check_usage(checkpoint)
    return checkpoint


def _open_base(source: str, options: Options) -> Checkpoint:
    """Open a base model: a LLaVA checkpoint or a plain language model."""
    folder, above = model_folder(source), _OPENING.get()
    if folder.resolve() in above or len(above) > _MOST_BASES:
        raise error_at(folder, "is a base model of itself; fix: --base DIR")
    token = _OPENING.set((*above, folder.resolve()))
    try:
        if detect_format(folder) is not None:
            base = open_checkpoint(folder, Options(vision_tower=options.vision_tower), name_tower=True)
            base = base.require("language_model")
        else:
            base = open_language_model(source)
        check(base)
        return base
    finally:
        _OPENING.reset(token)


def with_bases(checkpoint: Checkpoint, options: Options) -> Checkpoint:
    """Open the base models that a checkpoint of our own format names, after a comparison with its hashes."""
    usage, where = checkpoint.description.usage, checkpoint.path
    for part in ("vision_tower", "language_model"):
        if part in checkpoint.parts:
            continue
        text = part.replace("_", " ")
        chosen = options.base if part == "language_model" else options.vision_tower
        source = chosen or usage["base"].get(part)
        if source is None:
            raise error_at(where, f"neither contains nor names its {text}")
        expected, actual = str(usage["base_hash"].get(part, "")), base_hash(source)
        if expected.partition(":")[0] != actual.partition(":")[0]:
            checkpoint.notes.append(f"{text} {display_path(source)}: taken unchecked, only its name is recorded")
        elif expected != actual:
            raise error_at(where, f"made with another {text} than {display_path(source)}; fix: restore that one")
        if part == "language_model":
            try:
                base = _open_base(source, Options())
            except CheckpointError as error:
                raise error_at(where, f"its language model cannot be read: {error}") from error
            half = {name: tensor for name, tensor in base.tensors.items() if name.startswith("language_model.")}
            tensors, names = checkpoint.tensors | half, base.names | checkpoint.names
            checkpoint = replace(checkpoint, tensors=tensors, names=names, uses_base=True)
    return checkpoint


def _content(path: Path) -> str:
    if path.is_file():
        return "a single file of another kind"
    names = sorted(entry.name for entry in path.iterdir())
    return "it is empty" if not names else f"it contains {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
