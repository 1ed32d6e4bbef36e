"""The language of the miniature: captions by five annotators, questions with exact answers, descriptions, reasoning.

Every sentence is made from `Facts`, whether these come from a scene (all known) or were read out of a prompt's captions
and boxes by the offline teacher (some unknown): both therefore speak with one wording.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from companion.miniature.world import _CATEGORY_NAMES, BACKGROUNDS, CATEGORIES, COLORS, POSITIONS, Group, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PLACE_PHRASE = {
    "meadow": "in a meadow",
    "beach": "on a beach",
    "street": "on a street",
    "snow": "in the snow",
    "desert": "in a desert",
    "room": "in a room",
    "lake": "by a lake",
    "night": "at night",
}
PLACE_ANSWER = {
    "meadow": "A meadow.",
    "beach": "A beach.",
    "street": "A street.",
    "snow": "A snow field.",
    "desert": "A desert.",
    "room": "A room.",
    "lake": "A lake.",
    "night": "A night scene.",
}
POSITION_PHRASE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
# supercategory -> (question that does not name the object, reason given for the answer)
AFFORDANCE = {
    "vehicle": ("Which thing could carry people away?", "it is a vehicle and vehicles carry people"),
    "animal": ("Which thing here needs to be fed?", "it is an animal and animals need food"),
    "plant": ("Which thing here grows with water and light?", "it is a plant and plants grow"),
    "building": ("Where could somebody live?", "it is a building and people live in buildings"),
    "furniture": ("Which thing belongs in a living room?", "it is furniture and furniture stands in rooms"),
    "thing": ("Which thing could somebody hold in one hand?", "it is a small thing that a hand can hold"),
}
_PLURAL = {"fish": "fish"}


@dataclass(frozen=True)
class Facts:
    """What is known of an image: groups of objects from left to right, and the background (None: not known)."""

    groups: tuple[Group, ...]
    background: str | None


@dataclass(frozen=True)
class QA:
    """A question, its short exact answer and kind: color, count, presence, position, background, category, relation."""

    question: str
    answer: str
    kind: str


def facts_of_scene(scene: Scene) -> Facts:
    """All facts of a scene, groups ordered from left to right."""
    return Facts(tuple(sorted(scene.groups, key=lambda g: POSITIONS.index(g.position or "middle"))), scene.background)


def plural(noun: str) -> str:
    """The plural of a category name, regular English otherwise."""
    if noun in _PLURAL:
        return _PLURAL[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an"."""
    return f"{'an' if phrase[:1] in 'aeiou' else 'a'} {phrase}"


def number_word(n: int) -> str:
    """A number as a word up to twelve, as digits above."""
    return NUMBERS[n] if n < len(NUMBERS) else str(n)


def noun_phrase(group: Group, *, size: bool = False, article: bool = True) -> str:
    """ "a red car", "two white dogs", "a small blue cup" for a group."""
    words = [w for w in ((group.size if size else None), group.color) if w]
    if group.count == 1:
        phrase = " ".join([*words, group.category])
        return with_article(phrase) if article else phrase
    return " ".join([number_word(group.count), *words, plural(group.category)])


def listing(parts: Sequence[str]) -> str:
    """Parts joined as English does: one alone, two by "and", more by commas and a last "and"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions, one per annotator habit: terse, place last, sizes, positions, place first.

    Args:
        scene: what is described; every caption is true, none is complete.
        rng: decides order of mention.

    Returns:
        Five sentences; together they name every category, color, count, position and the background.
    """
    groups = list(facts_of_scene(scene).groups)
    place = PLACE_PHRASE[scene.background]
    shuffled = rng.sample(groups, len(groups))
    terse = sentence(listing([noun_phrase(g) for g in shuffled]))
    placed = sentence(f"{listing([noun_phrase(g) for g in rng.sample(groups, len(groups))])} {place}")
    sized = sentence(listing([noun_phrase(g, size=True) for g in shuffled]))
    positions = sentence(listing([f"{noun_phrase(g)} {POSITION_PHRASE[g.position or 'middle']}" for g in groups]))
    if len(groups) > 1 and rng.random() < 0.4:
        left, right = groups[0], groups[-1]
        positions = sentence(f"{noun_phrase(left)} to the left of {noun_phrase(right)} {place}")
        if len(groups) == 3:
            positions = positions[:-1] + f", with {noun_phrase(groups[1])} in the middle."
    # A place opens only with what stands there, so that this habit never repeats the second one.
    first = groups[rng.randrange(len(groups))]
    opening = sentence(f"{place}, there {'is' if first.count == 1 else 'are'} {noun_phrase(first)}")
    return [terse, placed, sized, positions, opening]


def questions(facts: Facts, rng: random.Random) -> list[QA]:
    """Every factual question that the facts decide, in random order.

    Args:
        facts: unknown colors, positions or background leave their questions out.
        rng: decides order, wording and which absent category is asked for.

    Returns:
        Questions with short exact answers such as "Red.", "Two.", "Yes.", "On the left.", "A beach.".
    """
    found: list[QA] = []
    present = {g.category for g in facts.groups}
    for g in facts.groups:
        one = g.count == 1
        name = g.category if one else plural(g.category)
        be = "is" if one else "are"
        if g.color:
            found.append(QA(f"What color {be} the {name}?", sentence(g.color), "color"))
        found.append(QA(f"How many {plural(g.category)} are there?", sentence(number_word(g.count)), "count"))
        found.append(QA(f"Is there {with_article(g.category)}?", "Yes.", "presence"))
        absent = rng.choice([c for c in _CATEGORY_NAMES if c not in present])
        found.append(QA(f"Is there {with_article(absent)}?", "No.", "presence"))
        if g.position:
            found.append(QA(f"Where {be} the {name}?", sentence(POSITION_PHRASE[g.position]), "position"))
            found.append(QA(f"What is {POSITION_PHRASE[g.position]}?", sentence(noun_phrase(g)), "category"))
    placed = [g for g in facts.groups if g.position]
    if len(placed) > 1:
        a, b = rng.sample(placed, 2)
        if a.position != b.position:
            is_left = POSITIONS.index(a.position or "") < POSITIONS.index(b.position or "")
            name_a = a.category if a.count == 1 else plural(a.category)
            name_b = b.category if b.count == 1 else plural(b.category)
            be = "Is" if a.count == 1 else "Are"
            text = f"{be} the {name_a} to the left of the {name_b}?"
            found.append(QA(text, "Yes." if is_left else "No.", "relation"))
    if facts.background in PLACE_ANSWER:
        found.append(QA("What place does the image show?", PLACE_ANSWER[facts.background], "background"))
    rng.shuffle(found)
    return found


def overview(facts: Facts) -> str:
    """All groups and the place in one sentence."""
    place = PLACE_PHRASE.get(facts.background or "", "")
    return f"The image shows {listing([noun_phrase(g) for g in facts.groups])} {place}".rstrip() + "."


def describe(facts: Facts) -> str:
    """A detailed description: the place, then each group with its position, then how many there are."""
    lines = [overview(facts)]
    for g in facts.groups:
        if g.position:
            name = g.category if g.count == 1 else plural(g.category)
            be = "is" if g.count == 1 else "are"
            size = f"{g.size} and " if g.size else ""
            lines.append(sentence(f"the {name} {be} {size}{POSITION_PHRASE[g.position]}"))
    total = sum(g.count for g in facts.groups)
    lines.append("There is one object in total." if total == 1 else f"There are {number_word(total)} objects in total.")
    return " ".join(lines)


def reasoning(facts: Facts, rng: random.Random) -> QA | None:
    """A question that names no object and asks what a thing is for; None where the answer would be ambiguous."""
    kinds = [CATEGORIES.get(g.category) for g in facts.groups]
    unique = [g for g, k in zip(facts.groups, kinds, strict=True) if k in AFFORDANCE and kinds.count(k) == 1]
    if not unique:
        return None
    g = rng.choice(unique)
    question, reason = AFFORDANCE[CATEGORIES[g.category]]
    if g.count > 1:
        answer = f"One of the {plural(g.category)}, because {reason}."
    else:
        answer = f"The {' '.join(w for w in (g.color, g.category) if w)}, because {reason}."
    return QA(question, answer, "reasoning")


__all__ = ["BACKGROUNDS", "CATEGORIES", "COLORS", "QA", "Facts", "captions", "describe", "questions", "reasoning"]
