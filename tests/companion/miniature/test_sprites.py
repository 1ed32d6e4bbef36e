"""Sprites and backgrounds: each category in each color fills its box, shows its color, and is reproducible."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
from PIL import Image

from companion.miniature.backgrounds import BACKGROUNDS, HORIZON, draw_background
from companion.miniature.display_list import DisplayList, number
from companion.miniature.sprites import ASPECT, CATEGORIES, COLORS, ZONE, draw_object
from llava_core.runtime import ConfigError

HEIGHT, MARGIN = 48, 24


@functools.cache
def on_plain(category: str, color: str, gray: int, flip: bool = False, seed: int = 0) -> np.ndarray:
    """One object on a plain gray picture, 48 pixels tall with 24 pixels around it."""
    width = round(HEIGHT * ASPECT[category])
    canvas = Image.new("RGB", (width + 2 * MARGIN, HEIGHT + 2 * MARGIN), (gray, gray, gray))
    box = (MARGIN, MARGIN, MARGIN + width, MARGIN + HEIGHT)
    draw_object(canvas, category, color, box, random.Random(seed), flip=flip)
    return np.asarray(canvas).astype(np.int32)


def drawn(category: str, color: str, seed: int = 0) -> np.ndarray:
    """Mask of opaque pixels: equal on a black and on a white background; a soft shadow is not opaque."""
    return (on_plain(category, color, 255, seed=seed) - on_plain(category, color, 0, seed=seed)).max(-1) < 100


def body(category: str, seed: int = 0) -> np.ndarray:
    """Which pixels carry the object's color: those that change between a red, a green and a white one."""
    pictures = [on_plain(category, color, 128, seed=seed) for color in ("red", "green", "white")]
    return np.ptp(np.stack(pictures), axis=0).max(-1) > 40


def test_tables_have_the_same_names() -> None:
    assert len(CATEGORIES) == 24
    assert set(CATEGORIES) == set(ASPECT) == set(ZONE)
    assert set(BACKGROUNDS) == set(HORIZON)
    assert len(COLORS) == len(BACKGROUNDS) == 8
    assert {name for name, zone in ZONE.items() if zone == "sky"} == {"airplane", "bird", "kite"}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("category", CATEGORIES)
def test_sprite_fills_exactly_its_box(category: str, seed: int) -> None:
    mask = drawn(category, "blue", seed)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    width, height = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    assert width >= 0.85 * ASPECT[category] * HEIGHT
    assert height >= 0.85 * HEIGHT
    assert min(rows[0], columns[0]) >= MARGIN - 1
    assert rows[-1] <= mask.shape[0] - MARGIN
    assert columns[-1] <= mask.shape[1] - MARGIN


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_body_shows_its_color(category: str, color: str) -> None:
    for seed in (0, 1):
        mean = on_plain(category, color, 128, seed=seed)[body(category, seed) & drawn(category, color, seed)].mean(0)
        distance = {name: float(np.linalg.norm(mean - value)) for name, value in COLORS.items()}
        nearest = min(distance, key=distance.__getitem__)
        assert nearest == color, f"seed {seed}: mean body color {mean.round()} is nearest to {nearest}"


@pytest.mark.parametrize("category", CATEGORIES)
def test_color_covers_most_of_the_object(category: str) -> None:
    mask = drawn(category, "red")
    assert (body(category) & mask).sum() >= 0.5 * mask.sum()


def test_named_colors_are_far_apart() -> None:
    values = np.array(list(COLORS.values()))
    distance = np.linalg.norm(values[:, None] - values[None], axis=-1) + 1000 * np.eye(len(values))
    assert distance.min() > 80


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_color_stands_out_from_every_background(background: str, color: str) -> None:
    place = np.asarray(draw_background(background, 112, random.Random(1))).astype(np.int32)
    canvas = Image.fromarray(place.astype(np.uint8))
    draw_object(canvas, "car", color, (30, 76, 82, 106), random.Random(0))
    changed = np.abs(np.asarray(canvas).astype(np.int32) - place).max(-1)[76:106, 30:82]
    assert np.mean(changed > 25) > 0.55


def test_pixels_depend_only_on_the_seed() -> None:
    def scene(seed: int) -> bytes:
        rng = random.Random(seed)
        canvas = draw_background("lake", 64, rng)
        for k, category in enumerate(("dog", "flower", "kite")):
            draw_object(canvas, category, "purple", (4 + 18 * k, 20, 22 + 18 * k, 50), rng, flip=rng.random() < 0.5)
        return canvas.tobytes()

    assert scene(3) == scene(3)
    assert scene(3) != scene(4)


def test_flip_mirrors_the_shape() -> None:
    right, left = on_plain("truck", "green", 255), on_plain("truck", "green", 255, True)
    assert np.abs(right - left).mean() > 5
    assert np.abs(right - left[:, ::-1]).mean() < 3


def test_object_may_cross_the_image_edge() -> None:
    canvas = Image.new("RGB", (40, 40), (128, 128, 128))
    for box in ((-10.4, -8.0, 12.5, 14.0), (30.0, 31.0, 60.0, 62.0)):
        draw_object(canvas, "apple", "red", box, random.Random(0))
    assert np.asarray(canvas)[2, 4].tolist() != [128, 128, 128]
    assert np.asarray(canvas)[38, 38].tolist() != [128, 128, 128]


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_backgrounds_have_muted_colors(name: str) -> None:
    image = draw_background(name, 96, random.Random(0))
    assert (image.mode, image.size) == ("RGB", (96, 96))
    pixels = np.asarray(image).astype(np.int32)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    assert np.ptp(pixels, axis=-1).mean() < 75


def test_unknown_names_are_rejected_with_the_nearest() -> None:
    canvas = Image.new("RGB", (20, 20))
    with pytest.raises(ConfigError, match="did you mean 'bicycle'"):
        draw_object(canvas, "bicycel", "red", (0, 0, 20, 20), random.Random(0))
    with pytest.raises(ConfigError, match="did you mean 'purple'"):
        draw_object(canvas, "car", "purpel", (0, 0, 20, 20), random.Random(0))
    with pytest.raises(ConfigError, match="did you mean 'meadow'"):
        draw_background("medow", 20, random.Random(0))
    assert not np.asarray(canvas).any()


def test_numbers_are_sums_of_products() -> None:
    values = {"x": 0.5, "side": -1.0}
    assert number(0.25, values) == 0.25
    assert number("-0.25", values) == -0.25
    assert number("3/12", values) == 0.25
    assert number("x-0.3*side*x+1/4", values) == 0.5 + 0.15 + 0.25
    with pytest.raises(KeyError, match="roof"):
        number("roof+0.03", values)


def test_display_list_loops_and_scopes_its_variables() -> None:
    calls: list[tuple[object, ...]] = []

    class Recorder(DisplayList):
        def poly(self, fill: object, points: object, *numbers: float, line: bool = True) -> None:
            calls.append((fill, points, *numbers, line))

    steps = [
        {"let": {"a": 0.5}},
        {"for": {"x": "0 1", "y": "a 0.25"}, "draw": [{"let": {"a": "2*x"}}, "poly red flat x,y a"]},
        "poly 0000ff a,a",
    ]
    Recorder(random.Random(0), {"red": (255, 0, 0)}).run(steps)
    assert calls == [
        ((255, 0, 0), [(0.0, 0.5)], 0.0, False),
        ((255, 0, 0), [(1.0, 0.25)], 2.0, False),
        ((0, 0, 255), [(0.5, 0.5)], True),
    ]
