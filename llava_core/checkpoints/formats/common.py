"""The layouts in which LLaVA checkpoints lie on disk, each a record: how to know it, read it and write it.

Names are ours inside (`vision_tower.`, `multi_modal_projector.`, `language_model.`) and a layout's own outside; the
rules between them are renamed prefixes, so a map is as exact backwards as forwards. A layout is recognised by the
content of its files, never by a folder's name. One more layout is one more `Layout` record.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.description import (
    TOKENIZER_FILES,
    Description,
    Opened,
    folder_of,
    in_order,
    language_config,
    tokenizer_folder,
    tower_config,
    tower_images,
)
from llava_core.checkpoints.tensors import Lazy, has_file, inside, open_folder, read_settings
from llava_core.registry import Registry
from llava_core.runtime import CheckpointError, shown, write_json

ASSUMED = {"template": "v1", "image_position": "first", "image_delimiters": None}  # LLaVA 1.0 to 1.5
BLOCK = "llava_core"  # where foreign configuration files keep our description
DELIMITERS = ["<im_start>", "<im_end>"]
_COMPUTED = {
    r"(^|\.)rotary_emb\.inv_freq$": "computed from the configuration",
    r"(^|\.)embeddings\.position_ids$": "a counter, not a weight",
}


@dataclass(frozen=True)
class Options:
    """What a caller adds to a checkpoint that does not hold everything.

    Attributes:
        base: folder or id of the language model that a projector, a LoRA or a `.pth` belongs to.
        vision_tower: folder or id of the tower, instead of the one that the checkpoint names.
    """

    base: str | None = None
    vision_tower: str | None = None


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints lie on disk.

    Attributes:
        name: as `llava convert --to` takes it.
        text: what it is, in a few words.
        found: whether a path is of this layout, by its content.
        read: opens it.
        write: writes an opened checkpoint into an empty folder; None for what is only read.
        rules: pairs (our prefix, the layout's prefix), the longest first.
        parts: what must be inside to write it; a vision tower may else be referred to.
        alone: whether nothing but `parts` is written.
    """

    name: str
    text: str
    found: Callable[[Path], bool]
    read: Callable[[Path, Options], Opened]
    write: Callable[[Opened, Path, int], None] | None = None
    rules: tuple[tuple[str, str], ...] = ()
    parts: tuple[str, ...] = ("multi_modal_projector", "language_model")
    alone: bool = False


LAYOUTS: Registry[Layout] = Registry("layout")


# ------------------------------------------------------------------------------------------------ names


def to_theirs(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A layout's name for ours."""
    for ours, theirs in rules:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def to_ours(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Our name for a layout's."""
    for ours, theirs in rules:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def renamed(
    tensors: Mapping[str, Lazy], rename: Callable[[str], str], where: Path
) -> tuple[dict[str, Lazy], dict[str, str], dict[str, str]]:
    """Tensors under our names, their former names, and what was left out with the reason."""
    ours: dict[str, Lazy] = {}
    names: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for theirs, tensor in tensors.items():
        reason = next((text for pattern, text in _COMPUTED.items() if re.search(pattern, theirs)), None)
        if reason:
            left_out[theirs] = reason
            continue
        name = rename(theirs)
        if name in ours:
            raise CheckpointError(f"{shown(where)}: {theirs} and {names[name]} are both {name}; remove one")
        ours[name], names[name] = tensor, theirs
    return ours, names, left_out


def untied(opened: Opened) -> Opened:
    """Drop an output embedding that repeats the input's, where the configuration says that they are one."""
    head, words = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    if not opened.description.tied or head not in opened.tensors or words not in opened.tensors:
        return opened
    if not torch.equal(opened.tensors[head].read(), opened.tensors[words].read()):
        raise CheckpointError(
            f"{shown(opened.path)}: its configuration ties the output embedding to the input's, but they differ; "
            'fix: set "tie_word_embeddings": false'
        )
    opened.left_out[opened.names.pop(head)] = "repeats the input embedding (tied)"
    return replace(opened, tensors={k: v for k, v in opened.tensors.items() if k != head})


# ------------------------------------------------------------------------------------------------ shared steps


def write_settings(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a part's configuration as `folder/config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))


def copy_tokenizer(opened: Opened, folder: Path) -> None:
    """Copy the tokenizer's files as they are."""
    for name in TOKENIZER_FILES if opened.tokenizer else ():
        if has_file(opened.tokenizer, name):  # type: ignore[arg-type]
            shutil.copyfile(inside(opened.tokenizer, name), folder / name)  # type: ignore[arg-type]


def unchanged(told: Description, config: Mapping[str, Any], where: str, fields: Mapping[str, Any]) -> None:
    """Make sure that a file which we wrote for others still says what our description in it says.

    Raises:
        CheckpointError: a field differs: others have changed the checkpoint since.
    """
    for name, value in fields.items():
        if config.get(name) != value:
            raise CheckpointError(
                f"{where}: {name} is {config.get(name)!r} and was {value!r} when it was exported; fix: remove "
                f"'{BLOCK}' from it, and what the other fields say will count"
            )


def with_tower_settings(description: Description, notes: list[str]) -> Description:
    """Fill in the tower's configuration and image settings from the tower that a checkpoint names, if it is here."""
    mode = description.facts.get("image_mode")
    facts = {k: v for k, v in description.facts.items() if k != "image_mode"}
    description = replace(description, facts=facts)
    if description.image is not None or description.tower_source is None:
        return description
    try:
        folder = folder_of(description.tower_source)
        config = tower_config(read_settings(folder, "config.json"))
        image = tower_images(folder, config["image_size"])
    except CheckpointError as error:
        notes.append(f"the vision tower is not here: {error}")
        return description
    notes.append(f"vision tower read from {shown(folder)}, which the files or the caller name")
    return replace(description, vision_tower=config, image=replace(image, mode=mode or image.mode).to_dict())


def open_renamed(
    layout: str, path: Path, tensors: dict[str, Lazy], rename: Callable[[str], str], description: Description,
    tokenizer: Path | None, notes: list[str],
) -> Opened:  # fmt: skip
    """Tensors under our names, with their description; a tower inside counts before one that is only named."""
    ours, names, left_out = renamed(tensors, rename, path)
    description = with_tower_settings(description, notes)
    if any(name.startswith("vision_tower.") for name in ours):
        if description.vision_tower is None:
            raise CheckpointError(f"{shown(path)}: a vision tower without configuration; fix: --vision-tower DIR")
        description = replace(description, tower_source=None)
    opened = Opened(layout, path, description, ours, names, left_out, tokenizer, notes)
    return in_order(untied(opened))


def open_language_model(source: str) -> Opened:
    """A plain language model (folder or hub id) under our names."""
    folder = folder_of(source)
    config = read_settings(folder, "config.json")
    description = Description(language_config(config, shown(folder)), None, None, 0, "linear", -2, None)
    ours, names, left_out = renamed(open_folder(folder), lambda name: f"language_model.{name}", folder)
    if not ours:
        raise CheckpointError(f"{shown(folder)}: holds no weights; fix: download the language model whole")
    opened = Opened("language model", folder, description, ours, names, left_out, tokenizer_folder(folder))
    return in_order(untied(opened))
