"""Loading: no code of a checkpoint runs, vision towers are compared, paths are relative."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_fixtures import (  # noqa: F401 - fixtures
    change_json,
    loaded,
    original,
    root,
)
from safetensors.torch import load_file, save_file

from companion.checkpoints.convert import convert
from companion.checkpoints.inspection import inspect
from llava_core.checkpoints.base_models import base_hash
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import load
from llava_core.checkpoints.open import open_checkpoint
from llava_core.inference import prompt_ids
from llava_core.runtime import CheckpointError


def test_code_of_a_tokenizer_is_never_run(original, tmp_path) -> None:
    mark = tmp_path / "executed"
    (original / "evil.py").write_text(f"import os\nos.system('touch {mark}')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    change_json(original / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    code = f"import llava_core; llava_core.load({str(original)!r})"
    subprocess.run([sys.executable, "-c", code], input="y\n" * 9, text=True, capture_output=True, check=False)
    inspect(original)
    assert not mark.exists()


def test_vision_towers_are_compared_by_their_files(original, root, tmp_path) -> None:
    convert(original, tmp_path / "c", "llava")
    copy = tmp_path / "copy"
    shutil.copytree(root / "clip", copy)
    assert load(tmp_path / "c", options=Options(vision_tower=str(copy)))
    tensors = load_file(copy / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="made with another vision tower"):
        load(tmp_path / "c", options=Options(vision_tower=str(copy)))
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    change_json(tmp_path / "c" / "manifest.json", base_hash={"vision_tower": base_hash("someone/clip")})
    assert manifest["base_hash"]["vision_tower"].startswith("files:")
    checkpoint = open_checkpoint(tmp_path / "c")
    assert any("taken unchecked" in note for note in checkpoint.notes)


def test_paths_are_relative_to_the_working_folder(original, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("original").manifest["template"] == "v1"
    convert(Path("original"), Path("out"), "llava")
    assert prompt_ids(load("out"), [("what", None)], True)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load("~nobody-of-that-name/x")
