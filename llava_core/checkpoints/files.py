"""Files of checkpoint folders as untrusted input: none outside the folder is read, none is left half-written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_core.runtime import (
    CheckpointError,
    DataError,
    display_path,
    folder_lock,
    printable,
    read_json,
    sha256_file,
    shortened,
)

_LFS = b"version https://git-lfs"
_MOST_BYTES = {
    "tokenizer.json": 40_000_000, "vocab.json": 40_000_000, "merges.txt": 40_000_000, "config.json": 1_000_000,
    "manifest.json": 1_000_000, "adapter_config.json": 1_000_000,
}  # fmt: skip
_MOST_BYTES_OF_TEXT = 10_000_000  # of any other text; far more than an index of shards has
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LONGEST = 800  # characters of an error


def error_at(path: str | Path, problem: str) -> CheckpointError:
    """Return the error of a file or folder; `problem` also says how to fix it, names and values in it are others'."""
    text = printable(f"{display_path(path)}: {problem}")
    return CheckpointError(text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}")


def contained_file(folder: Path, name: str) -> Path:
    """Return `folder / name` if it is a regular file, and neither is nor links to a path outside the folder."""
    path = folder / name
    if not isinstance(name, str) or Path(name).name != name or name in (".", "..") or "\0" in name:
        raise error_at(folder, f"'{name}' points outside the folder; refused; fix: use plain file names")
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        raise error_at(path, "missing; fix: copy or download it again") from None
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise error_at(path, f"cannot be followed ({error}); fix: put the file itself there") from None
    home = folder.resolve()
    # the hub's cache keeps snapshots/<commit>/<file> as links to ../../blobs/<hash> of the same model
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(h) for h in homes):
        raise error_at(path, "is a link out of its folder; refused; fix: copy the file into it")
    if not real.is_file():  # a folder, or a pipe that blocks the reader
        raise error_at(path, "not a regular file; fix: put the file itself there")
    status, most = real.stat(), _MOST_BYTES.get(name, _MOST_BYTES_OF_TEXT)
    if path.suffix in (".json", ".model", ".txt", ".jinja") and status.st_size > most:
        raise error_at(path, f"larger than {most:,} bytes; fix: download it again")
    stored = 512 * getattr(status, "st_blocks", 0)  # 0 where the file system does not tell
    if 0 < stored < status.st_size / 10 and status.st_size > _MOST_BYTES_OF_TEXT:
        raise error_at(path, f"only {stored:,} of its {status.st_size:,} bytes are there; fix: download it again")
    try:
        with real.open("rb") as file:
            is_pointer = file.read(len(_LFS)) == _LFS
    except OSError as error:
        raise error_at(path, f"cannot be read ({error.strerror}); fix: change its permissions") from None
    if is_pointer:
        raise error_at(path, "a Git LFS pointer instead of the file; fix: `git lfs pull` in its repository")
    return path


def has_file(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of that name, readable or not (`contained_file` checks it)."""
    return os.path.lexists(folder / name)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint folder, without NaN, infinity or repeated keys; else a CheckpointError."""
    path = contained_file(folder, name)
    try:
        value = read_json(path, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_without_repeats)
        if _SURROGATE.search(path.read_bytes()):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error_at(path, "holds half a character (a lone surrogate); fix: download it again") from None
    except (DataError, OSError) as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(value, dict):
        raise error_at(folder / name, "not a JSON object; fix: copy or download it again")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"{shortened(next(key for key, n in counts.items() if n > 1))!r} is there twice")
    return fields


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` on success; without `overwrite`, `target` must be new or empty.

    One process writes at a time: another one waits for it with `overwrite`, and without gets a CheckpointError.
    """
    target = Path(os.path.abspath(target))  # "." has no name of its own
    temporary, replaced = (target.with_name(f".{target.name}.{state}") for state in ("writing", "replaced"))
    with contextlib.ExitStack() as stack:
        try:
            _lock_new_folder(stack, temporary, wait=overwrite)
        except BlockingIOError:
            raise error_at(target, "another process is writing it; fix: wait for it, or choose another place") from None
        try:
            if replaced.exists():  # a process was killed between the two renames, or before the last line
                shutil.rmtree(replaced) if target.exists() else replaced.rename(target)
            if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise error_at(target, "exists already; fix: choose another place, or remove it first")
            for left in temporary.iterdir():  # by a killed process
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield temporary
            if target.exists():
                target.rename(replaced)
            temporary.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, CheckpointError):  # of a file in it, which the user knows by the target's name
                raise CheckpointError(str(error).replace(temporary.name, target.name)) from error
            if (full := re.search("No space left|[Qq]uota exceeded", str(error))) and isinstance(error, Exception):
                # also of safetensors and tokenizers, which have errors of their own
                raise error_at(target, f"not written: {full[0]} on the disk; fix: choose another place") from error
            raise


def _lock_new_folder(stack: contextlib.ExitStack, folder: Path, wait: bool) -> None:
    """Create a folder and lock it; another process may rename or remove it in between."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return stack.enter_context(folder_lock(folder, wait))


def verify_files(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of a base model, after a comparison of its files with its manifest."""
    if not (folder / "manifest.json").is_file():
        raise CheckpointError(
            f"{display_path(folder)}: no base model here; fix: `git checkout -- models`, or `llava base-models`"
        )
    files: dict[str, str] = read_config(folder, "manifest.json").get("files", {})
    if not isinstance(files, dict):
        raise error_at(folder / "manifest.json", "files is no object of hashes; fix: copy the base model again")
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256_file(contained_file(folder, name)) != digest:
            raise CheckpointError(
                f"{display_path(folder / name)}: missing, or its SHA-256 is not the manifest's; fix: `git checkout -- "
                "models`, or `llava base-models` to train it again"
            )
    return files
