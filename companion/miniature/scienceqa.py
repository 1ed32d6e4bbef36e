"""mini-scienceqa: multiple-choice problems of three subjects in ScienceQA's official files."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from companion.data_tools.scienceqa import write_training_files
from companion.miniature.coco import render
from companion.miniature.science_skills import SKILLS
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, write_json

SIZES = {"train": 4000, "val": 400, "test": 1000}
_SHARES = {"test": 20, "val": 10}  # percent of the different texts of problems; the rest is for training and reading
_ATTEMPTS = 400  # draws of a new problem for a skill before another skill replaces it


def split_of(problem: Mapping[str, Any]) -> str:
    """The split of a problem, decided by its question, hint and solution: no two splits share all three."""
    text = "\n".join((problem["question"], problem["hint"], problem["solution"]))
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 100
    return "test" if place < _SHARES["test"] else "val" if place < sum(_SHARES.values()) else "train"


def make_problem(rng: random.Random, skill: str | None = None, split: str | None = None) -> dict[str, Any]:
    """Generate one problem of a skill, drawn by weight when None, and of a split, of any when None.

    It has the fields of `problems.json` except `split`, and `scene`: that of the image, or None without an image.

    Raises:
        ConfigError: unknown skill.
    """
    skill = skill or rng.choices(list(SKILLS), [s.weight for s in SKILLS.values()])[0]
    if skill not in SKILLS:
        raise ConfigError(unknown("science skill", skill, SKILLS))
    kind = SKILLS[skill]
    while True:
        draft = kind.draw(rng)
        if split is None or split_of(vars(draft)) == split:
            break
    choices = [draft.right, *rng.sample(draft.wrong, rng.randint(draft.least, min(3, len(draft.wrong))))]
    rng.shuffle(choices)
    return {
        "question": draft.question,
        "choices": choices,
        "answer": choices.index(draft.right),
        "hint": draft.hint,
        "image": "image.png" if draft.scene else None,
        "task": "closed choice",
        "grade": f"grade{rng.randint(*kind.grades)}",
        "subject": kind.subject,
        "topic": kind.topic,
        "category": kind.category,
        "skill": skill,
        "lecture": kind.lecture,
        "solution": draft.solution,
        "scene": draft.scene,
    }


def _plan(n: int, rng: random.Random) -> list[str]:
    """Skills of n problems in random order, by systematic sampling of the weights."""
    edges, start = list(accumulate(skill.weight for skill in SKILLS.values())), rng.random()
    plan = [list(SKILLS)[bisect_right(edges, (k + start) / n * edges[-1])] for k in range(n)]
    return rng.sample(plan, n)


def _content(problem: dict[str, Any]) -> tuple[Any, ...]:
    """Key for equal problems; the order of the choices and the seed of the pixels do not matter."""
    scene = problem["scene"]
    return problem["question"], problem["hint"], *sorted(problem["choices"]), scene and (scene.background, scene.items)


def write_scienceqa(root: Path, *, seed: int, sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Write mini-scienceqa; no problem occurs twice, and no two splits share question, hint and solution.

    Returns counts by split and context.

    Raises:
        ConfigError: there are not that many different problems.
    """
    sizes = sizes or SIZES
    total, rng = sum(sizes.values()), random.Random(f"scienceqa-{seed}")
    ids = rng.sample(range(1, total + 1), total)
    problems: dict[int, dict[str, Any]] = {}
    splits, seen, jobs = {}, set(), []
    for split, n in sizes.items():
        splits[split] = sorted(ids.pop() for _ in range(n))
        for number, skill in zip(splits[split], _plan(n, rng), strict=True):
            drawn = (make_problem(rng, skill if k < _ATTEMPTS else None, split) for k in range(2 * _ATTEMPTS))
            problem = next((p for p in drawn if _content(p) not in seen), None)
            if problem is None:
                raise ConfigError(f"mini-scienceqa: there are no {total} different problems; ask for fewer in `sizes`")
            seen.add(_content(problem))
            if scene := problem.pop("scene"):
                folder = root / "images" / split / str(number)
                folder.mkdir(parents=True, exist_ok=True)
                jobs.append((scene, folder / problem["image"]))
            problems[number] = problem | {"split": split}
    splits |= {f"mini{split}": members[: -(-len(members) // 10)] for split, members in splits.items()}
    splits["trainval"] = sorted(splits.get("train", []) + splits.get("val", []))
    write_json(root / "problems.json", {str(number): problems[number] for number in sorted(problems)})
    write_json(root / "pid_splits.json", {split: [str(k) for k in members] for split, members in splits.items()})
    render(jobs, "drawing mini-scienceqa")
    write_training_files(root, check_images=False)
    context = [(bool(p["image"]), bool(p["hint"])) for p in problems.values()]
    return dict(sizes) | {
        "with_image": sum(image for image, _ in context),
        "with_text": sum(text for _, text in context),
        "without_context": context.count((False, False)),
    }


__all__ = ["SIZES", "SKILLS", "make_problem", "split_of", "write_scienceqa"]
