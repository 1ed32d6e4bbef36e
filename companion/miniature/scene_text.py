"""Parsing of the miniature's language: captions, descriptions and boxes of a prompt back to the facts of a scene."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from companion.miniature import language
from companion.miniature.everyday import Box, Photo, either
from companion.miniature.language import NUMBERS, PLACE_PHRASE, POSITION_PHRASE, Facts
from companion.miniature.world import CATEGORIES, COLORS, POSITIONS, Group

_BOX = re.compile(r"^(?P<name>[^:\[\]]+): [\[(](?P<box>[\d., ]+)[\])]$")


@dataclass(frozen=True)
class Context:
    captions: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...]
    misread: Facts | None = None  # taken for the facts of the scene, by a teacher that makes errors

    @property
    def facts(self) -> Facts | None:
        """The facts of a scene; None if a sentence is not of the miniature's language."""
        return self.misread or read_scene(self.captions, self.boxes)

    @property
    def photo(self) -> Photo:
        return Photo(self.captions, self.boxes)


def read_context(text: str) -> Context:
    """Parse captions (a line each) and boxes (`category: [x1, y1, x2, y2]`) of a user message."""
    captions: list[str] = []
    boxes: list[tuple[str, Box]] = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        match = _BOX.match(line)
        numbers = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", match["box"])] if match else []
        if match and len(numbers) == 4:
            boxes.append((match["name"].strip(), (numbers[0], numbers[1], numbers[2], numbers[3])))
        else:
            captions.append(line)
    return Context(tuple(captions), tuple(boxes))


WORDS = {form: name for name in CATEGORIES for form in (language.plural(name), name)}
_GROUP = (
    rf"(?P<n>an?|{either(NUMBERS[1:])}) (?:(?P<size>small|large) )?(?:(?P<color>{either(COLORS)}) )?"
    rf"(?P<noun>{either(WORDS)})\b"
)
_POSITION = rf"(?P<position>{either(POSITION_PHRASE.values())})"
STATED = rf"\bthe (?P<noun>{either(WORDS)}) (?:is|are) (?:(?P<size>small|large) and )?{_POSITION}"
_LEFT_OF = re.compile(rf"\b{re.sub('P<', 'P<a_', _GROUP)} to the left of {re.sub('P<', 'P<b_', _GROUP)}")
MENTION = re.compile(rf"\b{_GROUP}(?: {_POSITION})?")
_TOTAL = re.compile(rf"\bthere (?:is|are) {either(NUMBERS)} objects? in total")
_FILLER = re.compile(r"\b(?:the image shows|there (?:is|are)|and|with)\b|[\s,.]")
_SIDE = {phrase: position for position, phrase in POSITION_PHRASE.items()}


def read_scene(captions: Sequence[str], boxes: Sequence[tuple[str, Box]] = ()) -> Facts | None:
    """Parse a scene of the miniature from captions, description or boxes; None if a word is not of its language.

    Boxes, (x1, y1, x2, y2) from 0 to 1, decide positions that the captions leave open. Groups are from left to right.
    """
    known: dict[str, Group] = {}
    order: list[tuple[str, str]] = []
    background = None

    def learn(noun: str, **facts: object) -> None:
        name = WORDS[noun]
        news = {key: value for key, value in facts.items() if value is not None}
        known[name] = replace(known.get(name, Group(name, None, 1, None)), **news)  # type: ignore[arg-type]

    def count(word: str) -> int:
        return NUMBERS.index(word) if word in NUMBERS else 1

    for text in (caption.lower() for caption in captions):
        rest = _TOTAL.sub(" ", text)
        for place, phrase in PLACE_PHRASE.items():
            if re.search(rf"\b{phrase}\b", rest):
                background, rest = place, re.sub(rf"\b{phrase}\b", " ", rest)
        for m in _LEFT_OF.finditer(rest):
            order.append((WORDS[m["a_noun"]], WORDS[m["b_noun"]]))
        for m in re.finditer(STATED, rest):
            learn(m["noun"], size=m["size"], position=_SIDE[m["position"]])
        rest = re.sub(STATED, " ", rest)
        for m in MENTION.finditer(rest):
            position = _SIDE.get(m["position"] or "")
            learn(m["noun"], count=count(m["n"]), color=m["color"], size=m["size"], position=position)
        if _FILLER.sub("", MENTION.sub(" ", rest.replace("to the left of", " "))):
            return None
    if not known or not set(known) | {name for name, _ in boxes} <= set(CATEGORIES):
        return None
    for name in dict.fromkeys(name for name, _ in boxes):
        own = [box for other, box in boxes if other == name]
        center = (min(b[0] for b in own) + max(b[2] for b in own)) / 2
        nearest = "left" if center < 0.35 else "right" if center > 0.65 else "middle"
        stated = known[name].position if name in known else None
        learn(name, count=len(own), position=stated or nearest)
    for left, right in order if len(known) == 3 else ():  # "a to the left of b" leaves the middle to the third
        learn(left, position=known[left].position or "left")
        learn(right, position=known[right].position or "right")
    groups = sorted(known.values(), key=lambda g: POSITIONS.index(g.position or "middle"))
    return Facts(tuple(groups), background)


def objects_named(text: str) -> set[str]:
    """Return the categories that a text names."""
    return {WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in WORDS}
