"""One rank of training runs in tests: `python training_rank.py OUT RECORD...` trains each record's run.

Per record OUT gets whole weights and moments after the last step. With STOP=K in the environment a run stops after
step K with a saved state; with SCHEDULES=N it takes N steps of random batches, which differ between the ranks in
samples, rows and images.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

from llava_core import runtime
from llava_core.ops.transformers_backend import packed_attention
from llava_core.record import RunRecord
from llava_core.train import trainer as training
from llava_core.train.signals import Interrupted, StopRequest

SCHEDULES: list[dict[str, Any]] = []


def whole_state(self: training.Trainer) -> dict[str, Any]:
    """Instead of the final checkpoint."""
    state = {name: tensor.float().cpu().clone() for name, tensor in self.engine.state()}
    if self.engine.rank == 0:
        torch.save({"state": state, "schedules": SCHEDULES}, Path(sys.argv[1]) / f"{self.record.path.name}.pt")
    return {}


def random_batches(self: training.Trainer) -> dict[str, Any]:
    engine, draw = self.engine, random.Random(0)
    self.stop = StopRequest()
    with packed_attention(self.model.language_model):
        for self.step in range(int(os.environ["SCHEDULES"])):
            # the same draws on any number of ranks: two shares, of which one rank takes both or each of two takes one
            shares = [[draw.randrange(len(self.train_set)) for _ in range(draw.randrange(0, 7))] for _ in range(2)]
            shares[draw.randrange(2)] += [5] * draw.randrange(1, 3)  # a sample without an image
            self.loader.max_tokens = draw.choice([64, 128, 512])
            own = shares[engine.rank] if engine.world == 2 else shares[0] + shares[1]
            step = self._train_step(self.loader.batch(own))
            SCHEDULES.append({"loss": step.loss, "norm": step.norm, "rows": len(self.loader.batch(own).rows)})
    return whole_state(self)


def stopped_after(step: int) -> Any:
    """`Trainer._train_step` with a request to stop that comes in the given step."""
    original = training.Trainer._train_step

    def train_step(self: training.Trainer, batch: Any) -> training.Step:
        if self.step == step - 1:
            self.stop.since = 0.0
        return original(self, batch)

    return train_step


if __name__ == "__main__":
    runtime.ROOT = Path(os.environ["LLAVA_ROOT"])
    training.Trainer._finish = whole_state  # type: ignore[method-assign]
    if "SCHEDULES" in os.environ:
        training.Trainer.run = random_batches  # type: ignore[method-assign]
    if "STOP" in os.environ:
        training.Trainer._train_step = stopped_after(int(os.environ["STOP"]))  # type: ignore[method-assign]
    for record in sys.argv[2:]:
        with contextlib.suppress(Interrupted):
            training.train_record(RunRecord(Path(record)))
