"""The saved states of a run: whole tensors, independent of the engine and of the number of ranks.

`states/<step>/` holds safetensors files and `manifest.json` with the SHA-256 of each. It is written as `<step>.writing`
and renamed when it is complete, so a killed writer leaves the older states as they were.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import distributed as dist

from llava_core.checkpoints.files import contained_file, error_at, read_config
from llava_core.checkpoints.tensors import open_file
from llava_core.runtime import (
    CompanionError,
    display_path,
    fingerprint,
    rank,
    set_default_mode,
    sha256_file,
    world_size,
    write_json,
)

FILE_BYTES = 2_000_000_000
Tensors = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Starts a stream of named whole tensors, the same on every rank; they must not change until the save returns."""


class State:
    """A saved state; its tensors stay on disk until they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_config(folder, "manifest.json")
        self.step: int = manifest["step"]
        self.seconds: float = manifest["seconds"]
        self._tensors = {name: t for file in manifest["files"] for name, t in open_file(folder / file).items()}
        self.names = list(self._tensors)

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Return a tensor on the CPU; a CheckpointError if it is not there or of another shape."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != tuple(shape):
            found = "is missing" if tensor is None else f"has shape {tensor.shape}, not {tuple(shape)}"
            raise error_at(self.folder, f"{name} {found}; fix: start again with --resume never")
        return tensor.read()


class States:
    """The states of a run, of which the newest `keep` remain; `save` and `newest` must be called by every rank."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, seconds: float, tensors: Tensors) -> bool:
        """Save a state; if that fails, warn, leave the older states as they are and return False.

        If the disk is full, the oldest state makes room as long as a newer one is valid.
        """
        folder = self.folder / str(step)
        if _from_rank_0(lambda: folder.is_dir() and not _problem(folder)):  # resumed from it, or saved just now
            return True
        problem = self._write(step, seconds, tensors)
        if problem and re.search("No space|quota", problem) and _from_rank_0(self._make_room):
            problem = self._write(step, seconds, tensors)
        if problem and rank() == 0:
            sys.stderr.write(f"step {step}: the state was not saved ({problem}); the run goes on\n")
        return not problem

    def newest(self) -> State | None:
        """Return the newest state whose files are as they were written, None if there are no states.

        Damaged states are named on stderr and skipped; a CheckpointError if all are damaged.
        """
        step, problems = _from_rank_0(self._find)
        if step is None and problems:
            raise error_at(self.folder, f"no state is usable ({problems}); fix: start again with --resume never")
        return None if step is None else State(self.folder / str(step))

    def remove(self) -> None:
        """Remove all states, before a run that starts anew and after one that has finished; call it on any rank."""
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return sorted((f for f in self.folder.glob("*") if f.name.isdecimal()), key=lambda f: int(f.name))

    def _find(self) -> tuple[int | None, str]:
        """Return step and problems of the newest valid state and of those after it; remove what a kill left."""
        problems: list[str] = []
        for unfinished in self.folder.glob("*.writing"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for folder in reversed(self._folders()):
            problem = _problem(folder)
            if problem is None:
                if problems:
                    sys.stderr.write(f"damaged states are skipped: {'; '.join(problems)}; using step {folder.name}\n")
                return int(folder.name), ""
            problems.append(problem)
        return None, "; ".join(problems)

    def _make_room(self) -> bool:
        """Remove the states after the newest valid one, which are damaged, or else the oldest before it."""
        folders = self._folders()
        valid = next((k for k in reversed(range(len(folders))) if _problem(folders[k]) is None), 0)
        removed = folders[valid + 1 :] or folders[: min(valid, 1)]
        for folder in removed:
            shutil.rmtree(folder, ignore_errors=True)
        return bool(removed)

    def _write(self, step: int, seconds: float, tensors: Tensors) -> str | None:
        """Write a state once; return what went wrong on any rank."""
        writing = self.folder / f"{step}.writing"
        parts = all_ranks(_write_files(writing, tensors))
        files = {name: digest for part, _ in parts for name, digest in part.items()}
        content = {"step": step, "seconds": seconds, "world": world_size(), "files": files}
        problem = next((p for _, p in parts if p), None)
        return _from_rank_0(lambda: self._complete(writing, content, problem))

    def _complete(self, writing: Path, content: dict[str, Any], problem: str | None) -> str | None:
        """Write the manifest, rename the folder and remove old states; after a problem remove the folder."""
        target = writing.with_suffix("")
        try:
            if problem is None:
                write_json(writing / "manifest.json", {**content, "fingerprint": fingerprint(content)})
                _sync(writing)
                if target.exists():  # damaged, see `save`
                    shutil.rmtree(target)
                writing.rename(target)
                _sync(self.folder)
                _sync(self.folder.parent)
        except OSError as error:
            problem = str(error)
        if problem:
            shutil.rmtree(writing, ignore_errors=True)
            return problem
        folders = self._folders()
        k = folders.index(target) + 1  # later ones were found damaged, else the run had resumed from them
        for folder in (*folders[: max(0, k - self.keep)], *folders[k:]):
            shutil.rmtree(folder, ignore_errors=True)
        return None


def _write_files(folder: Path, tensors: Tensors) -> tuple[dict[str, str], str | None]:
    """Write this rank's tensors; return file -> SHA-256 and what went wrong. Holds one file's tensors at a time."""
    files: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    problem: str | None = None

    def flush() -> None:
        nonlocal problem
        path = folder / f"{rank():03d}-{len(files):05d}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(held, path)
            set_default_mode(path)
            _sync(path)
            files[path.name] = sha256_file(path)
        except (OSError, SafetensorError) as error:
            problem = f"{display_path(path)}: {error}"
        held.clear()

    for k, (name, tensor) in enumerate(tensors()):  # to its end even after a failure: the other ranks take part in it
        if k % world_size() == rank() and problem is None:
            held[name] = tensor.detach().cpu().contiguous()
            if sum(t.nbytes for t in held.values()) >= FILE_BYTES:
                flush()
    if held and problem is None:
        flush()
    return files, problem


def _problem(folder: Path) -> str | None:
    """Return what is wrong with a state, None if nothing is."""
    try:
        manifest = read_config(folder, "manifest.json")
        if manifest.pop("fingerprint", None) != fingerprint(manifest) or manifest["step"] != int(folder.name):
            return f"{display_path(folder / 'manifest.json')}: not as it was written"
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda name: sha256_file(contained_file(folder, name)), manifest["files"])
            for (name, written), digest in zip(manifest["files"].items(), digests, strict=True):
                if digest != written:
                    return f"{display_path(folder / name)}: its SHA-256 is not the manifest's"
    except (CompanionError, OSError, ValueError) as error:
        return str(error)
    return None


def all_ranks(value: Any) -> list[Any]:
    """Return the value of every rank, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def _from_rank_0(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 and return its result on every rank."""
    return all_ranks(function() if rank() == 0 else None)[0]


def _sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    if os.name == "nt":  # cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
