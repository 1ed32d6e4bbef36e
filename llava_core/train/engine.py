"""Several processes: a process group, and sums over ranks.

Each rank divides its loss by the supervised tokens of the global batch, so the sum of the ranks' gradients is the
gradient of one large batch: 1 x 32 == 2 ranks x 16. Gradients are summed once per step, after the last micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import distributed as dist


def start() -> None:
    """Join the process group that torchrun describes in the environment; nothing for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def sum_over_ranks(value: float) -> float:
    if not dist.is_initialized():
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum gradients over all ranks in place; a rank without gradients (rows without images) adds zeros."""
    if not dist.is_initialized():
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
