"""Fused layers: the same function and the same gradients as transformers' modules, at every width of a piece."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llava_core.ops import Segments, fused_layers
from llava_core.ops.packed_mask import positions
from llava_core.ops.transformers_backend import packed_attention
from llava_core.runtime import ConfigError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
ENDS = [[22] * 3 + [14] * 4 + [9] * 2 + [11] * 2 + [14] * 3 + [22] * 8 + [27] * 5]  # a forest, see test_ops_interface
SOURCES = torch.tensor([7, 8, 12, 13, 20, 25])


@pytest.fixture(params=[2**18, 300], ids=["one piece", "many pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, "PIECE_BYTES", request.param)


def language_model(kind: str = "Llama", **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES | changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn(weight.shape) / 4)  # as they begin, all ones, a forgotten weight is not seen
    return model.train()


def learned(model: Any, fused: bool, sources: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss at `SOURCES` and the gradients of all that trains."""
    segments = Segments(torch.tensor(ENDS, dtype=torch.int32))
    ids = torch.randint(0, 64, segments.ends.shape, generator=torch.Generator().manual_seed(1))
    decoder = model.get_decoder()
    with packed_attention(model), fused_layers.fused_layers(model) if fused else nullcontext():
        assert fused_layers.takes_sources(decoder) == fused
        more = {"sources": SOURCES} if sources else {}
        hidden = decoder(input_ids=ids, segments=segments, position_ids=positions(segments), use_cache=False, **more)
        hidden = hidden.last_hidden_state[0] if sources else hidden.last_hidden_state[0, SOURCES]
        loss = F.cross_entropy(model.get_output_embeddings()(hidden), ids[0, SOURCES + 1])
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def far_apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of gradients, relative to the largest of the same weight."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items())


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("sources", [False, True])
@pytest.mark.parametrize("kind", fused_layers.FAMILIES)
def test_loss_and_gradients_stay_as_they_are(kind: str, sources: bool) -> None:
    model = language_model(kind)
    expected, grads = learned(model, fused=False)
    loss, found = learned(model, fused=True, sources=sources)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert len(found) == len([*model.parameters()])
    assert far_apart(found, grads) < 1e-5


def test_adapters_and_checkpointing_learn_the_same() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = get_peft_model(
        language_model(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    expected, grads = learned(model, fused=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, found = learned(model, fused=True, sources=True)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert len(found) == 3 * 2 * 2
    assert far_apart(found, grads) < 1e-5


@pytest.mark.usefixtures("pieces")
def test_the_gradients_are_those_of_the_functions() -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(lambda x, w: fused_layers._RMSNorm.apply(x, w, 1e-6), (draw(2, 3, 6), draw(6)))
    assert torch.autograd.gradcheck(fused_layers._SwiGLU.apply, (draw(2, 3, 6), draw(2, 3, 6)))
    angle = torch.rand(2, 3, 1, 2, dtype=torch.float64).repeat(1, 1, 1, 2)
    turn = lambda x: fused_layers._Rotate.apply(x, angle.cos(), angle.sin())  # noqa: E731
    assert torch.autograd.gradcheck(turn, (draw(2, 3, 2, 4),))


def modules() -> dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], list[torch.Tensor]]]:
    """Per function: ours, transformers', what both are given."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        norm = LlamaRMSNorm(x.shape[-1], eps=1e-6)
        out: torch.Tensor = torch.func.functional_call(norm, {"weight": weight}, (x,))
        return out

    angle = torch.rand(1, 9, 4).repeat(1, 1, 2) * 6
    cos, sin = angle.cos(), angle.sin()
    turned: tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] = (
        lambda x: fused_layers._Rotate.apply(x, cos.to(x)[:, :, None], sin.to(x)[:, :, None]),
        lambda x: apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos.to(x), sin.to(x))[0].transpose(1, 2),
    )
    rows = torch.randn(9, 64)
    return {
        "norm": (lambda x, w: fused_layers._RMSNorm.apply(x, w, 1e-6), plain_norm, [rows, torch.randn(64)]),
        "swiglu": (fused_layers._SwiGLU.apply, lambda g, u: F.silu(g) * u, [rows, torch.randn(9, 64)]),
        "rotate": (*turned, [torch.randn(1, 9, 3, 8)]),
    }  # fmt: skip


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("name", ["norm", "swiglu", "rotate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_little_more_than_transformers(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, plain, given = modules()[name]

    def errors(function: Callable[..., torch.Tensor], precision: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).to(precision).requires_grad_() for x in given]
        out = function(*leaves)
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(precision)
        return [out.detach().float(), *(g.float() for g in torch.autograd.grad(out, leaves, weight))]

    exact = errors(plain, torch.float32)
    for k, (e, a, b) in enumerate(zip(exact, errors(ours, dtype), errors(plain, dtype), strict=True)):
        assert float((a - e).abs().max()) <= (2 if k == 0 else 3) * float((b - e).abs().max()) + 1e-6


BROKEN = {
    "a norm without its weight": ("_RMSNorm", lambda x, w, eps: F.rms_norm(x, (x.shape[-1],), None, eps) + 0 * w),
    "positions turned the other way": ("_Rotate", lambda x, cos, sin: fused_layers._turned(x, cos, sin, -1)),
    "gate and up exchanged": ("_SwiGLU", lambda gate, up: F.silu(up) * gate),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_function_broken_on_purpose_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    expected, grads = learned(model, fused=False)
    where, function = BROKEN[name]
    monkeypatch.setattr(fused_layers, where, type(where, (), {"apply": staticmethod(function)}))
    loss, found = learned(model, fused=True)
    assert abs(float(loss - expected)) > 1e-4
    assert far_apart(found, grads) > 1e-2


def test_the_wrong_tokens_of_the_last_layer_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    expected, _ = learned(model, fused=False)
    real = fused_layers._wanted
    monkeypatch.setattr(fused_layers, "_wanted", lambda x, s: real(x, s if s is None else s - 1))
    loss, _ = learned(model, fused=True, sources=True)
    assert abs(float(loss - expected)) > 1e-3


def test_modules_are_as_before_afterwards_even_after_an_error() -> None:
    model = language_model()

    def fails() -> None:
        with fused_layers.fused_layers(model):
            assert any("forward" in vars(module) for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not any("forward" in vars(module) for module in model.modules())
    assert not fused_layers.takes_sources(model.get_decoder())


def test_a_module_that_somebody_has_replaced_is_left_to_them() -> None:
    model = language_model()
    norm = model.get_decoder().norm
    theirs = norm.forward = lambda x: 2 * x
    with fused_layers.fused_layers(model), fused_layers.fused_layers(model):
        assert norm.forward is theirs
    assert [module for module in model.modules() if "forward" in vars(module)] == [norm]


def test_the_last_layer_of_a_replaced_attention_or_of_a_shortened_decoder_is_left_alone() -> None:
    model = language_model()
    decoder = model.get_decoder()
    theirs = decoder.layers[-1].self_attn.forward
    decoder.layers[-1].self_attn.forward = lambda *given, **more: theirs(*given, **more)
    with fused_layers.fused_layers(model):
        assert not fused_layers.takes_sources(decoder)
    decoder = (model := language_model()).get_decoder()
    decoder.config.num_hidden_layers = 2
    with fused_layers.fused_layers(model):
        assert not fused_layers.takes_sources(decoder)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_a_sliding_window_is_refused_as_before(kind: str) -> None:
    more: dict[str, Any] = (
        {"layer_types": 3 * ["sliding_attention"], "use_sliding_window": True} if kind == "Qwen2" else {}
    )
    with pytest.raises(ConfigError, match="a sliding window of 8"):
        learned(language_model(kind, sliding_window=8, **more), fused=True)


def test_every_layer_is_checkpointed() -> None:
    model, calls = language_model(), []
    for layer in model.get_decoder().layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, *_: calls.append(module))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    learned(model, fused=True, sources=True)
    assert [calls.count(layer.mlp.gate_proj) for layer in model.get_decoder().layers] == [2, 2, 2]


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    out = fused_layers._RMSNorm.apply(x, torch.ones(8), 1e-6)
    (grad,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_computes_something_else_is_left_alone() -> None:
    changed = {}
    for name in ("silu", "gelu"):
        with fused_layers.fused_layers(model := language_model(hidden_act=name)):
            changed[name] = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    each = 3 * ["LlamaAttention"] + 7 * ["LlamaRMSNorm"]
    assert sorted(changed["gelu"]) == each
    assert sorted(changed["silu"]) == sorted([*each, *3 * ["LlamaMLP"]])
    with fused_layers.fused_layers(model := language_model("Gemma")):
        assert not any("forward" in vars(module) for module in model.modules())
        assert not fused_layers.takes_sources(model.get_decoder())
