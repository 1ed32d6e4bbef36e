"""Attention: every backend equals the reference on packed rows with shared prefixes, forward and backward."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from packed_rows import ROWS, packed_row

from llava_core.ops import BACKENDS, PackedMask, attention
from llava_core.ops.attention import Backend, _log_choice, choose, self_test
from llava_core.ops.cpu_varlen import Schedule
from llava_core.ops.reference import dense_mask
from llava_core.runtime import CompanionError, ConfigError

cpu_varlen = importlib.import_module("llava_core.ops.cpu_varlen")
SHAPES = [(4, 4, 8), (4, 2, 16), (6, 1, 32)]  # heads, kv_heads, head_dim


def inputs(
    packed_mask: PackedMask, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    (b, t), (heads, kv, d) = packed_mask.ends.shape, shape
    return [torch.randn(b, h, t, d, dtype=dtype, requires_grad=True) for h in (heads, kv, kv)]


def run(
    name: str, packed_mask: PackedMask, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    q, k, v = inputs(packed_mask, shape, dtype)
    out = attention(q, k, v, packed_mask=packed_mask, backend=name)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * weight).sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", ["sdpa", "cpu_varlen", "auto"])
def test_backends_equal_reference(backend: str, name: str, shape: tuple[int, int, int]) -> None:
    packed_mask = packed_row(name)
    for got, expected in zip(run(backend, packed_mask, shape), run("reference", packed_mask, shape), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# samples of several blocks, a group of two samples of different lengths with one prefix, single tokens
LARGE = [[300] * 20 + [60] * 40 + [95] * 35 + [132] * 37 + [300] * 100 + [260] * 28 + [300] * 40 + [301, 302]]


@pytest.mark.parametrize("saved", [0, 2**24])
@pytest.mark.parametrize("block", [5, 32, 128])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_blocks_and_groups_equal_reference(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], block: int, saved: int
) -> None:
    monkeypatch.setattr(cpu_varlen, "BLOCK", block)
    monkeypatch.setattr(cpu_varlen, "MAX_SAVED_BYTES", saved)
    for ends in (LARGE, [[40] * 40 + [75] * 35 + [112] * 37, [112] * 112]):
        packed_mask = PackedMask(torch.tensor(ends, dtype=torch.int32))
        for got, expected in zip(
            run("cpu_varlen", packed_mask, shape), run("reference", packed_mask, shape), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_short_samples_with_one_prefix_are_one_group() -> None:
    schedule = cpu_varlen.make_schedule(PackedMask(torch.tensor(LARGE, dtype=torch.int32)))
    assert sorted(group.samples for group in schedule.groups) == [1, 1, 1, 2]
    assert schedule.singletons.tolist() == [300, 301]
    padded = [{*group.padding.tolist()} for group in schedule.groups]
    own = [
        t
        for group, pads in zip(schedule.groups, padded, strict=True)
        for k, t in enumerate(group.queries)
        if k not in pads
    ]
    assert sorted(int(t) for t in own) == [*range(300)]


@pytest.mark.parametrize("name", ["no mask", "padding left in", "a prefix one token short"])
def test_wrong_schedule_is_detected(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = cpu_varlen.make_schedule

    def wrong(packed_mask: PackedMask) -> Schedule:
        schedule = real(packed_mask)
        if name == "padding left in":
            return replace(schedule, groups=[replace(group, padding=group.padding[:0]) for group in schedule.groups])
        if name == "a prefix one token short":
            groups = [
                group
                if len(group.keys) == len(group.queries)
                else replace(group, keys=group.keys.view(group.samples, -1)[:, 1:].flatten())
                for group in schedule.groups
            ]
            return replace(schedule, groups=groups)
        return schedule

    monkeypatch.setattr(cpu_varlen, "make_schedule", wrong)
    if name == "no mask":
        right = cpu_varlen._probabilities
        monkeypatch.setattr(
            cpu_varlen, "_probabilities", lambda q, k, future, m: right(q, k, torch.zeros_like(future), m)
        )
    packed_mask = PackedMask(torch.tensor([[119] * 20 + [50] * 30 + [83] * 33 + [119] * 36], dtype=torch.int32))
    expected = run("reference", packed_mask, SHAPES[1])
    actual = run("cpu_varlen", packed_mask, SHAPES[1])
    assert max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True)) > 1e-3


@pytest.mark.parametrize("backend", ["sdpa", "cpu_varlen", "reference"])
def test_row_without_mask_is_one_sample(backend: str) -> None:
    q, k, v = inputs(packed_row("one sample"), SHAPES[1])
    plain = attention(q, k, v, backend=backend)
    torch.testing.assert_close(plain, attention(q, k, v, packed_mask=packed_row("one sample"), backend="reference"))


@pytest.mark.parametrize("backend", ["sdpa", "cpu_varlen"])
def test_low_precision_error_follows_ratio_rule(backend: str) -> None:
    packed_mask = packed_row("two levels")
    exact = run("reference", packed_mask, SHAPES[1])
    plain, ours = (run(name, packed_mask, SHAPES[1], torch.bfloat16) for name in ("reference", backend))
    for k, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        assert (o - e).abs().max() <= (2 if k == 0 else 3) * (p - e).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_close_to_sdpa(dtype: torch.dtype) -> None:
    packed_mask, shape = PackedMask(torch.tensor(LARGE, dtype=torch.int32)), (4, 2, 16)
    exact = run("reference", packed_mask, shape)
    kernel, ours = (run(name, packed_mask, shape, dtype) for name in ("sdpa", "cpu_varlen"))
    for e, p, o in zip(exact, kernel, ours, strict=True):
        assert (o - e).abs().mean() <= 1.5 * (p - e).abs().mean()


def test_cpu_varlen_needs_a_cpu() -> None:
    assert BACKENDS.get("cpu_varlen").unavailable(torch.empty(1, 1, 1, 8)) is None
    assert "CPU" in str(BACKENDS.get("cpu_varlen").unavailable(torch.empty(1, 1, 1, 8, device="meta")))


def test_samples_of_rows() -> None:
    assert packed_row("two levels").samples == [[[(0, 9)], [(0, 7), (9, 11)], [(0, 7), (11, 14)], [(0, 3), (14, 22)]]]
    assert packed_row("three samples").samples == [[[(0, 3)], [(3, 4)], [(4, 9)]]]
    assert PackedMask.from_lengths([[2, 3], [4]]).ends.tolist() == [[2, 2, 5, 5, 5], [4, 4, 4, 4, 5]]


@pytest.mark.parametrize("name", ROWS)
def test_packed_row_equals_separate_samples(name: str) -> None:
    packed_mask = packed_row(name)
    q, k, v = inputs(packed_mask, SHAPES[1])
    packed = attention(q, k, v, packed_mask=packed_mask)
    for b, row in enumerate(packed_mask.samples):
        for ranges in row:
            index = torch.cat([torch.arange(first, last) for first, last in ranges])
            single = attention(*(x[b : b + 1, :, index] for x in (q, k, v)))
            torch.testing.assert_close(packed[b : b + 1, :, index], single, rtol=1e-5, atol=1e-5)


def test_wrong_mask_is_detected() -> None:
    q, k, v = inputs(packed_row("two levels"), SHAPES[1])
    right = attention(q, k, v, packed_mask=packed_row("two levels"), backend="reference")
    for place, end in ((9, 14), (3, 13), (0, 14)):
        wrong = packed_row("two levels").ends.clone()
        wrong[wrong == wrong[0, place]] = end
        for backend in ("sdpa", "reference"):
            assert not torch.allclose(
                attention(q, k, v, packed_mask=PackedMask(wrong), backend=backend), right, atol=1e-4
            )


def test_dense_mask() -> None:
    seen = dense_mask(12, packed_row("two with a shared prefix"), torch.device("cpu"))[0, 0]
    assert seen[9].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert seen[6].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_flex_attention_equals_reference_forward(name: str, shape: tuple[int, int, int]) -> None:
    q, k, v = (x.detach() for x in inputs(packed_row(name), shape))
    for packed_mask in (packed_row(name), None):
        out = attention(q, k, v, packed_mask=packed_mask, backend="flex")
        expected = attention(q, k, v, packed_mask=packed_mask, backend="reference")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_flex_attention_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["llava_core.ops.attention"], "FLEX_BLOCK", 16)  # the name is a function too
    packed_mask = PackedMask(torch.tensor([[70] * 20 + [45] * 25 + [70] * 25 + [75] * 5, [30] * 30 + [75] * 45]))
    q, k, v = (x.detach() for x in inputs(packed_mask, SHAPES[1]))
    out = attention(q, k, v, packed_mask=packed_mask, backend="flex")
    torch.testing.assert_close(
        out, attention(q, k, v, packed_mask=packed_mask, backend="reference"), rtol=1e-5, atol=1e-5
    )


def test_unavailable_backend_says_why() -> None:
    q, k, v = inputs(packed_row("one sample"), SHAPES[0])
    with pytest.raises(CompanionError, match="FlexAttention has no backward pass on a CPU"):
        attention(q, k, v, backend="flex")
    attention(q.detach(), k.detach(), v.detach(), backend="flex")
    with pytest.raises(ConfigError, match="packed_mask has rows"):
        attention(q, k, v, packed_mask=packed_row("three samples"))


def test_auto_selects_the_first_available_and_logs_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed_mask = packed_row("two levels")
    q, k, v = inputs(packed_mask, SHAPES[0])
    assert choose(q, None)[0] == "sdpa"
    assert choose(q, packed_mask)[0] == "cpu_varlen"
    # a tensor on a GPU
    on_gpu = SimpleNamespace(device=torch.device("cuda"), shape=(1, 2, 3, 4), dtype=torch.bfloat16)
    failed: dict[str, str | None] = {"triton": None, "flex": None}
    monkeypatch.setattr(sys.modules["llava_core.ops.attention"], "self_test", lambda name, *_: failed[name])
    could: dict[str, str | None] = {"triton": None, "flex": None}
    record = lambda name: SimpleNamespace(unavailable=lambda q: could[name])  # noqa: E731
    monkeypatch.setattr(BACKENDS, "get", record)
    assert choose(on_gpu, packed_mask)[0] == "triton"
    failed["triton"] = "its self-test differs from the reference"
    assert choose(on_gpu, packed_mask) == ("flex", f"it skips empty blocks; triton: {failed['triton']}")
    could["triton"] = "triton is not installed"
    assert choose(on_gpu, packed_mask) == ("flex", "it skips empty blocks; triton: triton is not installed")
    could["flex"] = "not here"
    assert choose(on_gpu, packed_mask)[0] == "sdpa"
    monkeypatch.undo()
    _log_choice.cache_clear()
    with caplog.at_level("INFO", "llava_core.ops.attention"):
        for _ in range(2):
            attention(q, k, v, packed_mask=packed_mask)
    assert [record.message.partition(" (")[0] for record in caplog.records] == ["attention backend auto -> cpu_varlen"]


def test_unknown_backend_names_the_known() -> None:
    q, k, v = inputs(packed_row("one sample"), SHAPES[0])
    with pytest.raises(ConfigError, match="cpu_varlen"):
        attention(q, k, v, backend="cpu_varlne")
    assert {"reference", "sdpa", "cpu_varlen", "triton", "flex"} <= set(BACKENDS.names())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdpa", "cpu_varlen"])
def test_correct_backend_passes_its_self_test(name: str, dtype: torch.dtype) -> None:
    assert self_test(name, 16, dtype, torch.device("cpu")) is None


def test_wrong_backend_fails_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask | None) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory\nmore")

    def forgets(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask | None) -> torch.Tensor:
        return attention(q, k, v, backend="sdpa")

    def stops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask | None) -> torch.Tensor:
        return attention(q, k.detach() + 0 * k, v, packed_mask=packed_mask, backend="sdpa")

    for name, run, wrong in (
        ("raises", raises, "its self-test ended with RuntimeError: out of resource: shared memory"),
        ("forgets", forgets, "its self-test differs from the reference"),
        ("stops", stops, "its self-test differs from the reference"),
    ):
        broken = Backend(name, run)
        get = BACKENDS.get
        with monkeypatch.context() as patch:
            patch.setattr(BACKENDS, "get", lambda asked, b=broken, g=get: b if asked == b.name else g(asked))
            assert self_test(name, 16, torch.float32, torch.device("cpu")) == wrong
