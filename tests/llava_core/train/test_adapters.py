"""LoRA and QLoRA: what is adapted, the checkpoint of a run, and that the merged model is the trained one."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_fixtures import BITS, adapted, bases  # noqa: F401 - a fixture
from foreign import logits
from torch import nn
from training_root import make_training_root

from companion.checkpoints.convert import convert
from companion.checkpoints.inspection import inspect
from llava_core.checkpoints.load import build, load, load_into, save_checkpoint
from llava_core.config import AdapterConfig, load_experiment
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.runtime import ConfigError
from llava_core.train.adapters import add_adapters
from llava_core.train.launch import launch

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("bits", BITS)
def test_adapters_are_on_all_linear_layers_of_the_decoder(bases, bits) -> None:
    loaded = build(*bases, torch.bfloat16, bits=bits)
    before, kind = logits(loaded), type(loaded.model.language_model)
    loaded.model.set_trainable(["projector", "language_model"])
    add_adapters(loaded.model, AdapterConfig(r=4, alpha=8), seed=3)
    trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    places = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    assert places == set(LINEAR)
    assert len(trained) == 2 + 2 * len(LINEAR) * 2
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {name for name in trained if ".lora_" not in name} == {
        "multi_modal_projector.weight", "multi_modal_projector.bias"
    }  # fmt: skip
    assert type(loaded.model.language_model) is kind
    assert torch.equal(logits(loaded), before)


def test_adapters_start_from_the_seed(bases) -> None:
    def first(seed: int) -> torch.Tensor:
        model = build(*bases, torch.float32).model
        state = torch.get_rng_state()
        add_adapters(model, AdapterConfig(r=4, alpha=8), seed, torch.bfloat16)
        assert torch.equal(torch.get_rng_state(), state)
        return model.language_model.model.layers[0].self_attn.q_proj.lora_A["default"].weight

    assert first(1).dtype == torch.bfloat16
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_projector_and_output_layer_are_not_quantised(bases) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = adapted(bases, bits=4).model
    quantised = {n.split(".")[0] for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert quantised == {"language_model"}
    for module in (model.language_model.lm_head, model.multi_modal_projector):
        assert type(module) is nn.Linear
        assert module.weight.dtype == torch.float32


def test_qlora_trains_adapters_and_projector(bases) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    loaded = adapted(bases, bits=4)
    weight = loaded.model.language_model.model.layers[0].mlp.up_proj.base_layer.weight
    before, value = weight.detach().clone(), logits(loaded)
    ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * 4, 9, 10]])
    loaded.model.train()(ids, torch.randn(1, 3, 32, 32)).logits.square().sum().backward()
    for name, p in loaded.model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (".lora_" in name or "projector" in name), name
    loaded.model.eval()
    assert torch.equal(logits(loaded), value)
    assert torch.equal(weight, before)  # an evaluation on a CPU does not pack it


def test_qlora_without_bitsandbytes_is_refused(bases, monkeypatch) -> None:
    from llava_core.checkpoints import base_models

    monkeypatch.setattr(base_models, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="4 needs bitsandbytes; fix: pip install"):
        build(*bases, torch.float32, bits=4)


@pytest.mark.parametrize("bits", BITS)
def test_merged_model_equals_the_active_adapter(bases, bits, tmp_path) -> None:
    loaded = adapted(bases, bits)
    wanted = logits(loaded)
    path = save_checkpoint(tmp_path / "c", loaded, "adapter", template="v0", image_position="first")
    assert not torch.allclose(logits(build(*bases, torch.float32)), wanted, atol=0.1)
    torch.testing.assert_close(logits(load(path)), wanted, rtol=1e-5, atol=1e-5)
    report = inspect(path)
    assert report["problems"] == []
    assert any("LoRA adapter of rank 4 merged" in note for note in report["notes"])
    convert(path, tmp_path / "merged", "llava")
    assert "base_nf4" not in json.loads((tmp_path / "merged" / "manifest.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted, rtol=1e-5, atol=1e-5)


def test_peft_reads_the_adapter_of_a_checkpoint(bases, tmp_path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = adapted(bases)
    path = save_checkpoint(tmp_path / "c", loaded, "adapter")
    ids = torch.arange(3, 12)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[0]), path)
    with torch.no_grad():
        wanted = loaded.model.eval()(ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_adapters_of_stage_1_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="adapters belong to the language model"):
        load_experiment("pretrain", "mini", {"train.adapters": {"r": 4, "alpha": 8}})


@pytest.mark.parametrize("bits", BITS)
def test_a_run_with_adapters_is_trained_and_opened(workspace, bits) -> None:
    make_training_root(workspace)
    values = {"train.epochs": 2, "train.global_batch": 8, "train.max_length": 96, "train.learning_rate": 5e-3}
    adapters = {"r": 4, "alpha": 8, "dropout": 0.05, "bits": bits}
    record = launch(load_experiment("finetune", "mini", {**values, "train.adapters": adapters}))
    rows = [row for row in record.metrics() if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    manifest = json.loads((record.checkpoint / "manifest.json").read_text())
    assert (manifest["kind"], manifest["run_id"]) == ("adapter", record.run_id)
    loaded = load(record.checkpoint)
    base = build(str(workspace / "models/llm"), str(workspace / "models/clip"), torch.float32)
    load_into(base.model, record.checkpoint, ("multi_modal_projector.",))
    assert not torch.equal(logits(loaded), logits(base))
