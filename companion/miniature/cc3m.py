"""mini-cc3m: web-like captions with their images in the file format of Conceptual Captions after download.

A few popular subjects fill almost half of the lines, and rare words give a long tail: few noun phrases occur in
hundreds of captions and most in one or two, as in the paper's data.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar

from companion.miniature import coco, language
from companion.miniature.display_list import load_table
from companion.miniature.world import CATEGORIES, COLORS, Group, Scene, held_out_pair, sample_scene
from llava_core.runtime import atomic_write

TSV = "Train_GCC-training.tsv"
DEAD_SHARE = 0.08
BROKEN = 3
# shares of lines with a popular subject, a title without objects, an invented place; of names with rare words, a size
POPULAR, TITLES, TAILS, RARE, SIZES = 0.45, 0.06, 0.07, 0.12, 0.06
SEVERAL = 0.1  # share of the layouts with several popular objects that is used: web images of products show one
LAYOUTS = 80  # at least, of a popular category
_OTHER_SEED = 1_000_003  # so that no scene of mini-coco occurs
_T = TypeVar("_T")

_TABLE: dict[str, Any] = load_table("cc3m")
_NAMES = [
    f"{stem}{ending} {kind}"
    for kind in _TABLE["names"]["kinds"]
    for ending in _TABLE["names"]["endings"]
    for stem in _TABLE["names"]["stems"]
]


class _Zipf(Generic[_T]):
    """Values in shuffled order, the r-th drawn with a probability proportional to r ** -exponent."""

    def __init__(self, values: Sequence[_T], exponent: float, rng: random.Random, n: int | None = None) -> None:
        self.values = rng.sample(values, n or len(values))
        self.weights = list(accumulate((rank + 1) ** -exponent for rank in range(len(self.values))))

    def draw(self, rng: random.Random) -> _T:
        return rng.choices(self.values, cum_weights=self.weights)[0]


class _Web:
    """A synthetic web crawl: six popular subjects and any other scenes."""

    def __init__(self, seed: int) -> None:
        self.seed, rng = seed, random.Random(f"cc3m-web-{seed}")
        pairs = [(category, color) for category in CATEGORIES for color in COLORS if not held_out_pair(category, color)]
        self.subjects = _Zipf(pairs, 1.0, rng, n=6)
        self.names = _Zipf(_NAMES, 0.7, rng)
        self.layouts: dict[str, list[Scene]] = {category: [] for category, _ in self.subjects.values}
        number = 0
        while any(len(known) < LAYOUTS for known in self.layouts.values()):
            scene = sample_scene(number, seed + _OTHER_SEED, n_groups=1)
            if scene.groups[0].count == 1 or rng.random() < SEVERAL:
                self.layouts.get(scene.groups[0].category, []).append(scene)
            number += 1

    def scene(self, index: int) -> tuple[Scene, bool]:
        """The scene of a line, and whether it is a popular subject without others."""
        rng = random.Random(f"cc3m-scene-{self.seed}-{index}")
        if rng.random() > POPULAR:
            return sample_scene(index, self.seed + _OTHER_SEED), False
        category, color = self.subjects.draw(rng)
        scene = rng.choice(self.layouts[category])
        items = tuple(replace(item, color=color) for item in scene.items)
        return replace(scene, id=index, items=items, groups=(replace(scene.groups[0], color=color),)), True

    def caption(self, scene: Scene, popular: bool) -> str:
        """A caption, lower-case and tokenised as in CC3M; most have color and category of every group."""
        rng = random.Random(f"cc3m-caption-{self.seed}-{scene.id}")
        if rng.random() < TITLES:
            return f"{rng.choice(_TABLE['titles']).format(self.names.draw(rng))} ."
        groups = list(language.facts_of_scene(scene).groups)
        shuffled = rng.sample(groups, len(groups))
        names = {g: self._name(g, rng) for g in groups}
        styles = {"plain": 34, "headline": 30, "photo": 6, "partial": 6, "position": 0 if popular else 24}
        style = rng.choices(list(styles), list(styles.values()))[0]
        text = language.listing([names[g] for g in shuffled])
        if style == "photo":
            text = f"{rng.choice(_TABLE['leads'])} {text}"
        elif style == "headline":
            text = language.listing([re.sub(r"^an? ", "", names[g]) for g in shuffled])
        elif style == "partial":
            one = shuffled[0]
            text = names[one] if rng.random() < 0.5 else language.noun_phrase(replace(one, color=None))
        elif style == "position":
            text = language.listing([f"{names[g]} {language.position_phrase(g)}" for g in groups])
        if rng.random() < (0.06 if popular else 0.55):
            place = language.PLACE_PHRASE[scene.background]
            text = f"{place} : {text}" if rng.random() < 0.15 else f"{text} {place}"
        if rng.random() < TAILS:
            text = f"{text} {rng.choice(_TABLE['tails']).format(self.names.draw(rng))}"
        return re.sub(r"\s*([,:])", r" \1", text.lower()) + (" ." if rng.random() < 0.85 else "")

    def _name(self, group: Group, rng: random.Random) -> str:
        chance = rng.random()
        if chance > RARE:
            return language.noun_phrase(group, size=chance > 1 - SIZES)
        words = f"{rng.choice(_TABLE['second'])} {rng.choice(_TABLE['rare'][CATEGORIES[group.category]])}"
        phrase = language.noun_phrase(group, article=False)
        if group.count == 1:
            return language.with_article(f"{words} {phrase}")
        count, rest = phrase.split(" ", 1)
        return f"{count} {words} {rest}"


@cache
def _any_web() -> _Web:
    return _Web(7)


def web_caption(scene: Scene, rng: random.Random) -> str:
    """A caption in the style of this set, for the pretraining text."""
    return _any_web().caption(replace(scene, id=rng.randrange(1 << 30)), False)


def write_cc3m(root: Path, *, seed: int, lines: int) -> dict[str, int]:
    """Write mini-cc3m: the TSV (caption, URL) and `images/GCC_train_%09d.jpg`, numbered by line from 0.

    A share of the URLs is dead (no image) and a few images are truncated; the counts returned include both.
    """
    web, rng = _Web(seed), random.Random(f"cc3m-crawl-{seed}")
    scenes = [web.scene(k) for k in range(lines)]
    dead = set(rng.sample(range(lines), round(DEAD_SHARE * lines)))
    alive = [k for k in range(lines) if k not in dead]
    broken = rng.sample(alive, min(BROKEN, len(alive) // 8))
    hosts = ("photos.example.com", "img.example.net", "www.example.org/gallery", "stock.example.com/web")
    rows = [f"{web.caption(*s)}\thttp://{rng.choice(hosts)}/{rng.randrange(16**10):010x}.jpg" for s in scenes]
    atomic_write(root / TSV, "\n".join(rows) + "\n")
    paths = {k: root / "images" / f"GCC_train_{k:09d}.jpg" for k in alive}
    (root / "images").mkdir(exist_ok=True)
    coco.render([(scenes[k][0], paths[k]) for k in alive], "drawing mini-cc3m")
    for k in broken:
        content = paths[k].read_bytes()
        paths[k].write_bytes(content[: len(content) * 2 // 5])
    return {"captions": lines, "images": len(alive), "dead_urls": len(dead), "broken_images": len(broken)}


__all__ = ["TSV", "web_caption", "write_cc3m"]
