"""mini-scienceqa: multiple-choice problems of three subjects in ScienceQA's official files; science facts as text."""

from __future__ import annotations

import random
from bisect import bisect_right
from itertools import accumulate, combinations, permutations, product
from pathlib import Path
from typing import Any

from companion.data_tools.scienceqa import write_training_files
from companion.miniature.coco import render
from companion.miniature.language import number_word, sentence
from companion.miniature.science_skills import (
    COMPASS,
    ENDINGS,
    GROUP_OF,
    GROUPS,
    LEGS,
    MEASURES,
    MOVES,
    NEEDS,
    PLACES,
    RHYMES,
    SKILLS,
    WORDS,
    article,
    equation,
    is_a,
    last_letters,
)
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, write_json

SIZES = {"train": 1600, "val": 200, "test": 400}
_ATTEMPTS = 40  # draws of a new problem for a skill before another skill replaces it


def make_problem(rng: random.Random, skill: str | None = None) -> dict[str, Any]:
    """Generate one problem of a skill, drawn by weight when None.

    It has the fields of `problems.json` except `split`, and `scene`: that of the image, or None without an image.

    Raises:
        ConfigError: unknown skill.
    """
    skill = skill or rng.choices(list(SKILLS), [s.weight for s in SKILLS.values()])[0]
    if skill not in SKILLS:
        raise ConfigError(unknown("science skill", skill, SKILLS))
    kind = SKILLS[skill]
    draft = kind.draw(rng)
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
    """Write mini-scienceqa; no problem occurs twice, in one split or in two. Returns counts by split and context.

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
            drawn = (make_problem(rng, skill if k < _ATTEMPTS else None) for k in range(2 * _ATTEMPTS))
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


def _facts() -> dict[str, list[str]]:
    pairs = list(product(range(1, 13), repeat=2))
    letters = sorted({word[0] for word in WORDS})
    return {
        "group": [is_a(noun) for noun in GROUP_OF],
        "kin": [
            f"{article(a)} and {article(b)} belong to one group" for g in GROUPS.values() for a, b in permutations(g, 2)
        ],
        "need": [f"{article(group)} needs {need}" for group, need in NEEDS.items()],
        "move": [f"{article(noun)} moves {way}" for way, nouns in MOVES.items() for noun in nouns],
        "legs": [f"{article(animal)} has {number_word(n)} legs" for animal, n in LEGS.items()],
        "weather": [f"{name} is {weather}" for name, weather, _ in PLACES.values()],
        "take": [f"when it is {weather}, people take {item}" for _, weather, item in PLACES.values()],
        "compass": [f"{seen.removesuffix(' of')} is {way}" for way, seen in COMPASS.items()],
        "plus": [equation(a, "plus", b) for a, b in pairs if a + b <= 12],
        "times": [equation(a, "times", b) for a, b in pairs if a * b <= 12],
        "divided": [equation(a * b, "divided by", b) for a, b in pairs if a * b <= 12],
        "more": [f"{number_word(a)} is more than {number_word(b)}" for a, b in pairs if a > b],
        "less": [f"{number_word(a)} is less than {number_word(b)}" for a, b in pairs if a < b],
        "letter": [f"{word} starts with {word[0]}" for word in WORDS],
        "alphabet": [f"{a} comes before {b} in the alphabet" for a, b in combinations(letters, 2)],
        "rhyme": [f"{a} rhymes with {b}" for words in RHYMES.values() for a, b in permutations(words, 2)],
        "sound": [f"{word} ends in {end}" for end, words in RHYMES.items() for word in words],
        "plural": [f"{word} takes {end} in its plural" for end, words in ENDINGS.items() for word in words],
        "ending": [f"{word} ends in {last_letters(word)}" for words in ENDINGS.values() for word in words],
        "measure": [f"{a} is the opposite of {b}" for m in MEASURES for a, b in (m[:2], m[2:4])],
    }


FACTS = _facts()


def science_text(rng: random.Random) -> str:
    """One to four sentences of facts, lectures and hints as pretraining text, never a question."""
    said = [sentence(rng.choice(FACTS[kind])) for kind in rng.choices(list(FACTS), k=rng.randint(1, 3))]
    skill, kind = rng.choice(list(SKILLS.values())), rng.random()
    extra = skill.lecture if kind < 0.35 else skill.draw(rng).hint if kind < 0.6 else ""
    return " ".join([extra, *said]).strip()


__all__ = ["FACTS", "SIZES", "SKILLS", "make_problem", "science_text", "write_scienceqa"]
