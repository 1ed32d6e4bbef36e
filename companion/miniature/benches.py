"""bench-coco and bench-wild in LLaVA-Bench's file formats: questions, context for the judge, reference answers.

bench-coco has val scenes of mini-coco; bench-wild has scenes whose pairs of category and color occur in no training
image. The reference answers are those of the text-only teacher, generated from the scene.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from companion.miniature import coco, language
from companion.miniature.world import Scene, sample_scene
from llava_core.runtime import write_jsonl

DETAIL_REQUESTS = (
    "Describe this image in detail.",
    "Tell me everything that can be seen in the image.",
    "Give a complete description of the scene.",
)


class _Bench:
    def __init__(self, seed: int, name: str, prefix: str = "") -> None:
        self.rng, self.prefix = random.Random(f"{name}-{seed}"), prefix
        self.questions: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []

    def ask(self, image: str, category: str, text: str, answer: str) -> None:
        row = {"question_id": len(self.questions), "text": text, "category": self.prefix + category}
        self.questions.append({"question_id": row["question_id"], "image": image} | row)
        self.answers.append(row | {"text": answer})

    def conv(self, image: str, scene: Scene) -> None:
        qa = language.questions(language.facts_of_scene(scene), self.rng)[0]
        self.ask(image, "conv", qa.question, qa.statement)

    def detail(self, image: str, scene: Scene) -> None:
        self.ask(image, "detail", self.rng.choice(DETAIL_REQUESTS), language.describe(language.facts_of_scene(scene)))

    def complex(self, image: str, scene: Scene, which: int = 0) -> None:
        qa = _reasonings(scene)[which]
        self.ask(image, "complex", qa.question, qa.answer)

    def save(self, root: Path, context: list[dict[str, Any]]) -> dict[str, int]:
        write_jsonl(root / "questions.jsonl", self.questions)
        write_jsonl(root / "answers_gpt4.jsonl", self.answers)
        write_jsonl(root / "context.jsonl", context)
        asked = Counter(str(q["category"]) for q in self.questions)
        return {"images": len(context), "questions": len(self.questions), **dict(sorted(asked.items()))}


def _reasonings(scene: Scene) -> list[language.QA]:
    facts = language.facts_of_scene(scene)
    result: dict[str, language.QA] = {}
    for attempt in range(12):
        if qa := language.reasoning(facts, random.Random(f"reasoning-{scene.id}-{attempt}")):
            result.setdefault(qa.question, qa)
    return [result[question] for question in sorted(result)]


def _pick(candidates: Callable[[int], Scene], n: int, reasonings: int, limit: int) -> list[Scene]:
    """The first `n` candidates that allow that many reasoning questions."""
    scenes: list[Scene] = []
    for k in range(limit):
        if len(scenes) < n and len(_reasonings(scene := candidates(k))) >= reasonings:
            scenes.append(scene)
    return scenes


def write_bench_coco(root: Path, *, seed: int, images: int, train: int, val: int) -> dict[str, int]:
    """Write bench-coco: three questions (conv, detail, complex) about each of at most `images` val scenes of mini-coco.

    `seed`, `train` and `val` are those of mini-coco and decide its image ids. Returns counts by category.
    """
    members = coco.scenes(seed, train, val)["val"]
    random.Random(f"bench-coco-scenes-{seed}").shuffle(members)
    bench, context, jobs = _Bench(seed, "bench-coco"), [], []
    (root / "images").mkdir(parents=True, exist_ok=True)
    for scene in _pick(members.__getitem__, images, 1, len(members)):
        image = f"{scene.id:012d}.jpg"
        bench.conv(image, scene)
        bench.detail(image, scene)
        bench.complex(image, scene)
        boxes = [{"category": i.category, "bbox": [round(v, 3) for v in coco.visible_box(i)]} for i in scene.items]
        texts = coco.captions_of(scene, seed)
        context.append({"id": image[:-4], "image": image, "captions": texts, "instances": boxes})
        jobs.append((scene, root / "images" / image))
    coco.render(jobs, "drawing bench-coco")
    return bench.save(root, context)


def write_bench_wild(root: Path, *, seed: int, images: int) -> dict[str, int]:
    """Write bench-wild: scenes with held-out pairs of category and color, 5 questions for every 2 of them.

    24 `images` get 28 complex, 17 conv and 15 detail questions, as in the official bench. Returns counts by category.
    """
    n_conv, n_detail, n_twice = (round(images * share / 24) for share in (17, 15, 4))
    # scene ids above those of mini-coco
    one = _pick(lambda k: sample_scene(600_000 + k, seed, (2, 3, None)[k % 3], "ood"), images - n_twice, 1, 50 * images)
    two = _pick(lambda k: sample_scene(700_000 + k, seed, 2 + k % 2, "ood"), n_twice, 2, 50 * images)
    members = one + two
    order = random.Random(f"bench-wild-{seed}")
    order.shuffle(members)
    with_conv = {s.id for s in order.sample(members, n_conv)}
    with_detail = {s.id for s in order.sample(members, n_detail)}
    bench, context, jobs = _Bench(seed, "bench-wild", "llava_bench_"), [], []
    (root / "images").mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(members, start=1):
        image = f"{number:03d}.jpg"
        if scene.id in with_conv:
            bench.conv(image, scene)
        if scene.id in with_detail:
            bench.detail(image, scene)
        for which in range(1 + (scene in two)):
            bench.complex(image, scene, which)
        caption = language.describe(language.facts_of_scene(scene))
        context.append({"id": image[:-4], "image": image, "caption": caption})
        jobs.append((scene, root / "images" / image))
    coco.render(jobs, "drawing bench-wild")
    return bench.save(root, context)


__all__ = ["write_bench_coco", "write_bench_wild"]
