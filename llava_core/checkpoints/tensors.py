"""Weights files as untrusted input: tensors are read one at a time and written shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llava_core.checkpoints.files import contained_file, error_at, has_file, read_config
from llava_core.checkpoints.pickles import load_pickle
from llava_core.runtime import set_default_mode, sha256_file, write_json

SHARD_BYTES = 5_000_000_000
PICKLE_SUFFIXES = (".bin", ".pth", ".pt")
_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
_NOT_MODELS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # further pickles of a Trainer
_QUANTISED = (  # ends of names of packed weights and their scales
    ".qweight", ".qzeros", ".g_idx", ".scales", ".absmax", ".quant_map", ".SCB", ".weight_scale", ".weight_packed",
)  # fmt: skip
_STEMS = ("model.safetensors", "pytorch_model.bin", "model.bin")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST_TENSORS = 20_000  # the language models that are read have up to 12 per layer
_MOST_HEADER_BYTES = 10_000_000


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that stays on disk until `read` is called; its shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None) -> LazyTensor:
        """Apply a function when the tensor is read; give the new `shape` if it changes."""
        return LazyTensor(shape or self.shape, self.dtype, lambda: function(self.read()))

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """Convert to a dtype when the tensor is read."""
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def open_file(path: Path) -> dict[str, LazyTensor]:
    """Open one weights file; of safetensors only the header is read. Reading NaN or infinity is a CheckpointError."""
    path = contained_file(path.parent, path.name)
    if path.suffix not in _SUFFIXES:
        raise error_at(path, f"not a weights file (.safetensors, {', '.join(PICKLE_SUFFIXES)})")
    tensors = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    for name, tensor in tensors.items():
        if name.endswith(_QUANTISED):
            raise error_at(path, f"{name} belongs to quantised weights; fix: take the model in 16 or 32 bits")
        if not name.isprintable():
            raise error_at(path, f"{name} is no name of a tensor; fix: download it again")
        if 0 in tensor.shape:
            raise error_at(path, f"{name} is {tensor.shape}, without a number; fix: get the complete file")
        if tensor.dtype in _FLOATS:
            tensors[name] = tensor.map(partial(check_finite, name=name, path=path))
        elif not name.endswith("position_ids"):
            raise error_at(path, f"{name} has type {tensor.dtype}; fix: take the model in 16 or 32 bits floating-point")
    return tensors


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> torch.Tensor:
    """Return a tensor of `path` as it is; a CheckpointError if it holds NaN or infinity."""
    ends = torch.stack(tensor.aminmax())  # NaN if one of its numbers is; several times faster than isfinite
    if not ends.isfinite().all():
        raise error_at(path, f"{name} holds NaN or infinity; fix: download it again, or take an earlier checkpoint")
    return tensor


def _check_number(tensors: int, path: Path) -> None:
    if tensors > _MOST_TENSORS:
        raise error_at(path, f"{tensors:,} tensors, more than {_MOST_TENSORS:,}; fix: download it again")


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    if _MOST_HEADER_BYTES < header_bytes <= path.stat().st_size:
        raise error_at(path, f"a header of {header_bytes:,} bytes; fix: download it again")
    try:
        file = safe_open(path, "pt")
        _check_number(len(file.keys()), path)
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, MemoryError) as error:  # the last one where a limit forbids to map the file
        raise error_at(path, f"damaged or cut off ({error}); fix: copy or download it again") from error
    tensors: dict[str, LazyTensor] = {}
    for name, header in slices.items():
        dtype = _DTYPES.get(header.get_dtype())
        if dtype is None:
            raise error_at(path, f"{name} has type {header.get_dtype()}, which is not supported; fix: store it as BF16")
        tensors[name] = LazyTensor(tuple(header.get_shape()), dtype, partial(file.get_tensor, name))
    return tensors


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    content = load_pickle(path)
    if isinstance(content.get("state_dict"), Mapping):  # mmengine's checkpoints
        content = dict(content["state_dict"])
    _check_number(len(content), path)
    for name, value in content.items():
        plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta
        if not isinstance(name, str) or not plain or value.is_quantized:
            raise error_at(path, f"{name!r} is {type(value).__name__}, not a plain tensor; fix: name a weights file")
        if value.nbytes > value.untyped_storage().nbytes():  # a view that repeats its values would fill the memory
            raise error_at(path, f"{name} is {tuple(value.shape)}, larger than its storage; fix: download it again")
    return {name: LazyTensor.of(tensor) for name, tensor in content.items()}


def has_weights(folder: Path) -> bool:
    """Whether a folder has a model's weights, readable or not, under one of the usual names."""
    return any(has_file(folder, name) or has_file(folder, f"{name}.index.json") for name in _STEMS)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weights files of a folder, those of its index if it has one; () if there are none."""
    return tuple(contained_file(folder, name) for name in _files_and_index(folder)[0])


def _files_and_index(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return names of the weights files, and the index's map from tensor to file (empty for a single file)."""
    for name in _STEMS:
        if has_file(folder, name):
            return [name], {}
        if has_file(folder, f"{name}.index.json"):
            weight_map = _read_index(folder, f"{name}.index.json")
            return sorted(set(weight_map.values())), weight_map
    return [], {}


def _read_index(folder: Path, index: str) -> dict[str, str]:
    weight_map = read_config(folder, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise error_at(folder / index, "no weight_map from tensors to files; fix: download it again")
    for shard in set(weight_map.values()):
        if not shard.endswith(_SUFFIXES):
            raise error_at(folder / index, f"{shard} is not a weights file (an index that leads to an index?)")
    return weight_map


def open_folder(folder: Path) -> dict[str, LazyTensor]:
    """Open the tensors of a folder, from one file or from the shards of its index."""
    files, index = _files_and_index(folder)
    tensors: dict[str, LazyTensor] = {}
    file_of: dict[str, str] = {}
    for file in files:
        for name, tensor in open_file(contained_file(folder, file)).items():
            if name in tensors:
                raise error_at(folder, f"{name} is in {file_of[name]} and in {file}")
            tensors[name], file_of[name] = tensor, file
    _check_number(len(tensors), folder)
    for name, shard in index.items():
        if file_of.pop(name, None) != shard:
            raise error_at(folder / shard, f"{name} should be in it and is not; fix: download this shard again")
    if index and file_of:
        name, shard = next(iter(file_of.items()))
        raise error_at(folder / shard, f"{name} is not in the index; fix: download the index again")
    return tensors


def lone_weights_file(path: Path) -> Path | None:
    """Return the weights file of a checkpoint that is one file of any name: the path, or the only one of a folder."""
    if not path.is_dir():
        return path if path.suffix in _SUFFIXES else None
    files = files_with_weights(path)
    return files[0] if len(files) == 1 and not has_weights(path) else None


def files_with_weights(folder: Path) -> list[Path]:
    """Return the files of a folder that may hold a model's weights, whatever their names."""
    try:
        return [f for f in sorted(folder.iterdir()) if f.suffix in _SUFFIXES and not f.name.startswith(_NOT_MODELS)]
    except OSError as error:
        raise error_at(folder, f"cannot be read ({error.strerror}); fix: change its permissions") from None


def write_tensors(folder: Path, tensors: Mapping[str, LazyTensor], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write shards of up to `shard_bytes` or one larger tensor, one in memory at a time; return file -> SHA-256."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.bytes
    n = len(shards)
    files = [f"model-{k + 1:05d}-of-{n:05d}.safetensors" for k in range(n)] if n > 1 else ["model.safetensors"]
    hashes = {
        file: write_file(folder / file, {name: tensors[name] for name in names})
        for file, names in zip(files, shards, strict=True)
    }
    if n > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return hashes


def write_file(file: Path, tensors: Mapping[str, LazyTensor]) -> str:
    """Read tensors once, in their order, and write them to one safetensors file; return its SHA-256."""
    shard: dict[str, torch.Tensor] = {}
    for name, lazy in tensors.items():
        tensor = lazy.read().detach().cpu().contiguous()
        if any(tensor.data_ptr() == other.data_ptr() for other in shard.values()):
            tensor = tensor.clone()  # safetensors refuses two names of one storage
        shard[name] = tensor
    save_file(shard, file, metadata={"format": "pt"})
    set_default_mode(file)
    return sha256_file(file)
