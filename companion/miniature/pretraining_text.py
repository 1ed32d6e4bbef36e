"""Pretraining text of the base language models: scenes as sentences or patch by patch, dialogues, science facts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

from companion.data_tools.expansion import BRIEF_INSTRUCTIONS
from companion.miniature import language, school_texts, world
from companion.miniature.cc3m import web_caption
from companion.teacher.prompts import DETAIL_QUESTIONS
from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES
from llava_core.data.label_mask import Segment

GRID = 7  # patches of the vision tower, per row and per column


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


def told_problem(rng: random.Random) -> tuple[list[Segment], list[str]]:
    """A problem of the train split whose image is told, in either order of reason and answer in equal parts."""
    problem, scene = school_texts.draw_problem(rng)
    while scene and not scene.groups:  # a map's places are not told by the texts of a scene
        problem, scene = school_texts.draw_problem(rng)
    patches = patch_words(scene) if scene and rng.random() < 0.5 else []
    context = (IMAGE_MARKER if patches else context_text(scene, rng)) if scene else ""
    prompt_format = rng.choice((school_texts.REASON_FIRST, school_texts.ANSWER_FIRST))
    return dialogue([school_texts.problem_turn(problem, prompt_format, context)]), patches


def _caption(scene: world.Scene, rng: random.Random) -> str:
    return web_caption(scene, rng) if rng.random() < 0.5 else rng.choice(language.captions(scene, rng))


def document(rng: random.Random) -> tuple[list[Segment], list[str]]:
    """One training document of the language models, and the words of its patches (empty without a patch text).

    A patch text replaces an image: one vector per patch of a scene, the sum of the embeddings of its words. This is the
    form of a projector's output.
    """
    kind = rng.random()
    if kind < 0.22:
        return told_problem(rng)
    if kind < 0.36:
        return dialogue(school_texts.exercise(rng)), []
    if kind < 0.42:
        return [Segment(school_texts.science_text(rng), True, eos=True)], []
    return _scene_document(rng)


def _scene_document(rng: random.Random) -> tuple[list[Segment], list[str]]:
    """Captions, descriptions and dialogues about a scene."""
    scene, kind = world.sample_scene(rng.randrange(1 << 30), 7), rng.random()
    facts = language.facts_of_scene(scene)
    if kind < 0.05:
        return [Segment(_caption(scene, rng), True, eos=True)], []
    if kind < 0.09:  # questions without context: the model learns the prior instead of one fixed guess
        return dialogue([(q.question, q.answer) for q in language.questions(facts, rng)[:2]], supervise_all=True), []
    patches = patch_words(scene) if rng.random() < 0.5 else []
    context = IMAGE_MARKER if patches else context_text(scene, rng)
    if kind < 0.28:
        if kind < 0.16:
            pair = rng.choice(DETAIL_QUESTIONS), language.describe(facts)
        else:
            pair = rng.choice(BRIEF_INSTRUCTIONS), _caption(scene, rng)
        return dialogue([("\n".join(rng.sample((context, pair[0]), 2)), pair[1])]), patches
    asked = language.questions(facts, rng)
    if rng.random() < 0.5:  # the hardest kind, and at most one of a scene
        asked.sort(key=lambda q: q.kind != "relation")
    qa = asked[: rng.randint(1, 5)]
    rng.shuffle(qa)
    if rng.random() < 0.3 and (reason := language.reasoning(facts, rng)):
        qa.insert(rng.randrange(len(qa)), reason)
    pairs: list[tuple[str, str | None]] = [(q.question, q.answer) for q in qa]
    first = f"{context}\n{pairs[0][0]}" if rng.random() < 0.8 else f"{pairs[0][0]}\n{context}"
    return dialogue([(first, pairs[0][1]), *pairs[1:]]), patches
