"""Image availability: which rows of a TSV have an image that can be read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from companion.data_tools.parallel import parallel_map
from llava_core.data.instruct import file_fault, image_fault
from llava_core.runtime import DataError, atomic_write, display_path, fingerprint, progress, read_json

SHARD = 2000  # images: some seconds of decoding
MAX_EXAMPLES = 20
_ABSENT = [-1, -1]

Checked = tuple[list[int], tuple[str, str] | None]
"""Size and time of an image file, and its fault as `image_fault` returns it."""


@dataclass
class ImageAvailability:
    available: int = 0
    missing: int = 0
    unreadable: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


def image_availability(
    names: Iterable[str], images: str | Path, cache: str | Path | None = None, processes: int | None = 1
) -> tuple[NDArray[np.bool_], ImageAvailability]:
    """Decode the image of each row; a fault is counted and never stops the work.

    Args:
        names: the image file of each row.
        cache: folder for the results; an image is checked again if its size or time has changed.

    Returns (rows,) whether the image can be used, and the counts. Raises DataError without a folder of images.
    """
    images = Path(images)
    if not images.is_dir():
        raise DataError(f"{display_path(images)}: no such folder; give the folder of the images, or none")
    folder = Path(cache) / fingerprint(str(images.resolve())) if cache is not None else None

    def shards() -> Iterator[tuple[Any, ...]]:
        source = iter(names)
        while shard := list(islice(source, SHARD)):
            # named by its image names, so that another TSV with the same images finds it
            yield shard, images, folder / f"{fingerprint(shard)}.json" if folder else None

    usable: list[bool] = []
    result = ImageAvailability()
    with progress(0, "images", unit=" images") as bar:
        for shard in parallel_map(_check_shard, shards(), processes):
            for name, fault in shard:
                usable.append(fault is None)
                if fault is None:
                    result.available += 1
                    continue
                result.missing += fault[0] == "missing_image"
                result.unreadable += fault[0] != "missing_image"
                if len(result.examples) < MAX_EXAMPLES:
                    result.examples.append({"line": len(usable), "image": name, "why": fault[1]})
            bar.update(len(shard))
    return np.array(usable, bool), result


def _check_shard(names: list[str], images: Path, cached: Path | None) -> list[tuple[str, tuple[str, str] | None]]:
    """Names and faults of some images; those that have not changed since the cached check are not opened."""
    known = _load(cached, len(names))
    checked: list[Checked] = []
    for name, (stamp, fault) in zip(names, known, strict=True):
        now = _stamp(images, name)
        if now != stamp or now == _ABSENT:
            outside = file_fault(images, name, image=True)
            fault = image_fault(images / name) if outside is None else ("missing_image", outside)
        checked.append((now, fault))
    if cached is not None:
        atomic_write(cached, json.dumps(checked))
    return [(name, fault) for name, (_, fault) in zip(names, checked, strict=True)]


def _stamp(images: Path, name: str) -> list[int]:
    try:
        status = os.stat(images / name)
    except (OSError, ValueError):  # a name too long, a NUL
        return _ABSENT
    return [status.st_size, status.st_mtime_ns]


def _load(cached: Path | None, rows: int) -> list[Checked]:
    """The cached check of a shard; a damaged file counts as none."""
    if cached is not None and cached.exists():
        try:
            known = [(list(stamp), fault and (fault[0], fault[1])) for stamp, fault in read_json(cached)]
        except (DataError, TypeError, ValueError, IndexError):
            known = []
        if len(known) == rows:
            return known
    return [([], None)] * rows
