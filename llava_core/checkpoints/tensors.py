"""Weights files, read one tensor at a time and written shard by shard, without trusting them.

safetensors first; `.bin`, `.pth` and `.pt` only through PyTorch's `weights_only` reader, which refuses everything that
is not a tensor or a plain container. No index and no link leads out of the named folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llava_core.runtime import CheckpointError, DataError, read_json, sha256_file, shown, write_json

SHARD_BYTES = 5_000_000_000
PICKLES = (".bin", ".pth", ".pt")
_STEMS = ("model.safetensors", "pytorch_model.bin", "model.bin")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is asked for.

    Attributes:
        shape, dtype: known without reading.
        read: gives the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Lazy:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def then(self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None) -> Lazy:
        """The tensor after `change`, applied when it is read."""
        return Lazy(shape or self.shape, self.dtype, lambda: change(self.read()))

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def inside(folder: Path, name: str) -> Path:
    """The regular file `name` of a folder.

    Raises:
        CheckpointError: it is missing, no regular file, cannot be read, or lies (or links) outside the folder.
    """
    path = folder / name
    if not isinstance(name, str) or Path(name).name != name or name in (".", "..") or "\0" in name:
        raise CheckpointError(f"{shown(folder)}: '{name}' points outside the folder; refused; fix: name plain files")
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{shown(path)}: missing; fix: copy or download it again") from None
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise CheckpointError(f"{shown(path)}: cannot be followed ({error}); fix: put the file itself there") from None
    home = folder.resolve()
    # the hub's cache keeps snapshots/<commit>/<file> as links to ../../blobs/<hash> of the same model
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(h) for h in homes):
        raise CheckpointError(f"{shown(path)}: is a link out of its folder; refused; fix: copy the file into it")
    if not real.is_file():  # a directory or, worse, a pipe on which reading would wait for ever
        raise CheckpointError(f"{shown(path)}: not a regular file; fix: put the file itself there")
    return path


def has_file(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of that name, sound or not (`inside` then says what is wrong with it)."""
    return (folder / name).exists() or (folder / name).is_symlink()


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint folder.

    Raises:
        CheckpointError: it cannot be read or is no JSON object.
    """
    try:
        value = read_json(inside(folder, name))
    except (DataError, OSError) as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown(folder / name)}: not a JSON object; fix: copy or download it again")
    return value


# ------------------------------------------------------------------------------------------------ reading


def open_file(path: Path) -> dict[str, Lazy]:
    """The tensors of one weights file; nothing but its directory of contents is read.

    Raises:
        CheckpointError: damaged, cut off, or holding anything but tensors.
    """
    path = inside(path.parent, path.name)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise CheckpointError(f"{shown(path)}: not a weights file (.safetensors, {', '.join(PICKLES)})")


def _open_safetensors(path: Path) -> dict[str, Lazy]:
    try:
        file = safe_open(path, "pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shown(path)}: damaged or cut off ({error}); fix: copy or download it again") from error
    strange = [name for name, s in slices.items() if s.get_dtype() not in _DTYPES]
    if strange:
        kind = slices[strange[0]].get_dtype()
        raise CheckpointError(f"{shown(path)}: {strange[0]} has type {kind}, which is not read; fix: store it as BF16")

    def lazy(name: str) -> Lazy:
        described = slices[name]
        return Lazy(
            tuple(described.get_shape()), _DTYPES[described.get_dtype()], lambda: torch.as_tensor(file.get_tensor(name))
        )

    return {name: lazy(name) for name in slices}


def _open_pickle(path: Path) -> dict[str, Lazy]:
    content = load_pickle(path)
    if isinstance(content.get("state_dict"), Mapping):  # mmengine's checkpoints
        content = dict(content["state_dict"])
    for name, value in content.items():
        plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta
        if not isinstance(name, str) or not plain or value.is_quantized:
            raise CheckpointError(
                f"{shown(path)}: {name!r} is {type(value).__name__}, not a plain tensor; fix: name a file of weights "
                "alone"
            )
    return {name: Lazy.of(tensor) for name, tensor in content.items()}


def load_pickle(path: Path) -> dict[str, Any]:
    """The dict in a `.bin`, `.pth` or `.pt` file, mapped into memory, not copied.

    Raises:
        CheckpointError: damaged, no dict, or holding code; nothing of it is executed.
    """
    path = inside(path.parent, path.name)
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before PyTorch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{shown(path)}: holds more than tensors (code, perhaps) or is damaged; nothing of it was executed; "
            "fix: get the weights as safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{shown(path)}: damaged or cut off ({reason}); fix: download it again") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{shown(path)}: holds {type(content).__name__}, not a dict of tensors")
    return dict(content)


def has_weights(folder: Path) -> bool:
    """Whether a folder has a model's weights under one of the usual names, sound or not."""
    return any(has_file(folder, name) or has_file(folder, f"{name}.index.json") for name in _STEMS)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weights files of a folder, after its index where there is one; () if it has none.

    Raises:
        CheckpointError: the index is damaged, or names what is not a weights file of this folder.
    """
    for name in _STEMS:
        if has_file(folder, name):
            return (inside(folder, name),)
        if has_file(folder, f"{name}.index.json"):
            return tuple(inside(folder, shard) for shard in sorted(set(_weight_map(folder, name).values())))
    return ()


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    index = f"{name}.index.json"
    found = read_settings(folder, index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise CheckpointError(f"{shown(folder / index)}: no weight_map from tensors to files; fix: download it again")
    for shard in set(found.values()):
        if not shard.endswith((".safetensors", *PICKLES)):
            raise CheckpointError(
                f"{shown(folder / index)}: names {shard} as a shard, which is no weights file (an index that leads to "
                "an index?); fix: download it again"
            )
    return found


def open_folder(folder: Path) -> dict[str, Lazy]:
    """The tensors of a folder, from one file or from the shards of its index.

    Raises:
        CheckpointError: a file is missing or damaged, or index and shards disagree.
    """
    files = weight_files(folder)
    tensors: dict[str, Lazy] = {}
    where: dict[str, str] = {}
    for file in files:
        for name, tensor in open_file(file).items():
            if name in tensors:
                raise CheckpointError(f"{shown(folder)}: {name} stands in {where[name]} and in {file.name}")
            tensors[name], where[name] = tensor, file.name
    stems = [name for name in _STEMS if has_file(folder, f"{name}.index.json") and not has_file(folder, name)]
    for name, shard in _weight_map(folder, stems[0]).items() if stems else ():
        if where.pop(name, None) != shard:
            raise CheckpointError(
                f"{shown(folder / shard)}: {name} should be in it and is not; fix: download this shard again"
            )
    if stems and where:
        name, shard = next(iter(where.items()))
        raise CheckpointError(f"{shown(folder / shard)}: {name} is not in the index; fix: download the index again")
    return tensors


def single_weights_file(folder: Path) -> Path | None:
    """The one weights file of a folder that follows no naming rule (a `.pth`, say), or None."""
    try:
        found = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", *PICKLES)]
    except OSError as error:
        raise CheckpointError(f"{shown(folder)}: cannot be read ({error.strerror})") from None
    return found[0] if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------ writing


class ShardWriter:
    """Writes tensors into safetensors shards as they come; at most one shard is held in memory.

    Args:
        folder: where `model.safetensors`, or the shards and their index, go.
        shard_bytes: a shard is written before it grows larger than this.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""
        size = tensor.numel() * tensor.itemsize
        if self._held and self._bytes + size > self.shard_bytes:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        if any(tensor.data_ptr() == held.data_ptr() for held in self._held.values()):
            tensor = tensor.clone()  # two names of one tensor; safetensors keeps each for itself
        self._held[name] = tensor
        self._bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        save_file(self._held, self.folder / f"shard-{len(self._shards)}.part", metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held, self._bytes = {}, 0

    def close(self) -> dict[str, str]:
        """Write what is left and the index.

        Returns:
            Weights file -> SHA-256.
        """
        if self._held or not self._shards:
            self._flush()
        n = len(self._shards)
        names = [f"model-{k + 1:05d}-of-{n:05d}.safetensors" for k in range(n)] if n > 1 else ["model.safetensors"]
        for k, name in enumerate(names):
            (self.folder / f"shard-{k}.part").rename(self.folder / name)
        if n > 1:
            weight_map = {t: name for name, held in zip(names, self._shards, strict=True) for t in held}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)
        return {name: sha256_file(self.folder / name) for name in names}


def fingerprint_tensors(tensors: Mapping[str, Lazy]) -> str:
    """64 hex digits of names, shapes and values; equal for the same values in fp16, bf16 or fp32."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].read().to(torch.float32).contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def numbered(name: str) -> tuple[Any, ...]:
    """Sort key that puts layer 2 before layer 10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` when all went well, and vanishes otherwise.

    Raises:
        CheckpointError: `target` exists; nothing is ever overwritten.
    """
    import shutil

    target = Path(os.path.abspath(target))  # "." has no name of its own
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{shown(target)}: exists already; fix: choose another place, or remove it first")
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
