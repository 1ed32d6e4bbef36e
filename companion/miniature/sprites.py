"""Object sprites: 24 categories in 8 colors, flat illustrations with shading; `sprites.yaml` has their display lists.

Each sprite is drawn at two or four times its size, reduced, shaded and pasted: its edges are smooth and its pixels end
at the box.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from companion.miniature.display_list import RGB, DisplayList, Point, bezier, load_table, mix, smooth
from llava_core.registry import unknown
from llava_core.runtime import ConfigError

_TABLE = load_table("sprites")
_CATEGORIES = _TABLE["categories"]
CATEGORIES: dict[str, str] = {name: entry["supercategory"] for name, entry in _CATEGORIES.items()}
ASPECT: dict[str, float] = {name: entry["aspect"] for name, entry in _CATEGORIES.items()}  # width over height
ZONE: dict[str, str] = {name: entry["zone"] for name, entry in _CATEGORIES.items()}  # sky or ground
COLORS: dict[str, RGB] = {name: tuple(value) for name, value in _TABLE["colors"].items()}
MATERIALS: dict[str, RGB] = {name: tuple(value) for name, value in _TABLE["materials"].items()}
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
# an outline as dark as the others would turn small yellow objects orange
OUTLINES = {"white": (132, 136, 148), "black": (8, 8, 12), "yellow": (176, 144, 26)}


class Sprite(DisplayList):
    """One object on its own layer, in unit coordinates; lengths are fractions of the shorter side.

    The fills `base`, `light`, `dark` and `edge` share the hue of the object's color.
    """

    def __init__(self, width: int, height: int, color: str, rng: random.Random) -> None:
        shade = rng.uniform(-0.05, 0.06)
        base = mix(COLORS[color], WHITE if shade > 0 else BLACK, abs(shade))
        edge = OUTLINES.get(color) or mix(base, BLACK, 0.5)
        mark = (120, 124, 136) if color == "white" else MATERIALS["white"]
        fills = {
            "base": base,
            "edge": edge,
            "dark": mix(base, edge, 0.24),
            "light": mix(base, WHITE, 0.24 if color == "black" else 0.4),
            "mark": mark,
            "pollen": (150, 92, 40) if color in ("yellow", "orange") else (252, 208, 70),
            "dial": mix(base, WHITE, 0.12 if color == "black" else 0.6),
            "hand": mark if color == "black" else MATERIALS["ink"],
        }
        super().__init__(rng, MATERIALS | fills)
        self.edge = edge
        self.scale = 2 if max(width, height) > 72 else 4
        self.stroke = max(0.75, 0.022 * min(width, height)) * self.scale
        size = (width * self.scale, height * self.scale)
        # transparent in the outline's hue, so that reducing the layer leaves no fringe of another color
        self.layer = Image.new("RGBA", size, (*edge, 0))
        self.draw = ImageDraw.Draw(self.layer)
        self.origin = self.stroke / 2
        self.extent = (size[0] - 1 - self.stroke, size[1] - 1 - self.stroke)

    def at(self, point: Point) -> Point:
        return self.origin + point[0] * self.extent[0], self.origin + point[1] * self.extent[1]

    def length(self, fraction: float) -> float:
        return fraction * min(self.extent)

    def _frame(self, corners: Sequence[Point], line: bool) -> tuple[float, float, float, float]:
        """Pixel box of two corners, half an outline larger where there is one."""
        half = self.stroke / 2 if line else 0.0
        (left, top), (right, bottom) = map(self.at, corners)
        return left - half, top - half, right + half, bottom + half

    def poly(self, fill: RGB, points: Sequence[Point], line: bool = True) -> None:
        corners = [self.at(p) for p in points]
        self.draw.polygon(corners, fill=fill)
        if line:
            self.draw.line([*corners, *corners[:2]], fill=self.edge, width=round(self.stroke), joint="curve")

    def blob(self, fill: RGB, points: Sequence[Point], line: bool = True) -> None:
        self.poly(fill, smooth(points), line)

    def oval(self, fill: RGB, points: Sequence[Point], line: bool = True) -> None:
        outline = self.edge if line else None
        self.draw.ellipse(self._frame(points, line), fill=fill, outline=outline, width=round(self.stroke))

    def disc(self, fill: RGB, points: Sequence[Point], radius: float, line: bool = True) -> None:
        ((x, y),) = points
        rx, ry = self.length(radius) / self.extent[0], self.length(radius) / self.extent[1]
        self.oval(fill, [(x - rx, y - ry), (x + rx, y + ry)], line)

    def rect(self, fill: RGB, points: Sequence[Point], radius: float = 0.0, line: bool = True) -> None:
        box, outline = self._frame(points, line), self.edge if line else None
        self.draw.rounded_rectangle(box, self.length(radius), fill=fill, outline=outline, width=round(self.stroke))

    def line(self, fill: RGB, points: Sequence[Point], width: float, line: bool = True) -> None:
        """A bar with round ends."""
        corners, wide = [self.at(p) for p in points], max(self.length(width), 1.0)
        for color, thick in ((self.edge, wide + 2 * self.stroke), (fill, wide)) if line else ((fill, wide),):
            self.draw.line(corners, fill=color, width=round(thick), joint="curve")
            for x, y in (corners[0], corners[-1]):
                r = thick / 2
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def curve(self, fill: RGB, points: Sequence[Point], width: float, line: bool = True) -> None:
        self.line(fill, bezier(points), width, line)

    def ring(self, fill: RGB, points: Sequence[Point], radius: float, width: float) -> None:
        """A ring with an outline on both sides; the radius is that of its outer side."""
        (cx, cy), r, wide = self.at(points[0]), self.length(radius), self.length(width)
        half = self.stroke / 2
        for color, outer, thick in ((self.edge, r + half, wide + self.stroke), (fill, r - half, wide - self.stroke)):
            box = (cx - outer, cy - outer, cx + outer, cy + outer)
            self.draw.ellipse(box, outline=color, width=max(round(thick), 1))

    def eye(self, fill: RGB, points: Sequence[Point], radius: float = 0.035) -> None:
        self.disc(fill, points, radius * 1.5, line=False)
        self.disc(self.colors["ink"], points, radius, line=False)

    def wheel(self, fill: RGB, points: Sequence[Point], radius: float) -> None:
        self.disc(fill, points, radius)
        self.disc(self.colors["metal"], points, radius * 0.5, line=False)
        self.disc(fill, points, radius * 0.2, line=False)

    def petals(self, fill: RGB, points: Sequence[Point], turn: float) -> None:
        """Six petals around a point, the first at `turn` degrees; every other one has a highlight."""
        ((cx, cy),) = points
        rx, ry = 0.3, 0.3 * self.extent[0] / self.extent[1]
        for k in range(6):
            angle = math.radians(turn + 60 * k)
            x, y = cx + rx * math.cos(angle), cy + ry * math.sin(angle)
            self.disc(fill, [(x, y)], 0.2)
            self.disc(self.colors["light"] if k % 2 else fill, [(x - 0.03, y - 0.02)], 0.09, line=False)

    def hands(self, fill: RGB, points: Sequence[Point]) -> None:
        """Hour marks and the two hands of a clock, at random hours."""
        ((x, y),) = points
        ratio = self.extent[0] / self.extent[1]

        def on_dial(hour: int, reach: float) -> Point:
            angle = hour * math.pi / 6
            return x + reach * math.sin(angle), y + reach * (-math.cos(angle) * ratio)

        for hour in range(12):
            self.disc(fill, [on_dial(hour, 0.29)], 0.03 if hour % 3 == 0 else 0.014, line=False)
        for reach, hour in ((0.24, self.rng.randrange(12)), (0.16, self.rng.randrange(12))):
            self.line(fill, [(x, y), on_dial(hour, reach)], 0.045, line=False)

    def canopy(self, fill: RGB, points: Sequence[Point]) -> None:
        """An umbrella's canopy: a half ellipse over four scallops; the point is the middle of its rim."""
        ((x, y),) = points
        dome = [(math.cos(a) * 0.5 + x, y - 0.52 * math.sin(a)) for a in (math.pi * k / 16 for k in range(17))]
        scallops = [(k / 16, y - 0.055 * abs(math.sin(k / 16 * 4 * math.pi))) for k in range(17)]
        self.poly(fill, [*dome, *scallops])

    def finish(self, flip: bool) -> Image.Image:
        """The layer at its final size, mirrored if asked, lighter at the top and darker at the bottom."""
        layer = self.layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else self.layer
        pixels = np.asarray(layer.reduce(self.scale)).astype(np.float32)
        height, width = pixels.shape[:2]
        light = np.linspace(1.07, 0.91, height, dtype=np.float32)[:, None]
        light = light + np.linspace(0.03, -0.03, width, dtype=np.float32)
        pixels[..., :3] = np.clip(pixels[..., :3] * light[..., None], 0, 255)
        return Image.fromarray(pixels.astype(np.uint8))


def draw_object(
    canvas: Image.Image,
    category: str,
    color: str,
    box: tuple[float, float, float, float],
    rng: random.Random,
    flip: bool = False,
) -> None:
    """Draw one object onto the RGB canvas, filling its box; an object on the ground casts a soft shadow.

    `box` is (x1, y1, x2, y2) in pixels; parts outside the canvas are cut off. `flip`: face left instead of right.

    Raises:
        ConfigError: there is no such category or color; the message lists all.
    """
    if category not in CATEGORIES:
        raise ConfigError(unknown("category of the miniature", category, CATEGORIES))
    if color not in COLORS:
        raise ConfigError(unknown("color of the miniature", color, COLORS))
    x1, y1, x2, y2 = (round(v) for v in box)
    width, height = max(x2 - x1, 4), max(y2 - y1, 4)
    sprite = Sprite(width, height, color, rng)
    sprite.run(_CATEGORIES[category]["draw"])
    if ZONE[category] == "ground":
        _shadow(canvas, x1, y2, width, height)
    layer = sprite.finish(flip)
    canvas.paste(layer, (x1, y1), layer)


def _shadow(canvas: Image.Image, x1: int, bottom: int, width: int, height: int) -> None:
    """Blend a soft dark ellipse below an object whose lower edge is y = bottom."""
    depth = max(round(0.16 * min(width, height)), 3)
    soft = max(depth // 3, 1)
    mask = Image.new("L", (width + 4 * soft, depth + 4 * soft))
    ImageDraw.Draw(mask).ellipse((2 * soft, 2 * soft, width + 2 * soft, depth + 2 * soft), fill=84)
    mask = mask.filter(ImageFilter.BoxBlur(soft))
    canvas.paste((24, 24, 40), (x1 - 2 * soft, bottom - round(0.6 * depth) - 2 * soft), mask)
