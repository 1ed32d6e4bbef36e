"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from llava_core import runtime

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():  # read when triton is first loaded: kernels then run on the CPU, step by step
    os.environ.setdefault("TRITON_INTERPRET", "1")
runtime.set_offline()


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of real files of other projects, not shipped with this one."""
    path = Path(os.environ.get("LLAVA_REFERENCE") or runtime.ROOT.parent / "shared" / "reference")
    if not path.is_dir():
        pytest.skip(f"no reference files at {path}; set LLAVA_REFERENCE to their folder")
    return path


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository root with the project's configs, for tests that write runs or data."""
    (tmp_path / "configs").symlink_to(runtime.ROOT / "configs")
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    return tmp_path
