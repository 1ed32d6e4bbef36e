"""Opening a checkpoint: format, template and image position are detected."""

from __future__ import annotations

import json

import foreign
import pytest
import torch
from checkpoint_fixtures import loaded, original, root, world, write_checkpoint  # noqa: F401 - fixtures
from safetensors.torch import save_file

from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.open import detect_format, open_checkpoint
from llava_core.runtime import CheckpointError


def test_safetensors_precede_an_index_of_another_format(world, tmp_path) -> None:
    root, loaded, _ = world
    source = write_checkpoint("original", loaded, root, tmp_path / "source")  # pytorch_model.bin.index.json and shards
    tensors = {n: t + 1 for n, t in foreign.language_tensors(loaded.model).items()} | foreign.projector_tensors(
        loaded.model
    )
    save_file(tensors, source / "model.safetensors")
    words = open_checkpoint(source).tensors["language_model.model.embed_tokens.weight"].read()
    assert torch.equal(words, tensors["model.embed_tokens.weight"])


def test_release_with_an_extra_projector_file(original, loaded) -> None:
    torch.save(foreign.projector_tensors(loaded.model), original / "mm_projector.bin")
    assert getattr(detect_format(original), "name", None) == "original"
    assert "language_model" in open_checkpoint(original).parts


def test_unused_options_are_refused(original, root) -> None:
    with pytest.raises(CheckpointError, match="contains what --base names"):
        open_checkpoint(original, Options(base=str(root / "llm")))


def test_base_models_in_a_cycle_are_refused(tmp_path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        torch.save({}, tmp_path / name / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is a base model of itself; fix: --base DIR"):
        open_checkpoint(tmp_path / "a")
