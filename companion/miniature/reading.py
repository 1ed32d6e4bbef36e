"""What the base models of the miniature read: scenes told in sentences or patch by patch, dialogues, science."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

from companion.miniature import language, scienceqa, world
from companion.miniature.cc3m import web_caption
from companion.teacher.prompts import DETAIL_QUESTIONS
from llava_core.constants import BRIEF_INSTRUCTIONS, IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES, Segment

GRID = 7  # patches of the vision tower, per row and per column


def told(groups: Sequence[world.Group], place: str, rng: random.Random) -> str:
    """A scene in one sentence that leaves nothing out, each thing's place, number and color before its name."""
    parts = [
        f"{language.POSITION_PHRASE[g.position or 'middle']} {language.noun_phrase(g)}"
        for g in rng.sample(groups, len(groups))
    ]
    parts.insert(rng.choice((0, len(parts))), place)
    return language.sentence(", ".join(parts))


def patch_groups(scene: world.Scene) -> list[world.Group | None]:
    """The group that covers the center of each patch of a scene's raster, row by row; None where there is none.

    What is too narrow for any center has the column that it stands in; what is too flat for any has no patch.
    """
    by_category = {g.category: g for g in scene.groups}
    patches: list[world.Group | None] = [None] * GRID**2
    for item in scene.items:  # from far to near
        centers = [(k + 0.5) / GRID for k in range(GRID)]
        columns = [k for k, x in enumerate(centers) if item.box[0] <= x <= item.box[2]]
        rows = [k for k, y in enumerate(centers) if item.box[1] <= y <= item.box[3]]
        between = int(GRID * (item.box[0] + item.box[2]) / 2)  # a narrow thing that covers no center
        for row, column in product(rows, columns or [between]):
            patches[GRID * row + column] = by_category[item.category]
    return patches


def noun(group: world.Group) -> str:
    """A group's category, in the plural where there are several."""
    return group.category if group.count == 1 else language.plural(group.category)


def patch_words(scene: world.Scene) -> list[str]:
    """What each patch of a scene's raster shows, in words, row by row: the place's name where nothing stands."""
    return [
        f"{g.position} {language.number_word(g.count)} {g.color} {noun(g)}" if g else scene.background
        for g in patch_groups(scene)
    ]


def context_text(scene: world.Scene, rng: random.Random) -> str:
    """A text from which every fact of a scene can be read."""
    kind = rng.random()
    if kind < 0.6:
        return told(scene.groups, language.PLACE_PHRASE[scene.background], rng)
    groups = rng.sample(scene.groups, len(scene.groups))
    where = [f"{language.noun_phrase(g)} {language.POSITION_PHRASE[g.position or 'middle']}" for g in groups]
    return language.sentence(f"{language.listing(where)} {language.PLACE_PHRASE[scene.background]}")


def dialogue(turns: list[tuple[str, str | None]], everything: bool = False) -> list[Segment]:
    """A rendered dialogue; `everything` supervises questions and contexts too, as plain pretraining does."""
    segments = TEMPLATES.get("v0").render(turns)
    return [Segment("".join(s.text for s in segments), True)] if everything else segments


OPTIONS: dict[str, Sequence[str]] = {
    "color": list(world.COLORS),
    "count": language.NUMBERS[1:4],
    "position": list(language.POSITION_PHRASE.values()),
    "background": [answer.rstrip(".").lower() for answer in language.PLACE_ANSWER.values()],
}


def multiple_choice(context: str, facts: language.Facts, rng: random.Random) -> tuple[str, str]:
    """A question with lettered options and a reply that says the fact before its letter, laid out as in ScienceQA."""
    qa = rng.choice([q for q in language.questions(facts, rng) if q.kind in OPTIONS])
    right = qa.answer.rstrip(".").lower()
    wrong = [o for o in OPTIONS[qa.kind] if o != right]
    choices = [right, *rng.sample(wrong, rng.randint(1, min(3, len(wrong))))]
    rng.shuffle(choices)
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=False))
    reply = f"SOLUTION: {language.sentence(right)}\n###\nANSWER: {'ABCD'[choices.index(right)]}."
    return f"{qa.question}\nContext: {context}\nOptions: {options}", reply


def _caption(scene: world.Scene, rng: random.Random) -> str:
    """A caption by an annotator, or as the web writes them."""
    return web_caption(scene, rng) if rng.random() < 0.5 else rng.choice(language.captions(scene, rng))


def document(rng: random.Random) -> tuple[list[Segment], list[str]]:
    """One training document of the language models, and the words of its patches (empty without a patch text).

    A patch text stands where LLaVA puts an image: one vector for each patch of a scene, the sum of the embeddings of
    the words for what is there. It is text, no image; but it has the form in which a projector will hand images over.
    """
    kind = rng.random()
    if kind < 0.12:
        return [Segment(scienceqa.science_text(rng), True, eos=True)], []
    scene = world.sample_scene(rng.randrange(1 << 30), 7)
    facts = language.facts_of_scene(scene)
    if kind < 0.16:
        return [Segment(_caption(scene, rng), True, eos=True)], []
    if kind < 0.19:  # the same questions with nothing to look at: the model learns the prior, not to guess one answer
        return dialogue([(q.question, q.answer) for q in language.questions(facts, rng)[:2]], True), []
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
