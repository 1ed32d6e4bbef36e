from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from llava_core.config import load_experiment
from llava_core.train.optimizer import learning_rate


def test_warmup_is_one_step_ahead_of_transformers() -> None:
    config, steps = load_experiment("pretrain", "a100x8").experiment.train, 4652
    warmup = 140  # 3 % of the steps, rounded up
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    theirs = []
    for _ in range(steps):
        theirs += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    ours = [learning_rate(step, steps, config) for step in range(steps)]
    assert theirs[0] == 0 < ours[0]
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], rel=1e-12)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-9, abs=1e-15)
