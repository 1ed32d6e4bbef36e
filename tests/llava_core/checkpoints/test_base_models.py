from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch

from llava_core.checkpoints.base_models import load_language_model, map_language_model
from llava_core.runtime import CheckpointError


def test_mapped_weights_are_views_of_the_file(tmp_path: Path) -> None:
    llm, _ = tiny.base_models(tmp_path)
    mapped, tokenizer = map_language_model(llm)
    loaded, other = load_language_model(llm, torch.float32)
    assert tokenizer.get_vocab() == other.get_vocab()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(mapped(ids).logits, loaded(ids).logits)
    if sys.platform == "linux":
        assert str(Path(llm) / "model.safetensors") in Path("/proc/self/maps").read_text()


def test_mapped_weights_must_fit_the_configuration(tmp_path: Path) -> None:
    llm, _ = tiny.base_models(tmp_path)
    config = Path(llm) / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48'))
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
        map_language_model(llm)
