"""The attention op: every backend equals the definition on packed rows with shared beginnings, forward and backward."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from packed_rows import TREES, tree

from llava_core.ops import BACKENDS, Segments, attention
from llava_core.ops.attention import Backend, _say, choose, trial
from llava_core.ops.cpu_varlen import Plan
from llava_core.ops.reference import allowed
from llava_core.runtime import CompanionError, ConfigError

plans = importlib.import_module("llava_core.ops.cpu_varlen")
SHAPES = [(4, 4, 8), (4, 2, 16), (6, 1, 32)]  # heads, kv_heads, head_dim


# each sample is (tokens it shares with the samples of the same letters, its own); written out as `ends`
def inputs(segments: Segments, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    (b, t), (heads, kv, d) = segments.ends.shape, shape
    return [torch.randn(b, h, t, d, dtype=dtype, requires_grad=True) for h in (heads, kv, kv)]


def run(
    name: str, segments: Segments, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    q, k, v = inputs(segments, shape, dtype)
    out = attention(q, k, v, segments=segments, backend=name)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * weight).sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("backend", ["sdpa", "per_sample", "auto"])
def test_backends_equal_the_definition(backend: str, name: str, shape: tuple[int, int, int]) -> None:
    segments = tree(name)
    for got, expected in zip(run(backend, segments, shape), run("reference", segments, shape), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# samples of many blocks, stacks of several that begin alike and are not as long as each other, single tokens
FOREST = [[300] * 20 + [60] * 40 + [95] * 35 + [132] * 37 + [300] * 100 + [260] * 28 + [300] * 40 + [301, 302]]


@pytest.mark.parametrize("kept", [0, 2**24])
@pytest.mark.parametrize("block", [5, 32, 128])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_samples_in_blocks_and_stacks_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], block: int, kept: int
) -> None:
    monkeypatch.setattr(plans, "BLOCK", block)
    monkeypatch.setattr(plans, "KEPT_BYTES", kept)
    for ends in (FOREST, [[40] * 40 + [75] * 35 + [112] * 37, [112] * 112]):
        segments = Segments(torch.tensor(ends, dtype=torch.int32))
        for got, expected in zip(run("per_sample", segments, shape), run("reference", segments, shape), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_short_samples_that_begin_alike_are_stacked() -> None:
    plan = plans.make_plan(Segments(torch.tensor(FOREST, dtype=torch.int32)))
    assert sorted(call.samples for call in plan.calls) == [1, 1, 1, 2]
    assert plan.alone.tolist() == [300, 301]
    padded = [{*call.padding.tolist()} for call in plan.calls]
    own = [t for call, pads in zip(plan.calls, padded, strict=True) for k, t in enumerate(call.own) if k not in pads]
    assert sorted(int(t) for t in own) == [*range(300)]


@pytest.mark.parametrize("name", ["no mask", "padding left in", "a prefix one token short"])
def test_a_broken_plan_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = plans.make_plan

    def broken(segments: Segments) -> Plan:
        plan = real(segments)
        if name == "padding left in":
            return replace(plan, calls=[replace(call, padding=call.padding[:0]) for call in plan.calls])
        if name == "a prefix one token short":
            begun = [call for call in plan.calls if len(call.seen) > len(call.own)]
            shorter = [replace(call, seen=call.seen.view(call.samples, -1)[:, 1:].flatten()) for call in begun]
            return replace(plan, calls=[*(call for call in plan.calls if len(call.seen) == len(call.own)), *shorter])
        return plan

    monkeypatch.setattr(plans, "make_plan", broken)
    if name == "no mask":
        right = plans._probabilities
        monkeypatch.setattr(plans, "_probabilities", lambda q, k, future, m: right(q, k, torch.zeros_like(future), m))
    segments = Segments(torch.tensor([[119] * 20 + [50] * 30 + [83] * 33 + [119] * 36], dtype=torch.int32))
    expected = run("reference", segments, SHAPES[1])
    found = run("per_sample", segments, SHAPES[1])
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) > 1e-3


@pytest.mark.parametrize("backend", ["sdpa", "per_sample", "reference"])
def test_a_row_without_segments_is_one_sample(backend: str) -> None:
    q, k, v = inputs(tree("one sample"), SHAPES[1])
    plain = attention(q, k, v, backend=backend)
    torch.testing.assert_close(plain, attention(q, k, v, segments=tree("one sample"), backend="reference"))


@pytest.mark.parametrize("backend", ["sdpa", "per_sample"])
def test_low_precision_errs_at_most_by_the_ratio_rule(backend: str) -> None:
    segments = tree("two levels")
    exact = run("reference", segments, SHAPES[1])
    plain, ours = (run(name, segments, SHAPES[1], torch.bfloat16) for name in ("reference", backend))
    for k, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        assert (o - e).abs().max() <= (2 if k == 0 else 3) * (p - e).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_pytorchs_kernel(dtype: torch.dtype) -> None:
    segments, shape = Segments(torch.tensor(FOREST, dtype=torch.int32)), (4, 2, 16)
    exact = run("reference", segments, shape)
    kernel, ours = (run(name, segments, shape, dtype) for name in ("sdpa", "per_sample"))
    for e, p, o in zip(exact, kernel, ours, strict=True):
        assert (o - e).abs().mean() <= 1.5 * (p - e).abs().mean()


def test_per_sample_is_for_a_cpu() -> None:
    assert BACKENDS.get("per_sample").unavailable(torch.empty(1, 1, 1, 8)) is None
    assert "CPU" in str(BACKENDS.get("per_sample").unavailable(torch.empty(1, 1, 1, 8, device="meta")))


def test_samples_of_rows() -> None:
    assert tree("two levels").samples == [[[(0, 9)], [(0, 7), (9, 11)], [(0, 7), (11, 14)], [(0, 3), (14, 22)]]]
    assert tree("three samples").samples == [[[(0, 3)], [(3, 4)], [(4, 9)]]]
    assert Segments.of([[2, 3], [4]]).ends.tolist() == [[2, 2, 5, 5, 5], [4, 4, 4, 4, 5]]


@pytest.mark.parametrize("name", TREES)
def test_a_packed_row_equals_its_samples_alone(name: str) -> None:
    segments = tree(name)
    q, k, v = inputs(segments, SHAPES[1])
    packed = attention(q, k, v, segments=segments)
    for b, row in enumerate(segments.samples):
        for ranges in row:
            index = torch.cat([torch.arange(first, last) for first, last in ranges])
            alone = attention(*(x[b : b + 1, :, index] for x in (q, k, v)))
            torch.testing.assert_close(packed[b : b + 1, :, index], alone, rtol=1e-5, atol=1e-5)


def test_a_wrong_segment_is_seen() -> None:
    q, k, v = inputs(tree("two levels"), SHAPES[1])
    right = attention(q, k, v, segments=tree("two levels"), backend="reference")
    for place, end in ((9, 14), (3, 13), (0, 14)):
        wrong = tree("two levels").ends.clone()
        wrong[wrong == wrong[0, place]] = end
        for backend in ("sdpa", "reference"):
            assert not torch.allclose(attention(q, k, v, segments=Segments(wrong), backend=backend), right, atol=1e-4)


def test_who_sees_whom_is_the_definition() -> None:
    seen = allowed(12, tree("two that begin alike"), torch.device("cpu"))[0, 0]
    assert seen[9].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert seen[6].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TREES)
def test_flex_attention_equals_the_definition_forward(name: str, shape: tuple[int, int, int]) -> None:
    q, k, v = (x.detach() for x in inputs(tree(name), shape))
    for segments in (tree(name), None):
        out = attention(q, k, v, segments=segments, backend="flex")
        expected = attention(q, k, v, segments=segments, backend="reference")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_flex_attention_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["llava_core.ops.attention"], "FLEX_BLOCK", 16)  # the name is a function too
    segments = Segments(torch.tensor([[70] * 20 + [45] * 25 + [70] * 25 + [75] * 5, [30] * 30 + [75] * 45]))
    q, k, v = (x.detach() for x in inputs(segments, SHAPES[1]))
    out = attention(q, k, v, segments=segments, backend="flex")
    torch.testing.assert_close(out, attention(q, k, v, segments=segments, backend="reference"), rtol=1e-5, atol=1e-5)


def test_a_backend_that_cannot_run_says_why() -> None:
    q, k, v = inputs(tree("one sample"), SHAPES[0])
    with pytest.raises(CompanionError, match="FlexAttention has no backward pass there"):
        attention(q, k, v, backend="flex")
    attention(q.detach(), k.detach(), v.detach(), backend="flex")
    with pytest.raises(ConfigError, match="segments describe rows"):
        attention(q, k, v, segments=tree("three samples"))


def test_auto_takes_the_first_that_can_run_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    segments = tree("two levels")
    q, k, v = inputs(segments, SHAPES[0])
    assert choose(q, None)[0] == "sdpa"
    assert choose(q, segments)[0] == "per_sample"
    # what a GPU would get: a tensor that says that it lies on one
    there = SimpleNamespace(device=torch.device("cuda"), shape=(1, 2, 3, 4), dtype=torch.bfloat16)
    failed: dict[str, str | None] = {"triton": None, "flex": None}
    monkeypatch.setattr(sys.modules["llava_core.ops.attention"], "trial", lambda name, *_: failed[name])
    could: dict[str, str | None] = {"triton": None, "flex": None}
    record = lambda name: SimpleNamespace(unavailable=lambda q: could[name])  # noqa: E731
    monkeypatch.setattr(BACKENDS, "get", record)
    assert choose(there, segments)[0] == "triton"
    failed["triton"] = "its trial differs from the definition"
    assert choose(there, segments) == ("flex", f"it leaves out what no token sees; triton: {failed['triton']}")
    could["triton"] = "triton is not installed"
    assert choose(there, segments) == ("flex", "it leaves out what no token sees; triton: triton is not installed")
    could["flex"] = "not here"
    assert choose(there, segments)[0] == "sdpa"
    monkeypatch.undo()
    _say.cache_clear()
    with caplog.at_level("INFO", "llava_core.ops.attention"):
        for _ in range(2):
            attention(q, k, v, segments=segments)
    assert [record.message.partition(" (")[0] for record in caplog.records] == ["attention backend auto -> per_sample"]


def test_unknown_backend_names_the_known() -> None:
    q, k, v = inputs(tree("one sample"), SHAPES[0])
    with pytest.raises(ConfigError, match="per_sample"):
        attention(q, k, v, backend="per_smaple")
    assert {"reference", "sdpa", "per_sample", "triton", "flex"} <= set(BACKENDS.names())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdpa", "per_sample"])
def test_a_right_backend_passes_its_trial(name: str, dtype: torch.dtype) -> None:
    assert trial(name, 16, dtype, torch.device("cpu")) is None


def test_a_backend_that_fails_or_errs_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory\nmore")

    def forgets(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None) -> torch.Tensor:
        return attention(q, k, v, backend="sdpa")

    def stops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None) -> torch.Tensor:
        return attention(q, k.detach() + 0 * k, v, segments=segments, backend="sdpa")

    for name, run, wrong in (
        ("raises", raises, "its trial ended with RuntimeError: out of resource: shared memory"),
        ("forgets", forgets, "its trial differs from the definition"),
        ("stops", stops, "its trial differs from the definition"),
    ):
        broken = Backend(name, run)
        get = BACKENDS.get
        with monkeypatch.context() as patch:
            patch.setattr(BACKENDS, "get", lambda asked, b=broken, g=get: b if asked == b.name else g(asked))
            assert trial(name, 16, torch.float32, torch.device("cpu")) == wrong
