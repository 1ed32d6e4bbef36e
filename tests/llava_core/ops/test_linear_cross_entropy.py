"""Linear cross-entropy in chunks: equal to the definition in value and gradients, with little memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.common import peak_mib
from llava_core.ops import linear_cross_entropy as module
from llava_core.ops.linear_cross_entropy import linear_cross_entropy, reference


def inputs(dtype: torch.dtype = torch.float32, rows: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 24, dtype=dtype), torch.randn(101, 24, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, 101, (rows,))


def run(loss_of: Callable[..., torch.Tensor], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    hidden, weight, targets = inputs(dtype)
    loss = loss_of(hidden, weight, targets)
    (loss / 7).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    return [loss.detach().float(), hidden.grad.float(), weight.grad.float()]


@pytest.mark.parametrize("chunk", [1, 101, 101 * 5, 2**24])
def test_chunks_equal_the_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    for got, expected in zip(run(linear_cross_entropy), run(reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_low_precision_error_follows_ratio_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 101 * 4)
    exact, plain, ours = run(reference), run(reference, torch.bfloat16), run(linear_cross_entropy, torch.bfloat16)
    for k, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        assert (o - e).abs().max() <= (2 if k == 0 else 3) * (p - e).abs().max() + 1e-6


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    hidden, weight, targets = inputs()
    if frozen in ("hidden", "both"):
        hidden = hidden.detach()
    if frozen in ("weight", "both"):
        weight = weight.detach()
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        torch.testing.assert_close(loss, reference(hidden, weight, targets))
        return
    loss.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_second_backward_gives_the_same() -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(3 * loss, [hidden, weight]), strict=True):
        torch.testing.assert_close(3 * a, b)


def test_peak_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2**20)
    weight, grown = torch.randn(20_000, 16), {}
    for loss_of in (linear_cross_entropy, reference):
        hidden, targets = torch.randn(4000, 16, requires_grad=True), torch.randint(0, 20_000, (4000,))

        def work(hidden: Any = hidden, targets: Any = targets, loss_of: Any = loss_of) -> None:
            loss_of(hidden, weight, targets).backward()

        before = peak_mib(lambda: None, torch.device("cpu"))
        grown[loss_of] = peak_mib(work, torch.device("cpu")) - before
    # all logits are 305 MiB, and so is their gradient
    assert grown[reference] > 500
    assert grown[linear_cross_entropy] < 100
