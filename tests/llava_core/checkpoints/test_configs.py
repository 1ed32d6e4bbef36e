"""Configurations of others: an allow-list, bounds before anything is built, fields that change the computation."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch

from llava_core.checkpoints.configs import build_on_meta, language_config, tower_config
from llava_core.runtime import CheckpointError

LLAMA = {"model_type": "llama", "max_position_embeddings": 2048}


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "phi3", "mixtral", "llava", "bert", None, ["llama"]])
def test_other_language_models_are_refused(model_type) -> None:
    with pytest.raises(CheckpointError, match="fix: take one of llama, mistral, qwen2, qwen3"):
        language_config({"model_type": model_type}, "config.json")


@pytest.mark.parametrize("value", [10**9, 2**40, 0, -1, "4096", 1.5, True, [32], {}])
@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"]
)
def test_impossible_sizes_are_refused_at_once(name, value) -> None:
    begin = time.monotonic()
    for model_type in ("llama", "qwen2"):  # qwen2 lists the kind of each layer
        with pytest.raises(CheckpointError, match=f"config.json: {name} is .*; fix: "):
            language_config({"model_type": model_type, name: value}, "config.json")
    if name in ("num_hidden_layers", "hidden_size"):
        with pytest.raises(CheckpointError, match=f"vision tower: {name} is"):
            tower_config({name: value})
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize(
    "fields",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"logit_scale": 0.0625},
        {"embedding_multiplier": 12.0},
        {"num_local_experts": 8},
        {"sliding_window": 1024},
        {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        {"hidden_act": "relu7"},
        {"rope_theta": 0},
    ],
)
def test_fields_that_change_the_computation_are_named(fields) -> None:
    ((name, value),) = fields.items()
    inner = [*value][-1] if isinstance(value, dict) and "mrope" not in str(value) else name
    inner = "rope_type" if "mrope" in str(value) else inner
    with pytest.raises(CheckpointError, match=rf"config.json: {re.escape(inner)} is .*; fix: "):
        language_config(LLAMA | fields, "config.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"partial_rotary_factor": 1.0}, {"final_logit_softcapping": None}, {"logit_scale": 1}, {"num_experts": 0},
        {"sliding_window": None}, {"sliding_window": 4096}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"attention_bias": True}, {"head_dim": 16}, {"pretraining_tp": 2}, {"mm_hidden_size": 1024},
    ],
)  # fmt: skip
def test_fields_that_change_nothing_or_are_built_are_read(fields) -> None:
    config = language_config(LLAMA | fields, "config.json")
    for name in ("attention_bias", "head_dim"):
        assert config[name] == fields.get(name, {"attention_bias": False, "head_dim": 128}[name])


@pytest.mark.parametrize("kind", ["siglip_vision_model", "pixtral", "dinov2", "clip_text_model", None])
def test_other_vision_towers_are_refused(kind) -> None:
    with pytest.raises(CheckpointError, match="vision tower: a vision tower of model_type "):
        tower_config({"vision_config": {"model_type": kind}})
    with pytest.raises(CheckpointError, match="num_channels is 4"):
        tower_config({"num_channels": 4})


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 4}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
)
def test_what_is_allowed_is_computed_as_in_transformers(model_type, fields) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **fields)).eval()
    config = language_config({"model_type": model_type, **sizes, **fields}, "config.json")
    ours = type(build_on_meta("language_model", config))(theirs.config.from_dict(config)).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)
        plain = type(theirs)(theirs.config.from_dict(sizes | {"sliding_window": None})).eval()
        if not fields.get("attention_bias"):
            plain.load_state_dict(theirs.state_dict())
            assert not torch.allclose(plain(ids).logits, ours(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5, no divisor of 32"),
        ({"tie_word_embeddings": False, "eos_token_id": 10**20}, "eos_token_id is 1000000000000000000"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e300}}, "factor is 1e\\+300"),
        ({"layer_types": ["linear_attention"] * 32}, "layer_types are"),
        ({"rope_parameters": {"rope_type": "default", "a": ["x"] * 10**5}}, "its configuration has [0-9,]+ characters"),
        ({"vocab_size": 10**20}, "vocab_size is 100000000000000000000"),
    ],
)
def test_numbers_that_fail_later_are_refused_before(fields, message) -> None:
    base = LLAMA | ({"model_type": "qwen2"} if "layer_types" in fields else {})
    with pytest.raises(CheckpointError, match=f"config.json: {message}.*; fix: "):
        language_config(base | fields, "config.json")


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "return_dict", "dtype"])
@pytest.mark.parametrize("value", ["x", 0, [], None])
def test_switches_of_a_forward_pass_are_not_taken(name, value) -> None:
    assert name not in language_config(LLAMA | {name: value}, "config.json")


@pytest.mark.parametrize("name", ["num_labels", "n_layer", "n_layers", "num_layers", "n_embd"])
def test_numbers_under_other_names_build_nothing(name) -> None:
    begin = time.monotonic()
    for value in (10**9, "many"):
        assert language_config(LLAMA | {name: value}, "config.json")["num_hidden_layers"] == 32
        assert tower_config({"num_hidden_layers": 3, name: value})["num_hidden_layers"] == 3
    assert time.monotonic() - begin < 5


def test_patches_larger_than_the_image_are_refused() -> None:
    with pytest.raises(CheckpointError, match="image_size is 14, not a number of pixels"):
        tower_config({"image_size": 14, "patch_size": 32})
