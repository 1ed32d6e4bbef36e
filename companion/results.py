"""Evaluation results of a run, stored in its folder: ScienceQA, LLaVA-Bench, factual questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from companion.data_tools.scienceqa import load_problems
from companion.evaluation import llava_bench, science_qa
from companion.evaluation.bench_steps import load_bench
from companion.evaluation.grounding import factual_accuracy, shuffle_images, text_prior
from companion.evaluation.predict import predict_science_qa
from llava_core.checkpoints.load import Loaded, load
from llava_core.config import RunConfig, load_scale
from llava_core.inference import answer_questions
from llava_core.record import RunRecord
from llava_core.runtime import (
    fingerprint,
    read_json,
    read_jsonl,
    resolve,
    resolve_device,
    resolve_dtype,
    sha256_file,
    write_json,
)

CODE_ROOT = Path(__file__).resolve().parents[1]
EVALUATION_CODE = (
    "llava_core/data", "llava_core/models", "llava_core/checkpoints",
    "companion/data_tools", "companion/evaluation", "companion/teacher", "companion/miniature",
)  # fmt: skip


def cached_result(record: RunRecord, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a result stored with its run; it is recomputed when evaluation code or data cards have changed."""
    path = record.path / f"{name}.json"
    code = [file for folder in EVALUATION_CODE for file in sorted((CODE_ROOT / folder).rglob("*"))]
    files = [Path(__file__), *(file for file in code if file.suffix in (".py", ".yaml", ".txt", ".json"))]
    cards = {resolve(folder) / "card.json" for folder in record.config.scale.data.values()}
    files += sorted(card for card in cards if card.is_file())
    measured_with = fingerprint([sha256_file(file) for file in files])
    if path.is_file():
        stored: dict[str, Any] = read_json(path)
        if stored["measured_with"] == measured_with:
            return stored
    result = {**compute(), "measured_with": measured_with}
    write_json(path, result)
    return result


def load_run(record: RunRecord) -> Loaded:
    config = record.config
    return load(record.checkpoint, resolve_dtype(config.dtype), resolve_device(config.scale.device))


SHUFFLE_SEED = 0  # of `shuffle_images`


def science_result(record: RunRecord, limit: int | None = None, look: bool = True) -> dict[str, Any]:
    """Return `science_qa.score` and the `answers` of a run on the test split; without `look` as text only."""
    name = "science_qa" if look else "science_qa_blind"

    def compute() -> dict[str, Any]:
        folder, out = record.config.data_path, record.path / f"{name}_answers.jsonl"
        first, second = load_scale(record.config.scale.name).answer_tokens
        out.unlink(missing_ok=True)  # from other code or data; it would be resumed
        answers = predict_science_qa(
            load_run(record), record.checkpoint, folder, out,
            limit=limit, images=look, max_new_tokens=first, answer_tokens=second,
        )  # fmt: skip
        return {**science_qa.score(load_problems(folder, "test")[:limit], answers), "answers": answers}

    return cached_result(record, name, compute)


def bench_result(record: RunRecord, client: Any, bench: str = "bench-coco", limit: int | None = None) -> dict[str, Any]:
    """Return the LLaVA-Bench scores of a finished run: `llava_bench.score_reviews`, the `answers` and the `reviews`."""

    def compute() -> dict[str, Any]:
        folder, images = bench_folders(record, bench)
        files = load_bench(folder, limit)
        rows, images = files.rows(images)
        max_new_tokens, _ = load_scale(record.config.scale.name).answer_tokens
        answers = answer_questions(load_run(record), rows, images, max_new_tokens=max_new_tokens, desc=bench)
        reviews, _ = llava_bench.judge(files.questions, files.context, files.reference or {}, answers, client)
        return {**llava_bench.score_reviews(reviews), "answers": answers, "reviews": reviews}

    return cached_result(record, bench, compute)


def bench_folders(record: RunRecord, bench: str) -> tuple[Path, Path]:
    folder = resolve(record.config.scale.data[bench])
    return folder, resolve(record.config.scale.data.get(f"{bench}_images", str(folder / "images")))


def factual_folder(config: RunConfig) -> Path:
    """Return the folder of factual questions: COCO of the scale if it has them, otherwise that of the miniature."""
    from companion import miniature

    folder = resolve(config.scale.data["coco"])
    return folder if (folder / "questions_val.jsonl").is_file() else miniature.ensure(only=["mini-coco"]) / "mini-coco"


def grounding_result(record: RunRecord, limit: int | None = None) -> dict[str, Any]:
    """Answer factual questions about held-out images, with the right image and with another one.

    The `limit` of a run's first call decides, since its result is stored with the run.

    Returns:
        `right`, `shuffled` (images exchanged) and `prior` (the best answers without an image), each as
        `factual_accuracy` returns it, and the `answers` with the right image.
    """

    def compute() -> dict[str, Any]:
        folder, loaded = factual_folder(record.config), load_run(record)
        rows = read_jsonl(folder / "questions_val.jsonl")[:limit]
        answers, mixed = (
            answer_questions(loaded, asked, folder / "val2014", max_new_tokens=16, desc=desc)
            for asked, desc in ((rows, "right image"), (shuffle_images(rows, SHUFFLE_SEED), "another image"))
        )
        prior = text_prior(read_jsonl(folder / "questions_train.jsonl"), rows)
        right, shuffled = factual_accuracy(rows, answers), factual_accuracy(rows, mixed)
        return {"right": right, "shuffled": shuffled, "prior": prior, "answers": answers}

    return cached_result(record, "grounding", compute)
