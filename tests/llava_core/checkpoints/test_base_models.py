from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from checkpoint_fixtures import change_json

from llava_core.checkpoints.base_models import load_language_model, load_vision_tower, map_language_model
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"llm: no language model of model_type 'gpt2'"),
        ({"num_hidden_layers": 10**9}, r"llm: num_hidden_layers is 1000000000"),
        ({"quantization_config": {"quant_method": "awq"}}, r"llm/config\.json: quantised weights \(awq\)"),
    ],
)
def test_language_models_are_checked_before_they_are_built(change, message, tmp_path: Path) -> None:
    llm, _ = tiny.base_models(tmp_path)
    change_json(Path(llm) / "config.json", **change)
    for load in (partial(load_language_model, dtype=torch.float32), map_language_model):
        with pytest.raises(CheckpointError, match=message):
            load(llm)


def test_vision_towers_are_checked_before_they_are_built(tmp_path: Path) -> None:
    _, clip = tiny.base_models(tmp_path)
    config = json.loads((Path(clip) / "config.json").read_text())
    vision = config["vision_config"] | {"num_hidden_layers": 10**9}
    change_json(Path(clip) / "config.json", vision_config=vision)
    with pytest.raises(CheckpointError, match="clip: num_hidden_layers is 1000000000"):
        load_vision_tower(clip, torch.float32)
