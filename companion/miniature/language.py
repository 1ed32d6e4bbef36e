"""Text generation for scenes: captions by five annotators, questions with exact answers, descriptions, reasoning.

Every sentence is generated from `Facts`. These come from a scene (all known) or from the captions and boxes of a prompt
that the offline teacher parses (some unknown), so that both use the same wording.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from companion.miniature.display_list import load_table
from companion.miniature.world import BACKGROUNDS, CATEGORIES, COLORS, POSITIONS, Group, Scene

_TABLE: dict[str, Any] = load_table("language")
NUMBERS: list[str] = _TABLE["numbers"]
PLACE_PHRASE: dict[str, str] = _TABLE["place_phrase"]
PLACE_ANSWER: dict[str, str] = _TABLE["place_answer"]
POSITION_PHRASE: dict[str, str] = _TABLE["position_phrase"]
AFFORDANCE: dict[str, list[str]] = _TABLE["affordance"]


@dataclass(frozen=True)
class Facts:
    """Known content of an image: groups of objects from left to right, and the background (None: not known)."""

    groups: tuple[Group, ...]
    background: str | None


@dataclass(frozen=True)
class QA:
    """A question, its short exact answer, its kind (e.g. color, count, presence), and the answer as a sentence."""

    question: str
    answer: str
    kind: str
    statement: str = ""


def facts_of_scene(scene: Scene) -> Facts:
    return Facts(tuple(sorted(scene.groups, key=lambda g: POSITIONS.index(g.position or "middle"))), scene.background)


def plural(word: str) -> str:
    if word in _TABLE["irregular_plural"]:
        return str(_TABLE["irregular_plural"][word])
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[:1] in 'aeiou' else 'a'} {phrase}"


def number_word(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else str(n)


def noun_phrase(group: Group, *, size: bool = False, article: bool = True) -> str:
    """ "a red car", "two white dogs", "a small blue cup" for a group."""
    words = [w for w in ((group.size if size else None), group.color) if w]
    if group.count == 1:
        phrase = " ".join([*words, group.category])
        return with_article(phrase) if article else phrase
    return " ".join([number_word(group.count), *words, plural(group.category)])


def noun(group: Group) -> str:
    return group.category if group.count == 1 else plural(group.category)


def be(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def position_phrase(group: Group) -> str:
    return POSITION_PHRASE[group.position or "middle"]


def placed_phrase(group: Group) -> str:
    return f"{noun_phrase(group)} {position_phrase(group)}"


def listing(parts: Sequence[str]) -> str:
    """Parts joined as English does: one unchanged, two by "and", more by commas and a last "and"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five true captions, one per annotator habit: terse, place last, sizes, positions, place first.

    None is complete; together they name every category, color, count, position and the background.
    """
    groups = list(facts_of_scene(scene).groups)
    place = PLACE_PHRASE[scene.background]
    shuffled = rng.sample(groups, len(groups))
    terse = sentence(listing([noun_phrase(g) for g in shuffled]))
    placed = sentence(f"{listing([noun_phrase(g) for g in rng.sample(groups, len(groups))])} {place}")
    sized = sentence(listing([noun_phrase(g, size=True) for g in shuffled]))
    positions = sentence(listing([placed_phrase(g) for g in groups]))
    if len(groups) > 1 and rng.random() < 0.4:
        left, right = groups[0], groups[-1]
        positions = sentence(f"{noun_phrase(left)} to the left of {noun_phrase(right)} {place}")
        if len(groups) == 3:
            positions = positions[:-1] + f", with {noun_phrase(groups[1])} in the middle."
    # only one group after the place, so that this caption never repeats the second one
    first = groups[rng.randrange(len(groups))]
    opening = sentence(f"{place}, there {be(first)} {noun_phrase(first)}")
    return [terse, placed, sized, positions, opening]


def questions(facts: Facts, rng: random.Random) -> list[QA]:
    """Every factual question that the facts decide, in random order and wording.

    The short exact answers are e.g. "Red.", "Two.", "Yes.", "On the left.", "A beach.".
    """
    result: list[QA] = []

    def add(kind: str, question: str, answer: str, statement: str) -> None:
        result.append(QA(question, sentence(answer), kind, sentence(statement)))

    present = {g.category for g in facts.groups}
    for g in facts.groups:
        name, number = noun(g), number_word(g.count)
        if g.color:
            add("color", f"What color {be(g)} the {name}?", g.color, f"the {name} {be(g)} {g.color}")
        asked = f"How many {plural(g.category)} are there?"
        add("count", asked, number, f"there {be(g)} {number} {name} in the image")
        one = with_article(g.category)
        add("presence", f"Is there {one}?", "yes", f"yes, there is {one} in the image")
        absent = rng.choice([c for c in CATEGORIES if c not in present])
        add("presence", f"Is there {with_article(absent)}?", "no", f"no, there is no {absent} in the image")
        if g.position:
            where = position_phrase(g)
            add("position", f"Where {be(g)} the {name}?", where, f"the {name} {be(g)} {where}")
            add("category", f"What is {where}?", noun_phrase(g), f"there {be(g)} {placed_phrase(g)}")
    placed = [g for g in facts.groups if g.position]
    if len(placed) > 1:
        a, b = rng.sample(placed, 2)
        if a.position != b.position:
            is_left = POSITIONS.index(a.position or "") < POSITIONS.index(b.position or "")
            answer, negation = ("yes", "") if is_left else ("no", "not ")
            asked = f"{be(a).capitalize()} the {noun(a)} to the left of the {noun(b)}?"
            add("relation", asked, answer, f"{answer}, the {noun(a)} {be(a)} {negation}to the left of the {noun(b)}")
    if facts.background in PLACE_ANSWER:
        place = PLACE_ANSWER[facts.background]
        statement = f"the image shows {place[:1].lower()}{place[1:]}"
        add("background", "What place does the image show?", place, statement)
    rng.shuffle(result)
    return result


def overview(facts: Facts) -> str:
    place = PLACE_PHRASE.get(facts.background or "", "")
    return f"The image shows {listing([noun_phrase(g) for g in facts.groups])} {place}".rstrip() + "."


def describe(facts: Facts) -> str:
    """A detailed description: the place, then each group with its position, then how many there are."""
    lines = [overview(facts)]
    for g in facts.groups:
        if g.position:
            size = f"{g.size} and " if g.size else ""
            lines.append(sentence(f"the {noun(g)} {be(g)} {size}{position_phrase(g)}"))
    total = sum(g.count for g in facts.groups)
    lines.append("There is one object in total." if total == 1 else f"There are {number_word(total)} objects in total.")
    return " ".join(lines)


def reasoning(facts: Facts, rng: random.Random) -> QA | None:
    """A question about the use of an object without its name; None where the answer would be ambiguous."""
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
