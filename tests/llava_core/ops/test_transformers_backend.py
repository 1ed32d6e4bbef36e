"""Packed attention in transformers' models: a packed row equals its separate samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError

from llava_core.ops import BACKENDS, PackedMask
from llava_core.ops.packed_mask import positions
from llava_core.ops.transformers_backend import NAME, packed_attention
from llava_core.runtime import CompanionError, ConfigError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
# one system text, two images under it, the first with three conversations; then a sample of its own, and padding
ENDS = [[22] * 3 + [14] * 4 + [9] * 2 + [11] * 2 + [14] * 3 + [22] * 8 + [27] * 5 + [28, 29]]


def language_model(kind: str = "Llama", **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def packed() -> tuple[torch.Tensor, PackedMask]:
    packed_mask = PackedMask(torch.tensor(ENDS, dtype=torch.int32))
    return torch.randint(0, 64, packed_mask.ends.shape, generator=torch.Generator().manual_seed(1)), packed_mask


def supervised(ranges: list[tuple[int, int]], seen: set[int]) -> list[int]:
    """Places in the sample whose next token no earlier sample has predicted: each prediction of the row once."""
    tokens = [t for first, last in ranges for t in range(first, last)]
    new = [k for k in range(len(tokens) - 1) if tokens[k + 1] == tokens[k] + 1 and tokens[k] not in seen]
    seen.update(tokens[k] for k in new)
    return new


def loss_alone(model: Any, ids: torch.Tensor, packed_mask: PackedMask) -> torch.Tensor:
    total, seen = torch.zeros(()), set[int]()
    for ranges in packed_mask.samples[0]:
        sample = torch.cat([ids[0, first:last] for first, last in ranges])
        logits, places = model(input_ids=sample[None]).logits[0], supervised(ranges, seen)
        total = total + F.cross_entropy(logits[places], sample[[p + 1 for p in places]], reduction="sum")
    return total


def loss_packed(model: Any, ids: torch.Tensor, packed_mask: PackedMask) -> torch.Tensor:
    logits = model(input_ids=ids, packed_mask=packed_mask, position_ids=positions(packed_mask)).logits[0]
    total, seen = torch.zeros(()), set[int]()
    for ranges in packed_mask.samples[0]:
        tokens = [t for first, last in ranges for t in range(first, last)]
        places = [tokens[p] for p in supervised(ranges, seen)]
        total = total + F.cross_entropy(logits[places], ids[0, [p + 1 for p in places]], reduction="sum")
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_logits_equal_those_of_separate_samples(kind: str) -> None:
    model, (ids, packed_mask) = language_model(kind).eval(), packed()
    with torch.no_grad(), packed_attention(model):
        row = model(input_ids=ids, packed_mask=packed_mask, position_ids=positions(packed_mask)).logits[0]
    with torch.no_grad():
        for ranges in packed_mask.samples[0]:
            index = torch.cat([torch.arange(first, last) for first, last in ranges])
            single = model(input_ids=ids[:, index]).logits[0]
            torch.testing.assert_close(row[index], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "cpu_varlen", "triton"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_separate_samples(checkpointing: bool, backend: str) -> None:
    if backend != "auto" and (reason := BACKENDS.get(backend).unavailable(torch.zeros(1, 1, 1, 8))) is not None:
        pytest.skip(f"{backend}: {reason}")
    model, (ids, packed_mask) = language_model().train(), packed()
    expected = gradients(model, loss_alone(model, ids, packed_mask))
    if checkpointing:
        model.gradient_checkpointing_enable()
    with packed_attention(model, backend):
        actual = gradients(model, loss_packed(model, ids, packed_mask))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-5)


def test_checkpointed_backward_outside_the_context_fails() -> None:
    model, (ids, packed_mask) = language_model().train(), packed()
    model.gradient_checkpointing_enable()
    with packed_attention(model):
        loss = loss_packed(model, ids, packed_mask)
    with pytest.raises(CheckpointError):
        loss.backward()


def test_lora_with_checkpointing_has_the_same_gradients() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)
    model, (ids, packed_mask) = peft.get_peft_model(language_model(), settings).train(), packed()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    expected = gradients(model, loss_alone(model, ids, packed_mask))
    with packed_attention(model):
        actual = gradients(model, loss_packed(model, ids, packed_mask))
    assert expected
    assert all("lora" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-5)


def test_previous_implementation_is_restored() -> None:
    model = language_model()
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match="without `packed_mask`"), packed_attention(model):
        model(input_ids=packed()[0])
    assert model.config._attn_implementation == before != NAME


def test_no_dense_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask is built")

    for name in ("sdpa_mask", "eager_mask", "_vmap_expansion_sdpa", "_non_vmap_expansion_sdpa"):
        monkeypatch.setattr(masking_utils, name, forbidden)
    model, (ids, packed_mask) = language_model(), packed()
    with packed_attention(model):
        model(input_ids=ids, packed_mask=packed_mask, position_ids=positions(packed_mask))


def test_scaling_of_the_model_is_used() -> None:
    ids, packed_mask = packed()
    model = language_model().eval()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    first = packed_mask.samples[0][0][0][1]
    with torch.no_grad():
        single = model(input_ids=ids[:, :first]).logits
        with packed_attention(model):
            row = model(input_ids=ids, packed_mask=packed_mask, position_ids=positions(packed_mask)).logits
    torch.testing.assert_close(row[:, :first], single, rtol=1e-5, atol=1e-5)


def test_unsupported_features_are_named() -> None:
    ids, packed_mask = packed()
    place = {"input_ids": ids, "position_ids": positions(packed_mask)}
    model = language_model().train()
    with packed_attention(model):
        with pytest.raises(ConfigError, match="without `packed_mask`"):
            model(**place)
        with pytest.raises(ConfigError, match="rows of"):
            model(**place, packed_mask=PackedMask.from_lengths([[3, 4]]))
        with pytest.raises(ConfigError, match="attention_mask"):
            model(**place, packed_mask=packed_mask, attention_mask=torch.ones_like(ids))
        with pytest.raises(ConfigError, match="attention_mask"):
            model(**place, packed_mask=packed_mask, attention_mask=torch.ones(1, 1, 29, 29))
        with pytest.raises(ConfigError, match="softcap"):
            model(**place, packed_mask=packed_mask, softcap=30.0)
        with pytest.raises(ConfigError, match="positions continue"):
            model(input_ids=ids, packed_mask=packed_mask)
    with packed_attention(dropping := language_model(attention_dropout=0.1).train()):
        with pytest.raises(ConfigError, match=r"dropout of 0\.1"):
            dropping(**place, packed_mask=packed_mask)
        dropping.eval()(**place, packed_mask=packed_mask)
    sliding = language_model("Mistral", sliding_window=16)
    with packed_attention(sliding), pytest.raises(ConfigError, match="sliding window of 16"):
        sliding(**place, packed_mask=packed_mask)
    with packed_attention(sliding := language_model("Mistral", sliding_window=64)):
        sliding(**place, packed_mask=packed_mask)
    with pytest.raises(ConfigError, match="cpu_varlen"), packed_attention(model, "cpu_varlne"):
        pass


def test_model_with_fixed_attention_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(CompanionError, match="does not support another attention"), packed_attention(model):
        pass


def test_packed_row_compiles() -> None:
    model, (ids, packed_mask) = language_model().eval(), packed()
    place = {"input_ids": ids, "position_ids": positions(packed_mask), "packed_mask": packed_mask}
    with packed_attention(model):
        expected = gradients(model, model(**place).logits.square().sum())
        compiled = torch.compile(model, backend="aot_eager")
        actual = gradients(model, compiled(**place).logits.square().sum())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-4)


def test_positions_count_visible_tokens() -> None:
    expected = [*range(7), 7, 8, 7, 8, 7, 8, 9, *range(3, 11), *range(5), 0, 0]
    assert positions(packed()[1]).tolist() == [expected]
