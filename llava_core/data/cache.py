"""Checked samples in an arrow file that is mapped into memory: a large data set is ready at once, and takes no memory.

The first start reads and checks the records and writes the file. Its name holds a hash of the source, the folder of
the images and how they were checked, so a changed source is checked anew and an old file can never be taken for it.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from llava_core.data.instruct import Sample, choose_kinds, import_pyarrow, iter_instruct, load_instruct
from llava_core.runtime import ROOT, DataError, fingerprint, sha256_file, shown

VERSION = 1  # of the columns
CACHED_FROM = 2**25
"""Bytes of a source from which `load_large` uses the cache; what is smaller is read and checked in seconds."""
_ROWS = 4096  # per record batch: what is unpacked at once


class CachedSamples(Sequence[Sample]):
    """Samples of a mapped arrow file; each is made when it is asked for.

    Args:
        path: the arrow file.
        images: folder of the images, which the file does not name.
        indices: which rows, in which order; None for all.
    """

    def __init__(self, path: Path, images: Path | None, indices: np.ndarray | None = None) -> None:
        arrow, ipc = import_pyarrow(), import_pyarrow("ipc")
        self.path, self.images = path, images
        try:
            with ipc.open_file(arrow.memory_map(str(path))) as file:
                self.table = file.read_all()  # maps, does not copy
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{shown(path)}: damaged ({error}); remove it, it is made again") from error
        self.indices = np.arange(len(self.table)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, k: int) -> Sample: ...
    @overload
    def __getitem__(self, k: slice) -> CachedSamples: ...
    def __getitem__(self, k: int | slice) -> Sample | CachedSamples:
        if isinstance(k, slice):
            return self.select(self.indices[k])
        row = self.table.slice(int(self.indices[k]), 1).to_pylist()[0]
        image = row["image"] if row["image"] is None else Path(row["image"])
        if image is not None and self.images is not None:
            image = self.images / image
        texts = row["texts"]
        return Sample(row["id"], list(zip(texts[::2], texts[1::2], strict=True)), image, row["kind"])

    @property
    def kinds(self) -> list[str | None]:
        """The kind of each sample."""
        kinds: list[str | None] = self.table["kind"].take(self.indices).to_pylist()
        return kinds

    def select(self, rows: np.ndarray) -> CachedSamples:
        """The samples of these rows of the file, in this order; the file stays mapped once."""
        chosen = object.__new__(CachedSamples)
        chosen.path, chosen.images, chosen.table, chosen.indices = self.path, self.images, self.table, rows
        return chosen

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process maps the file itself
        return CachedSamples, (self.path, self.images, self.indices)


def load_large(
    path: str | Path,
    images: str | Path | None = None,
    subset: Mapping[str, float] | None = None,
    seed: int = 0,
    decode: bool = False,
    folder: str | Path | None = None,
) -> Sequence[Sample]:
    """Load records for a training run: a file of `CACHED_FROM` bytes or more through the cache, a smaller one directly.

    Without pyarrow, which only the cache needs, a large file is loaded directly too. Images are checked when the cache
    is made: one that goes missing later is found when it is needed.

    Args:
        path, images, subset, seed, decode: as for `load_instruct`.
        folder: as for `cached_instruct`.

    Raises:
        DataError: as `load_instruct`.
    """
    path = Path(path)
    small = not path.is_file() or path.stat().st_size < CACHED_FROM
    if small or importlib.util.find_spec("pyarrow") is None:
        return load_instruct(path, images, subset=subset, seed=seed, decode=decode)
    samples = cached_instruct(path, images, decode, folder)
    return samples.select(np.array(choose_kinds(samples.kinds, subset, seed, path))) if subset else samples


def pick(samples: Sequence[Sample], rows: Sequence[int]) -> Sequence[Sample]:
    """The samples of these numbers, in this order, without making those that the cache holds."""
    if isinstance(samples, CachedSamples):
        return samples.select(samples.indices[np.asarray(rows, dtype=np.int64)])
    return [samples[k] for k in rows]


def cached_instruct(
    path: str | Path,
    images: str | Path | None = None,
    decode: bool = False,
    folder: str | Path | None = None,
) -> CachedSamples:
    """Load instruction records like `load_instruct`, from the second time on without reading them.

    Args:
        path: a `.json`, `.jsonl` or `.parquet` file of records.
        images: folder of the images. They are checked when the cache is made, and not again; `load_image` names a file
            that went missing since.
        decode: decode every image when the cache is made.
        folder: where the caches lie; `data/.cache` by default.

    Returns:
        The samples, in the order of the file.

    Raises:
        DataError: as `load_instruct`; nothing is cached then.
    """
    path = Path(path)
    images = Path(images) if images is not None else None
    where = None if images is None else str(images.absolute())
    key = fingerprint([VERSION, sha256_file(path), path.suffix, where, decode])
    target = (Path(folder) if folder is not None else ROOT / "data" / ".cache") / f"{path.stem}-{key}.arrow"
    if not target.is_file():
        _write(target, path, images, decode)
    return CachedSamples(target, images)


def _write(target: Path, path: Path, images: Path | None, decode: bool) -> None:
    """Write the cache batch by batch, whole or not at all."""
    arrow, ipc = import_pyarrow(), import_pyarrow("ipc")
    text = arrow.string()
    schema = arrow.schema([("id", text), ("kind", text), ("image", text), ("texts", arrow.list_(text))])
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        with ipc.new_file(temporary, schema) as writer:
            for rows in _batches(path, images, decode):
                writer.write_batch(arrow.RecordBatch.from_pylist(rows, schema))
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _batches(path: Path, images: Path | None, decode: bool) -> Iterator[list[dict[str, Any]]]:
    samples = iter_instruct(path, images, decode)
    while chunk := list(islice(samples, _ROWS)):
        yield [
            {
                "id": sample.id,
                "kind": sample.kind,
                "image": _name(sample.image, images),
                "texts": [text for turn in sample.turns for text in turn],
            }
            for sample in chunk
        ]


def _name(image: Path | None, images: Path | None) -> str | None:
    return None if image is None else str(image.relative_to(images) if images is not None else image)
