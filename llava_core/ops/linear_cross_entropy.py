"""Cross-entropy of a linear layer's outputs in chunks, without the logits of all rows in memory.

The logits of a language model are its largest tensor: tokens x vocabulary. Here they are computed chunk by chunk. The
forward pass turns each chunk in place into the gradient of its loss, and that into the gradients of hidden states and
weight, as in Liger Kernel (arXiv 2410.10989). The weight's gradient is computed only if the weight is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**24  # logits of a chunk: 64 MiB in fp32


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The definition, with all logits at once."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # accumulated in fp32: low precision would lose small terms over many chunks
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        in_place = hidden.dtype == torch.float32
        size = max(1, min(len(hidden), CHUNK_ELEMENTS // weight.shape[0]))
        # one buffer for all chunks: on a CPU new pages cost as much as the arithmetic
        buffer = torch.empty(size, weight.shape[0], dtype=hidden.dtype, device=hidden.device)
        for begin in range(0, len(hidden), size):
            rows, target = hidden[begin : begin + size], targets[begin : begin + size, None]
            logits = torch.mm(rows, weight.T, out=buffer[: len(rows)])
            target_logits = logits.gather(-1, target).float()
            largest, index = logits.max(-1, keepdim=True)
            out = logits if in_place else None
            grad = torch.softmax(logits, -1, dtype=torch.float32, out=out)
            # logsumexp from the largest probability, which is never 0
            total += (largest.float() - grad.gather(-1, index).log() - target_logits).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            grad.scatter_add_(-1, target, grad.new_full(target.shape, -1.0))  # softmax minus one-hot
            grad = grad.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[begin : begin + len(rows)])
            if weight_grad is not None:
                if weight_grad.dtype == grad.dtype:
                    weight_grad.addmm_(grad.T, rows)
                else:
                    weight_grad += grad.T @ rows
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * grads[0].to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * grads[0]).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` with targets, summed over the positions: a scalar in fp32.

    Args:
        hidden: (M, D) hidden states of the supervised positions.
        weight: (V, D) of the output layer, without bias.
        targets: (M,) token ids.
    """
    loss: torch.Tensor = _Chunked.apply(hidden.contiguous(), weight, targets)
    return loss
