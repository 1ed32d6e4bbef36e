"""Scenes unlike those of any training image, with questions that have one right answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from PIL import Image, ImageFilter, ImageOps

from companion.miniature.language import QA, facts_of_scene, questions, sentence, with_article
from companion.miniature.sprites import ZONE
from companion.miniature.world import COLORS, Group, Item, Scene, draw_scene, held_out_pair, place, sample_scene
from llava_core.registry import unknown
from llava_core.runtime import ConfigError

KINDS = {
    "usual": "scenes as in training, on no training image",
    "unseen colors": "each thing in the color that no training image gives it",
    "in the sky": "things of the ground at the upper edge",
    "crowd": "four to six of a kind; no training image has more than three",
    "line drawing": "the edges alone, dark on white",
    "empty": "the place without the things that are asked for",
    "exchanged colors": "two things; asked for one of them in the color of the other",
}
FIRST_ID = 900_000  # of the scenes, above those of the data sets


def unusual_scenes(kind: str, n: int, seed: int = 0) -> Iterator[tuple[Image.Image, list[QA]]]:
    """Yield `n` images, RGB (224, 224), each with its questions; equal arguments give equal pixels and texts.

    The scenes of all kinds but "crowd" begin as those of "usual": two groups of objects in one place.

    Raises:
        ConfigError: `kind` is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ConfigError(unknown("kind of unusual scene", kind, KINDS))
    for k in range(FIRST_ID, FIRST_ID + n):
        scene, rng = sample_scene(k, seed, n_groups=2), random.Random(f"unusual-{k}-{seed}")
        if kind == "unseen colors":
            scene = _unseen_colors(scene)
        elif kind == "in the sky":
            scene = replace(scene, items=tuple(_raised(item, rng) for item in scene.items))
        elif kind == "crowd":
            scene = _crowd(scene, rng)
        wanted = ("count",) if kind == "crowd" else ("color", "presence", "position")
        known = {qa.question: qa for qa in questions(facts_of_scene(scene), rng)}  # one may be drawn twice
        asked = [qa for qa in known.values() if qa.kind in wanted]
        if kind == "line drawing":
            asked = [qa for qa in asked if qa.kind != "color"]
        elif kind == "empty":
            scene = replace(scene, items=())
            asked = [replace(qa, answer="No.") for qa in asked if qa.kind == "presence"]
        elif kind == "exchanged colors":
            asked = _exchanged(scene)
        image = draw_scene(scene)
        yield (_line_drawing(image) if kind == "line drawing" else image), asked


def _unseen_colors(scene: Scene) -> Scene:
    new = {g.category: next(c for c in COLORS if held_out_pair(g.category, c)) for g in scene.groups}
    return replace(
        scene,
        items=tuple(replace(item, color=new[item.category]) for item in scene.items),
        groups=tuple(replace(g, color=new[g.category]) for g in scene.groups),
    )


def _raised(item: Item, rng: random.Random) -> Item:
    x1, y1, x2, y2 = item.box
    top = rng.uniform(0.02, 0.06) if ZONE[item.category] == "ground" else y1
    return replace(item, box=(x1, top, x2, top + y2 - y1))


def _crowd(scene: Scene, rng: random.Random) -> Scene:
    first, count = scene.groups[0], rng.randint(4, 6)
    items = place(rng, first.category, str(first.color), "small", count, "middle", scene.background, 0.94)
    return replace(scene, items=tuple(items), groups=(Group(first.category, first.color, count, "middle"),))


def _exchanged(scene: Scene) -> list[QA]:
    result = []
    for group, other in (scene.groups, scene.groups[::-1]):
        if group.color != other.color:
            for color, kind, answer in ((group.color, "own color", "yes"), (other.color, "color of the other", "no")):
                result.append(QA(f"Is there {with_article(f'{color} {group.category}')}?", sentence(answer), kind))
    return result


def _line_drawing(image: Image.Image) -> Image.Image:
    edges = image.convert("L").filter(ImageFilter.GaussianBlur(0.8)).filter(ImageFilter.FIND_EDGES)
    width, height = image.size
    edges = edges.crop((2, 2, width - 2, height - 2)).resize(image.size)  # the filter marks the border
    return ImageOps.invert(ImageOps.autocontrast(edges, cutoff=(0, 2))).convert("RGB")
