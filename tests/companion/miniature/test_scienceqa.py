"""mini-scienceqa: every problem is valid and true, none can be guessed, and the files have the official form."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Hashable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from companion.data_tools.scienceqa import load_problems
from companion.miniature import science_skills, scienceqa, world
from companion.miniature.language import NUMBERS
from companion.miniature.science_skills import GROUP_OF, LEGS, MOVES, NEEDS, PLACES, SKILLS
from companion.miniature.scienceqa import make_problem
from llava_core.runtime import ConfigError, read_json

Problem = dict[str, Any]
N = 300
SIZES = {"train": 60, "val": 20, "test": 20}


def problems(skill: str, n: int = N, seed: int = 0) -> list[Problem]:
    rng = random.Random(f"{skill}-{seed}")
    return [make_problem(rng, skill) for _ in range(n)]


def right(problem: Problem) -> str:
    return problem["choices"][problem["answer"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini-scienceqa")
    scienceqa.write_scienceqa(root, seed=3, sizes=SIZES)
    return root


@pytest.mark.parametrize("skill", SKILLS)
def test_problems_are_valid(skill: str) -> None:
    for p in problems(skill):
        assert 2 <= len(set(p["choices"])) == len(p["choices"]) <= 4
        assert 0 <= p["answer"] < len(p["choices"])
        assert (p["image"] == "image.png") == (p["scene"] is not None)
        assert p["lecture"].count(".") == 1
        assert p["solution"].count(".") >= 2, "less than two steps"
        last = p["solution"].rstrip(".").rsplit(". ", 1)[-1].lower()
        assert right(p) in last, "the letter is bound to the last step"
        text = " ".join([p["question"], p["hint"], *p["choices"]])
        assert len(text.split()) <= 45
        assert len(f"{p['lecture']} {p['solution']}".split()) <= 30


def guessed(cue: Callable[[Problem, int], Hashable], fit: list[Problem], test: list[Problem]) -> float:
    """How far above chance a guesser comes that knows how often each value of a cue was right; ties share."""
    seen: Counter[Hashable] = Counter()
    hits: Counter[Hashable] = Counter()
    for p in fit:
        for k in range(len(p["choices"])):
            seen[cue(p, k)] += 1
            hits[cue(p, k)] += k == p["answer"]
    gain = 0.0
    for p in test:
        rates = [(hits[cue(p, k)] + 1) / (seen[cue(p, k)] + 2.5) for k in range(len(p["choices"]))]
        best = [k for k, rate in enumerate(rates) if rate == max(rates)]
        gain += (p["answer"] in best) / len(best) - 1 / len(rates)
    return gain / len(test)


def named(p: Problem, k: int) -> Hashable:
    """How often the hint has a choice, and which of the choices it has first."""
    hint = p["hint"].lower()
    return (
        len(p["choices"]),
        hint.count(p["choices"][k]),
        sorted(map(hint.find, p["choices"])).index(hint.find(p["choices"][k])),
    )


def amounts(p: Problem) -> list[tuple[int, int]]:
    """Miles and hours of each choice's car."""
    cars = pairs_in(r"the (\w+) car goes (\w+) miles? in (\w+)", p["hint"])
    return [(NUMBERS.index(cars[c][0]), NUMBERS.index(cars[c][1])) for c in p["choices"]]


CUES: dict[str, Callable[[Problem, int], Hashable]] = {
    "position": lambda p, k: (len(p["choices"]), k),
    "choice": lambda p, k: p["choices"][k],
    "length": lambda p, k: sorted(map(len, p["choices"])).index(len(p["choices"][k])),
    "mentions": named,
}


@pytest.mark.parametrize("skill", SKILLS)
def test_no_problem_can_be_guessed(skill: str) -> None:
    fit, test = problems(skill, 4 * N, seed=1), problems(skill, 2 * N, seed=2)
    cues = dict(CUES)
    if fit[0]["image"]:  # with an image, the full question must not reveal the answer either
        cues["question"] = lambda p, k: (p["question"], p["choices"][k])
    if skill == "speed from a text":  # neither the way nor the time may do without the other
        for number in (0, 1):
            cues[f"number {number}"] = lambda p, k, n=number: (p["question"], amounts(p)[k][n] > amounts(p)[1 - k][n])
    for name, cue in cues.items():
        assert guessed(cue, fit, test) < 0.09, name


def test_guesser_detects_a_revealing_choice() -> None:
    skill = "needs in a picture"
    fit, test = problems(skill, seed=1), problems(skill, seed=2)
    for p in fit + test:  # drivers are right whenever offered, as if scenes had been sampled carelessly
        if "a driver" in p["choices"]:
            p["answer"] = p["choices"].index("a driver")
    assert guessed(CUES["choice"], fit, test) > 0.09


# --- answers derived from picture and text -----------------------------------------------------------------------


def pointed_at(p: Problem) -> str:
    """The category of the thing that the question points at by color or place."""
    by_color = re.search(r"the (\w+) thing", p["question"])
    groups = p["scene"].groups
    zone = re.search(r"thing (?:on|in) the (\w+)", p["question"])
    result = [g for g in groups if not by_color or g.color == by_color[1] if not zone or g.position == zone[1]]
    assert len(result) == 1, p["question"]
    return result[0].category


def pairs_in(pattern: str, text: str) -> dict[str, Any]:
    return {m[0]: m[1] if len(m) == 2 else m[1:] for m in re.findall(pattern, text.lower())}


def find_map(p: Problem) -> str:
    a, b = re.findall(r"the (\w+)", p["question"])
    (ax, ay), (bx, by) = (
        next(((i.box[0] + i.box[2]) / 2, i.box[3]) for i in p["scene"].items if i.category == c) for c in (a, b)
    )
    return ("west" if ax < bx else "east") if abs(ax - bx) > 0.2 else ("north" if ay < by else "south")


def find_caption(p: Problem) -> str:
    (group,) = p["scene"].groups
    return next(w for w in p["choices"] if w not in (group.color, group.category, group.position))


def find_distance(p: Problem) -> str:
    speeds = pairs_in(r"(\w+) goes (\w+) mile", p["hint"])
    hours = re.findall(r"in (\w+) hours", p["question"])[0]
    return f"{NUMBERS[NUMBERS.index(speeds[pointed_at(p)]) * NUMBERS.index(hours)]} miles"


def find_prices(p: Problem) -> str:
    prices = pairs_in(r"(\w+) costs (\w+)", p["hint"])
    return f"{NUMBERS[sum(NUMBERS.index(prices[g.category]) for g in p['scene'].groups)]} coins"


def find_sorting(p: Problem) -> str:
    thing = re.findall(r"the (\w+) go", p["question"])[0]
    rules = pairs_in(r"(\w+) goes in (\w+)", p["hint"])
    return rules[next(g.color for g in p["scene"].groups if g.category == thing)]


def find_state(p: Problem) -> str:
    melt, boil, now = (NUMBERS.index(w) for w in re.findall(r"(?:at|it is) (\w+)", p["hint"]))
    return "solid" if now < melt else "gas" if now > boil else "liquid"


def find_speed(p: Problem) -> str:
    rate = {c: miles / hours for c, (miles, hours) in zip(p["choices"], amounts(p), strict=True)}
    return (max if "faster" in p["question"] else min)(rate, key=lambda c: rate[c])


def find_most(p: Problem) -> str:
    values = {color: NUMBERS.index(n) for color, n in re.findall(r"(\w+) (\w+)[,.]", p["hint"].split(": ")[1])}
    end = re.findall(r"is the (\w+)", p["question"])[0]
    return (max if end in ("heaviest", "hottest", "fastest") else min)(values, key=lambda color: values[color])


def find_direction(p: Problem) -> str:
    a, b = re.findall(r"the (\w+)", p["question"])
    told = {(one, other): way for one, way, other in re.findall(r"the (\w+) is (\w+) of the (\w+)", p["hint"].lower())}
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    return told[a, b] if (a, b) in told else back[told[b, a]]


def find_history(p: Problem) -> str:
    return pairs_in(r"the (\w+) came (\w+)", p["hint"])[pointed_at(p)]


def find_legs(p: Problem) -> str:
    (color,) = re.findall(r"all (\w+) animals", p["question"])
    return NUMBERS[sum(LEGS.get(item.category, 0) for item in p["scene"].items if item.color == color)]


def find_member(p: Problem) -> str:
    wanted = re.findall(r"in the group of an? (\w+)", p["question"])
    group = GROUP_OF[wanted[0]] if wanted else next(g for g, n in NEEDS.items() if n in p["question"])
    (result,) = [c for c in p["choices"] if GROUP_OF[c] == group]
    return result


def find_alphabet(p: Problem) -> str:
    return (min if "first" in p["question"] else max)(p["choices"])


def find_plural(p: Problem) -> str:
    def ending(word: str) -> str:
        return "ies" if word.endswith("y") else "es" if re.search(r"(s|x|sh|ch)$", word) else "s"

    return ending(re.findall(r"what does (\w+) take", p["question"])[0])


def find_rhyme(p: Problem) -> str:
    word = re.findall(r"with (\w+)", p["question"])[0]
    (result,) = [c for c in p["choices"] for words in science_skills.RHYMES.values() if {c, word} <= set(words)]
    return result


FINDERS: dict[str, Callable[[Problem], str]] = {
    "needs in a picture": lambda p: NEEDS[GROUP_OF[pointed_at(p)]],
    "groups in a picture": lambda p: GROUP_OF[pointed_at(p)],
    "movement in a picture": lambda p: next(way for way, things in MOVES.items() if pointed_at(p) in things),
    "legs in a picture": find_legs,
    "climate in a picture": lambda p: PLACES[p["scene"].background][2],
    "map of a picture": find_map,
    "sorting by a rule": find_sorting,
    "distance in a picture": find_distance,
    "prices in a picture": find_prices,
    "history in a picture": find_history,
    "caption of a picture": find_caption,
    "most and least": find_most,
    "directions from a text": find_direction,
    "states of matter": find_state,
    "speed from a text": find_speed,
    "groups and needs": find_member,
    "alphabetical order": find_alphabet,
    "plurals": find_plural,
    "rhymes": find_rhyme,
    "analogies": lambda p: GROUP_OF[re.findall(r"as (\w+) is", p["question"])[0]],
}


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_follow_from_picture_and_text(skill: str) -> None:
    for p in problems(skill, 150):
        assert right(p) == FINDERS[skill](p), p


def test_scenes_have_no_held_out_pairs() -> None:
    for skill in SKILLS:
        for scene in (p["scene"] for p in problems(skill, 60)):
            for item in scene.items if scene else ():
                assert not world.held_out_pair(item.category, item.color)
                assert min(item.box) >= -0.02
                assert max(item.box) <= 1.02
            boxes = sorted((i.box[0], i.box[2]) for i in scene.items) if scene and skill[:3] != "map" else []
            assert all(b[0] > a[1] - 0.12 for a, b in pairwise(boxes)), skill


# --- shares, files, text ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set at its default sizes, without its pictures."""
    root = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scienceqa, "render", lambda jobs, desc: None)
        counts = scienceqa.write_scienceqa(root, seed=0)
    assert {split: counts[split] for split in scienceqa.SIZES} == scienceqa.SIZES
    return root


def test_subset_shares_are_near_scienceqa(full_set: Path) -> None:
    rows = [p for split in scienceqa.SIZES for p in load_problems(full_set, split, check_images=False)]
    assert sum(skill.weight for skill in SKILLS.values()) == 100
    shares = {"NAT": 0.53, "SOC": 0.21, "LAN": 0.26, "IMG": 0.48, "TXT": 0.48, "NO": 0.34, "G1-6": 0.64, "G7-12": 0.36}
    counts = Counter(subset for p in rows for subset in p.subsets)
    for subset, share in shares.items():
        assert counts[subset] / len(rows) == pytest.approx(share, abs=0.04), subset
    assert {p.grade for p in rows} == set(range(1, 13))


def test_skills_have_their_share_without_duplicates(full_set: Path) -> None:
    rows = read_json(full_set / "problems.json").values()
    asked = Counter(p["skill"] for p in rows)
    assert all(abs(asked[name] - 54 * skill.weight) <= 3 for name, skill in SKILLS.items())
    texts = [(p["question"], p["hint"], *sorted(p["choices"])) for p in rows if not p["image"]]
    assert len(set(texts)) == len(texts) > 2500


def test_no_two_splits_share_question_hint_and_solution(full_set: Path) -> None:
    seen: dict[tuple[str, ...], str] = {}
    for p in read_json(full_set / "problems.json").values():
        text = tuple(p[field] for field in ("question", "hint", "solution"))
        assert seen.setdefault(text, p["split"]) == p["split"], text
        assert scienceqa.split_of(p) == p["split"]


def test_files_have_the_official_format(folder: Path) -> None:
    raw, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    assert {split: len(splits[split]) for split in SIZES} == SIZES
    assert sorted(splits["trainval"]) == sorted(splits["train"] + splits["val"])
    assert set(splits["minitest"]) < set(splits["test"])
    fields = "question choices answer hint image task grade subject topic category skill lecture solution split"
    assert all(list(p) == fields.split() for p in raw.values())
    assert set(raw) == {name for split in SIZES for name in splits[split]}
    loaded = load_problems(folder, "test")
    assert [p.id for p in loaded] == splits["test"]
    with_image = [p for p in loaded if p.image]
    assert with_image
    for p in with_image:
        with Image.open(str(p.image)) as image:
            assert (image.size, image.mode, image.format) == ((224, 224), "RGB", "PNG")


def test_equal_seeds_write_equal_bytes(folder: Path, tmp_path: Path) -> None:
    def content(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    scienceqa.write_scienceqa(tmp_path / "same", seed=3, sizes=SIZES)
    assert content(tmp_path / "same") == content(folder)
    scienceqa.write_scienceqa(tmp_path / "other", seed=4, sizes=SIZES | {"train": 0})
    assert content(tmp_path / "other")["problems.json"] != content(folder)["problems.json"]


def test_too_many_problems_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scienceqa, "SKILLS", {"analogies": SKILLS["analogies"]})
    monkeypatch.setattr(scienceqa, "_ATTEMPTS", 40)
    with pytest.raises(ConfigError, match="no 9000 different problems"):
        scienceqa.write_scienceqa(tmp_path, seed=0, sizes={"train": 9000})


def test_unknown_skill_is_named() -> None:
    with pytest.raises(ConfigError, match="'rhyme'; did you mean 'rhymes'"):
        make_problem(random.Random(0), "rhyme")


def test_import_loads_no_torch() -> None:
    code = "import sys, companion.miniature.scienceqa; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
