"""One run tells you nothing: two arms of an ablation with many seeds each at a small budget."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import circumstances
from companion.protocol import load_protocol
from companion.results import science_result
from llava_core.config import load_experiment
from llava_core.train.launch import launch


def bench_single_runs(
    ablation: str = "pretraining",
    seeds: int = 20,
    first: int = 0,
    problems: int = 1200,
    epochs: int = 1,
    questions: int = 1000,
) -> dict[str, Any]:
    """Train both arms of an ablation with many seeds and count right test answers; finished runs are reused.

    All runs start from one run of stage 1, so their scatter is that of the fine-tuning alone.

    Args:
        ablation: an ablation of configs/protocol.yaml whose arms are scored by accuracy.
        seeds: seeds per arm.
        first: the first of them; rows of earlier calls keep theirs.
        problems: training problems.
        epochs: passes over them.
        questions: test problems, the first ones.

    Returns:
        Mean accuracy (%) by arm, and `cases`: a row for each arm and seed.
    """
    protocol, facts = load_protocol(), circumstances(torch.device("cpu"))
    arms = dict(list(protocol.plan(ablation).arms.items())[:2])
    cases = []
    for seed in range(first, first + seeds):
        for label, arm in arms.items():
            budget = {"data.limit": problems, "train.epochs": epochs, "train.seed": seed, "train.snapshots": 0}
            record = launch(load_experiment(arm.experiment, protocol.scale, {**arm.set, **budget}))
            result = science_result(record, questions)
            row = {"ablation": ablation, "arm": label, "seed": seed, "problems": problems, "epochs": epochs}
            row |= {"questions": result["n"], "correct": result["correct"], "run": record.run_id}
            cases.append({**row, **facts})
    means = {
        label: sum(100 * row["correct"] / row["questions"] for row in cases if row["arm"] == label) / seeds
        for label in arms
    }
    return {**means, "cases": cases}
