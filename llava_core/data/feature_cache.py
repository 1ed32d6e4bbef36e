"""Features of the frozen vision tower, computed once per image and memory-mapped from disk.

They keep the dtype of the tower: a coarser one would change the gradients. An image is identified by the hash of its
bytes; tower, layers and preprocessing name the folder.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_core.runtime import (
    DataError,
    atomic_write,
    display_path,
    fingerprint,
    progress,
    read_json,
    sha256_file,
    write_json,
)

SHARD = 512  # images per file; a killed run loses the unfinished file
MAX_DISK_FRACTION = 0.5  # of the free space


class FeatureCache:
    """Features of shape (layers, P, D_vision) per image, `SHARD` images per file.

    `facts` is what they depend on, apart from the image: tower, layers, preprocessing, dtype.
    """

    def __init__(self, folder: Path, facts: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder / fingerprint(facts), tuple(shape), dtype
        self._places: dict[str, tuple[np.ndarray, int]] = {}
        self._hashes: dict[str, list[Any]] = {}
        self._hashes_file = self.folder / "images.json"
        if self._hashes_file.exists():
            self._hashes = read_json(self._hashes_file)
        for index in sorted(self.folder.glob("*.index.json")):
            self._open(index)
        if not (self.folder / "facts.json").exists():  # several ranks may do this at a time
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "facts.json", facts)

    def _open(self, index: Path) -> None:
        path = index.with_name(index.name.replace(".index.json", ".npy"))
        keys = read_json(index)
        try:
            features = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{display_path(path)}: no file of features ({error}); remove {display_path(index)} and it"
            ) from error
        if features.shape != (len(keys), *self.shape):
            raise DataError(
                f"{display_path(path)}: features of shape {features.shape}; remove {display_path(index)} and it"
            )
        self._places |= {key: (features, k) for k, key in enumerate(keys)}

    def key(self, image: Path) -> str:
        """SHA-256 of the image's bytes; recomputed if its size or time has changed, kept if the file was removed."""
        known = self._hashes.get(str(image))
        try:
            status = os.stat(image)
        except FileNotFoundError:
            if known is None:
                raise DataError(
                    f"{display_path(image)}: there is no such image; fix: check the image folder of the data set"
                ) from None
            return str(known[2])
        stamp = [status.st_size, status.st_mtime_ns]
        if known is None or known[:2] != stamp:
            known = self._hashes[str(image)] = [*stamp, sha256_file(image)]
        return str(known[2])

    def missing(self, images: Iterable[Path]) -> list[Path]:
        """The images without cached features, each once."""
        missing = {key: image for image in dict.fromkeys(images) if (key := self.key(image)) not in self._places}
        return list(missing.values())

    def bytes_per_image(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def disk_shortage(self, images: int) -> str | None:
        """Why the disk cannot hold the features of so many more images, or None."""
        need, free = images * self.bytes_per_image(), shutil.disk_usage(self.folder).free
        if need <= MAX_DISK_FRACTION * free:
            return None
        return (
            f"features of {images} images need {need / 2**30:.1f} GiB; of the {free / 2**30:.1f} GiB of free space "
            f"{MAX_DISK_FRACTION:.0%} may be used"
        )

    def fill(self, images: Sequence[Path], compute: Callable[[Sequence[Path]], torch.Tensor]) -> int:
        """Store missing features, by `compute` (n, layers, P, D_vision) of n images; return the number of images."""
        missing = self.missing(images)
        if missing:
            with progress(len(missing), "features of images", unit=" images") as bar:
                for begin in range(0, len(missing), SHARD):
                    shard = missing[begin : begin + SHARD]
                    self._store([self.key(image) for image in shard], compute(shard))
                    bar.update(len(shard))
        atomic_write(self._hashes_file, json.dumps(self._hashes, separators=(",", ":")))
        return len(missing)

    def _store(self, keys: list[str], features: torch.Tensor) -> None:
        array = features.detach().cpu()
        # numpy has no bf16: its bits
        stored = array.view(torch.uint16).numpy() if self.dtype == torch.bfloat16 else array.numpy()
        buffer = io.BytesIO()
        np.save(buffer, stored)
        name = fingerprint(keys)
        atomic_write(self.folder / f"{name}.npy", buffer.getvalue())
        index = self.folder / f"{name}.index.json"
        write_json(index, keys)  # last: a file without an index does not count
        self._open(index)

    def get(self, images: Sequence[Path], layer: int = 0) -> torch.Tensor:
        """Features (n, P, D_vision) from one of the cached layers; a KeyError for an image that is not cached."""
        places = [self._places[self.key(image)] for image in images]
        stacked = np.stack([features[k][layer] for features, k in places])
        tensor = torch.from_numpy(stacked)
        return tensor.view(self.dtype) if self.dtype == torch.bfloat16 else tensor
