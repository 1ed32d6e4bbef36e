"""Pretraining text of the base language models: scenes as sentences or patch by patch, dialogues, science facts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

from companion.data_tools.expansion import BRIEF_INSTRUCTIONS
from companion.miniature import language, scienceqa, world
from companion.miniature.cc3m import web_caption
from companion.teacher.prompts import DETAIL_QUESTIONS
from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES
from llava_core.data.label_mask import Segment

GRID = 7  # patches of the vision tower, per row and per column
OPTIONS: dict[str, Sequence[str]] = {
    "color": list(world.COLORS),
    "count": language.NUMBERS[1:4],
    "position": list(language.POSITION_PHRASE.values()),
    "background": [answer.rstrip(".").lower() for answer in language.PLACE_ANSWER.values()],
}


def dense_caption(groups: Sequence[world.Group], place: str, rng: random.Random) -> str:
    """One sentence with every fact of a scene; the position, number and color of a group precede its name."""
    parts = [f"{language.position_phrase(g)} {language.noun_phrase(g)}" for g in rng.sample(groups, len(groups))]
    parts.insert(rng.choice((0, len(parts))), place)
    return language.sentence(", ".join(parts))


def patch_groups(scene: world.Scene) -> list[world.Group | None]:
    """The group that covers the center of each patch, row by row; None for the background.

    An object that is too narrow to cover a center gets the column of its own center; one that is too flat has no patch.
    """
    by_category = {g.category: g for g in scene.groups}
    patches: list[world.Group | None] = [None] * GRID**2
    centers = [(k + 0.5) / GRID for k in range(GRID)]
    for item in scene.items:  # from far to near
        x1, y1, x2, y2 = item.box
        columns = [k for k, x in enumerate(centers) if x1 <= x <= x2] or [int(GRID * (x1 + x2) / 2)]
        rows = [k for k, y in enumerate(centers) if y1 <= y <= y2]
        for row, column in product(rows, columns):
            patches[GRID * row + column] = by_category[item.category]
    return patches


def patch_words(scene: world.Scene) -> list[str]:
    """The content of each patch in words, row by row: position, number, color and noun, or the background."""
    return [
        f"{g.position} {language.number_word(g.count)} {g.color} {language.noun(g)}" if g else scene.background
        for g in patch_groups(scene)
    ]


def context_text(scene: world.Scene, rng: random.Random) -> str:
    """A text that states every fact of a scene."""
    place = language.PLACE_PHRASE[scene.background]
    if rng.random() < 0.6:
        return dense_caption(scene.groups, place, rng)
    groups = rng.sample(scene.groups, len(scene.groups))
    return language.sentence(f"{language.listing([language.placed_phrase(g) for g in groups])} {place}")


def dialogue(turns: list[tuple[str, str | None]], supervise_all: bool = False) -> list[Segment]:
    """A rendered dialogue; `supervise_all` puts the loss on questions and contexts too."""
    segments = TEMPLATES.get("v0").render(turns)
    return [Segment("".join(s.text for s in segments), True)] if supervise_all else segments


def multiple_choice(context: str, facts: language.Facts, rng: random.Random) -> tuple[str, str]:
    """A question with lettered options in ScienceQA's prompt format, and a reply with the reason before its letter."""
    qa = rng.choice([q for q in language.questions(facts, rng) if q.kind in OPTIONS])
    right = qa.answer.rstrip(".").lower()
    wrong = [o for o in OPTIONS[qa.kind] if o != right]
    choices = [right, *rng.sample(wrong, rng.randint(1, min(3, len(wrong))))]
    rng.shuffle(choices)
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=False))
    reply = f"SOLUTION: {language.sentence(right)}\n###\nANSWER: {'ABCD'[choices.index(right)]}."
    return f"{qa.question}\nContext: {context}\nOptions: {options}", reply


def _caption(scene: world.Scene, rng: random.Random) -> str:
    return web_caption(scene, rng) if rng.random() < 0.5 else rng.choice(language.captions(scene, rng))


def document(rng: random.Random) -> tuple[list[Segment], list[str]]:
    """One training document of the language models, and the words of its patches (empty without a patch text).

    A patch text replaces an image: one vector per patch of a scene, the sum of the embeddings of its words. This is the
    form of a projector's output.
    """
    kind = rng.random()
    if kind < 0.12:
        return [Segment(scienceqa.science_text(rng), True, eos=True)], []
    scene = world.sample_scene(rng.randrange(1 << 30), 7)
    facts = language.facts_of_scene(scene)
    if kind < 0.16:
        return [Segment(_caption(scene, rng), True, eos=True)], []
    if kind < 0.19:  # questions without context: the model learns the prior instead of one fixed guess
        return dialogue([(q.question, q.answer) for q in language.questions(facts, rng)[:2]], supervise_all=True), []
    patches = patch_words(scene) if rng.random() < 0.5 else []
    context = IMAGE_MARKER if patches else context_text(scene, rng)
    if kind < 0.43:
        if kind < 0.25:
            pair = rng.choice(DETAIL_QUESTIONS), language.describe(facts)
        elif kind < 0.35:
            pair = rng.choice(BRIEF_INSTRUCTIONS), _caption(scene, rng)
        else:
            return dialogue([multiple_choice(context, facts, rng)]), patches
        return dialogue([("\n".join(rng.sample((context, pair[0]), 2)), pair[1])]), patches
    qa = language.questions(facts, rng)[: rng.randint(1, 5)]
    if rng.random() < 0.3 and (reason := language.reasoning(facts, rng)):
        qa.insert(rng.randrange(len(qa)), reason)
    pairs: list[tuple[str, str | None]] = [(q.question, q.answer) for q in qa]
    first = f"{context}\n{pairs[0][0]}" if rng.random() < 0.8 else f"{pairs[0][0]}\n{context}"
    return dialogue([(first, pairs[0][1]), *pairs[1:]]), patches
