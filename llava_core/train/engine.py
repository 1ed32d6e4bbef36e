"""The little that several processes need: a process group, and sums over ranks.

Gradients are summed after the last micro-batch. Each rank's loss is already divided by the supervised tokens of the
whole global batch, so the sum is the gradient of one large batch: 1 x 32 == 2 ranks x 16. Sharded training comes with a
launcher.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import distributed as dist


def start() -> None:
    """Join the process group that torchrun describes in the environment; nothing when the process is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def sum_over_ranks(value: float) -> float:
    """A number summed over all ranks."""
    if not dist.is_initialized():
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum gradients over all ranks in place; a rank without one (text-only rows) contributes zeros."""
    if not dist.is_initialized():
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
