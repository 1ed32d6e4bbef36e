"""Backgrounds: eight empty places in muted colors; `backgrounds.yaml` has their display lists."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from companion.miniature.display_list import RGB, DisplayList, Point, bezier, load_table, mix, rgb
from llava_core.registry import unknown
from llava_core.runtime import ConfigError

_TABLE = load_table("backgrounds")
BACKGROUNDS: tuple[str, ...] = tuple(_TABLE)
# fraction of the height where the sky (or the wall) ends
HORIZON: dict[str, float] = {name: entry["horizon"] for name, entry in _TABLE.items()}
WALLS: tuple[RGB, ...] = ((190, 176, 168), (172, 178, 184), (200, 190, 170), (176, 170, 178))


def _gradient(size: int, sky: Sequence[str], ground: Sequence[str], horizon: float) -> Image.Image:
    edge = round(size * horizon)
    top, bottom, far, near = map(rgb, (*sky, *ground))
    rows = np.concatenate([np.linspace(top, bottom, edge), np.linspace(far, near, size - edge)])
    return Image.fromarray(np.broadcast_to(rows[:, None, :], (size, size, 3)).astype(np.uint8))


class Backdrop(DisplayList):
    """Background shapes without outlines, in unit coordinates of the image."""

    def __init__(self, image: Image.Image, rng: random.Random, colors: dict[str, RGB]) -> None:
        super().__init__(rng, colors)
        self.size, self.draw = image.width, ImageDraw.Draw(image)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.size, y * self.size) for x, y in points]

    def poly(self, fill: RGB, points: Sequence[Point]) -> None:
        self.draw.polygon(self._pixels(points), fill=fill)

    def rect(self, fill: RGB, points: Sequence[Point]) -> None:
        (x1, y1), (x2, y2) = points
        self.poly(fill, [(x1, y1), (x2, y1), (x2, y2), (x1, y2)])

    def oval(self, fill: RGB, points: Sequence[Point]) -> None:
        """An ellipse by its center and its radii."""
        ((x, y), (rx, ry)), s = points, self.size
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def line(self, fill: RGB, points: Sequence[Point], width: float) -> None:
        self.draw.line(self._pixels(points), fill=fill, width=round(width * self.size))

    def curve(self, fill: RGB, points: Sequence[Point], width: float) -> None:
        self.line(fill, bezier(points), width)

    def hills(self, fill: RGB, points: Sequence[Point], base: float, height: float, waves: float, foot: float) -> None:
        """A rolling silhouette around y = base, filled down to y = foot."""
        phase, second = self.rng.uniform(0, 6.28), self.rng.uniform(0, 6.28)
        top = []
        for k in range(33):
            x = k / 32
            y = math.sin(waves * 6.28 * x + phase) + 0.5 * math.sin(2.3 * waves * 6.28 * x + second)
            top.append((x, base - height * (0.5 + y / 3)))
        self.poly(fill, [(0, foot), *top, (1, foot)])

    def peaks(self, fill: RGB, points: Sequence[Point], base: float, height: float, count: float) -> None:
        """Mountains with tops in the color `snow`, their feet on y = base."""
        for k in range(int(count)):
            x, tall = (k + self.rng.uniform(0.2, 0.8)) / count, height * self.rng.uniform(0.6, 1)
            half, c = 0.75 / count, 0.3
            self.poly(fill, [(x - half, base), (x, base - tall), (x + half, base)])
            shaded = mix(fill, (60, 66, 92), 0.14)
            self.poly(shaded, [(x, base - tall), (x + half, base), (x + half * 0.2, base)])
            cap = [(x - half * c, base - tall * (1 - c)), (x, base - tall), (x + half * c, base - tall * (1 - c))]
            jag = [(x + half * 0.1, base - tall * 0.77), (x - half * 0.08, base - tall * 0.66)]
            self.poly(self.colors["snow"], [*cap, *jag])

    def clouds(self, fill: RGB, points: Sequence[Point], count: float, top: float = 0.06, bottom: float = 0.24) -> None:
        for _ in range(int(count)):
            x, y, r = self.rng.uniform(0.05, 0.95), self.rng.uniform(top, bottom), self.rng.uniform(0.03, 0.05)
            for dx, dy, scale in ((-1.5, 0.25, 0.7), (0, -0.1, 1.1), (1.5, 0.25, 0.8)):
                self.oval(fill, [(x + dx * r, y + dy * r), (r * 1.3 * scale, r * 0.75 * scale)])
            self.oval(fill, [(x, y + 0.45 * r), (2.6 * r, 0.4 * r)])

    def buildings(self, fill: RGB, points: Sequence[Point]) -> None:
        """A row of houses with windows; `fill` darkens the eaves, the point is the left end of the row's foot."""
        ((_, foot),) = points
        x = -self.rng.uniform(0, 0.1)
        while x < 1:
            wide, top = self.rng.uniform(0.15, 0.25), self.rng.uniform(0.16, 0.36)
            wall = self.rng.choice(WALLS)
            self.rect(wall, [(x, top), (x + wide, foot)])
            self.rect(mix(wall, fill, 0.25), [(x, top), (x + wide, top + 0.018)])
            columns = max(int(wide / 0.055), 2)
            for i in range(columns):
                for j in range(int((0.56 - top) / 0.075)):
                    wx, wy = x + wide * (i + 0.28) / columns, top + 0.04 + 0.075 * j
                    window = [(wx, wy), (wx + wide * 0.44 / columns, wy + 0.042)]
                    self.rect(mix(wall, (214, 228, 236), 0.6), window)
            x += wide

    def picture(self, fill: RGB, points: Sequence[Point]) -> None:
        """A framed picture on the emptier side of a window; the point is the left edge of the window."""
        ((window, y),) = points
        x = window + 0.46 if window < 0.35 else window - 0.24
        self.rect(fill, [(x, y), (x + 0.14, 0.3)])
        self.rect((222, 220, 208), [(x + 0.015, 0.175), (x + 0.125, 0.285)])
        self.poly((150, 170, 176), [(x + 0.015, 0.285), (x + 0.06, 0.21), (x + 0.1, 0.285)])

    def planks(self, fill: RGB, points: Sequence[Point]) -> None:
        """The joints of a wooden floor from the point down."""
        ((left, top),) = points
        for k in range(6):
            y = top + 0.355 * (k / 6) ** 1.3
            self.line(fill, [(left, y), (1, y)], 0.005)
            offset = self.rng.random()
            for j in range(3):
                x = (offset + j / 3) % 1
                self.line(fill, [(x, y), (x, y + 0.04 + 0.01 * k)], 0.005)


def draw_background(name: str, size: int, rng: random.Random) -> Image.Image:
    """Draw an empty place in muted colors, RGB (size, size), so that the objects in front of it contrast with it.

    Raises:
        ConfigError: there is no such background; the message lists all.
    """
    if name not in _TABLE:
        raise ConfigError(unknown("background of the miniature", name, _TABLE))
    entry = _TABLE[name]
    image = _gradient(2 * size, entry["sky"], entry["ground"], entry["horizon"])
    colors = {"snow": rgb(entry["snow"])} if "snow" in entry else {}
    Backdrop(image, rng, colors).run(entry["draw"])
    image = image.reduce(2)
    coarse = np.random.default_rng(rng.getrandbits(32)).integers(120, 137, (24, 24), dtype=np.uint8)
    grain = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR)).astype(np.int16) - 128
    return Image.fromarray(np.clip(np.asarray(image) + grain[..., None] // 2, 0, 255).astype(np.uint8))
