"""The drawings of the miniature: 24 things in 8 colors and 8 places, as flat illustrations with light and shade.

Every object is drawn on its own small layer at twice the size or more, in unit coordinates of its box (x right, y down,
facing right), then reduced, lit from above and pasted: its edges are smooth and its pixels end where the box ends.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from llava_core.registry import Registry, unknown
from llava_core.runtime import ConfigError

RGB = tuple[int, int, int]
Point = tuple[float, float]

_GROUPS = {
    "vehicle": "car truck bicycle boat airplane",
    "animal": "dog cat bird horse fish",
    "plant": "tree flower mushroom",
    "building": "house",
    "furniture": "chair table lamp clock",
    "thing": "cup bottle apple ball umbrella kite",
}
CATEGORIES: dict[str, str] = {name: group for group, names in _GROUPS.items() for name in names.split()}
COLORS: dict[str, RGB] = {
    "red": (214, 40, 44),
    "orange": (243, 132, 28),
    "yellow": (250, 214, 48),
    "green": (56, 158, 74),
    "blue": (42, 106, 214),
    "purple": (140, 66, 178),
    "white": (240, 240, 240),
    "black": (40, 40, 46),
}
# width over height of the natural box
ASPECT: dict[str, float] = {
    "car": 1.75, "truck": 1.8, "bicycle": 1.55, "boat": 1.0, "airplane": 1.7,
    "dog": 1.2, "cat": 0.85, "bird": 1.3, "horse": 1.1, "fish": 1.6,
    "tree": 0.75, "flower": 0.62, "mushroom": 0.95, "house": 1.05,
    "chair": 0.62, "table": 1.5, "lamp": 0.6, "clock": 0.86,
    "cup": 1.15, "bottle": 0.4, "apple": 0.92, "ball": 1.0, "umbrella": 1.05, "kite": 0.7,
}  # fmt: skip
PLACE: dict[str, str] = {name: "sky" if name in ("airplane", "bird", "kite") else "ground" for name in CATEGORIES}
BACKGROUNDS: tuple[str, ...] = ("meadow", "beach", "street", "snow", "desert", "room", "lake", "night")
# fraction of the height where the sky (or the wall) ends
HORIZON: dict[str, float] = {
    "meadow": 0.55, "beach": 0.46, "street": 0.6, "snow": 0.55,
    "desert": 0.55, "room": 0.64, "lake": 0.48, "night": 0.6,
}  # fmt: skip

WHITE, DARK, GLASS, TIRE = (248, 248, 246), (34, 32, 38), (188, 222, 240), (58, 58, 66)
METAL, WOOD, LEAF, CREAM, PINK = (164, 168, 178), (134, 94, 64), (92, 140, 84), (244, 232, 208), (238, 168, 168)
BEAK, LIGHT_BULB = (244, 170, 60), (255, 238, 170)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """The color that lies `share` (0 to 1) of the way from a to b."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def path(text: str) -> list[Point]:
    """The points of "x,y x,y ..." in percent of the box, for long outlines."""
    return [(float(x) / 100, float(y) / 100) for x, y in (pair.split(",") for pair in text.split())]


def smooth(points: Sequence[Point], steps: int = 6) -> list[Point]:
    """Closed Catmull-Rom curve through the points, as a polygon of `steps` corners for each of them."""
    n, curve = len(points), []
    for k in range(n):
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = (points[(k + j - 1) % n] for j in range(4))
        for step in range(steps):
            t = step / steps
            wa, wb = -t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3
            wc, wd = t + 4 * t**2 - 3 * t**3, -(t**2) + t**3
            curve.append(((wa * ax + wb * bx + wc * cx + wd * dx) / 2, (wa * ay + wb * by + wc * cy + wd * dy) / 2))
    return curve


def bow(start: Point, pull: Point, end: Point, steps: int = 8) -> list[Point]:
    """Open curve from start to end, drawn towards `pull` (a quadratic Bezier curve)."""
    curve = []
    for k in range(steps + 1):
        t = k / steps
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
        curve.append((a * start[0] + b * pull[0] + c * end[0], a * start[1] + b * pull[1] + c * end[1]))
    return curve


class Pen:
    """Draws outlined shapes in unit coordinates on its own layer; `base`, `light`, `dark` and `edge` share one hue."""

    def __init__(self, width: int, height: int, color: str, rng: random.Random) -> None:
        self.rng, self.color = rng, color
        self.scale = 2 if max(width, height) > 72 else 4
        shade = rng.uniform(-0.05, 0.06)
        self.base = mix(COLORS[color], (255, 255, 255) if shade > 0 else (0, 0, 0), abs(shade))
        # a yellow outline dark as the others would turn small yellow things orange
        outlines = {"white": (132, 136, 148), "black": (8, 8, 12), "yellow": (176, 144, 26)}
        self.edge = outlines.get(color) or mix(self.base, (0, 0, 0), 0.5)
        self.dark = mix(self.base, self.edge, 0.24)
        self.light = mix(self.base, (255, 255, 255), 0.24 if color == "black" else 0.4)
        # small marks on the body: pale, except where the body itself is pale
        self.mark = (120, 124, 136) if color == "white" else WHITE
        size = (width * self.scale, height * self.scale)
        self.stroke = max(0.75, 0.022 * min(width, height)) * self.scale
        # transparent but of the outline's hue, so that reducing the layer leaves no foreign fringe
        self.layer = Image.new("RGBA", size, (*self.edge, 0))
        self.draw = ImageDraw.Draw(self.layer)
        margin = self.stroke / 2
        self.origin = margin
        self.extent = (size[0] - 1 - 2 * margin, size[1] - 1 - 2 * margin)

    def at(self, point: Point) -> Point:
        return self.origin + point[0] * self.extent[0], self.origin + point[1] * self.extent[1]

    def length(self, fraction: float) -> float:
        """Pixels of a fraction of the box's shorter side."""
        return fraction * min(self.extent)

    def poly(self, points: Sequence[Point], fill: RGB, line: bool = True) -> None:
        corners = [self.at(p) for p in points]
        self.draw.polygon(corners, fill=fill)
        if line:
            self.draw.line([*corners, *corners[:2]], fill=self.edge, width=round(self.stroke), joint="curve")

    def blob(self, points: Sequence[Point], fill: RGB, line: bool = True) -> None:
        self.poly(smooth(points), fill, line)

    def oval(self, x1: float, y1: float, x2: float, y2: float, fill: RGB, line: bool = True) -> None:
        half = self.stroke / 2 if line else 0.0
        (left, top), (right, bottom) = self.at((x1, y1)), self.at((x2, y2))
        box = (left - half, top - half, right + half, bottom + half)
        self.draw.ellipse(box, fill=fill, outline=self.edge if line else None, width=round(self.stroke))

    def disc(self, x: float, y: float, radius: float, fill: RGB, line: bool = True) -> None:
        """A circle; the radius is a fraction of the shorter side."""
        rx, ry = self.length(radius) / self.extent[0], self.length(radius) / self.extent[1]
        self.oval(x - rx, y - ry, x + rx, y + ry, fill, line)

    def rect(
        self, x1: float, y1: float, x2: float, y2: float, fill: RGB, radius: float = 0.0, line: bool = True
    ) -> None:
        half = self.stroke / 2 if line else 0.0
        (left, top), (right, bottom) = self.at((x1, y1)), self.at((x2, y2))
        box = (left - half, top - half, right + half, bottom + half)
        outline = self.edge if line else None
        self.draw.rounded_rectangle(box, self.length(radius), fill=fill, outline=outline, width=round(self.stroke))

    def line(self, points: Sequence[Point], fill: RGB, width: float, line: bool = True) -> None:
        """A round-ended bar through the points; the width is a fraction of the shorter side."""
        corners, wide = [self.at(p) for p in points], max(self.length(width), 1.0)
        for color, thick in ((self.edge, wide + 2 * self.stroke), (fill, wide)) if line else ((fill, wide),):
            self.draw.line(corners, fill=color, width=round(thick), joint="curve")
            for x, y in (corners[0], corners[-1]):
                r = thick / 2
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def ring(self, x: float, y: float, radius: float, width: float, fill: RGB) -> None:
        """An outlined ring, empty inside; radius (to its outer edge) and width are fractions of the shorter side."""
        (cx, cy), r, wide = self.at((x, y)), self.length(radius), self.length(width)
        for color, outer, thick in (
            (self.edge, r + self.stroke / 2, wide + self.stroke),
            (fill, r - self.stroke / 2, wide - self.stroke),
        ):
            box = (cx - outer, cy - outer, cx + outer, cy + outer)
            self.draw.ellipse(box, outline=color, width=max(round(thick), 1))

    def eye(self, x: float, y: float, radius: float = 0.035) -> None:
        self.disc(x, y, radius * 1.5, WHITE, line=False)
        self.disc(x, y, radius, DARK, line=False)

    def wheel(self, x: float, y: float, radius: float) -> None:
        self.disc(x, y, radius, TIRE)
        self.disc(x, y, radius * 0.5, METAL, line=False)
        self.disc(x, y, radius * 0.2, TIRE, line=False)

    def finish(self, flip: bool) -> Image.Image:
        """The layer at its final size, mirrored if asked, lighter above and darker below."""
        layer = self.layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else self.layer
        pixels = np.asarray(layer.reduce(self.scale)).astype(np.float32)
        height, width = pixels.shape[:2]
        light = np.linspace(1.07, 0.91, height, dtype=np.float32)[:, None]
        light = light + np.linspace(0.03, -0.03, width, dtype=np.float32)
        pixels[..., :3] = np.clip(pixels[..., :3] * light[..., None], 0, 255)
        return Image.fromarray(pixels.astype(np.uint8))


DRAWINGS: Registry[Callable[[Pen], None]] = Registry("category of the miniature")

# ------------------------------------------------------------------------------------------------ vehicles


@DRAWINGS.register("car")
def _car(p: Pen) -> None:
    roof = p.rng.uniform(0.3, 0.36)
    p.blob([(0.14, 0.5), (0.2, 0.3), (roof, 0.02), (0.5, 0), (0.66, 0.03), (0.8, 0.36), (0.86, 0.5)], p.base)
    p.poly([(0.26, 0.4), (roof + 0.03, 0.11), (0.47, 0.1), (0.47, 0.4)], GLASS)
    p.poly([(0.53, 0.4), (0.53, 0.1), (0.64, 0.12), (0.74, 0.4)], GLASS)
    p.rect(0, 0.4, 1, 0.84, p.base, 0.2)
    p.rect(0.03, 0.7, 0.97, 0.81, p.dark, 0.05, line=False)
    p.rect(0.05, 0.44, 0.93, 0.5, p.light, 0.03, line=False)
    p.line([(0.5, 0.44), (0.5, 0.78)], p.edge, 0.02, line=False)
    p.oval(0.93, 0.48, 0.99, 0.62, LIGHT_BULB)
    for x in (0.22, 0.78):
        p.wheel(x, 0.81, 0.19)


@DRAWINGS.register("truck")
def _truck(p: Pen) -> None:
    p.rect(0.05, 0.72, 0.95, 0.84, TIRE)
    p.rect(0, 0, 0.64, 0.78, p.base, 0.04)
    p.rect(0.02, 0.03, 0.62, 0.1, p.light, 0.02, line=False)
    p.rect(0.02, 0.66, 0.62, 0.75, p.dark, line=False)
    for x in (0.16, 0.32, 0.48):
        p.line([(x, 0.16), (x, 0.62)], p.dark, 0.03, line=False)
    p.poly([(0.68, 0.8), (0.68, 0.22), (0.86, 0.22), (0.96, 0.5), (1, 0.56), (1, 0.8)], p.base)
    p.poly([(0.75, 0.48), (0.75, 0.3), (0.85, 0.3), (0.91, 0.48)], GLASS)
    p.rect(0.95, 0.6, 1, 0.68, LIGHT_BULB)
    for x in (0.14, 0.36, 0.83):
        p.wheel(x, 0.83, 0.17)


@DRAWINGS.register("bicycle")
def _bicycle(p: Pen) -> None:
    back, front, crank, seat, head = (0.22, 0.66), (0.78, 0.66), (0.46, 0.68), (0.36, 0.26), (0.66, 0.24)
    for x, y in (back, front):
        for angle in range(0, 180, 45):
            dx, dy = 0.2 * math.cos(math.radians(angle)), 0.3 * math.sin(math.radians(angle))
            p.line([(x - dx, y - dy), (x + dx, y + dy)], METAL, 0.012, line=False)
        p.ring(x, y, 0.34, 0.12, p.base)
    for color, width in ((p.edge, 0.13), (p.base, 0.075)):
        for bar in ([back, crank], [back, seat], [seat, crank], [crank, head], [seat, head], [head, front]):
            p.line(bar, color, width, line=False)
    p.line([seat, (0.345, 0.13)], TIRE, 0.05, line=False)
    p.line([(0.28, 0.12), (0.42, 0.1)], TIRE, 0.1, line=False)
    p.line([head, (0.63, 0.05), (0.72, 0.03), (0.75, 0.1)], TIRE, 0.07, line=False)
    p.disc(*crank, 0.07, METAL)


@DRAWINGS.register("boat")
def _boat(p: Pen) -> None:
    tip = p.rng.uniform(0.44, 0.5)
    p.line([(tip, 0.02), (tip, 0.74)], WOOD, 0.025)
    p.blob(
        [(tip - 0.05, 0.62), (tip - 0.05, 0.35), (tip - 0.04, 0.06), (0.2, 0.38), (0.06, 0.62), (0.24, 0.64)], p.base
    )
    p.blob(
        [(tip + 0.06, 0.64), (tip + 0.05, 0.35), (tip + 0.06, 0.08), (0.78, 0.36), (0.94, 0.62), (0.7, 0.66)], p.light
    )
    p.poly([(0, 0.72), (1, 0.72), (0.94, 0.84), (0.82, 1), (0.2, 1), (0.06, 0.86)], p.base)
    p.poly([(0.05, 0.84), (0.95, 0.84), (0.82, 0.985), (0.2, 0.985)], p.dark, line=False)
    p.poly([(0.03, 0.77), (0.96, 0.77), (0.94, 0.82), (0.05, 0.82)], p.mark, line=False)


@DRAWINGS.register("airplane")
def _airplane(p: Pen) -> None:
    p.poly([(0.5, 0.44), (0.34, 0.12), (0.44, 0.12), (0.68, 0.44)], p.dark)
    p.poly([(0.05, 0.48), (0, 0), (0.12, 0), (0.28, 0.4)], p.base)
    p.blob([(0, 0.44), (0.3, 0.36), (0.7, 0.36), (0.92, 0.44), (1, 0.58), (0.9, 0.67), (0.5, 0.7), (0.2, 0.64)], p.base)
    p.blob([(0.12, 0.46), (0.4, 0.4), (0.75, 0.41), (0.6, 0.45), (0.3, 0.47)], p.light, line=False)
    p.poly([(0.83, 0.43), (0.91, 0.46), (0.95, 0.53), (0.84, 0.52)], GLASS)
    for k in range(5):
        p.disc(0.3 + 0.1 * k, 0.52, 0.034, GLASS)
    p.poly([(0.44, 0.6), (0.66, 0.6), (0.36, 1), (0.24, 1)], p.base)
    p.poly([(0.45, 0.63), (0.53, 0.63), (0.31, 0.95), (0.27, 0.96)], p.light, line=False)
    p.poly([(0.06, 0.5), (0.2, 0.5), (0.06, 0.68), (0, 0.68)], p.dark)


# ------------------------------------------------------------------------------------------------ animals


def _legs(p: Pen, xs: Sequence[float], top: float, width: float, hoof: RGB | None = None) -> None:
    """Four legs, the two far ones darker; the far ones come first in `xs`."""
    for k, x in enumerate(xs):
        p.rect(x, top, x + width, 1, p.dark if k < 2 else p.base, 0.03)
        if hoof:
            p.rect(x, 0.94, x + width, 1, hoof, 0.02)


@DRAWINGS.register("dog")
def _dog(p: Pen) -> None:
    wag = p.rng.uniform(0, 0.08)
    p.line([(0.14, 0.5), (0.05, 0.36), (0.045 + wag, 0.17)], p.base, 0.08)
    _legs(p, (0.22, 0.6, 0.11, 0.52), 0.62, 0.1)
    p.blob(path("8,60 12,43 35,42 60,36 70,50 66,74 40,76 14,78"), p.base)
    p.blob([(0.16, 0.5), (0.36, 0.465), (0.56, 0.45), (0.4, 0.54), (0.2, 0.58)], p.light, line=False)
    p.blob(path("54,14 70,0 84,10 98,24 100,34 88,42 72,46 56,38"), p.base)
    p.blob([(0.58, 0.06), (0.67, 0.1), (0.68, 0.3), (0.62, 0.46), (0.53, 0.42), (0.52, 0.2)], p.dark)
    p.oval(0.94, 0.2, 1, 0.29, DARK, line=False)
    p.line([(0.86, 0.36), (0.95, 0.35)], p.edge, 0.02, line=False)
    p.eye(0.79, 0.17)


@DRAWINGS.register("cat")
def _cat(p: Pen) -> None:
    tilt = p.rng.uniform(-0.03, 0.03)
    p.line([(0.7, 0.93), (0.9, 0.9), (0.94, 0.72), (0.88, 0.56)], p.dark, 0.1)
    p.blob([(0.3, 0.45), (0.6, 0.45), (0.78, 0.75), (0.74, 0.98), (0.45, 1), (0.14, 0.98), (0.12, 0.75)], p.base)
    p.blob([(0.36, 0.55), (0.54, 0.55), (0.56, 0.75), (0.45, 0.82), (0.34, 0.75)], p.light, line=False)
    for x in (0.3, 0.48):
        p.rect(x, 0.76, x + 0.14, 1, p.base, 0.07)
    for side in (-1, 1):
        p.poly([(0.45 + side * 0.4, 0), (0.45 + side * 0.44, 0.26), (0.45 + side * 0.12, 0.12)], p.base)
        p.poly([(0.45 + side * 0.35, 0.06), (0.45 + side * 0.37, 0.18), (0.45 + side * 0.2, 0.12)], PINK, line=False)
    p.oval(0, 0.09, 0.9, 0.54, p.base)
    p.oval(0.12, 0.12, 0.6, 0.22, p.light, line=False)
    for side in (-1, 1):
        p.oval(0.41 + side * 0.2 + tilt, 0.24, 0.49 + side * 0.2 + tilt, 0.36, (212, 232, 130))
        p.oval(0.435 + side * 0.2 + tilt, 0.25, 0.465 + side * 0.2 + tilt, 0.35, DARK, line=False)
        for y in (0.39, 0.44):
            p.line([(0.45 + side * 0.14, 0.41), (0.45 + side * 0.4, y)], p.mark, 0.014, line=False)
    p.poly([(0.4, 0.37), (0.5, 0.37), (0.45, 0.41)], PINK)
    for side in (-1, 1):
        p.line(bow((0.45, 0.42), (0.45 + side * 0.04, 0.49), (0.45 + side * 0.1, 0.44)), p.edge, 0.022, line=False)


@DRAWINGS.register("bird")
def _bird(p: Pen) -> None:
    lift = p.rng.uniform(0, 0.05)
    p.blob([(0.5, 0.6), (0.5, 0.34), (0.62, 0.08 + lift), (0.72, 0.3), (0.72, 0.56)], p.dark)
    p.poly([(0.24, 0.6), (0, 0.66), (0.05, 0.76), (0.02, 0.88), (0.3, 0.82)], p.dark)
    p.poly([(0.86, 0.5), (1, 0.58), (0.86, 0.64)], BEAK)
    p.blob(path("18,64 44,52 66,50 78,40 90,48 88,66 70,92 45,100 25,86"), p.base)
    p.blob([(0.45, 0.86), (0.62, 0.84), (0.78, 0.7), (0.7, 0.86), (0.52, 0.95)], p.light, line=False)
    p.blob([(0.3, 0.66), (0.16, 0.34), (0.18, 0), (0.36, 0.14), (0.52, 0.36), (0.6, 0.66), (0.46, 0.76)], p.base)
    for k in range(3):
        p.line([(0.24 + 0.09 * k, 0.22 + 0.1 * k), (0.38 + 0.05 * k, 0.6)], p.dark, 0.03, line=False)
    p.eye(0.8, 0.53, 0.04)


@DRAWINGS.register("horse")
def _horse(p: Pen) -> None:
    p.blob([(0.12, 0.36), (0.03, 0.42), (0, 0.62), (0.05, 0.8), (0.1, 0.62), (0.17, 0.46)], p.dark)
    _legs(p, (0.24, 0.57, 0.12, 0.65), 0.5, 0.08, TIRE)
    p.blob(path("8,45 15,33 38,36 60,33 75,42 74,56 55,59 32,57 14,60"), p.base)
    p.blob(path("55,44 62,24 66,8 74,3 84,10 100,27 98,36 89,36 80,26 78,38 75,50 66,56"), p.base)
    p.poly(path("75,3 66,0 60,8 61,12 54,17 56,22 49,28 52,33 46,39 58,42 66,24 71,10"), p.dark)
    p.poly([(0.71, 0.07), (0.745, 0), (0.79, 0.07)], p.base)
    p.blob([(0.18, 0.4), (0.34, 0.41), (0.5, 0.41), (0.36, 0.46), (0.2, 0.47)], p.light, line=False)
    p.eye(0.83, 0.15, 0.026)
    p.disc(0.965, 0.3, 0.016, DARK, line=False)


@DRAWINGS.register("fish")
def _fish(p: Pen) -> None:
    p.poly([(0.3, 0.3), (0.46, 0), (0.72, 0.12), (0.7, 0.3)], p.dark)
    p.poly([(0.5, 0.72), (0.4, 1), (0.62, 0.92), (0.68, 0.75)], p.dark)
    p.blob([(0.26, 0.5), (0.12, 0.34), (0, 0.14), (0.06, 0.5), (0, 0.88), (0.12, 0.68)], p.dark)
    p.blob(path("18,50 40,20 70,13 92,34 100,53 92,70 70,88 40,80"), p.base)
    p.blob([(0.36, 0.36), (0.62, 0.22), (0.84, 0.34), (0.62, 0.32)], p.light, line=False)
    for x in (0.34, 0.48, 0.62):
        p.line([(x, 0.4), (x + 0.035, 0.52), (x, 0.64)], p.edge, 0.03, line=False)
    p.eye(0.84, 0.42, 0.06)
    p.line([(0.93, 0.64), (0.86, 0.62)], p.edge, 0.03, line=False)


# ------------------------------------------------------------------------------------------------ plants and houses


@DRAWINGS.register("tree")
def _tree(p: Pen) -> None:
    p.poly([(0.42, 0.6), (0.58, 0.6), (0.6, 0.92), (0.68, 1), (0.32, 1), (0.4, 0.92)], WOOD)
    crown = [(0.5, 0.195, 0.26), (0.22, 0.36, 0.22), (0.78, 0.36, 0.22), (0.31, 0.55, 0.2), (0.69, 0.55, 0.2)]
    tufts = [(x, y + p.rng.uniform(0, 0.02), r) for x, y, r in crown]
    for x, y, r in tufts:
        p.disc(x, y, r, p.base)
    p.blob(path("30,25 70,25 80,45 65,62 50,66 35,62 20,45"), p.base)
    for k, (x, y, r) in enumerate(tufts):
        p.disc(x, y, r - 0.012, p.dark if k > 2 else p.base, line=False)
    p.blob(path("25,25 75,25 82,42 68,56 50,58 32,56 18,42"), p.base, line=False)
    for x, y, r in tufts:
        p.line(bow((x - r * 0.6, y), (x - r * 0.4, y - r * 0.6), (x + r * 0.1, y - r * 0.5)), p.light, 0.07, line=False)


@DRAWINGS.register("flower")
def _flower(p: Pen) -> None:
    turn = p.rng.uniform(0, 60)
    p.line([(0.5, 0.4), (0.48, 0.7), (0.5, 0.97)], LEAF, 0.07)
    p.blob([(0.5, 0.92), (0.68, 0.72), (0.94, 0.7), (0.8, 0.88)], LEAF)
    p.blob([(0.5, 0.98), (0.3, 0.8), (0.06, 0.8), (0.22, 0.96)], LEAF)
    spots = [math.radians(turn + 60 * k) for k in range(6)]
    rx, ry = 0.3, 0.3 * p.extent[0] / p.extent[1]
    for k, angle in enumerate(spots):
        x, y = 0.5 + rx * math.cos(angle), 0.31 + ry * math.sin(angle)
        p.disc(x, y, 0.2, p.base)
        p.disc(x - 0.03, y - 0.02, 0.09, p.light if k % 2 else p.base, line=False)
    p.disc(0.5, 0.31, 0.17, (150, 92, 40) if p.color in ("yellow", "orange") else (252, 208, 70))


@DRAWINGS.register("mushroom")
def _mushroom(p: Pen) -> None:
    p.blob([(0.34, 0.5), (0.36, 0.75), (0.28, 0.98), (0.5, 1), (0.72, 0.98), (0.64, 0.75), (0.66, 0.5)], CREAM)
    p.blob(path("0,50 10,22 34,2 66,2 90,22 100,50 78,62 50,65 22,62"), p.base)
    p.blob(path("5,52 30,55 70,55 95,52 76,60 50,63 24,60"), p.dark, line=False)
    for x, y, r in ((0.5, 0.2, 0.1), (0.23, 0.36, 0.075), (0.76, 0.37, 0.085)):
        p.disc(x + p.rng.uniform(-0.03, 0.03), y, r, p.mark, line=False)


@DRAWINGS.register("house")
def _house(p: Pen) -> None:
    roof = (98, 92, 104)
    p.rect(0.7, 0.04, 0.82, 0.3, (150, 110, 96))
    p.rect(0.06, 0.3, 0.94, 1, p.base)
    p.rect(0.08, 0.34, 0.92, 0.42, p.dark, line=False)
    p.rect(0.08, 0.94, 0.92, 0.985, p.dark, line=False)
    p.poly([(0, 0.37), (0.25, 0), (0.75, 0), (1, 0.37)], roof)
    p.poly([(0.06, 0.33), (0.27, 0.03), (0.36, 0.03), (0.18, 0.33)], mix(roof, WHITE, 0.25), line=False)
    for x in (0.14, 0.65):
        p.rect(x, 0.5, x + 0.21, 0.72, GLASS)
        p.line([(x + 0.105, 0.5), (x + 0.105, 0.72)], p.mark, 0.02, line=False)
        p.line([(x, 0.61), (x + 0.21, 0.61)], p.mark, 0.02, line=False)
    p.rect(0.42, 0.62, 0.58, 1, WOOD, 0.03)
    p.disc(0.55, 0.82, 0.015, LIGHT_BULB, line=False)


# ------------------------------------------------------------------------------------------------ furniture


@DRAWINGS.register("chair")
def _chair(p: Pen) -> None:
    for x in (0.2, 0.86):
        p.rect(x, 0.55, x + 0.09, 0.9, p.dark, 0.02)
    p.rect(0.14, 0, 0.96, 0.5, p.base, 0.1)
    p.rect(0.26, 0.08, 0.84, 0.42, p.dark, 0.06, line=False)
    for x in (0.38, 0.58):
        p.rect(x, 0.07, x + 0.1, 0.44, p.light, 0.02, line=False)
    p.poly([(0.14, 0.48), (0.98, 0.48), (0.86, 0.64), (0, 0.64)], p.light)
    p.poly([(0, 0.64), (0.86, 0.64), (0.86, 0.72), (0, 0.72)], p.base)
    p.poly([(0.86, 0.64), (0.98, 0.48), (0.98, 0.55), (0.86, 0.72)], p.dark)
    for x in (0, 0.75):
        p.rect(x, 0.72, x + 0.11, 1, p.base, 0.02)


@DRAWINGS.register("table")
def _table(p: Pen) -> None:
    for x in (0.17, 0.74):
        p.rect(x, 0.3, x + 0.08, 0.84, p.dark)
    for x in (0.05, 0.85):
        p.rect(x, 0.4, x + 0.1, 1, p.base)
    p.rect(0.05, 0.38, 0.95, 0.54, p.dark)
    p.poly([(0.16, 0), (0.84, 0), (1, 0.3), (0, 0.3)], p.base)
    p.poly([(0.19, 0.05), (0.5, 0.05), (0.36, 0.24), (0.09, 0.24)], p.light, line=False)
    p.rect(0, 0.3, 1, 0.41, p.base, 0.04)


@DRAWINGS.register("lamp")
def _lamp(p: Pen) -> None:
    p.rect(0.45, 0.5, 0.55, 0.92, METAL)
    p.oval(0.2, 0.87, 0.8, 1, METAL)
    p.oval(0.38, 0.46, 0.62, 0.6, LIGHT_BULB)
    top = p.rng.uniform(0.24, 0.3)
    p.poly([(top, 0), (1 - top, 0), (1, 0.53), (0, 0.53)], p.base)
    p.poly([(top + 0.05, 0.03), (0.46, 0.03), (0.36, 0.5), (0.1, 0.5)], p.light, line=False)
    p.poly([(0.94 - top, 0.03), (0.97 - top, 0.03), (0.96, 0.5), (0.78, 0.5)], p.dark, line=False)
    p.line([(0.72, 0.53), (0.72, 0.66)], METAL, 0.03, line=False)
    p.disc(0.72, 0.67, 0.035, METAL, line=False)


@DRAWINGS.register("clock")
def _clock(p: Pen) -> None:
    for x, foot in ((0.24, 0.1), (0.76, 0.9)):
        p.line([(x, 0.85), (foot, 0.96)], p.dark, 0.07)
        p.blob([(x - 0.2, 0.2), (x - 0.12, 0.04), (x + 0.1, 0), (x + 0.2, 0.1)], p.base)
    p.rect(0.46, 0, 0.54, 0.16, METAL)
    p.disc(0.5, 0.55, 0.5, p.base)
    p.disc(0.47, 0.52, 0.42, p.light, line=False)
    p.disc(0.5, 0.55, 0.35, mix(p.base, (255, 255, 255), 0.12 if p.color == "black" else 0.6))
    ratio = p.extent[0] / p.extent[1]
    hand = p.mark if p.color == "black" else DARK
    for k in range(12):
        dx, dy = math.sin(k * math.pi / 6), -math.cos(k * math.pi / 6) * ratio
        p.disc(0.5 + 0.29 * dx, 0.55 + 0.29 * dy, 0.03 if k % 3 == 0 else 0.014, hand, line=False)
    for reach, turn in ((0.24, p.rng.randrange(12)), (0.16, p.rng.randrange(12))):
        dx, dy = math.sin(turn * math.pi / 6), -math.cos(turn * math.pi / 6) * ratio
        p.line([(0.5, 0.55), (0.5 + reach * dx, 0.55 + reach * dy)], hand, 0.045, line=False)


# ------------------------------------------------------------------------------------------------ things


@DRAWINGS.register("cup")
def _cup(p: Pen) -> None:
    p.line([(0.7, 0.3), (0.9, 0.28), (0.955, 0.45), (0.9, 0.62), (0.7, 0.7)], p.base, 0.08)
    p.blob(path("0,14 2,50 10,90 20,99 38,100 58,99 68,90 76,50 78,14"), p.base)
    p.rect(0.07, 0.32, 0.15, 0.8, p.light, 0.06, line=False)
    p.blob([(0.62, 0.3), (0.73, 0.26), (0.7, 0.6), (0.62, 0.9), (0.55, 0.94), (0.6, 0.6)], p.dark, line=False)
    p.oval(0, 0, 0.78, 0.27, p.light)
    p.oval(0.07, 0.06, 0.71, 0.23, (110, 72, 50))


@DRAWINGS.register("bottle")
def _bottle(p: Pen) -> None:
    p.blob(path("32,8 33,24 8,38 0,50 0,94 12,100 88,100 100,94 100,50 92,38 67,24 68,8"), p.base)
    p.rect(0.1, 0.46, 0.24, 0.92, p.light, 0.06, line=False)
    p.rect(0.4, 0.1, 0.47, 0.3, p.light, 0.02, line=False)
    p.rect(0.82, 0.48, 0.93, 0.94, p.dark, 0.05, line=False)
    p.rect(0.27, 0, 0.73, 0.09, METAL, 0.06)
    p.rect(0.3, 0.56, 0.8, 0.78, p.mark, 0.05, line=False)
    p.line([(0.4, 0.64), (0.7, 0.64)], p.base, 0.05, line=False)
    p.line([(0.4, 0.71), (0.6, 0.71)], p.base, 0.05, line=False)


@DRAWINGS.register("apple")
def _apple(p: Pen) -> None:
    p.blob(path("50,25 72,17 96,32 98,60 80,94 62,100 50,97 38,100 20,94 2,60 4,32 28,17"), p.base)
    p.blob([(0.84, 0.34), (0.93, 0.52), (0.84, 0.78), (0.64, 0.95), (0.78, 0.7)], p.dark, line=False)
    p.blob([(0.16, 0.5), (0.18, 0.34), (0.3, 0.27), (0.28, 0.4), (0.22, 0.56)], p.light, line=False)
    p.line([(0.5, 0.27), (0.5, 0.14), (0.55, 0.03)], WOOD, 0.05)
    p.blob([(0.54, 0.16), (0.66, 0.01), (0.9, 0.02), (0.76, 0.16)], LEAF)


@DRAWINGS.register("ball")
def _ball(p: Pen) -> None:
    tilt = p.rng.uniform(-0.06, 0.06)
    p.oval(0, 0, 1, 1, p.dark)
    p.oval(0.02, 0.015, 0.93, 0.92, p.base, line=False)
    for side in (-1, 1):
        top, bend = 0.5 + side * 0.3, 0.5 + side * 0.16
        p.line(bow((top + tilt, 0.1), (bend - side * 0.08, 0.5), (top - tilt, 0.9)), p.mark, 0.055, line=False)
    p.oval(0.2, 0.1, 0.42, 0.28, p.light, line=False)


@DRAWINGS.register("umbrella")
def _umbrella(p: Pen) -> None:
    p.line([(0.5, 0.02), (0.5, 0.88), (0.545, 0.96), (0.63, 0.96), (0.67, 0.88)], WOOD, 0.035)
    rim = [(0.0, 0.56), (0.25, 0.5), (0.5, 0.56), (0.75, 0.5), (1.0, 0.56)]
    dome = [(math.cos(a) * 0.5 + 0.5, 0.56 - 0.52 * math.sin(a)) for a in (math.pi * k / 16 for k in range(17))]
    scallops = [(k / 16, 0.56 - 0.055 * abs(math.sin(k / 16 * 4 * math.pi))) for k in range(17)]
    p.poly([*dome, *scallops], p.base)
    top = (0.5, 0.04)
    p.poly([top, (0.3, 0.12), (0.1, 0.3), (0.03, 0.5), rim[1]], p.light, line=False)
    p.poly([top, (0.7, 0.12), (0.9, 0.3), (0.97, 0.5), rim[3]], p.dark, line=False)
    for x, y in ((0.25, 0.56), (0.5, 0.56), (0.75, 0.56)):
        p.line(bow(top, (x, 0.2), (x, y)), p.edge, 0.018, line=False)
    p.line([(0.5, 0), (0.5, 0.04)], WOOD, 0.03)


@DRAWINGS.register("kite")
def _kite(p: Pen) -> None:
    sway = p.rng.uniform(-0.05, 0.05)
    tail = [(0.5, 0.68), (0.64 + sway, 0.78), (0.42 + sway, 0.87), (0.56, 0.96)]
    p.line(tail, p.edge, 0.03, line=False)
    for x, y in tail[1:]:
        for side in (-0.15, 0.15):
            p.poly([(x, y), (x + side, y - 0.04), (x + side, y + 0.04)], p.base)
    top, right, bottom, left, middle = (0.5, 0.0), (1.0, 0.3), (0.5, 0.72), (0.0, 0.3), (0.5, 0.3)
    p.poly([top, right, middle], p.base)
    p.poly([right, bottom, middle], p.dark)
    p.poly([bottom, left, middle], p.base)
    p.poly([left, top, middle], p.light)


def draw_object(
    canvas: Image.Image,
    category: str,
    color: str,
    box: tuple[float, float, float, float],
    rng: random.Random,
    flip: bool = False,
) -> None:
    """Draw one object onto the canvas, filling its box; things on the ground cast a soft shadow below it.

    Args:
        canvas: RGB image, changed in place.
        category: one of CATEGORIES.
        color: one of COLORS, the color of the body.
        box: (x1, y1, x2, y2) in pixels, origin at the top left; parts outside the canvas are cut off.
        rng: decides shade and small differences of shape.
        flip: face left instead of right.

    Raises:
        ConfigError: there is no such category or color; the message lists all.
    """
    drawing = DRAWINGS.get(category)
    if color not in COLORS:
        raise ConfigError(unknown("color of the miniature", color, COLORS))
    x1, y1, x2, y2 = (round(v) for v in box)
    width, height = max(x2 - x1, 4), max(y2 - y1, 4)
    pen = Pen(width, height, color, rng)
    drawing(pen)
    if PLACE[category] == "ground":
        _shadow(canvas, x1, y2, width, height)
    layer = pen.finish(flip)
    canvas.paste(layer, (x1, y1), layer)


def _shadow(canvas: Image.Image, x1: int, bottom: int, width: int, height: int) -> None:
    """Blend a soft dark ellipse under an object that stands on the line y = bottom."""
    depth = max(round(0.16 * min(width, height)), 3)
    soft = max(depth // 3, 1)
    mask = Image.new("L", (width + 4 * soft, depth + 4 * soft))
    ImageDraw.Draw(mask).ellipse((2 * soft, 2 * soft, width + 2 * soft, depth + 2 * soft), fill=84)
    mask = mask.filter(ImageFilter.BoxBlur(soft))
    canvas.paste((24, 24, 40), (x1 - 2 * soft, bottom - round(0.6 * depth) - 2 * soft), mask)


# ------------------------------------------------------------------------------------------------ places


def _gradient(size: int, top: RGB, bottom: RGB, horizon: float, near: RGB, front: RGB) -> Image.Image:
    """Sky from `top` to `bottom` above the horizon, ground from `near` to `front` below it."""
    edge = round(size * horizon)
    rows = np.concatenate([np.linspace(top, bottom, edge), np.linspace(near, front, size - edge)])
    return Image.fromarray(np.broadcast_to(rows[:, None, :], (size, size, 3)).astype(np.uint8))


class _Stage:
    """Draws background shapes in unit coordinates of the whole picture, without outlines."""

    def __init__(self, image: Image.Image, rng: random.Random) -> None:
        self.size, self.rng, self.draw = image.width, rng, ImageDraw.Draw(image)

    def poly(self, points: Sequence[Point], fill: RGB) -> None:
        self.draw.polygon([(x * self.size, y * self.size) for x, y in points], fill=fill)

    def rect(self, x1: float, y1: float, x2: float, y2: float, fill: RGB) -> None:
        self.poly([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], fill)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: RGB) -> None:
        s = self.size
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def line(self, points: Sequence[Point], fill: RGB, width: float) -> None:
        self.draw.line([(x * self.size, y * self.size) for x, y in points], fill=fill, width=round(width * self.size))

    def hills(self, base: float, height: float, waves: float, fill: RGB, foot: float) -> None:
        """A rolling silhouette around y = base, filled down to y = foot."""
        phase, second = self.rng.uniform(0, 6.28), self.rng.uniform(0, 6.28)
        top = []
        for k in range(33):
            x = k / 32
            y = math.sin(waves * 6.28 * x + phase) + 0.5 * math.sin(2.3 * waves * 6.28 * x + second)
            top.append((x, base - height * (0.5 + y / 3)))
        self.poly([(0, foot), *top, (1, foot)], fill)

    def peaks(self, base: float, height: float, n: int, fill: RGB, snow: RGB) -> None:
        """Mountains with snowy tops standing on y = base."""
        for k in range(n):
            x, tall = (k + self.rng.uniform(0.2, 0.8)) / n, height * self.rng.uniform(0.6, 1)
            half = 0.75 / n
            self.poly([(x - half, base), (x, base - tall), (x + half, base)], fill)
            self.poly([(x, base - tall), (x + half, base), (x + half * 0.2, base)], mix(fill, (60, 66, 92), 0.14))
            c = 0.3
            cap = [(x - half * c, base - tall * (1 - c)), (x, base - tall), (x + half * c, base - tall * (1 - c))]
            self.poly([*cap, (x + half * 0.1, base - tall * 0.77), (x - half * 0.08, base - tall * 0.66)], snow)

    def clouds(self, n: int, fill: RGB, top: float = 0.06, bottom: float = 0.24) -> None:
        for _ in range(n):
            x, y, r = self.rng.uniform(0.05, 0.95), self.rng.uniform(top, bottom), self.rng.uniform(0.03, 0.05)
            for dx, dy, scale in ((-1.5, 0.25, 0.7), (0, -0.1, 1.1), (1.5, 0.25, 0.8)):
                self.oval(x + dx * r, y + dy * r, r * 1.3 * scale, r * 0.75 * scale, fill)
            self.oval(x, y + 0.45 * r, 2.6 * r, 0.4 * r, fill)

    def scatter(self, n: int, top: float, bottom: float) -> list[tuple[float, float, float]]:
        """Random places (x, y, nearness 0 to 1) between two heights."""
        spots = []
        for _ in range(n):
            near = self.rng.random()
            spots.append((self.rng.random(), top + (bottom - top) * near, near))
        return spots


SCENERY: Registry[Callable[[int, random.Random], Image.Image]] = Registry("background of the miniature")


@SCENERY.register("meadow")
def _meadow(size: int, rng: random.Random) -> Image.Image:
    image = _gradient(size, (158, 196, 224), (216, 230, 234), 0.55, (172, 194, 142), (140, 170, 114))
    s = _Stage(image, rng)
    s.oval(rng.uniform(0.1, 0.9), 0.12, 0.055, 0.055, (252, 244, 212))
    s.clouds(3, (238, 243, 245))
    s.hills(0.55, 0.12, 1.2, (164, 190, 164), 0.6)
    s.hills(0.6, 0.07, 0.8, (170, 194, 144), 0.64)
    for x, y, near in s.scatter(46, 0.62, 0.99):
        h = 0.012 + 0.016 * near
        s.poly(
            [(x - h * 0.6, y), (x - h * 0.3, y - h), (x, y), (x + h * 0.4, y - h * 1.2), (x + h * 0.6, y)],
            (122, 154, 98),
        )
    for x, y, near in s.scatter(12, 0.66, 0.98):
        s.oval(x, y, 0.005 + 0.003 * near, 0.004 + 0.003 * near, (240, 236, 220))
    return image


@SCENERY.register("beach")
def _beach(size: int, rng: random.Random) -> Image.Image:
    image = _gradient(size, (150, 200, 226), (222, 236, 238), 0.46, (122, 178, 196), (222, 206, 170))
    s = _Stage(image, rng)
    s.oval(rng.uniform(0.1, 0.9), 0.13, 0.06, 0.06, (254, 240, 200))
    s.clouds(2, (242, 246, 246), 0.06, 0.2)
    s.rect(0, 0.46, 1, 0.7, (126, 180, 196))
    for x, y, near in s.scatter(16, 0.48, 0.62):
        s.line([(x, y), (x + 0.05 + 0.05 * near, y)], (170, 208, 214), 0.006)
    s.hills(0.665, 0.05, 1.0, (238, 242, 238), 1.0)
    s.hills(rng.uniform(0.675, 0.69), 0.05, 1.0, (224, 208, 172), 1.0)
    for x, y, _ in s.scatter(60, 0.72, 0.99):
        s.oval(x, y, 0.004, 0.003, (204, 186, 148))
    for x, y, _ in s.scatter(4, 0.76, 0.98):
        s.oval(x, y, 0.011, 0.009, (240, 226, 212))
        s.line([(x, y - 0.008), (x, y + 0.008)], (206, 180, 166), 0.004)
    return image


@SCENERY.register("street")
def _street(size: int, rng: random.Random) -> Image.Image:
    image = _gradient(size, (176, 198, 214), (220, 226, 228), 0.6, (198, 196, 192), (190, 188, 184))
    s = _Stage(image, rng)
    s.clouds(1, (236, 240, 242), 0.05, 0.12)
    x = -rng.uniform(0, 0.1)
    while x < 1:
        wide, top = rng.uniform(0.15, 0.25), rng.uniform(0.16, 0.36)
        wall = rng.choice([(190, 176, 168), (172, 178, 184), (200, 190, 170), (176, 170, 178)])
        s.rect(x, top, x + wide, 0.6, wall)
        s.rect(x, top, x + wide, top + 0.018, mix(wall, (60, 60, 70), 0.25))
        columns = max(int(wide / 0.055), 2)
        for i in range(columns):
            for j in range(int((0.56 - top) / 0.075)):
                wx, wy = x + wide * (i + 0.28) / columns, top + 0.04 + 0.075 * j
                s.rect(wx, wy, wx + wide * 0.44 / columns, wy + 0.042, mix(wall, (214, 228, 236), 0.6))
        x += wide
    s.rect(0, 0.6, 1, 0.68, (200, 198, 194))
    s.rect(0, 0.68, 1, 0.7, (160, 160, 160))
    s.rect(0, 0.7, 1, 1, (138, 140, 148))
    for k in range(9):
        s.line([(k / 8 + 0.02, 0.6), (k / 8 - 0.02, 0.68)], (184, 182, 178), 0.004)
    start = rng.uniform(-0.2, 0)
    for k in range(6):
        s.poly(
            [(start + 0.24 * k + d, y) for d, y in ((0.015, 0.84), (0.135, 0.84), (0.12, 0.86), (0, 0.86))],
            (222, 220, 206),
        )
    return image


@SCENERY.register("snow")
def _snow(size: int, rng: random.Random) -> Image.Image:
    image = _gradient(size, (172, 190, 214), (216, 224, 234), 0.55, (214, 222, 234), (196, 208, 226))
    s = _Stage(image, rng)
    s.peaks(0.57, 0.3, 4, (164, 178, 202), (232, 238, 244))
    s.hills(0.58, 0.05, 1.0, (208, 218, 232), 0.64)
    for x, y, _ in sorted(s.scatter(9, 0.57, 0.6), key=lambda spot: spot[1]):
        for k in range(3):
            w, h = 0.03 - 0.006 * k, 0.03
            s.poly([(x - w, y - k * h * 0.7), (x, y - h - k * h * 0.7), (x + w, y - k * h * 0.7)], (128, 152, 152))
    s.hills(0.8, 0.06, 0.9, (202, 213, 229), 1.0)
    for x, y, _ in s.scatter(46, 0.02, 0.98):
        s.oval(x, y, 0.006, 0.006, (240, 244, 248))
    return image


@SCENERY.register("desert")
def _desert(size: int, rng: random.Random) -> Image.Image:
    image = _gradient(size, (176, 204, 216), (238, 226, 204), 0.55, (222, 198, 162), (206, 178, 138))
    s = _Stage(image, rng)
    s.oval(rng.uniform(0.1, 0.9), 0.15, 0.07, 0.07, (252, 240, 206))
    s.hills(0.55, 0.14, 0.9, (212, 186, 156), 0.7)
    s.hills(0.64, 0.12, 0.7, (222, 196, 156), 0.75)
    s.hills(0.74, 0.08, 0.6, (214, 186, 144), 1.0)
    for x, y, near in s.scatter(22, 0.74, 0.99):
        wide = 0.03 + 0.03 * near
        s.line(bow((x - wide, y), (x, y - 0.016), (x + wide, y)), (196, 166, 126), 0.005)
    for x, _, _ in s.scatter(2, 0.6, 0.62):
        s.line([(x, 0.62), (x, 0.5)], (140, 160, 124), 0.018)
        s.line([(x - 0.028, 0.52), (x - 0.028, 0.565), (x, 0.57)], (140, 160, 124), 0.012)
        s.line([(x + 0.028, 0.505), (x + 0.028, 0.55), (x, 0.555)], (140, 160, 124), 0.012)
    return image


@SCENERY.register("room")
def _room(size: int, rng: random.Random) -> Image.Image:
    image = _gradient(size, (224, 214, 202), (214, 202, 188), 0.64, (192, 164, 138), (174, 144, 118))
    s = _Stage(image, rng)
    for k in range(12):
        s.rect(k / 12, 0, k / 12 + 0.04, 0.62, (228, 219, 208))
    x = rng.uniform(0.1, 0.6)
    s.rect(x - 0.015, 0.085, x + 0.295, 0.395, (238, 234, 226))
    s.rect(x, 0.1, x + 0.28, 0.38, (176, 208, 226))
    s.poly([(x, 0.38), (x, 0.33), (x + 0.1, 0.28), (x + 0.2, 0.32), (x + 0.28, 0.3), (x + 0.28, 0.38)], (168, 192, 158))
    s.rect(x + 0.133, 0.1, x + 0.147, 0.38, (238, 234, 226))
    s.rect(x, 0.233, x + 0.28, 0.247, (238, 234, 226))
    s.rect(x - 0.03, 0.39, x + 0.31, 0.41, (206, 194, 180))
    for side in (x - 0.06, x + 0.27):
        s.rect(side, 0.06, side + 0.07, 0.46, (196, 176, 176))
        s.rect(side + 0.025, 0.06, side + 0.04, 0.46, (184, 162, 164))
    px = x + 0.46 if x < 0.35 else x - 0.24
    s.rect(px, 0.16, px + 0.14, 0.3, (150, 124, 102))
    s.rect(px + 0.015, 0.175, px + 0.125, 0.285, (222, 220, 208))
    s.poly([(px + 0.015, 0.285), (px + 0.06, 0.21), (px + 0.1, 0.285)], (150, 170, 176))
    s.rect(0, 0.61, 1, 0.645, (236, 228, 218))
    for k in range(6):
        y = 0.645 + 0.355 * (k / 6) ** 1.3
        s.line([(0, y), (1, y)], (162, 132, 106), 0.005)
        offset = rng.random()
        for j in range(3):
            s.line([((offset + j / 3) % 1, y), ((offset + j / 3) % 1, y + 0.04 + 0.01 * k)], (162, 132, 106), 0.005)
    return image


@SCENERY.register("lake")
def _lake(size: int, rng: random.Random) -> Image.Image:
    image = _gradient(size, (160, 194, 218), (220, 230, 232), 0.48, (146, 180, 196), (112, 152, 178))
    s = _Stage(image, rng)
    s.clouds(2, (240, 244, 245), 0.05, 0.16)
    s.peaks(0.48, 0.26, 3, (154, 168, 182), (228, 234, 238))
    s.hills(0.48, 0.05, 1.6, (138, 166, 142), 0.49)
    s.rect(0, 0.485, 1, 0.5, (122, 152, 146))
    for x, y, near in s.scatter(26, 0.53, 0.72):
        wide = 0.02 + 0.05 * near
        s.line([(x - wide, y), (x + wide, y)], (172, 200, 212), 0.005)
    s.hills(0.775, 0.03, 1.0, (196, 190, 160), 1.0)
    s.hills(0.79, 0.03, 1.0, (150, 174, 122), 1.0)
    for x, y, _ in s.scatter(26, 0.82, 0.99):
        s.line([(x, y), (x + rng.uniform(-0.008, 0.008), y - 0.022)], (126, 152, 100), 0.005)
    for edge in (0.03, 0.95):
        for k in range(4):
            x = edge + 0.012 * k
            s.line([(x, 0.8), (x + rng.uniform(-0.01, 0.01), 0.66 + 0.02 * k)], (124, 146, 106), 0.006)
    return image


@SCENERY.register("night")
def _night(size: int, rng: random.Random) -> Image.Image:
    image = _gradient(size, (70, 80, 128), (128, 132, 172), 0.6, (104, 116, 146), (86, 98, 132))
    s = _Stage(image, rng)
    for x, y, near in s.scatter(40, 0.02, 0.48):
        s.oval(x, y, 0.003 + 0.002 * near, 0.003 + 0.002 * near, (226, 226, 210))
    x = rng.uniform(0.12, 0.88)
    s.oval(x, 0.14, 0.085, 0.085, (92, 100, 146))
    s.oval(x, 0.14, 0.062, 0.062, (240, 236, 208))
    for dx, dy, r in ((-0.02, -0.015, 0.014), (0.022, 0.01, 0.01), (-0.008, 0.026, 0.009)):
        s.oval(x + dx, 0.14 + dy, r, r, (220, 214, 184))
    s.hills(0.58, 0.12, 1.1, (92, 102, 144), 0.65)
    s.hills(0.63, 0.06, 0.8, (98, 112, 138), 0.68)
    for k, (hx, _, _) in enumerate(s.scatter(3, 0, 1)):
        s.rect(hx, 0.565, hx + 0.05, 0.61, (70, 78, 112))
        s.poly([(hx - 0.01, 0.567), (hx + 0.025, 0.535), (hx + 0.06, 0.567)], (60, 66, 98))
        s.rect(hx + 0.015, 0.58, hx + 0.032, 0.596, (246, 222, 150) if k else (232, 206, 140))
    for gx, gy, near in s.scatter(36, 0.68, 0.99):
        h = 0.01 + 0.014 * near
        s.poly([(gx - h * 0.5, gy), (gx - h * 0.2, gy - h), (gx + h * 0.1, gy)], (78, 92, 120))
    return image


def draw_background(name: str, size: int, rng: random.Random) -> Image.Image:
    """Draw an empty place in muted colors, so that the objects put into it stand out.

    Args:
        name: one of BACKGROUNDS.
        size: width and height in pixels.
        rng: decides where clouds, hills, windows and grass are.

    Returns:
        An RGB image of (size, size).

    Raises:
        ConfigError: there is no such background; the message lists all.
    """
    image = SCENERY.get(name)(2 * size, rng).reduce(2)
    coarse = np.random.default_rng(rng.getrandbits(32)).integers(120, 137, (24, 24), dtype=np.uint8)
    grain = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR)).astype(np.int16) - 128
    return Image.fromarray(np.clip(np.asarray(image) + grain[..., None] // 2, 0, 255).astype(np.uint8))
