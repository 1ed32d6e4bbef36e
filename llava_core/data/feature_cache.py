"""What a frozen tower makes of images, computed once and kept on disk, mapped into memory.

The tower is frozen in both stages, so its features are the same in every epoch, for every sample of an image and in
every ablation. They are kept in the dtype that the tower ran in: anything coarser would change the gradients.

An image is known by its bytes; tower, layer and preprocessing name the folder.
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

from llava_core.runtime import DataError, atomic_write, fingerprint, progress, read_json, sha256_file, shown, write_json

SHARD = 512  # images of one file; who kills a run loses the file that was being made
MOST_OF_DISK = 0.5  # of what is free

_STORED = {torch.bfloat16: np.uint16}  # numpy has no bf16: its bits


class FeatureCache:
    """Features of images in files of `SHARD` images.

    Args:
        folder: where the caches of all towers lie.
        facts: whatever the features depend on but the image: tower, layers, preprocessing, dtype.
        shape: (layers, P, D) of one image.
        dtype: of the features.
    """

    def __init__(self, folder: Path, facts: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder / fingerprint(facts), tuple(shape), dtype
        self._places: dict[str, tuple[np.ndarray, int]] = {}
        self._names: dict[str, list[Any]] = {}
        self._memo = self.folder / "images.json"
        if self._memo.exists():
            self._names = read_json(self._memo)
        for index in sorted(self.folder.glob("*.index.json")):
            self._open(index)
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            write_json(self.folder / "facts.json", facts)

    def _open(self, index: Path) -> None:
        path = index.with_name(index.name.replace(".index.json", ".npy"))
        keys = read_json(index)
        try:
            features = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{shown(path)}: no file of features ({error}); remove {shown(index)} and it") from error
        if features.shape != (len(keys), *self.shape):
            raise DataError(f"{shown(path)}: features of shape {features.shape}; remove {shown(index)} and it")
        self._places |= {key: (features, k) for k, key in enumerate(keys)}

    def key(self, image: Path) -> str:
        """SHA-256 of the image's bytes, remembered by its size and time."""
        found = os.stat(image)
        stamp = [found.st_size, found.st_mtime_ns]
        known = self._names.get(str(image))
        if known is None or known[:2] != stamp:
            known = self._names[str(image)] = [*stamp, sha256_file(image)]
        return str(known[2])

    def missing(self, images: Iterable[Path]) -> list[Path]:
        """The images, each once, whose features are not here."""
        found = {key: image for image in dict.fromkeys(images) if (key := self.key(image)) not in self._places}
        return list(found.values())

    def bytes_per_image(self) -> int:
        """Size of one image's features."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def room(self, images: int) -> str | None:
        """Why the disk does not hold the features of so many further images, or None."""
        need, free = images * self.bytes_per_image(), shutil.disk_usage(self.folder).free
        if need <= MOST_OF_DISK * free:
            return None
        return (
            f"features of {images} images need {need / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB that are free "
            f"{MOST_OF_DISK:.0%} may be used"
        )

    def fill(self, images: Sequence[Path], compute: Callable[[Sequence[Path]], torch.Tensor]) -> int:
        """Compute and keep what is missing.

        Args:
            images: their files.
            compute: gives the features (n, layers, P, D) of n images.

        Returns:
            How many were computed.
        """
        missing = self.missing(images)
        if missing:
            with progress(len(missing), "features of images", unit=" images") as bar:
                for begin in range(0, len(missing), SHARD):
                    some = missing[begin : begin + SHARD]
                    self._keep([self.key(image) for image in some], compute(some))
                    bar.update(len(some))
        atomic_write(self._memo, json.dumps(self._names, separators=(",", ":")))
        return len(missing)

    def _keep(self, keys: list[str], features: torch.Tensor) -> None:
        array = features.detach().cpu()
        stored = array.view(torch.uint16).numpy() if self.dtype in _STORED else array.numpy()
        buffer = io.BytesIO()
        np.save(buffer, stored)
        name = fingerprint(keys)
        atomic_write(self.folder / f"{name}.npy", buffer.getvalue())
        index = self.folder / f"{name}.index.json"
        write_json(index, keys)  # last: without its index a file counts as absent
        self._open(index)

    def get(self, images: Sequence[Path], layer: int = 0) -> torch.Tensor:
        """Features (n, P, D) of images that are here, of one of the layers kept.

        Raises:
            KeyError: an image is not here.
        """
        found = np.stack([features[k][layer] for features, k in (self._places[self.key(i)] for i in images)])
        tensor = torch.from_numpy(found)
        return tensor.view(self.dtype) if self.dtype in _STORED else tensor
