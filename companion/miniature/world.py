"""Synthetic scenes: sampling, placement and drawing.

A scene is a background and one to three groups of objects. All its facts (category, color, count, size, position) are
known, so that captions, boxes, questions and answers generated from it are correct by construction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from companion.miniature.backgrounds import BACKGROUNDS, HORIZON, draw_background
from companion.miniature.sprites import ASPECT, CATEGORIES, COLORS, ZONE, draw_object

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "ood"]
POSITIONS = ("left", "middle", "right")
_ZONE_CENTER = {"left": 0.2, "middle": 0.5, "right": 0.8}
_COLOR_NAMES = tuple(COLORS)
_CATEGORY_NAMES = tuple(CATEGORIES)


@dataclass(frozen=True)
class Item:
    """One drawn object; `box` is (x1, y1, x2, y2) as fractions of the image, origin at the top left."""

    category: str
    color: str
    size: Literal["small", "large"]
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Group:
    """Adjacent objects of one category and color; `color` and `position` are None where a text does not state them."""

    category: str
    color: str | None
    count: int
    position: str | None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """A background, objects from far to near, and the seed of the drawing."""

    id: int
    background: str
    items: tuple[Item, ...]
    groups: tuple[Group, ...]
    seed: int


def held_out_pair(category: str, color: str) -> bool:
    """Whether only bench-wild has this pair: one color per category (24 of 192 pairs), colors about equally often."""
    return (5 * _CATEGORY_NAMES.index(category) + _COLOR_NAMES.index(color)) % 8 == 0


def sample_scene(scene_id: int, seed: int, n_groups: int | None = None, split: Split = "train") -> Scene:
    """Sample one scene of 1 to 3 groups, of different categories in different thirds; equal arguments, equal scene.

    `scene_id` is the COCO image id. "train" scenes have no held-out pairs of category and color, "ood" only those.
    """
    rng = random.Random(f"scene-{scene_id}-{seed}")
    background = rng.choice(BACKGROUNDS)
    n = n_groups or rng.choices((1, 2, 3), weights=(4, 4, 2))[0]
    categories = rng.sample(_CATEGORY_NAMES, n)
    zones = rng.sample(POSITIONS, n)
    groups, items = [], []
    apart = n == 1 or (n == 2 and "middle" not in zones)  # otherwise there is no space for several objects
    for category, zone in zip(categories, zones, strict=True):
        colors = [c for c in _COLOR_NAMES if held_out_pair(category, c) == (split == "ood")]
        color = rng.choice(colors or list(_COLOR_NAMES))
        size: Literal["small", "large"] = rng.choice(("small", "large"))
        count = rng.choices((1, 2, 3), weights=(3, 2, 1))[0] if apart else 1
        groups.append(Group(category, color, count, zone, size))
        items += place(rng, category, color, size, count, zone, background, width_share(zones))
    items.sort(key=lambda item: item.box[3])
    return Scene(scene_id, background, tuple(items), tuple(groups), seed)


def width_share(zones: Sequence[str]) -> float:
    """Maximal share of the image width per group, for groups in these thirds."""
    return 0.56 if len(zones) == 1 else 0.46 if len(zones) == 2 and "middle" not in zones else 0.36


def place(
    rng: random.Random,
    category: str,
    color: str,
    size: Literal["small", "large"],
    count: int,
    zone: str,
    background: str,
    max_width: float,
) -> list[Item]:
    """Boxes of one group within a share of the width: near objects are lower and larger, flying ones in the sky."""
    height = rng.uniform(0.4, 0.5) if size == "large" else rng.uniform(0.26, 0.32)
    if count > 1:
        height = min(height, 0.36)
    width = min(height * ASPECT[category], max_width / (count + 0.1 * (count - 1)))
    height = width / ASPECT[category]
    horizon = HORIZON[background]
    gap = width * 0.1
    total = count * width + (count - 1) * gap
    center = _ZONE_CENTER[zone] + rng.uniform(-0.03, 0.03)
    start = min(max(center - total / 2, 0.015), 0.985 - total)
    items = []
    for k in range(count):
        x1 = start + k * (width + gap)
        if ZONE[category] == "sky":
            y2 = rng.uniform(0.05, max(0.08, horizon - height)) + height
        else:
            near = 0.97 if size == "large" else 0.88
            y2 = min(max(rng.uniform(near - 0.08, near), horizon + 0.06, height + 0.02), 0.985)
        y1 = max(y2 - height, 0.01)
        items.append(Item(category, color, size, (round(x1, 4), round(y1, 4), round(x1 + width, 4), round(y2, 4))))
    return items


def draw_scene(scene: Scene, size: int = 224) -> Image.Image:
    """Draw a scene, objects from far to near, as RGB (size, size); equal arguments give equal pixels."""
    rng = random.Random(f"draw-{scene.seed}-{scene.id}")
    canvas = draw_background(scene.background, size, rng)
    for item in scene.items:
        x1, y1, x2, y2 = (v * size for v in item.box)
        draw_object(canvas, item.category, item.color, (x1, y1, x2, y2), rng, flip=rng.random() < 0.5)
    return canvas.convert("RGB")
