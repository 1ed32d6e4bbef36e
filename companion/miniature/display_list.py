"""Display lists: drawings as data, read from `sprites.yaml` and `backgrounds.yaml`.

A step is a line `shape fill [flat] arguments`. The fill is a name or rrggbb; `flat` leaves the outline out; an argument
with a comma is a point (x, y), any other a number: a sum of products of numbers and variables, e.g. `0.5+0.3*side`.
Other steps are `random: {NAME: LOW HIGH}` (uniform), `let: {NAME: NUMBER}`, and loops over `draw`:
`for: {NAME: NUMBER NUMBER ...}` (one pass per column) and `scatter: COUNT TOP BOTTOM` (random x, y and nearness `near`
from 0 to 1; `far_first` sorts by it).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

RGB = tuple[int, int, int]
Point = tuple[float, float]


def load_table(name: str) -> Any:
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))


def rgb(text: str) -> RGB:
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """Interpolate two colors: a at `share` 0, b at 1."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


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


def bezier(points: Sequence[Point], steps: int = 8) -> list[Point]:
    """Quadratic Bezier curve of a start, a control point and an end, as an open line."""
    (start, control, end), curve = points, []
    for k in range(steps + 1):
        t = k / steps
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
        curve.append((a * start[0] + b * control[0] + c * end[0], a * start[1] + b * control[1] + c * end[1]))
    return curve


def _constant(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


@cache
def _parse(text: str) -> float | list[tuple[float, list[float | str]]]:
    try:
        return _constant(text)
    except ValueError:
        terms = re.findall(r"([+-]?)([^+-]+)", text)
        return [
            (-1.0 if sign == "-" else 1.0, [f if f[0].isalpha() else _constant(f) for f in product.split("*")])
            for sign, product in terms
        ]


def number(text: str | float, variables: Mapping[str, float]) -> float:
    """Evaluate a number of a display list; KeyError: it uses a variable that no earlier step defines."""
    terms = _parse(str(text))
    if isinstance(terms, float):
        return terms
    total = 0.0
    for sign, factors in terms:
        total += sign * math.prod(variables[f] if isinstance(f, str) else f for f in factors)
    return total


class DisplayList:
    """Draws the steps of a display list; subclasses have a method per shape: `shape(fill, points, *numbers)`."""

    def __init__(self, rng: random.Random, colors: Mapping[str, RGB]) -> None:
        self.rng, self.colors = rng, colors

    def run(self, steps: Sequence[Any], variables: Mapping[str, float] | None = None) -> None:
        """Draw the steps in order; variables that they define are known to later steps and inner loops alone."""
        known = dict(variables or {})
        for step in steps:
            if isinstance(step, str):
                self._draw_shape(step, known)
            elif "random" in step:
                for name, bounds in step["random"].items():
                    low, high = (number(bound, known) for bound in bounds.split())
                    known[name] = self.rng.uniform(low, high)
            elif "let" in step:
                for name, value in step["let"].items():
                    known[name] = number(value, known)
            else:
                for values in self._loop(step, known):
                    self.run(step["draw"], known | values)

    def _loop(self, step: Mapping[str, Any], known: Mapping[str, float]) -> list[dict[str, float]]:
        if "for" in step:
            columns = zip(*(values.split() for values in step["for"].values()), strict=True)
            return [dict(zip(step["for"], (number(v, known) for v in column), strict=True)) for column in columns]
        count, top, bottom = (float(word) for word in step["scatter"].split())
        spots = []
        for _ in range(int(count)):
            near = self.rng.random()
            spots.append({"near": near, "x": self.rng.random(), "y": top + (bottom - top) * near})
        return sorted(spots, key=lambda spot: spot["near"]) if step.get("far_first") else spots

    def _draw_shape(self, text: str, known: Mapping[str, float]) -> None:
        shape, fill, *arguments = text.split()
        points, numbers = [], []
        for argument in arguments:
            if "," in argument:
                x, y = argument.split(",")
                points.append((number(x, known), number(y, known)))
            elif argument != "flat":
                numbers.append(number(argument, known))
        color = self.colors[fill] if fill in self.colors else rgb(fill)
        getattr(self, shape)(color, points, *numbers, **({"line": False} if "flat" in arguments else {}))
