"""Folders of data sets: where generated ones are written, and one checksum over several files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from llava_core.runtime import ROOT, sha256_file


def generated_folder(folder: Path, data: str, mark: str) -> Path:
    """Return `folder`, or one under runs/ if `folder` has a (downloaded) data set that this project did not write.

    `data` is the data set's file, `mark` a file that only this project writes into the same folder.
    """
    if not (folder / data).exists() or (folder / mark).exists():
        return folder
    return ROOT / "runs" / "generated" / folder.name


def combined_sha256(files: Mapping[str, Path]) -> str:
    """Return the SHA-256 over the names and the SHA-256 of files, in the mapping's order."""
    lines = (f"{name} {sha256_file(path)}\n" for name, path in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
