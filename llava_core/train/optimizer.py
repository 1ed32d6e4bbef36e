"""AdamW, and the cosine schedule with linear warm-up of the paper's runs."""

from __future__ import annotations

import math

import torch

from llava_core.config import TrainConfig


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in PyTorch's fused implementation; the paper's weight decay is 0."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
        fused=True,
    )  # fmt: skip


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then cosine to 0."""
    warmup = math.ceil(steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
