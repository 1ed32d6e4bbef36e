"""mini-scienceqa: multiple-choice problems of three subjects in ScienceQA's official files, each of two steps or more.

A skill draws its right choice first and the rest of the problem around it, so that neither the wording of a question
nor that of a choice tells which one is right: pictures have to be looked at, facts recalled, hints read.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, combinations, pairwise, permutations, product
from pathlib import Path
from typing import Any

from companion.data_tools.scienceqa import write_training_files
from companion.miniature import world
from companion.miniature.coco import render
from companion.miniature.display_list import load_table
from companion.miniature.language import number_word, plural, sentence, with_article
from companion.miniature.world import ASPECT, CATEGORIES, COLORS, POSITIONS, Group, Item, Scene, held_out_pair
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, write_json

SIZES = {"train": 1600, "val": 200, "test": 400}
_ATTEMPTS = 40  # to draw a problem that is not there yet, before another skill takes its place

# --- what there is to know; the language models read it before they see any problem -----------------------------------

_TABLE: dict[str, Any] = load_table("scienceqa")
GROUPS: dict[str, list[str]] = _TABLE["groups"]
GROUP_OF = {thing: group for group, things in GROUPS.items() for thing in things}
NEEDS: dict[str, str] = _TABLE["needs"]
MOVES: dict[str, list[str]] = _TABLE["moves"]
LEGS: dict[str, int] = _TABLE["legs"]
PLACES: dict[str, list[str]] = _TABLE["places"]
COMPASS: dict[str, str] = _TABLE["compass"]
SITES: list[str] = _TABLE["sites"]
USED: list[str] = _TABLE["used"]
RANKS: list[str] = _TABLE["ranks"]
STATES: list[str] = _TABLE["states"]
MEASURES: list[list[str]] = _TABLE["measures"]
RHYMES: dict[str, list[str]] = _TABLE["rhymes"]
ENDINGS: dict[str, list[str]] = _TABLE["endings"]
# the colors that training images show a thing in; the other pairings are kept for the bench of unseen ones
PALETTE = {thing: tuple(c for c in COLORS if not held_out_pair(thing, c)) for thing in CATEGORIES}
WORDS = sorted({*CATEGORIES, *chain(*RHYMES.values()), *SITES})


@dataclass(frozen=True)
class Draft:
    """A problem before its choices are mixed: of the candidates in `wrong`, `least` to three are taken."""

    question: str
    right: str
    wrong: Sequence[str]
    solution: str
    hint: str = ""
    scene: Scene | None = None
    least: int = 1


@dataclass(frozen=True)
class Skill:
    """What is asked for, how many of a hundred problems ask for it, its lowest and highest grade, and its rule."""

    draw: Callable[[random.Random], Draft]
    weight: int
    subject: str
    topic: str
    category: str
    grades: Sequence[int]
    lecture: str


SKILLS: dict[str, Skill] = {}


def _skill(draw: Callable[[random.Random], Draft]) -> None:
    """Register a problem generator as the skill of its name, with the other fields from `scienceqa.yaml`."""
    name = draw.__name__.strip("_").replace("_", " ")
    SKILLS[name] = Skill(draw, **_TABLE["skills"][name])


# --- helpers ----------------------------------------------------------------------------------------------------------


def _a(noun: str) -> str:
    return noun if noun == "furniture" else with_article(noun)


def _is(thing: str) -> str:
    return f"{_a(thing)} is {_a(GROUP_OF[thing])}"


def _say(*sentences: str) -> str:
    return " ".join(sentence(s) for s in sentences)


def _but(values: Iterable[str], *left_out: str) -> list[str]:
    return [value for value in values if value not in left_out]


def _count(n: int, noun: str) -> str:
    return f"{number_word(n)} {noun if n == 1 else plural(noun)}"


def _calc(a: int, sign: str, b: int) -> str:
    value = {"plus": a + b, "times": a * b, "divided by": a // b}[sign]
    return f"{number_word(a)} {sign} {number_word(b)} is {number_word(value)}"


def _tail(word: str) -> str:
    return word[-2:] if word.endswith(("sh", "ch")) else word[-1]


def _members(rng: random.Random, n: int, but: str = "") -> list[str]:
    """Different things of any group but one; each group is as likely, or plants would hardly ever be right."""
    found: list[str] = []
    while len(found) < n:
        found += _but([rng.choice(GROUPS[rng.choice(_but(GROUPS, but))])], *found)
    return found


def _ordered(rng: random.Random, names: Sequence[str], before: str, after: str) -> str:
    """A row of names told by its neighbors, in any order and from either side."""
    pairs = [(f"{a} {before} {b}", f"{b} {after} {a}") for a, b in pairwise(names)]
    return _say(*(rng.choice(both) for both in rng.sample(pairs, len(pairs))))


def _colors(rng: random.Random, things: Sequence[str], first: str | None = None) -> list[str]:
    """A color for each thing, all different; `first` is that of the first thing, drawn when None."""
    while True:
        colors = [rng.choice(PALETTE[thing]) for thing in things]
        colors[0] = first or colors[0]
        if len({*colors}) == len(colors):
            return colors


def _compose(rng: random.Random, groups: Sequence[Group], background: str | None = None) -> Scene:
    """A scene with just these groups of objects, placed as `world.sample_scene` places its own."""
    background = background or rng.choice(world.BACKGROUNDS)
    share = world.room([str(g.position) for g in groups])
    items: list[Item] = []
    for g in groups:
        color, zone = str(g.color), str(g.position)
        items += world.place(rng, g.category, color, "large", g.count, zone, background, share)
    return _scene(rng, background, items, groups)


def _scene(rng: random.Random, background: str, items: Sequence[Item], groups: Sequence[Group] = ()) -> Scene:
    far_to_near = sorted(items, key=lambda item: item.box[3])
    return Scene(rng.randrange(1 << 30), background, tuple(far_to_near), tuple(groups), rng.randrange(1 << 30))


def _show(
    rng: random.Random, things: Sequence[str], background: str | None = None, color: str | None = None
) -> tuple[Scene, str]:
    """A scene of single things, and words that point at the first: by its color (drawn when None) or by its place."""
    zones, colors = rng.sample(POSITIONS, len(things)), _colors(rng, things, color)
    scene = _compose(rng, [Group(t, c, 1, z) for t, c, z in zip(things, colors, zones, strict=True)], background)
    where = "in the middle" if zones[0] == "middle" else f"on the {zones[0]}"
    return scene, rng.choice([f"the {colors[0]} thing", f"the thing {where}"])


def _look(
    rng: random.Random, question: str, answers: dict[str, Sequence[str]], recall: Callable[[str], Sequence[str]]
) -> Draft:
    """Ask for a property of a thing in a picture; `answers` has the things of each answer, `recall` the steps to it."""
    # the color comes first, and only one that every answer can have: else a question's color would tell of its answer
    shared = [c for c in COLORS if all(any(c in PALETTE[t] for t in things) for things in answers.values())]
    color, answer = rng.choice(shared), rng.choice(list(answers))
    thing = rng.choice([t for t in answers[answer] if color in PALETTE[t]])
    scene, it = _show(rng, [thing, *rng.sample(_but(CATEGORIES, thing), rng.choice((1, 2)))], color=color)
    steps = _say(f"{it} is {_a(thing)}", *recall(thing))
    return Draft(question.format(it), answer, _but(answers, answer), steps, scene=scene)


def _extreme(rng: random.Random, order: list[str], names: str, more: str, less: str, asked: dict[int, str]) -> Draft:
    """Ask for an end of a row that the hint tells; `asked` has the words for either end."""
    k = rng.choice(list(asked))
    hint = _ordered(rng, [names.format(name) for name in order], more, less)
    steps = _say(f"{order[0]} {more} {order[1]} and {order[1]} {more} {order[2]}", f"{order[k]} is {asked[k]}")
    # the choices are the two ends: the middle one is named twice, so a choice of it could be ruled out by counting
    return Draft(f"Which one is {asked[k]}?", order[k], [order[2 - k]], steps, hint)


# --- pictures ---------------------------------------------------------------------------------------------------------


@_skill
def _needs_in_a_picture(rng: random.Random) -> Draft:
    def recall(thing: str) -> list[str]:
        return [_is(thing), f"{_a(GROUP_OF[thing])} needs {NEEDS[GROUP_OF[thing]]}"]

    return _look(rng, "What does {} need?", {NEEDS[group]: things for group, things in GROUPS.items()}, recall)


@_skill
def _groups_in_a_picture(rng: random.Random) -> Draft:
    return _look(rng, "Which group does {} belong to?", dict(GROUPS), lambda thing: [_is(thing)])


@_skill
def _movement_in_a_picture(rng: random.Random) -> Draft:
    def recall(thing: str) -> list[str]:
        return [f"{_a(thing)} moves {way}" for way, things in MOVES.items() if thing in things]

    return _look(rng, "Where does {} move?", dict(MOVES), recall)


@_skill
def _legs_in_a_picture(rng: random.Random) -> Draft:
    cases: dict[int, list[tuple[str, int]]] = {}
    for animal, count in product(LEGS, (1, 2, 3)):
        cases.setdefault(LEGS[animal] * count, []).append((animal, count))
    total = rng.choice(list(cases))
    animal, count = rng.choice(cases[total])
    other = rng.choice(_but(CATEGORIES, *GROUPS["animal"]))
    colors, zones = _colors(rng, (animal, other)), rng.sample(("left", "right"), 2)
    scene = _compose(rng, [Group(animal, colors[0], count, zones[0]), Group(other, colors[1], 1, zones[1])])
    seen, legs = f"there {'is' if count == 1 else 'are'} {_count(count, animal)}", LEGS[animal]
    steps = _say(seen, f"{_a(animal)} has {number_word(legs)} legs", _calc(count, "times", legs))
    wrong = [number_word(n) for n in cases if n != total]
    return Draft("How many legs do all animals here have?", number_word(total), wrong, steps, scene=scene)


@_skill
def _climate_in_a_picture(rng: random.Random) -> Draft:
    place = rng.choice(list(PLACES))
    name, weather, item = PLACES[place]
    scene, _ = _show(rng, rng.sample(_but(CATEGORIES, "lamp", "boat"), rng.choice((1, 2))), place)
    steps = _say(f"the picture shows {name}", f"{name} is {weather}", f"when it is {weather}, people take {item}")
    wrong = [taken for _, _, taken in PLACES.values() if taken != item]
    return Draft("What should people take to this place?", item, wrong, steps, scene=scene)


@_skill
def _map_of_a_picture(rng: random.Random) -> Draft:
    way = rng.choice(list(COMPASS))
    things = rng.sample([c for c in CATEGORIES if world.ZONE[c] == "ground"], 2)
    x, far, near = rng.uniform(0.45, 0.55), (0.0, 0.62), (0.0, 0.97)  # far things stand high in the picture
    spots = {"north": (far, near), "south": (near, far), "east": ((0.27, 0.85), (-0.27, 0.85))}
    spots["west"] = spots["east"][::-1]
    items = []
    for thing, color, (shift, y) in zip(things, _colors(rng, things), spots[way], strict=True):
        width = min(0.28 * ASPECT[thing], 0.34)
        corners = (x + shift - width / 2, y - width / ASPECT[thing], x + shift + width / 2, y)
        items.append(Item(thing, color, "small", (corners[0], corners[1], corners[2], corners[3])))
    scene = _scene(rng, rng.choice(("meadow", "beach", "snow", "desert")), items)
    seen = COMPASS[way]
    steps = _say(f"the {things[0]} is {seen} the {things[1]}", f"{seen.removesuffix(' of')} is {way}")
    return Draft(f"Which way is the {things[0]} from the {things[1]}?", way, _but(COMPASS, way), steps, scene=scene)


# --- pictures with a text ---------------------------------------------------------------------------------------------


@_skill
def _sorting_by_a_rule(rng: random.Random) -> Draft:
    thing = rng.choice(list(CATEGORIES))
    colors = rng.sample(PALETTE[thing], 3)
    other = rng.choice([c for c in _but(CATEGORIES, thing) if colors[1] in PALETTE[c]])
    zones = rng.sample(POSITIONS, 2)
    scene = _compose(rng, [Group(thing, colors[0], 1, zones[0]), Group(other, colors[1], 1, zones[1])])
    boxes = [f"box {number_word(k)}" for k in rng.sample((1, 2, 3), 3)]
    rules = [f"{color} goes in {box}" for color, box in zip(colors, boxes, strict=True)]
    steps = _say(f"the {thing} is {colors[0]}", rules[0])
    return Draft(f"Where does the {thing} go?", boxes[0], boxes[1:], steps, _say(*rng.sample(rules, 3)), scene)


@_skill
def _distance_in_a_picture(rng: random.Random) -> Draft:
    things, hours = rng.sample(GROUPS["vehicle"], 3), rng.choice((2, 3))
    speeds = rng.sample(range(1, 12 // hours + 1), 3)
    scene, it = _show(rng, things[:2])
    told = [f"{_a(thing)} goes {_count(speed, 'mile')}" for thing, speed in zip(things, speeds, strict=True)]
    hint = _say("in one hour " + ", ".join(rng.sample(told, 3)))
    miles = [f"{number_word(speed * hours)} miles" for speed in speeds]
    steps = _say(f"{it} is {_a(things[0])}", f"{_calc(speeds[0], 'times', hours)} miles")
    return Draft(f"How far does {it} go in {number_word(hours)} hours?", miles[0], miles[1:], steps, hint, scene)


@_skill
def _prices_in_a_picture(rng: random.Random) -> Draft:
    things, prices = rng.sample(list(CATEGORIES), 3), rng.sample(range(2, 7), 3)
    told = [f"{_a(thing)} costs {number_word(price)}" for thing, price in zip(things, prices, strict=True)]
    sums = [f"{number_word(a + b)} coins" for a, b in combinations(prices, 2)]
    sold = f"the picture shows {_a(things[0])} and {_a(things[1])}"
    steps = _say(sold, f"{_calc(prices[0], 'plus', prices[1])} coins")
    hint, (scene, _) = _say(", ".join(rng.sample(told, 3)) + " coins"), _show(rng, things[:2])
    return Draft("What do the things here cost together?", sums[0], sums[1:], steps, hint, scene)


@_skill
def _history_in_a_picture(rng: random.Random) -> Draft:
    order, k = rng.sample(USED, 3), rng.randrange(3)
    scene, it = _show(rng, [order[k], rng.choice(_but(order, order[k]))])
    hint = _ordered(rng, [f"the {name}" for name in order], "came before", "came after")
    steps = _say(f"{it} is {_a(order[k])}", f"the order is {', '.join(order)}", f"the {order[k]} was {RANKS[k]}")
    return Draft(f"When did {it} come to the town?", RANKS[k], _but(RANKS, RANKS[k]), steps, hint, scene)


@_skill
def _caption_of_a_picture(rng: random.Random) -> Draft:
    thing, (zone, elsewhere) = rng.choice(list(CATEGORIES)), rng.sample(("left", "right"), 2)
    color, miscolor = rng.sample(PALETTE[thing], 2)
    # the wrong caption, too, must be one that could be true: an unseen pairing would give it away
    other = rng.choice([c for c in _but(CATEGORIES, thing) if color in PALETTE[c]])
    true = (color, thing, zone)
    k = rng.randrange(3)
    said = [*true[:k], (miscolor, other, elsewhere)[k], *true[k + 1 :]]
    hint, fact = (f"{_a(c)} {t} is on the {z}" for c, t, z in (said, true))
    steps = _say(f"in the picture {fact}", f"{said[k]} should be {true[k]}")
    scene = _compose(rng, [Group(thing, color, 1, zone)])
    return Draft("Which word is wrong?", said[k], _but(said, said[k]), steps, _say(hint), scene)


# --- texts ------------------------------------------------------------------------------------------------------------


@_skill
def _most_and_least(rng: random.Random) -> Draft:
    more, less, most, least, noun = rng.choice(MEASURES)
    ends = {0: f"the {most}", 2: f"the {least}"}
    return _extreme(rng, rng.sample(list(COLORS), 3), f"the {{}} {noun}", f"is {more} than", f"is {less} than", ends)


@_skill
def _directions_from_a_text(rng: random.Random) -> Draft:
    way, back = rng.choice((("north", "south"), ("east", "west")))
    ends = {0: f"farthest {way}", 2: f"farthest {back}"}
    return _extreme(rng, rng.sample(SITES, 3), "the {}", f"is {way} of", f"is {back} of", ends)


@_skill
def _states_of_matter(rng: random.Random) -> Draft:
    now, k = rng.randint(4, 8), rng.randrange(3)  # the same temperatures for each state
    below, above = range(1, now), range(now + 1, 13)
    degrees = (rng.sample(above, 2), [rng.choice(below), rng.choice(above)], rng.sample(below, 2))[k]
    n, (melt, boil) = number_word(now), (number_word(d) for d in sorted(degrees))
    color = rng.choice(list(COLORS))
    hint = _say(f"the {color} matter melts at {melt} and boils at {boil} degrees", f"now it is at {n} degrees")
    steps = (f"{n} is less than {melt}", f"{n} is more than {melt} and less than {boil}", f"{n} is more than {boil}")
    return Draft("What is it now?", STATES[k], _but(STATES, STATES[k]), _say(steps[k], f"it is {STATES[k]}"), hint)


@_skill
def _speed_from_a_text(rng: random.Random) -> Draft:
    # in half of the problems the faster car goes the shorter way in less time, in the other half both are more
    both_more = rng.random() < 0.5
    ways = [(v * t, t) for v, t in product(range(1, 7), range(1, 5)) if v * t <= 12]
    (far, long), (near, short) = rng.sample(ways, 2)
    while far * short <= near * long or (far > near, long > short) != (both_more, both_more) or near == far:
        (far, long), (near, short) = rng.sample(ways, 2)
    fast, slow = rng.sample(list(COLORS), 2)
    told = [(fast, far, long), (slow, near, short)]
    rng.shuffle(told)
    hint = _say(*(f"the {c} car goes {_count(d, 'mile')} in {_count(t, 'hour')}" for c, d, t in told))
    more, right, wrong = rng.choice((("faster", fast, slow), ("slower", slow, fast)))
    steps = _say(*(_calc(d, "divided by", t) for _, d, t in told), f"{right} is {more}")
    return Draft(f"Which car is {more}?", right, [wrong], steps, hint)


# --- no context -------------------------------------------------------------------------------------------------------


@_skill
def _groups_and_needs(rng: random.Random) -> Draft:
    group = rng.choice(list(GROUPS))
    one, other = rng.sample(GROUPS[group], 2)
    wrong = _members(rng, 3, but=group)
    if rng.random() < 0.5:
        steps, need = _say(_is(other), f"{_a(group)} needs {NEEDS[group]}"), NEEDS[group]
        return Draft(f"Which one needs {need}?", other, wrong, steps)
    return Draft(f"Which one is in the same group as {_a(one)}?", other, wrong, _say(_is(one), _is(other)))


@_skill
def _alphabetical_order(rng: random.Random) -> Draft:
    n, words = rng.choice((2, 3)), [""]
    while len({word[:1] for word in words}) < n:
        words = sorted(rng.sample(WORDS, n))
    # of three words the middle one is asked for, too: else the ends of the alphabet would be right too often
    k, rank = rng.choice(((0, "first"), (n - 1, "last"), *([(1, "second")] if n == 3 else [])))
    steps = _say(", ".join(f"{word} starts with {word[0]}" for word in words), f"{words[k]} is {rank}")
    wrong = _but(words, words[k])
    return Draft(f"Which word comes {rank} in the alphabet?", words[k], wrong, steps, least=n - 1)


@_skill
def _plurals(rng: random.Random) -> Draft:
    words = {ending: rng.choice(row) for ending, row in ENDINGS.items()}
    ending, word = rng.choice(list(words.items()))
    steps = _say(f"{word} ends in {_tail(word)}", f"words that end in {_tail(word)} take {ending}")
    return Draft(f"Which word takes {ending} in its plural?", word, _but(words.values(), word), steps)


@_skill
def _rhymes(rng: random.Random) -> Draft:
    end, *ends = rng.sample(list(RHYMES), 4)
    one, other = rng.sample(RHYMES[end], 2)
    steps = _say(f"{one} ends in {end}", f"{other} ends in {end}")
    return Draft(f"Which word rhymes with {one}?", other, [rng.choice(RHYMES[e]) for e in ends], steps)


@_skill
def _analogies(rng: random.Random) -> Draft:
    one, other = _members(rng, 2)
    right, question = GROUP_OF[other], f"{one} is to {GROUP_OF[one]} as {other} is to what?"
    return Draft(question.capitalize(), right, _but(GROUPS, right), _say(_is(one), _is(other)))


# --- problems, files, text --------------------------------------------------------------------------------------------


def make_problem(rng: random.Random, skill: str | None = None) -> dict[str, Any]:
    """Make one problem.

    Args:
        rng: decides everything.
        skill: a key of `SKILLS`; drawn by weight when None.

    Returns:
        The fields of `problems.json` but `split`, and `scene`: what the image shows, or None where there is no image.

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
    """Skills of n problems in random order, their shares as near to the weights as n allows."""
    edges, start = list(accumulate(skill.weight for skill in SKILLS.values())), rng.random()
    plan = [list(SKILLS)[bisect_right(edges, (k + start) / n * edges[-1])] for k in range(n)]
    return rng.sample(plan, n)


def _content(problem: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two problems the same: neither the order of the choices nor the seed of the pixels."""
    scene = problem["scene"]
    return problem["question"], problem["hint"], *sorted(problem["choices"]), scene and (scene.background, scene.items)


def write_scienceqa(root: Path, *, seed: int, sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Write mini-scienceqa; no problem occurs twice, in one split or in two.

    Args:
        root: folder of the set, made if missing.
        seed: decides every file.
        sizes: problems of each split; `SIZES` when None.

    Returns:
        Counts of problems by split, and of those with an image, with a text, with neither.

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
    """Everything there is to know, by kind; no sentence of it is a problem."""
    pairs = list(product(range(1, 13), repeat=2))
    letters = sorted({word[0] for word in WORDS})
    return {
        "group": [_is(thing) for thing in GROUP_OF],
        "kin": [f"{_a(a)} and {_a(b)} belong to one group" for g in GROUPS.values() for a, b in permutations(g, 2)],
        "need": [f"{_a(group)} needs {need}" for group, need in NEEDS.items()],
        "move": [f"{_a(thing)} moves {way}" for way, things in MOVES.items() for thing in things],
        "legs": [f"{_a(animal)} has {number_word(n)} legs" for animal, n in LEGS.items()],
        "weather": [f"{name} is {weather}" for name, weather, _ in PLACES.values()],
        "take": [f"when it is {weather}, people take {item}" for _, weather, item in PLACES.values()],
        "compass": [f"{seen.removesuffix(' of')} is {way}" for way, seen in COMPASS.items()],
        "plus": [_calc(a, "plus", b) for a, b in pairs if a + b <= 12],
        "times": [_calc(a, "times", b) for a, b in pairs if a * b <= 12],
        "divided": [_calc(a * b, "divided by", b) for a, b in pairs if a * b <= 12],
        "more": [f"{number_word(a)} is more than {number_word(b)}" for a, b in pairs if a > b],
        "less": [f"{number_word(a)} is less than {number_word(b)}" for a, b in pairs if a < b],
        "letter": [f"{word} starts with {word[0]}" for word in WORDS],
        "alphabet": [f"{a} comes before {b} in the alphabet" for a, b in combinations(letters, 2)],
        "rhyme": [f"{a} rhymes with {b}" for words in RHYMES.values() for a, b in permutations(words, 2)],
        "sound": [f"{word} ends in {end}" for end, words in RHYMES.items() for word in words],
        "plural": [f"{word} takes {end} in its plural" for end, words in ENDINGS.items() for word in words],
        "ending": [f"{word} ends in {_tail(word)}" for words in ENDINGS.values() for word in words],
        "measure": [f"{a} is the opposite of {b}" for m in MEASURES for a, b in (m[:2], m[2:4])],
    }


FACTS = _facts()


def science_text(rng: random.Random) -> str:
    """Return one to four sentences of facts, lectures and hints for the language models to read, never a question."""
    said = [sentence(rng.choice(FACTS[kind])) for kind in rng.choices(list(FACTS), k=rng.randint(1, 3))]
    skill, kind = rng.choice(list(SKILLS.values())), rng.random()
    extra = skill.lecture if kind < 0.35 else skill.draw(rng).hint if kind < 0.6 else ""
    return " ".join([extra, *said]).strip()


__all__ = ["FACTS", "SIZES", "SKILLS", "Draft", "Skill", "make_problem", "science_text", "write_scienceqa"]
