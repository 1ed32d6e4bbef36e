"""Figures with controls for pages without a kernel: every combination of values is drawn beforehand, as HTML."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageColor

from companion.figures import BLUE, cell_text, html_safe, image_uri
from companion.live.host import html_output, joined
from llava_core.runtime import DataError

if TYPE_CHECKING:
    from IPython.display import HTML

MOST_BYTES = 2_500_000  # of all drawings of one figure; a page has 3 MB


def with_controls(
    choices: Mapping[str, Sequence[Any]],
    frames: Mapping[tuple[Any, ...], tuple[str, str]],
    start: Sequence[Any],
    lists: Sequence[str] = (),
) -> HTML:
    """Return a figure whose drawing depends on sliders and lists; without JavaScript it shows the drawing of `start`.

    Args:
        choices: names of the controls with their values, each a slider unless it is in `lists`.
        frames: for every combination of values a sentence (plain text) and HTML without scripts, such as `bars`.

    Raises:
        DataError: a combination has no drawing, or together they are too large for a page.
    """
    keys = list(itertools.product(*choices.values()))
    if missing := [key for key in keys if key not in frames]:
        raise DataError(f"no drawing for {missing[0]}")
    shown = [{"text": frames[key][0], "html": frames[key][1]} for key in keys]
    if (size := sum(len(frame["html"]) for frame in shown)) > MOST_BYTES:
        raise DataError(f"{len(shown)} drawings have {size:,} bytes; a page takes {MOST_BYTES:,}")
    rows = [
        {"label": name, "values": [cell_text(value) for value in values], "start": list(values).index(value)}
        | {"slider": name not in lists}
        for (name, values), value in zip(choices.items(), start, strict=True)
    ]
    text, drawing = frames[tuple(start)]
    fallback = f"<p>{html_safe(text)}</p>{drawing}"
    return html_output(joined("controls.mjs"), {"state": {"controls": rows, "frames": shown}}, fallback)


def bars(rows: Sequence[Mapping[str, Any]], unit: str = "") -> str:
    """Return a table with a bar per row, as HTML.

    Args:
        rows: `label` and `value`; `low` and `high` are the ends of an interval, `mark` a value to compare with.
        unit: what the values are, the title of their column.
    """
    numbers = [float(row[key]) for row in rows for key in ("value", "low", "high", "mark") if row.get(key) is not None]
    least, most = min([0.0, *numbers]), max([0.0, *numbers])
    most = most if most > least else 1.0

    def at(value: float) -> float:
        return 100 * (value - least) / (most - least)

    def line(left: float, right: float, style: str) -> str:
        return f'<div style="position: absolute; left: {left:.1f}%; width: {max(right - left, 0):.1f}%; {style}"></div>'

    lines = []
    for row in rows:
        value = row["value"]
        drawn = line(at(0), at(0), "top: 0; bottom: 0; border-left: 1px solid")
        if value is not None:
            fill = f"top: 15%; bottom: 15%; background: {BLUE}; opacity: .75"
            drawn += line(min(at(0), at(value)), max(at(0), at(value)), fill)
        if row.get("low") is not None:
            drawn += line(at(row["low"]), at(row["high"]), "top: 46%; border-top: 2px solid")
        if row.get("mark") is not None:
            drawn += line(at(row["mark"]), at(row["mark"]), "top: 0; bottom: 0; border-left: 3px dotted")
        drawn = f'<div style="position: relative; height: 1.2em">{drawn}</div>'
        lines.append(
            f'<tr><td class="text">{html_safe(row["label"])}</td><td style="width: 55%">{drawn}</td>'
            f'<td class="number">{html_safe(cell_text(value))}</td></tr>'
        )
    head = f'<tr><th></th><th></th><th class="number">{html_safe(unit)}</th></tr>'
    return f'<table class="companion" style="width: 100%; max-width: 44em">{head}{"".join(lines)}</table>'


def cell_picture(
    cells: np.ndarray, colors: Sequence[str], alt: str, width: int = 300, under: str = "", sets: int | None = None
) -> str:
    """Return cells (rows, columns) as an HTML picture.

    Args:
        cells: numbers of colors.
        colors: as CSS has them, `#rrggbb` or `#rrggbbaa`.
        alt: what the picture shows, in words.
        width: of the picture, in pixels.
        under: `data:` address of an image below the cells.
        sets: the number of the control that pointing at a cell sets to the number of the cell.
    """
    palette = np.array([ImageColor.getcolor(color, "RGBA") for color in colors], np.uint8)
    picture = Image.fromarray(np.asarray(cells, np.uint8), "P")
    picture.putpalette(palette.tobytes(), "RGBA")
    source = image_uri(picture, "png")
    below = f"background: url({under}) 0 0 / 100% 100%; " if under else ""
    rows, columns = cells.shape
    pointing = "" if sets is None else f' data-sets="{sets}" data-cells="{rows} {columns}"'
    return (
        f'<img alt="{html_safe(alt)}" src="{source}"{pointing} style="width: {width}px; max-width: 100%; '
        f'aspect-ratio: {columns / rows:.4f}; {below}image-rendering: pixelated; outline: 1px solid #8888">'
    )
