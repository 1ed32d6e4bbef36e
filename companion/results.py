"""Evaluation results of a run, stored in its folder: ScienceQA, LLaVA-Bench, factual questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from companion.ablation_records import CODE_ROOT
from companion.data_tools.scienceqa import Problem, load_problems
from companion.evaluation import llava_bench, science_qa
from companion.evaluation.anatomy import anatomy
from companion.evaluation.bench_steps import load_bench
from companion.evaluation.grounding import edited_accuracy, factual_accuracy, shuffle_images, text_prior
from companion.evaluation.predict import predict_science_qa, science_answers
from llava_core.checkpoints.load import Loaded, load
from llava_core.config import RunConfig, load_scale
from llava_core.inference import answer_questions
from llava_core.record import RunRecord
from llava_core.runtime import (
    DataError,
    display_path,
    fingerprint,
    read_json,
    read_jsonl,
    resolve,
    resolve_device,
    resolve_dtype,
    sha256_file,
    write_json,
)

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


def load_run(record: RunRecord, checkpoint: Path | None = None) -> Loaded:
    """Load the model of a run, or one of its snapshots."""
    config = record.config
    return load(checkpoint or record.checkpoint, resolve_dtype(config.dtype), resolve_device(config.scale.device))


def _limited(name: str, limit: int | None) -> str:
    """The name of a result of the first `limit` questions only: it does not replace that of all."""
    return name if limit is None else f"{name}_{limit}"


SHUFFLE_SEED = 0  # of `shuffle_images`


def science_result(
    record: RunRecord, limit: int | None = None, look: bool = True, split: str = "test"
) -> dict[str, Any]:
    """Return `science_qa.score` and the `answers` of a run on a split, which are also in `file` of the record's folder.

    `right` has a digit 1 or 0 for each question. Without `look` the questions are asked as text only.
    """
    name = ("science_qa" if look else "science_qa_blind") + ("" if split == "test" else f"_{split}")
    name = _limited(name, limit)

    def compute() -> dict[str, Any]:
        folder, out = record.config.data_path, record.path / f"{name}_answers.jsonl"
        answers = _science_answers(record, record.checkpoint, out, split=split, limit=limit, images=look)
        problems = load_problems(folder, split)[:limit]
        score = science_qa.score(problems, answers)
        return {**score, "answers": answers, "file": out.name, "right": _digits(problems, answers)}

    return cached_result(record, name, compute)


def _science_answers(record: RunRecord, checkpoint: Path, out: Path, **options: Any) -> dict[str, str]:
    config = record.config
    first, second = load_scale(config.scale.name).answer_tokens
    out.unlink(missing_ok=True)  # from other code or data; it would be resumed
    return predict_science_qa(
        load_run(record, checkpoint), checkpoint, config.data_path, out,
        max_new_tokens=first, answer_tokens=second, **options,
    )  # fmt: skip


def _digits(problems: list[Problem], answers: dict[str, str]) -> str:
    return "".join(str(int(right)) for right in science_qa.right_answers(problems, answers))


def _checkpoints(record: RunRecord) -> dict[int, Path]:
    """The snapshots of a run and its checkpoint by step, in order."""
    folders = [folder for folder in (record.path / "snapshots").glob("*") if folder.is_dir()]
    snapshots = {int(folder.name): folder for folder in folders}
    return {step: snapshots[step] for step in sorted(snapshots)} | {record.summary["steps"]: record.checkpoint}


def science_curve(record: RunRecord, limit: int) -> dict[str, Any]:
    """Answer the first test problems with each snapshot of a run and with its checkpoint.

    Returns:
        `steps`, and `right`: for each of them a text with a digit 1 or 0 for each problem.

    Raises:
        DataError: the run has kept no snapshot.
    """

    def compute() -> dict[str, Any]:
        problems = load_problems(record.config.data_path, "test")[:limit]
        places, right = _checkpoints(record), []
        if len(places) == 1:
            raise DataError(f"{display_path(record.path)}: no snapshots; train it with train.snapshots of 2 or more")
        for step, folder in places.items():
            out = record.path / "snapshots" / f"answers_{step}.jsonl"
            right.append(_digits(problems, _science_answers(record, folder, out, limit=limit)))
            out.unlink()
        return {"steps": list(places), "right": right}

    return cached_result(record, _limited("science_qa_curve", limit), compute)


def bench_scores(record: RunRecord, bench: str, limit: int | None = None) -> dict[str, Any]:
    """Return the rule scorer's scores of each answer to a bench, `candidate` and `reference`, and the `value` in %.

    A failed review has 0 for both and so counts for neither.
    """
    from companion.miniature.offline_chat import respond
    from companion.teacher.client import OfflineClient

    result = bench_result(record, OfflineClient(respond), bench, limit)
    pairs = [row["tuple"] or (0, 0) for row in result["reviews"]]
    return {"reference": [pair[0] for pair in pairs], "candidate": [pair[1] for pair in pairs], "value": result["all"]}


def anatomy_curve(record: RunRecord, limit: int | None = None) -> dict[str, Any]:
    """Score the steps of the reasons for validation problems, at each snapshot of a run and at its end.

    Returns:
        `steps`, and `anatomy`: for each of them the dict of `anatomy.anatomy`. A run without `train.snapshots` has one.
    """

    def compute() -> dict[str, Any]:
        config, problems = record.config, load_problems(record.config.data_path, "val")[:limit]
        first, second = load_scale(config.scale.name).answer_tokens
        places, found = _checkpoints(record), []
        for folder in places.values():
            answers = science_answers(load_run(record, folder), problems, max_new_tokens=first, answer_tokens=second)
            found.append(anatomy(problems, answers))
        return {"steps": list(places), "anatomy": found}

    return cached_result(record, _limited("anatomy", limit), compute)


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

    return cached_result(record, _limited(bench, limit), compute)


def bench_folders(record: RunRecord, bench: str) -> tuple[Path, Path]:
    folder = resolve(record.config.scale.data[bench])
    return folder, resolve(record.config.scale.data.get(f"{bench}_images", str(folder / "images")))


def factual_folder(config: RunConfig) -> Path:
    """Return the folder of factual questions: COCO of the scale if it has them, otherwise that of the miniature."""
    from companion import miniature

    folder = resolve(config.scale.data["coco"])
    return folder if (folder / "questions_val.jsonl").is_file() else miniature.ensure(only=["mini-coco"]) / "mini-coco"


def grounding_result(record: RunRecord, limit: int | None = None) -> dict[str, Any]:
    """Answer factual questions about held-out images: with the right image, another one, a blank and an edited one.

    Returns:
        `right`, `shuffled` (images exchanged), `blank` (uniform gray) and `prior` (the best answers without an image),
        each as `factual_accuracy` returns it; `edited`: color questions about the miniature's val scenes, with the
        image as it is and with another color of the group, each as `edited_accuracy` returns it; and the `answers`
        with the right image.
    """

    def compute() -> dict[str, Any]:
        folder, loaded = factual_folder(record.config), load_run(record)
        rows, images = read_jsonl(folder / "questions_val.jsonl")[:limit], folder / "val2014"
        with TemporaryDirectory() as blank:
            Image.new("RGB", (224, 224), (128, 128, 128)).save(Path(blank) / "blank.png")
            cases = {
                "right": (rows, images),
                "shuffled": (shuffle_images(rows, SHUFFLE_SEED), images),
                "blank": ([{**row, "image": "blank.png"} for row in rows], Path(blank)),
            }
            answers = {
                name: answer_questions(loaded, asked, place, max_new_tokens=16, desc=f"{name} image")
                for name, (asked, place) in cases.items()
            }
        prior = text_prior(read_jsonl(folder / "questions_train.jsonl"), rows)
        scores = {name: factual_accuracy(rows, said) for name, said in answers.items()}
        edited = _edited_result(loaded, limit)
        return {**scores, "prior": prior, "edited": edited, "answers": answers["right"]}

    return cached_result(record, _limited("grounding", limit), compute)


def _edited_result(loaded: Loaded, limit: int | None) -> dict[str, Any]:
    from companion import miniature
    from companion.miniature.edited_scenes import color_edits, draw_edits, edited_rows

    folder = miniature.ensure(only=["mini-coco"]) / "mini-coco"  # scenes are known for the miniature only
    edits = color_edits(folder, limit)
    rows = edited_rows(edits)
    before, after = [edit.answer for edit in edits], [edit.edited_answer for edit in edits]
    result: dict[str, Any] = {}
    with TemporaryDirectory() as drawn:
        draw_edits(edits, Path(drawn))
        for name, place in (("as it is", folder / "val2014"), ("edited", Path(drawn))):
            answers = answer_questions(loaded, rows, place, max_new_tokens=16, desc=f"color questions, {name}")
            said = [answers[str(row["question_id"])] for row in rows]
            result[name] = edited_accuracy(before, after, said)
    return result
