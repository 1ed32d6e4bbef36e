"""Which rows of a TSV have a usable image: looked at on all cores, and once per image."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from companion.data_tools.workers import spread
from llava_core.data.instruct import image_fault, leaves_folder
from llava_core.runtime import DataError, atomic_write, fingerprint, progress, shown

SHARD = 2000  # images: some seconds of decoding
USABLE, MISSING, UNREADABLE = range(3)
EXAMPLES = 20
_ABSENT = (-1, -1)

Looks = tuple[int, NDArray[np.uint8], list[dict[str, Any]]]  # first row, kind per row, the first that are wrong


@dataclass
class Coverage:
    """How many rows have a usable image, and examples of those that have not."""

    available: int = 0
    missing: int = 0
    unreadable: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


def look_at_images(
    names: Iterable[str],
    images: str | Path,
    decode: bool = True,
    cache: str | Path | None = None,
    processes: int | None = 1,
) -> tuple[NDArray[np.bool_], Coverage]:
    """Look at the image of every row; whatever is wrong with one is counted and never stops the work.

    Args:
        names: the image file of each row.
        images: their folder.
        decode: decode each image rather than only read its header.
        cache: folder where it is kept what was seen. An image is looked at again when its size or time has changed.
        processes: how many look; None for one per core.

    Returns:
        (rows,) whether the image can be used, and the coverage.

    Raises:
        DataError: there is no such folder of images.
    """
    images = Path(images)
    if not images.is_dir():
        raise DataError(f"{shown(images)}: no such folder; give the folder of the images, or none")
    folder = Path(cache) / fingerprint([str(images.resolve()), decode]) if cache is not None else None
    looks: list[Looks] = []

    def shards() -> Iterator[tuple[Any, ...]]:
        source, first = iter(names), 0
        while some := list(islice(source, SHARD)):
            # named by what is looked at: the same images are known under another TSV, too
            yield first, some, images, decode, folder / f"{fingerprint(some)}.npz" if folder else None
            first += len(some)

    with progress(0, "images", unit=" images") as bar:
        for shard in spread(_look, shards(), processes):
            looks.append(shard)
            bar.update(len(shard[1]))
    looks.sort(key=lambda shard: shard[0])
    kinds = np.concatenate([shard[1] for shard in looks]) if looks else np.zeros(0, np.uint8)
    examples = [example for _, _, wrong in looks for example in wrong][:EXAMPLES]
    count = np.bincount(kinds, minlength=3)
    return kinds == USABLE, Coverage(int(count[USABLE]), int(count[MISSING]), int(count[UNREADABLE]), examples)


def _look(first: int, names: list[str], images: Path, decode: bool, kept: Path | None) -> Looks:
    """Look at the images of one shard, except at those that are as they were when they were looked at before."""
    stamps = np.array([_stamp(images, name) for name in names], np.int64)
    old_stamps, kinds, reasons = _load(kept, len(names))
    for row in np.flatnonzero((stamps != old_stamps).any(axis=1) | (stamps == _ABSENT).all(axis=1)).tolist():
        reasons.pop(row, None)
        if leaves_folder(names[row]):
            fault: tuple[str, str] | None = ("missing_image", "the name leaves the folder of images")
        else:
            fault = image_fault(images / names[row], decode)
        kinds[row] = USABLE if fault is None else MISSING if fault[0] == "missing_image" else UNREADABLE
        if fault is not None:
            reasons[row] = fault[1]
    if kept is not None:
        buffer = io.BytesIO()
        text = np.frombuffer("\n".join(why.replace("\n", " ") for why in reasons.values()).encode(), np.uint8)
        np.savez_compressed(buffer, stamps=stamps, kinds=kinds, rows=np.array(list(reasons), np.int64), reasons=text)
        atomic_write(kept, buffer.getvalue())
    some = sorted(reasons)[:EXAMPLES]
    return first, kinds, [{"line": first + row + 1, "image": names[row], "why": reasons[row]} for row in some]


def _stamp(images: Path, name: str) -> tuple[int, int]:
    try:
        found = os.stat(images / name)
    except (OSError, ValueError):
        return _ABSENT
    return found.st_size, found.st_mtime_ns


def _load(kept: Path | None, rows: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], dict[int, str]]:
    """What was seen before; a damaged file counts as nothing."""
    if kept is not None and kept.exists():
        try:
            with np.load(kept, allow_pickle=False) as file:
                reasons = dict(zip(file["rows"].tolist(), file["reasons"].tobytes().decode().split("\n"), strict=False))
                if len(file["kinds"]) == rows:
                    return file["stamps"], file["kinds"], reasons
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass
    return np.full((rows, 2), -2, np.int64), np.zeros(rows, np.uint8), {}
