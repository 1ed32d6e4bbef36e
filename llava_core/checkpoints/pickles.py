"""Pickled weights (`.bin`, `.pth`, `.pt`) as untrusted input: no code of them is executed, and none fills the memory.

PyTorch's `weights_only` unpickler runs no code, but a pickle of a few bytes can still take it hours or gigabytes. So
the pickle's operations are checked before it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from llava_core.checkpoints.files import contained_file, error_at

_MOST_BYTES = 4_000_000  # of the pickle itself, without the numbers of the tensors: some 20,000 tensors
_MOST_MEMBERS = 50_000
_LONGEST_KEY = 1000
_DAMAGED = (  # what torch.load raises for damaged files
    RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, BadZipFile,
    OverflowError, AssertionError, NotImplementedError, RecursionError, MemoryError,
)  # fmt: skip
_GETS = ("GET", "BINGET", "LONG_BINGET")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_HASHED = {"SETITEM": 2, "SETITEMS": 2, "DICT": 2}  # operations on dicts -> one of so many values is a key
_PICKLES_OF_OLD_FILES = 5  # magic number, version, system, the tensors, the keys of their numbers


def load_pickle(path: Path) -> dict[str, Any]:
    """Read the dict in a `.bin`, `.pth` or `.pt` file by memory map; no code in it is executed."""
    path = contained_file(path.parent, path.name)
    try:
        _check_content(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before PyTorch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise error_at(path, "holds more than tensors; nothing of it was executed; fix: get safetensors") from None
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise error_at(path, f"damaged or cut off ({reason}); fix: download it again") from error
    if not isinstance(content, Mapping):
        raise error_at(path, f"holds {type(content).__name__}, not a dict of tensors")
    return dict(content)


def _check_content(path: Path) -> None:
    """Check sizes in an archive, and the operations of its pickles or of those of a file from before PyTorch 1.6."""
    with path.open("rb") as file:
        start = file.read(_MOST_BYTES)
    if not start.startswith(b"PK\x03\x04"):
        pickles = io.BytesIO(start)
        for _ in range(_PICKLES_OF_OLD_FILES):
            if pickles.tell() < len(start):
                _check_operations(pickles)
        return
    with ZipFile(path) as archive:
        entries = archive.infolist()
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise error_at(path, "compressed, which PyTorch's files are not; fix: download it again")
        if len(entries) > _MOST_MEMBERS:
            raise error_at(path, f"{len(entries):,} members, more than {_MOST_MEMBERS:,}; fix: download it again")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                if entry.file_size > _MOST_BYTES:
                    raise error_at(path, f"a pickle of {entry.file_size:,} bytes; fix: get safetensors")
                _check_operations(io.BytesIO(archive.read(entry)))


def _check_operations(pickled: io.BytesIO) -> None:
    """Raise UnpicklingError for what may take time or memory without a bound, although it runs no code.

    This is a key other than a short text or number, as the hash of nested tuples takes exponential time, and a
    container made of another. A value on the stack is represented by its operation or global, "key" if it may be one.
    """
    stack: list[str] = []
    marks: list[int] = []
    memo: dict[Any, str] = {}
    for operation, argument, _ in pickletools.genops(pickled):
        name = operation.name
        if name in _GETS:
            stack.append(memo[argument])
        elif name in _PUTS:
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        else:
            before = operation.stack_before
            items = []
            if pickletools.markobject in before:
                mark = marks.pop()
                items = stack[mark:]
                del stack[mark:]
                before = before[: before.index(pickletools.markobject)]
            first = len(stack) - len(before)
            if first < 0:
                raise IndexError("its operations do not belong together")
            taken = stack[first:] + items
            del stack[first:]
            keys = taken[len(taken) % _HASHED[name] :: _HASHED[name]] if name in _HASHED else []
            called = "collections OrderedDict" in taken and (name != "REDUCE" or taken[1] != "EMPTY_TUPLE")
            if called or any(key != "key" for key in keys) or (name == "BINPERSID" and taken != ["TUPLE"]):
                raise pickle.UnpicklingError
            stack += [_represented(name, argument, taken)] * len(operation.stack_after)


def _represented(name: str, argument: Any, taken: Sequence[str]) -> str:
    if name == "GLOBAL":
        if argument.split()[-1] in ("bytearray", "set", "Counter"):
            raise pickle.UnpicklingError
        return str(argument)
    if name.startswith("TUPLE"):
        return "NESTED" if any(value in ("TUPLE", "NESTED", "EMPTY_TUPLE") for value in taken) else "TUPLE"
    if isinstance(argument, str):
        return "key" if len(argument) <= _LONGEST_KEY else name
    return "key" if isinstance(argument, int) and "INT" in name and abs(argument) < 2**31 else name
