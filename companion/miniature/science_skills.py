"""Skills of mini-scienceqa: generators of problems whose solution takes at least two steps.

A skill draws the right choice first and then the rest of the problem, so that neither the wording of the question nor
that of a choice reveals the answer: the image, a fact or the hint is needed. A solution states its steps in the order
in which they can be computed: what is seen or looked up, the fact or the equation, and the right choice last.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import Any

from companion.miniature import world
from companion.miniature.display_list import load_table
from companion.miniature.language import listing, number_word, plural, sentence, with_article
from companion.miniature.world import ASPECT, CATEGORIES, COLORS, POSITIONS, Group, Item, Scene, held_out_pair

_TABLE: dict[str, Any] = load_table("science_skills")
GROUPS: dict[str, list[str]] = _TABLE["groups"]
GROUP_OF = {noun: group for group, nouns in GROUPS.items() for noun in nouns}
NEEDS: dict[str, str] = _TABLE["needs"]
MOVES: dict[str, list[str]] = _TABLE["moves"]
LEGS: dict[str, int] = _TABLE["legs"]
PLACES: dict[str, list[str]] = _TABLE["places"]
COMPASS: dict[str, str] = _TABLE["compass"]
OPPOSITE: dict[str, str] = _TABLE["opposite"]
SITES: list[str] = _TABLE["sites"]
BINS: list[str] = _TABLE["bins"]
USED: list[str] = _TABLE["used"]
RANKS: list[str] = _TABLE["ranks"]
STATES: list[str] = _TABLE["states"]
MEASURES: list[list[str]] = _TABLE["measures"]
RHYMES: dict[str, list[str]] = _TABLE["rhymes"]
ENDINGS: dict[str, list[str]] = _TABLE["endings"]
# colors of each category in training images; bench-wild has the other pairs
PALETTE = {name: tuple(c for c in COLORS if not held_out_pair(name, c)) for name in CATEGORIES}
WORDS = sorted({*CATEGORIES, *chain(*RHYMES.values()), *SITES})


@dataclass(frozen=True)
class Draft:
    """A problem before its choices are shuffled; `least` to three of the candidates in `wrong` are used."""

    question: str
    right: str
    wrong: Sequence[str]
    solution: str
    hint: str = ""
    scene: Scene | None = None
    least: int = 1


@dataclass(frozen=True)
class Skill:
    """A generator of problems, its weight per hundred problems, ScienceQA's labels, and the rule (lecture)."""

    draw: Callable[[random.Random], Draft]
    weight: int
    subject: str
    topic: str
    category: str
    grades: Sequence[int]
    lecture: str


SKILLS: dict[str, Skill] = {}


def _skill(draw: Callable[[random.Random], Draft]) -> None:
    """Register a problem generator as the skill of its name, with the other fields from `science_skills.yaml`."""
    name = draw.__name__.strip("_").replace("_", " ")
    SKILLS[name] = Skill(draw, **_TABLE["skills"][name])


def article(noun: str) -> str:
    return noun if noun == "furniture" else with_article(noun)


def is_a(noun: str) -> str:
    return f"{article(noun)} is {article(GROUP_OF[noun])}"


def _text(*sentences: str) -> str:
    return " ".join(sentence(s) for s in sentences)


def _without(values: Iterable[str], *left_out: str) -> list[str]:
    return [value for value in values if value not in left_out]


def _count(n: int, noun: str) -> str:
    return f"{number_word(n)} {noun if n == 1 else plural(noun)}"


def equation(a: int, sign: str, b: int) -> str:
    value = {"plus": a + b, "times": a * b, "divided by": a // b}[sign]
    return f"{number_word(a)} {sign} {number_word(b)} is {number_word(value)}"


def last_letters(word: str) -> str:
    return word[-2:] if word.endswith(("sh", "ch")) else word[-1]


def _group_members(rng: random.Random, n: int, but: str = "") -> list[str]:
    """Different members of any group but one; groups are equally likely, so that plants are right as often."""
    nouns: list[str] = []
    while len(nouns) < n:
        nouns += _without([rng.choice(GROUPS[rng.choice(_without(GROUPS, but))])], *nouns)
    return nouns


def _colors(rng: random.Random, nouns: Sequence[str], first: str | None = None) -> list[str]:
    """Different colors for the categories; `first` is that of the first one, drawn when None."""
    while True:
        colors = [rng.choice(PALETTE[noun]) for noun in nouns]
        colors[0] = first or colors[0]
        if len({*colors}) == len(colors):
            return colors


def _compose(rng: random.Random, groups: Sequence[Group], background: str | None = None) -> Scene:
    """A scene of these groups, placed as in `world.sample_scene`."""
    background = background or rng.choice(world.BACKGROUNDS)
    share = world.width_share([str(g.position) for g in groups])
    items: list[Item] = []
    for g in groups:
        color, zone = str(g.color), str(g.position)
        items += world.place(rng, g.category, color, "large", g.count, zone, background, share)
    return _scene(rng, background, items, groups)


def _scene(rng: random.Random, background: str, items: Sequence[Item], groups: Sequence[Group] = ()) -> Scene:
    far_to_near = sorted(items, key=lambda item: item.box[3])
    return Scene(rng.randrange(1 << 30), background, tuple(far_to_near), tuple(groups), rng.randrange(1 << 30))


def _scene_with(
    rng: random.Random, nouns: Sequence[str], background: str | None = None, color: str | None = None
) -> tuple[Scene, str]:
    """A scene of single objects, and a reference to the first by its color (drawn when None), its position or both."""
    zones, colors = rng.sample(POSITIONS, len(nouns)), _colors(rng, nouns, color)
    scene = _compose(rng, [Group(t, c, 1, z) for t, c, z in zip(nouns, colors, zones, strict=True)], background)
    where = "in the middle" if zones[0] == "middle" else f"on the {zones[0]}"
    named = f"the {colors[0]} thing"
    return scene, rng.choice([named, f"the thing {where}", f"{named} {where}"])


def _ask_image(
    rng: random.Random, question: str, answers: dict[str, Sequence[str]], recall: Callable[[str], Sequence[str]]
) -> Draft:
    """Ask for a property of an object in the image; `answers` has the categories of each answer, `recall` the steps."""
    # the color is drawn first, from those that every answer can have: a question's color must not reveal the answer
    shared = [c for c in COLORS if all(any(c in PALETTE[t] for t in nouns) for nouns in answers.values())]
    color, answer = rng.choice(shared), rng.choice(list(answers))
    noun = rng.choice([t for t in answers[answer] if color in PALETTE[t]])
    scene, it = _scene_with(rng, [noun, *rng.sample(_without(CATEGORIES, noun), rng.choice((1, 2)))], color=color)
    steps = _text(f"{it} is {article(noun)}", *recall(noun))
    return Draft(question.format(it), answer, _without(answers, answer), steps, scene=scene)


def _compare(a: int, b: int) -> str:
    return f"{number_word(a)} is {'more' if a > b else 'less'} than {number_word(b)}"


@_skill
def _needs_in_a_picture(rng: random.Random) -> Draft:
    def recall(noun: str) -> list[str]:
        return [is_a(noun), f"{article(GROUP_OF[noun])} needs {NEEDS[GROUP_OF[noun]]}"]

    return _ask_image(rng, "What does {} need?", {NEEDS[group]: nouns for group, nouns in GROUPS.items()}, recall)


@_skill
def _groups_in_a_picture(rng: random.Random) -> Draft:
    return _ask_image(rng, "Which group does {} belong to?", dict(GROUPS), lambda noun: [is_a(noun)])


@_skill
def _movement_in_a_picture(rng: random.Random) -> Draft:
    def recall(noun: str) -> list[str]:
        return [f"{article(noun)} moves {way}" for way, nouns in MOVES.items() if noun in nouns]

    return _ask_image(rng, "Where does {} move?", dict(MOVES), recall)


@_skill
def _legs_in_a_picture(rng: random.Random) -> Draft:
    cases: dict[int, list[tuple[str, int]]] = {}
    for animal, count in product(LEGS, (1, 2, 3)):
        cases.setdefault(LEGS[animal] * count, []).append((animal, count))
    total = rng.choice(list(cases))
    color = rng.choice([c for c in COLORS if all(c in PALETTE[animal] for animal in LEGS)])
    animal, count = rng.choice(cases[total])
    other = rng.choice(_without(CATEGORIES, *GROUPS["animal"]))
    colors, zones = _colors(rng, (animal, other), color), rng.sample(("left", "right"), 2)
    scene = _compose(rng, [Group(animal, colors[0], count, zones[0]), Group(other, colors[1], 1, zones[1])])
    seen, legs = f"there {'is' if count == 1 else 'are'} {number_word(count)} {color}", LEGS[animal]
    seen = f"{seen} {animal if count == 1 else plural(animal)}"
    steps = _text(seen, f"{article(animal)} has {number_word(legs)} legs", equation(count, "times", legs))
    wrong = [number_word(n) for n in cases if n != total]
    return Draft(f"How many legs do all {color} animals here have?", number_word(total), wrong, steps, scene=scene)


@_skill
def _climate_in_a_picture(rng: random.Random) -> Draft:
    place = rng.choice(list(PLACES))
    name, weather, item = PLACES[place]
    nouns = rng.sample(_without(CATEGORIES, "lamp", "boat"), rng.choice((1, 2)))
    color = rng.choice(PALETTE[nouns[0]])
    scene, _ = _scene_with(rng, nouns, place, color)
    steps = _text(f"the picture shows {name}", f"{name} is {weather}", f"when it is {weather}, people take {item}")
    wrong = [taken for _, _, taken in PLACES.values() if taken != item]
    return Draft(f"What should people near the {color} {nouns[0]} take?", item, wrong, steps, scene=scene)


@_skill
def _map_of_a_picture(rng: random.Random) -> Draft:
    way = rng.choice(list(COMPASS))
    nouns = rng.sample([c for c in CATEGORIES if world.ZONE[c] == "ground"], 2)
    x, far, near = rng.uniform(0.45, 0.55), (0.0, 0.62), (0.0, 0.97)  # far objects are higher in the image
    spots = {"north": (far, near), "south": (near, far), "east": ((0.27, 0.85), (-0.27, 0.85))}
    spots["west"] = spots["east"][::-1]
    items = []
    for noun, color, (shift, y) in zip(nouns, _colors(rng, nouns), spots[way], strict=True):
        width = min(0.28 * ASPECT[noun], 0.34)
        corners = (x + shift - width / 2, y - width / ASPECT[noun], x + shift + width / 2, y)
        items.append(Item(noun, color, "small", (corners[0], corners[1], corners[2], corners[3])))
    scene = _scene(rng, rng.choice(("meadow", "beach", "snow", "desert")), items)
    seen = COMPASS[way]
    steps = _text(f"the {nouns[0]} is {seen} the {nouns[1]}", f"{seen.removesuffix(' of')} is {way}")
    return Draft(f"Which way is the {nouns[0]} from the {nouns[1]}?", way, _without(COMPASS, way), steps, scene=scene)


@_skill
def _sorting_by_a_rule(rng: random.Random) -> Draft:
    noun = rng.choice(list(CATEGORIES))
    colors = rng.sample(PALETTE[noun], 3)
    other = rng.choice([c for c in _without(CATEGORIES, noun) if colors[1] in PALETTE[c]])
    zones = rng.sample(POSITIONS, 2)
    scene = _compose(rng, [Group(noun, colors[0], 1, zones[0]), Group(other, colors[1], 1, zones[1])])
    bins = rng.sample(BINS, 3)
    rules = [f"{color} goes in {name}" for color, name in zip(colors, bins, strict=True)]
    steps = _text(f"the {noun} is {colors[0]}", rules[0])
    return Draft(f"Where does the {noun} go?", bins[0], bins[1:], steps, _text(*rng.sample(rules, 3)), scene)


@_skill
def _distance_in_a_picture(rng: random.Random) -> Draft:
    nouns, hours = rng.sample(GROUPS["vehicle"], 3), rng.choice((2, 3))
    speeds = rng.sample(range(1, 12 // hours + 1), 3)
    scene, it = _scene_with(rng, nouns[:2])
    clues = [f"{article(noun)} goes {_count(speed, 'mile')}" for noun, speed in zip(nouns, speeds, strict=True)]
    hint = _text("in one hour " + ", ".join(rng.sample(clues, 3)))
    miles = [f"{number_word(speed * hours)} miles" for speed in speeds]
    steps = _text(f"{it} is {article(nouns[0])}", clues[0], f"{equation(speeds[0], 'times', hours)} miles")
    return Draft(f"How far does {it} go in {number_word(hours)} hours?", miles[0], miles[1:], steps, hint, scene)


@_skill
def _prices_in_a_picture(rng: random.Random) -> Draft:
    nouns, prices = rng.sample(list(CATEGORIES), 3), rng.sample(range(2, 7), 3)
    clues = [f"{article(noun)} costs {number_word(price)}" for noun, price in zip(nouns, prices, strict=True)]
    sums = [f"{number_word(a + b)} coins" for a, b in combinations(prices, 2)]
    hint, (scene, _) = _text(", ".join(rng.sample(clues, 3)) + " coins"), _scene_with(rng, nouns[:2])
    # the things are named from left to right, so that the picture decides the order of the steps
    left, right = sorted((0, 1), key=lambda k: POSITIONS.index(str(scene.groups[k].position)))
    sold = f"the picture shows {article(nouns[left])} and {article(nouns[right])}"
    steps = _text(sold, clues[left], clues[right], f"{equation(prices[left], 'plus', prices[right])} coins")
    return Draft("What do the things here cost together?", sums[0], sums[1:], steps, hint, scene)


@_skill
def _history_in_a_picture(rng: random.Random) -> Draft:
    order, k = rng.sample(USED, 3), rng.randrange(3)
    scene, it = _scene_with(rng, [order[k], rng.choice(_without(order, order[k]))])
    clues = [f"the {name} came {rank}" for name, rank in zip(order, RANKS, strict=True)]
    steps = _text(f"{it} is {article(order[k])}", clues[k])
    hint = _text(*rng.sample(clues, 3))
    return Draft(f"When did {it} come to the town?", RANKS[k], _without(RANKS, RANKS[k]), steps, hint, scene)


@_skill
def _caption_of_a_picture(rng: random.Random) -> Draft:
    noun, (zone, elsewhere) = rng.choice(list(CATEGORIES)), rng.sample(("left", "right"), 2)
    color, miscolor = rng.sample(PALETTE[noun], 2)
    # the wrong caption must be possible as well: a held-out pair would reveal it
    other = rng.choice([c for c in _without(CATEGORIES, noun) if color in PALETTE[c]])
    true = (color, noun, zone)
    k = rng.randrange(3)
    said = [*true[:k], (miscolor, other, elsewhere)[k], *true[k + 1 :]]
    hint, fact = (f"{article(c)} {t} is on the {z}" for c, t, z in (said, true))
    steps = _text(f"in the picture {fact}", f"the wrong word is {said[k]}")
    scene = _compose(rng, [Group(noun, color, 1, zone)])
    return Draft("Which word is wrong?", said[k], _without(said, said[k]), steps, _text(hint), scene)


@_skill
def _most_and_least(rng: random.Random) -> Draft:
    unit, noun, most, least = rng.choice(MEASURES)
    colors, values = rng.sample(list(COLORS), 3), sorted(rng.sample(range(1, 13), 3))
    clues = [f"{color} {number_word(n)}" for color, n in zip(colors, values, strict=True)]
    k, end = rng.choice(((2, most), (0, least)))
    others = " and ".join(number_word(n) for n in values if n != values[k])
    first = f"{number_word(values[k])} is {'more' if k else 'less'} than {others}"
    steps = _text(first, f"{colors[k]} is {number_word(values[k])}", f"the {end} is {colors[k]}")
    hint = _text(f"{plural(unit)}: {', '.join(rng.sample(clues, 3))}")
    return Draft(f"Which {noun} is the {end}?", colors[k], _without(colors, colors[k]), steps, hint)


@_skill
def _directions_from_a_text(rng: random.Random) -> Draft:
    way, places = rng.choice(list(OPPOSITE)), rng.sample(SITES, 4)
    pairs = (places[0], way, places[1]), (places[2], OPPOSITE[way], places[3])  # the hint names both choices
    clues = [f"the {one} is {which} of the {other}" for one, which, other in pairs]
    turned = rng.random() < 0.5
    asked, right = (places[1::-1], OPPOSITE[way]) if turned else (places[:2], way)
    steps = [clues[0], f"the opposite of {way} is {right}"] if turned else [clues[0], f"the {places[0]} is {right}"]
    question = f"Which way is the {asked[0]} from the {asked[1]}?"
    return Draft(question, right, [OPPOSITE[right]], _text(*steps), _text(*rng.sample(clues, 2)))


@_skill
def _states_of_matter(rng: random.Random) -> Draft:
    now, k = rng.randint(4, 8), rng.randrange(3)  # the same range for each state
    below, above = range(1, now), range(now + 1, 13)
    degrees = (rng.sample(above, 2), [rng.choice(below), rng.choice(above)], rng.sample(below, 2))[k]
    melt, boil = sorted(degrees)
    name = rng.choice(list(COLORS)).capitalize()
    hint = _text(
        f"{name} matter melts at {number_word(melt)} and boils at {number_word(boil)}", f"now it is {number_word(now)}"
    )
    steps = _text(_compare(now, melt), *([_compare(now, boil)] if now > melt else []), f"it is {STATES[k]}")
    return Draft("What is it now?", STATES[k], _without(STATES, STATES[k]), steps, hint)


@_skill
def _speed_from_a_text(rng: random.Random) -> Draft:
    # the faster car has the longer distance and time in half of the problems, the shorter ones in the other half
    both_more = rng.random() < 0.5
    ways = [(v * t, t) for v, t in product(range(1, 7), range(1, 5)) if v * t <= 12]
    (far, long), (near, short) = rng.sample(ways, 2)
    while far * short <= near * long or (far > near, long > short) != (both_more, both_more) or near == far:
        (far, long), (near, short) = rng.sample(ways, 2)
    fast, slow = rng.sample(list(COLORS), 2)
    clues = [(fast, far, long), (slow, near, short)]
    rng.shuffle(clues)
    hint = _text(*(f"the {c} car goes {_count(d, 'mile')} in {_count(t, 'hour')}" for c, d, t in clues))
    more, right, wrong = rng.choice((("faster", fast, slow), ("slower", slow, fast)))
    order = _compare(*((d // t) for _, d, t in sorted(clues, key=lambda clue: clue[0] != right)))
    steps = _text(*(f"{c}: {equation(d, 'divided by', t)}" for c, d, t in clues), order, f"the {more} is {right}")
    return Draft(f"Which car is {more}?", right, [wrong], steps, hint)


@_skill
def _groups_and_needs(rng: random.Random) -> Draft:
    group = rng.choice(list(GROUPS))
    one, right = rng.sample(GROUPS[group], 2)
    wrong = _group_members(rng, rng.randint(1, 3), but=group)
    named = listing(rng.sample([right, *wrong], len(wrong) + 1))
    if rng.random() < 0.5:
        steps = _text(f"{article(group)} needs {NEEDS[group]}", is_a(right))
        return Draft(f"Which of {named} needs {NEEDS[group]}?", right, wrong, steps, least=len(wrong))
    question = f"Which of {named} is in the group of {article(one)}?"
    return Draft(question, right, wrong, _text(is_a(one), is_a(right)), least=len(wrong))


@_skill
def _alphabetical_order(rng: random.Random) -> Draft:
    words = rng.sample(WORDS, 2)
    while words[0][0] == words[1][0]:
        words = rng.sample(WORDS, 2)
    low, high = sorted(words)
    right, wrong, rank = rng.choice(((low, high, "first"), (high, low, "last")))
    steps = _text(
        *(f"{word} starts with {word[0]}" for word in words),
        f"{low[0]} comes before {high[0]}",
        f"the {rank} is {right}",
    )
    return Draft(f"Which comes {rank} in the alphabet, {words[0]} or {words[1]}?", right, [wrong], steps)


@_skill
def _plurals(rng: random.Random) -> Draft:
    told, right = (rng.choice(list(ENDINGS)) for _ in range(2))
    one, word = rng.choice(ENDINGS[told]), rng.choice(ENDINGS[right])
    while one == word:
        one = rng.choice(ENDINGS[told])
    steps = _text(f"{word} ends in {last_letters(word)}", f"words that end in {last_letters(word)} take {right}")
    question = f"If {one} takes {told} in its plural, what does {word} take?"
    return Draft(question, right, _without(ENDINGS, right), steps)


@_skill
def _rhymes(rng: random.Random) -> Draft:
    end, *ends = rng.sample(list(RHYMES), rng.randint(2, 4))
    one, right = rng.sample(RHYMES[end], 2)
    wrong = [rng.choice(RHYMES[e]) for e in ends]
    named = listing(rng.sample([right, *wrong], len(wrong) + 1))
    steps = _text(f"{one} ends in {end}", f"so does {right}")
    return Draft(f"Which of {named} rhymes with {one}?", right, wrong, steps, least=len(wrong))


@_skill
def _analogies(rng: random.Random) -> Draft:
    one, other = _group_members(rng, 2)
    right, question = GROUP_OF[other], f"{one} is to {GROUP_OF[one]} as {other} is to what?"
    return Draft(question.capitalize(), right, _without(GROUPS, right), _text(is_a(one), is_a(other)))
