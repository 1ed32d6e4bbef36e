"""Where generated data sets are written."""

from __future__ import annotations

from pathlib import Path

from llava_core.runtime import ROOT


def generated_folder(folder: Path, data: str, mark: str) -> Path:
    """Return `folder`, or a folder under runs/ if `folder` has a data set that this project did not write.

    A downloaded data set must not be replaced by a generated one.

    Args:
        folder: the data set's folder.
        data: the data set's file.
        mark: a file that only this project writes into the same folder.
    """
    if not (folder / data).exists() or (folder / mark).exists():
        return folder
    return ROOT / "runs" / "generated" / folder.name
