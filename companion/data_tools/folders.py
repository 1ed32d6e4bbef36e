"""Where generated data sets are written."""

from __future__ import annotations

from pathlib import Path

from llava_core.runtime import ROOT


def generated_folder(folder: Path, data: str, mark: str) -> Path:
    """Return `folder`, or one under runs/ if `folder` has a (downloaded) data set that this project did not write.

    `data` is the data set's file, `mark` a file that only this project writes into the same folder.
    """
    if not (folder / data).exists() or (folder / mark).exists():
        return folder
    return ROOT / "runs" / "generated" / folder.name
