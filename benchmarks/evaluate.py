"""A whole evaluation of the miniature, and answers in batches beside one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Clock, circumstances, in_turns
from companion import miniature
from companion.data_tools.scienceqa import load_problems
from companion.evaluation.bench_steps import load_bench
from companion.evaluation.llava_bench import judge, score_reviews
from companion.evaluation.predict import science_answers
from companion.evaluation.science_qa import score
from companion.miniature.offline_chat import respond
from companion.teacher.client import OfflineClient
from llava_core.checkpoints.load import Loaded, load
from llava_core.config import load_scale
from llava_core.inference import answer_questions
from llava_core.runtime import DataError
from llava_core.train.launch import launch, resolve_run

BENCHES = ("bench-coco", "bench-wild")
Answer = Callable[[int], dict[str, str]]  # from the size of a batch
Score = Callable[[dict[str, str]], float]


def _tasks(finetune: Loaded, science: Loaded, limit: int | None) -> dict[str, tuple[Answer, Score]]:
    """How each set is answered and scored."""
    data = miniature.ensure(only=["mini-coco", "mini-scienceqa", *BENCHES])
    problems = load_problems(data / "mini-scienceqa", "test")[:limit]

    def answer_science(batch: int) -> dict[str, str]:
        first, second = load_scale("mini").answer_tokens
        return science_answers(science, problems, max_new_tokens=first, answer_tokens=second, batch=batch)

    def score_science(answers: dict[str, str]) -> float:
        return float(score(problems, answers)["accuracy"])

    tasks: dict[str, tuple[Answer, Score]] = {"mini-scienceqa": (answer_science, score_science)}
    for name in BENCHES:
        bench = load_bench(data / name, limit)
        rows, images = bench.rows()

        def answer_bench(batch: int, rows: Any = rows, images: Path = images) -> dict[str, str]:
            return answer_questions(finetune, rows, images, max_new_tokens=96, batch=batch)

        def score_bench(answers: dict[str, str], bench: Any = bench) -> float:
            client = OfflineClient(respond)
            reviews, _ = judge(bench.questions, bench.context, bench.reference or [], answers, client)
            return float(score_reviews(reviews)["all"])

        tasks[name] = (answer_bench, score_bench)
    return tasks


def bench_evaluate(
    finetune: Path | None = None,
    science_qa: Path | None = None,
    limit: int = 24,
    rounds: int = 3,
    batch: int = 64,
    clock: Clock = "cpu",
) -> dict[str, Any]:
    """Time the evaluation of mini-scienceqa and both benches, and a part of it batched against one by one.

    Args:
        finetune: checkpoint that answers the benches; None: that of the chapters.
        science_qa: checkpoint that answers mini-scienceqa; None: that of the chapters.
        limit: questions of each set that are answered batched and one by one.
        rounds: timed turns.
        batch: questions answered together.
        clock: computing time (cpu) or elapsed time (wall), of the turns.

    Returns:
        seconds (of the whole, models loaded and scores made), cpu_seconds, ratio (the lowest of the sets: one by one /
        batches), same_answers, cases: one row per set and one for the whole.
    """
    finetune, science_qa = (
        path or launch(resolve_run(name, "mini")).checkpoint
        for path, name in ((finetune, "finetune"), (science_qa, "science_qa"))
    )
    wall, cpu = time.perf_counter(), time.process_time()
    models = load(finetune), load(science_qa)
    facts, cases = circumstances(torch.device("cpu")), []
    for name, (answer, score_answers) in _tasks(*models, None).items():
        begin = time.perf_counter(), time.process_time()
        answers = answer(batch)
        scored = score_answers(answers)
        seconds = [time.perf_counter() - begin[0], time.process_time() - begin[1]]
        cases.append(_case(facts, name, len(answers), batch, seconds, scored))
    whole = [time.perf_counter() - wall, time.process_time() - cpu]
    same = True
    for case, (name, (answer, _)) in zip(cases, _tasks(*models, limit).items(), strict=True):
        together, alone = answer(batch), answer(1)  # also the warm-up
        if together != alone:
            same = False
        if not any(together.values()):
            raise DataError(f"{name}: every answer is empty; the ratio would tell nothing")
        turns = in_turns(lambda a=answer: a(batch), lambda a=answer: a(1), rounds, clock)  # type: ignore[misc]
        case |= {key: round(turns[key], 3) for key in ("ratio", "ratio_low", "ratio_high")}
        case |= {"compared": len(together), "rounds": rounds, "clock": clock, "same_answers": together == alone}
    cases.append(_case(facts, "all", sum(case["questions"] for case in cases), batch, whole, None))
    lowest = min(case["ratio"] for case in cases[:-1])
    return {"seconds": whole[0], "cpu_seconds": whole[1], "ratio": lowest, "same_answers": same, "cases": cases}


def _case(
    facts: dict[str, Any], name: str, questions: int, batch: int, seconds: Sequence[float], score: float | None
) -> dict[str, Any]:
    row = {**facts, "set": name, "questions": questions, "batch": batch}
    row |= {"seconds": round(seconds[0], 2), "cpu_seconds": round(seconds[1], 2)}
    row["score"] = None if score is None else round(score, 2)
    return row | dict.fromkeys(("ratio", "ratio_low", "ratio_high", "compared", "rounds", "clock", "same_answers"))
