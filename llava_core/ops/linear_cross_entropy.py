"""Cross-entropy of a linear layer's outputs, without ever holding the outputs of all rows.

The logits of a language model are its largest tensor: tokens x vocabulary. Here the rows come in chunks; each chunk's
logits become, in place, the gradient of its loss, and that at once the gradients of rows and weight. Nothing of the
size of the vocabulary is kept but the weight's own gradient, and that only if the weight is trained.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from llava_core.registry import Registry
from llava_core.runtime import CompanionError

CHUNK_NUMBERS = 2**24  # of a chunk of logits: 64 MiB in fp32

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """How the loss is computed, and why it cannot be here (None: it can)."""

    name: str
    run: Run
    unavailable: Callable[[torch.Tensor], str | None] = lambda hidden: None


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The definition: all logits at once."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # summed in fp32: many chunks of a low-precision gradient would round away the small ones
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        in_place = hidden.dtype == torch.float32
        size = min(len(hidden), max(1, CHUNK_NUMBERS // weight.shape[0]))
        # one piece of memory for all chunks: fresh pages cost a CPU as much as the arithmetic
        memory = torch.empty(size, weight.shape[0], dtype=hidden.dtype, device=hidden.device)
        for begin in range(0, len(hidden), size):
            rows, target = hidden[begin : begin + size], targets[begin : begin + size, None]
            logits = torch.mm(rows, weight.T, out=memory[: len(rows)])
            wanted = logits.gather(-1, target).float()
            largest, place = logits.max(-1, keepdim=True)
            out = logits if in_place else None
            wrong = torch.softmax(logits, -1, dtype=torch.float32, out=out)
            # log of the sum of exponentials, from the probability of the likeliest word, which never is 0
            total += (largest.float() - wrong.gather(-1, place).log() - wanted).sum()
            if of_hidden is None and of_weight is None:
                continue
            wrong.scatter_add_(-1, target, wrong.new_full(target.shape, -1.0))  # less one at the target: the gradient
            wrong = wrong.to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(wrong, weight, out=of_hidden[begin : begin + len(rows)])
            if of_weight is not None:
                if of_weight.dtype == wrong.dtype:
                    of_weight.addmm_(wrong.T, rows)
                else:
                    of_weight += wrong.T @ rows
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        if of_hidden is not None:
            of_hidden = of_hidden * grads[0].to(of_hidden.dtype)
        if of_weight is not None:
            of_weight = (of_weight * grads[0]).to(ctx.weight_dtype)
        return of_hidden, of_weight, None


def _chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = _Chunked.apply(hidden.contiguous(), weight, targets)
    return loss


def _liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    liger = importlib.import_module("liger_kernel.transformers")
    loss: torch.Tensor = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
    return loss


def _no_liger(hidden: torch.Tensor) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if hidden.device.type == "cuda" else "its kernels need a GPU"


BACKENDS: Registry[Backend] = Registry("loss backend")
for _backend in (Backend("chunked", _chunked), Backend("reference", reference), Backend("liger", _liger, _no_liger)):
    BACKENDS.register(_backend.name)(_backend)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, backend: str = "chunked"
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` with targets, summed over the rows.

    Args:
        hidden: (M, D) hidden states that predict.
        weight: (V, D) of the output layer, which has no bias.
        targets: (M,) token ids.
        backend: a name in `BACKENDS`.

    Returns:
        A scalar, in fp32. Gradients come in the dtypes of `hidden` and `weight`.

    Raises:
        ConfigError: unknown backend.
        CompanionError: the named backend cannot run here; the message says why.
    """
    chosen = BACKENDS.get(backend)
    if (reason := chosen.unavailable(hidden)) is not None:
        raise CompanionError(f"loss backend '{backend}' cannot run on {hidden.device}: {reason}; fix: use 'chunked'")
    return chosen.run(hidden, weight, targets)
