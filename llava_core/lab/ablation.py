"""Ablations: arms that differ in one field, several seeds each, one metric, the difference with its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_core.config import load_scale
from llava_core.data.scienceqa import answer_prompt, format_problem, load_problems
from llava_core.evaluate import llava_bench, science_qa
from llava_core.evaluate.answer import answer_questions
from llava_core.evaluate.statistics import seeds_interval
from llava_core.lab.launch import launch, resolve_run
from llava_core.record import RunRecord
from llava_core.runtime import read_json, read_jsonl, resolve, write_json
from llava_core.teacher.prompts import context_text
from llava_core.weights.checkpoint import Loaded, load


@dataclass
class Arm:
    """One variant: its values per seed (in points) and the runs behind them."""

    name: str
    experiment: str
    values: list[float] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.values) / len(self.values)


def cached_result(record: RunRecord, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """An evaluation's result, stored in its run's folder: measured once, read by every chapter that shows it."""
    path: Path = record.path / f"{name}.json"
    if path.is_file():
        found: dict[str, Any] = read_json(path)
        return found
    result = compute()
    write_json(path, result)
    return result


def science_answers(loaded: Loaded, folder: Path, split: str = "test", limit: int | None = None) -> dict[str, str]:
    """Answers of a model to a ScienceQA split, by the prompt format of its manifest, second pass included."""
    name = loaded.manifest["prompt_format"]
    problems = load_problems(folder, split)[:limit]
    rows = [
        {"question_id": p.id, "text": format_problem(p, name).turns[0][0], "image": str(p.image) if p.image else None}
        for p in problems
    ]
    answers = answer_questions(loaded, rows, folder, max_new_tokens=96, desc=f"ScienceQA {name}")
    if (bridge := answer_prompt(name)) is None:
        return answers
    begins = {i: text + bridge for i, text in answers.items()}
    letters = answer_questions(loaded, rows, folder, max_new_tokens=6, begins=begins, desc="ScienceQA, answer")
    return {i: f"{answers[i]}\n The answer is {letters[i].strip()}" for i in answers}


def science_result(record: RunRecord, limit: int | None = None) -> dict[str, Any]:
    """ScienceQA test accuracy of a finished run, with its subsets and its answers."""

    def compute() -> dict[str, Any]:
        folder = record.config.data_path
        answers = science_answers(load(record.checkpoint), folder, limit=limit)
        problems = load_problems(folder, "test")[:limit]
        return {**science_qa.score(problems, answers), "answers": answers}

    return cached_result(record, "science_qa", compute)


def bench_result(record: RunRecord, client: Any, bench: str = "bench-coco", limit: int | None = None) -> dict[str, Any]:
    """LLaVA-Bench scores of a finished run: its answers, the judge's reviews, relative scores in %."""

    def compute() -> dict[str, Any]:
        folder, images = bench_folders(record, bench)
        questions = read_jsonl(folder / "questions.jsonl")[:limit]
        answers = answer_questions(load(record.checkpoint), questions, images, max_new_tokens=96, desc=bench)
        context = {row["image"]: _description(row) for row in read_jsonl(folder / "context.jsonl")}
        reference = {str(r["question_id"]): r["text"] for r in read_jsonl(folder / "answers_gpt4.jsonl")}
        reviews = llava_bench.judge(questions, context, reference, answers, client)
        return {**llava_bench.score_reviews(reviews), "answers": answers, "reviews": reviews}

    return cached_result(record, bench, compute)


def _description(row: dict[str, Any]) -> str:
    """What the judge reads instead of the image: captions and boxes (COCO), or one long caption (In-the-Wild)."""
    if "caption" in row:
        return str(row["caption"])
    return context_text(row["captions"], [(i["category"], i["bbox"]) for i in row["instances"]])


def bench_folders(record: RunRecord, bench: str) -> tuple[Path, Path]:
    """Folder of a bench and folder of its images."""
    folder = resolve(record.config.scale.data[bench])
    return folder, resolve(record.config.scale.data.get(f"{bench}_images", str(folder / "images")))


def run_arms(
    arms: Sequence[tuple[str, str]],
    metric: Callable[[RunRecord], float],
    scale: str = "mini",
    fast: bool = False,
    seeds: Sequence[int] | None = None,
) -> list[Arm]:
    """Train and measure every arm with every seed.

    Args:
        arms: (name shown, experiment) pairs; the first is the reference.
        metric: value in points of a finished run.
        scale: scale of the runs.
        fast: one seed and the `--fast` budget.
        seeds: the scale's seeds when None.

    Returns:
        The arms with their values.
    """
    chosen = list(seeds if seeds is not None else load_scale(scale).seeds)[: 1 if fast else None]
    made = [Arm(name, experiment) for name, experiment in arms]
    for seed in chosen:  # seed by seed, so that an interrupted chapter has complete comparisons first
        for arm in made:
            record = launch(resolve_run(arm.experiment, scale, fast, train__seed=seed))
            arm.values.append(metric(record))
            arm.runs.append(record.run_id)
    return made


def difference(reference: Arm, other: Arm) -> dict[str, Any]:
    """Mean difference over seeds (other minus reference, same seeds paired) with its 95 % t interval, in points."""
    deltas = [b - a for a, b in zip(reference.values, other.values, strict=True)]
    return {"effect": sum(deltas) / len(deltas), "interval": seeds_interval(deltas)["interval"] if len(deltas) > 1 else None, "n_seeds": len(deltas)}
