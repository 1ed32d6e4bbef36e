"""Errors of the teacher against hallucination of the model: stage 2 on instruction data of several error rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.common import circumstances
from companion import miniature
from companion.data_tools.coco import AnnotatedImage, load_annotations
from companion.evaluation.grounding import hallucination
from companion.miniature.offline_chat import respond
from companion.miniature.scene_text import objects_named
from companion.paper.claims import claim
from companion.results import grounding_result, load_run
from companion.teacher.client import OfflineClient
from companion.teacher.mix import generate_mix
from llava_core.config import load_scale
from llava_core.inference import answer_questions
from llava_core.runtime import read_json, resolve
from llava_core.train.launch import launch, resolve_run

REQUEST = "Describe this image in detail."
SHARES = {
    "conversation": 1.0,
    "detail": claim("instruct-detail").value / claim("instruct-conversation").value,
    "complex": 1.0,
}
"""Requests per image, as in chapter 11."""


def absent_objects(descriptions: Mapping[str, str], images: Sequence[AnnotatedImage]) -> dict[str, Any]:
    """The `hallucination` of descriptions by image id."""
    present = {image.id: {name for name, _ in image.boxes} for image in images}
    return hallucination({key: objects_named(text) for key, text in descriptions.items()}, present)


def measure(error: float, seed: int, images: Sequence[AnnotatedImage], limit: int | None, fast: bool) -> dict[str, Any]:
    """Generate the data of an error rate, train stage 2 on them and return one row.

    Args:
        error: probability with which the teacher replaces a fact.
        seed: of the errors and of the training.
        images: those of the instruction data.
        limit: held-out images that are described and questions about facts; None: all.
        fast: the budget of `--fast`.
    """
    folder = f"runs/teacher_error/error{error:g}-seed{seed}-{len(images)}"
    client = OfflineClient(partial(respond, error=error, seed=seed))
    mix = generate_mix(images, SHARES, client, resolve(folder))
    data = {**load_scale("mini").data, "instruct158k": folder}
    record = launch(resolve_run("finetune", "mini", fast, train__seed=seed, scale__data=data))
    facts = grounding_result(record, limit)
    coco = resolve(data["coco"])
    held_out = load_annotations(coco, "val2014")[:limit]
    rows = [{"question_id": image.id, "text": REQUEST, "image": image.image} for image in held_out]
    said = answer_questions(load_run(record), rows, coco / "val2014", max_new_tokens=96, desc="descriptions")
    model = absent_objects({str(key): text for key, text in said.items()}, held_out)
    written = read_json(resolve(folder) / "detail" / "llava_instruct.json")
    teacher = absent_objects({r["id"]: r["conversations"][1]["value"] for r in written}, images)
    presence = facts["right"]["by_kind"].get("presence", {})
    return {
        **circumstances(torch.device("cpu")),
        "error": error,
        "seed": seed,
        "images": len(images),
        "records": sum(kind["records"] for kind in mix.values()),
        "steps": record.summary["steps"],
        "fast": fast,
        "run": record.run_id,
        "teacher_absent": teacher["objects"]["share"],
        "objects": model["objects"]["n"],
        "model_absent": model["objects"]["share"],
        "model_absent_low": model["objects"]["interval"][0],
        "model_absent_high": model["objects"]["interval"][1],
        "descriptions_with_absent": model["descriptions"]["share"],
        "questions": facts["right"]["n"],
        "facts_right": facts["right"]["accuracy"],
        "facts_right_low": facts["right"]["interval"][0],
        "facts_right_high": facts["right"]["interval"][1],
        "presence_right": presence.get("accuracy"),
    }


def bench_teacher_error(
    errors: Sequence[float] = (0.0, 0.05, 0.1, 0.2, 0.3),
    seeds: Sequence[int] = (42, 0),
    images: int = 0,
    limit: int = 0,
    fast: bool = False,
) -> dict[str, Any]:
    """Measure hallucination (objects named that are not there, wrong facts) against the teacher's error rate.

    Args:
        errors: error rates of the teacher, 0 to 1.
        seeds: of the errors and of the training.
        images: images of the instruction data; 0: all of mini-coco.
        limit: held-out images and questions of the measurement; 0: all.
        fast: the shortest training; its numbers mean nothing.
    """
    folder = miniature.ensure(only=["mini-coco"]) / "mini-coco"
    chosen = load_annotations(folder, "train2014")[: images or None]
    return {"cases": [measure(error, seed, chosen, limit or None, fast) for seed in seeds for error in errors]}
