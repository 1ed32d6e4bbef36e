"""Evaluation of the miniature: answers in batches against one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Clock, circumstances, in_turns
from companion import miniature
from companion.data_tools.scienceqa import load_problems
from companion.evaluation.bench_steps import load_bench
from companion.evaluation.predict import science_answers
from llava_core.checkpoints.load import Loaded, load
from llava_core.config import load_scale
from llava_core.inference import answer_questions
from llava_core.runtime import DataError
from llava_core.train.launch import launch, resolve_run

BENCHES = ("bench-coco", "bench-wild")
Answer = Callable[[int], dict[str, str]]  # batch size -> answers by question


def _tasks(finetune: Loaded, science_qa: Loaded, limit: int) -> dict[str, Answer]:
    """Data set -> a function that answers its first `limit` questions."""
    data = miniature.ensure(only=["mini-coco", "mini-scienceqa", *BENCHES])
    problems = load_problems(data / "mini-scienceqa", "test")[:limit]
    first, second = load_scale("mini").answer_tokens
    tasks: dict[str, Answer] = {
        "mini-scienceqa": lambda batch: science_answers(
            science_qa, problems, max_new_tokens=first, answer_tokens=second, batch=batch
        )
    }
    for name in BENCHES:
        rows, images = load_bench(data / name, limit).rows()
        tasks[name] = lambda batch, rows=rows, images=images: answer_questions(  # type: ignore[misc]
            finetune, rows, images, max_new_tokens=96, batch=batch
        )
    return tasks


def bench_evaluate(
    finetune: Path | None = None,
    science_qa: Path | None = None,
    limit: int = 24,
    rounds: int = 3,
    batch: int = 64,
    clock: Clock = "cpu",
) -> dict[str, Any]:
    """Time answering questions of mini-scienceqa and both benches in batches against one by one.

    Args:
        finetune: checkpoint that answers the benches; None: that of the chapters.
        science_qa: checkpoint that answers mini-scienceqa; None: that of the chapters.
        limit: questions of each set.
        rounds: timed turns.
        batch: questions answered together.
        clock: computing time (cpu) or elapsed time (wall).

    Returns:
        ratio (the lowest of the sets: one by one / batched), same_answers, cases: a row per set.
    """
    paths = {"finetune": finetune, "science_qa": science_qa}
    models = [load(path or launch(resolve_run(name, "mini")).checkpoint) for name, path in paths.items()]
    facts, cases = circumstances(torch.device("cpu")), []
    for name, answer in _tasks(*models, limit).items():
        begin = time.perf_counter(), time.process_time()
        batched = answer(batch)  # also the warm-up
        seconds = [time.perf_counter() - begin[0], time.process_time() - begin[1]]
        single = answer(1)
        if not any(batched.values()):
            raise DataError(f"{name}: every answer is empty, so the ratio would mean nothing")
        turns = in_turns(lambda a=answer: a(batch), lambda a=answer: a(1), rounds, clock)  # type: ignore[misc]
        row = {**facts, "set": name, "questions": len(batched), "batch": batch}
        row |= {"seconds": round(seconds[0], 2), "cpu_seconds": round(seconds[1], 2)}
        row |= {key: round(turns[key], 3) for key in ("ratio", "ratio_low", "ratio_high")}
        cases.append(row | {"rounds": rounds, "clock": clock, "same_answers": batched == single})
    same = all(case["same_answers"] for case in cases)
    return {"ratio": min(case["ratio"] for case in cases), "same_answers": same, "cases": cases}
