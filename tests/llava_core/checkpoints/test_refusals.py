"""Folders that are recognised but not read: one line that names the file, what it is and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import foreign
import pytest
import torch
from checkpoint_fixtures import change_json, loaded, original, root  # noqa: F401 - fixtures
from safetensors.torch import save_file

from companion.checkpoints.inspection import inspect
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.open import open_checkpoint
from llava_core.runtime import CheckpointError


def refusal(path: Path) -> str:
    """The only problem of a checkpoint, which opening it raises, too."""
    (problem,) = inspect(path)["problems"]
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    assert "; fix: " in problem
    return str(problem)


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        ("llava_next", "several crops"),
        ("vipllava", "five layers"),
        ("video_llava", "second tower for videos"),
        ("llava_onevision", "SigLIP"),
        ("paligemma", "another architecture"),
    ],
)
def test_other_vision_language_models_are_named(model_type, what, tmp_path) -> None:
    config = {"model_type": model_type, "text_config": {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    problem = refusal(tmp_path)
    assert f"config.json: {model_type} is" in problem
    assert what in problem


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised weights (awq)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights (gptq)"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "(bitsandbytes)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised weights (MLX)"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantised weights (fp8)"),
    ],
)
def test_quantised_models_are_refused_by_their_config(original, fields, what) -> None:
    change_json(original / "config.json", **fields)
    assert what in refusal(original)


@pytest.mark.parametrize("end", [".qweight", ".scales", ".weight.absmax", ".SCB", ".weight_packed"])
def test_quantised_tensors_are_refused_by_name(original, end) -> None:
    name = f"model.layers.0.mlp.up_proj{end}"
    index = json.loads((original / "pytorch_model.bin.index.json").read_text())
    file = original / next(iter(index["weight_map"].values()))
    torch.save({**torch.load(file, weights_only=True), name: torch.zeros(2)}, file)
    assert f"{name} belongs to quantised weights" in refusal(original)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["zero_to_fp32.py", "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "python zero_to_fp32.py"),
        (["global_step10/mp_rank_00_model_states.pt", "latest"], "python zero_to_fp32.py"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "python zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "trainer_state.json"], "accelerate merge-weights"),
        (["__0_0.distcp", ".metadata"], "accelerate merge-weights"),
        (["pytorch_model_fsdp.bin", "optimizer.bin"], "rename it to pytorch_model.bin"),
        (["checkpoint-50/config.json", "trainer_state.json", "training_args.bin"], "name one of its checkpoint-N"),
        (["adapter_config.json"], "adapter without its weights"),
        (["ggml-model-q4_k.gguf", "mmproj-model-f16.gguf"], "llama.cpp's format"),
        (["config.json", "training_args.bin", "optimizer.pt", "rng_state_0.pth"], "a configuration without weights"),
    ],
)
def test_folders_without_weights_say_what_they_are(files, what, tmp_path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert what in refusal(tmp_path)


def test_a_gguf_file_is_named(tmp_path) -> None:
    (tmp_path / "llava.gguf").write_bytes(b"GGUF")
    assert "llava.gguf: llama.cpp's format" in refusal(tmp_path / "llava.gguf")


def test_shards_beside_the_joined_weights_are_no_fault(original) -> None:
    (original / "global_step10").mkdir()
    (original / "zero_to_fp32.py").write_text("")
    (original / "training_args.bin").write_bytes(b"")
    assert inspect(original)["problems"] == []


def test_a_quantised_base_is_refused(loaded, root, tmp_path) -> None:
    path = foreign.write_mmpretrain(loaded, tmp_path / "mm")
    base = foreign.write_llama(loaded, tmp_path / "base")
    change_json(base / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"base/config\.json: quantised weights \(gptq\)"):
        open_checkpoint(path, Options(base=str(base), vision_tower=str(root / "clip")))


@pytest.mark.parametrize("name", ["language_model", "vision_tower", "tokenizer"])
def test_a_part_that_is_a_link_is_refused(original, name, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (original / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name}: is a link to a folder; refused" in refusal(original)


def test_a_checkpoint_behind_a_link_is_read(original, tmp_path) -> None:
    (tmp_path / "latest").symlink_to(original)
    assert inspect(tmp_path / "latest")["problems"] == []
