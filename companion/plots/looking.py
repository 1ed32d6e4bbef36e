"""Looking at instruction data: samples to leaf through, and charts of what is asked.

The controls work with a kernel, and without one in the built page: everything that they show is made beforehand, and a
control only chooses, linked in the browser.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from companion.data_tools.verbs import PAIR, Verbs
from companion.plots.chapters_data import dialogue_html
from companion.plots.figures import CARD, COLORS, INK, MUTED

if TYPE_CHECKING:
    from IPython.display import HTML
    from PIL.Image import Image

WHITE_ON = (*COLORS[:5], COLORS[6])  # dark enough for white letters
WIDTH = 460  # of a chart that has the page for itself
SIZE, CENTER = 380, (190.0, 228.0)
RINGS = (28.0, 88.0, 166.0)
LETTERS = (7.5, 11.0)  # heights of a letter in the rings, by the room that there is


# ------------------------------------------------------------------------------------------------ verbs and nouns


def drawn_pairs(verbs: Verbs, least: int = 1, most: tuple[int, int] = (20, 4)) -> dict[str, dict[str, int]]:
    """Choose what a chart shows.

    Args:
        verbs: the pairs of one kind.
        least: a rarer pair is left out.
        most: so many verbs, the commonest, and so many nouns of each.

    Returns:
        Verb -> noun -> questions, the commonest first.
    """
    nouns: dict[str, dict[str, int]] = defaultdict(dict)
    for (verb, noun), times in verbs.pairs.items():  # the commonest first
        if times >= least and len(nouns[verb]) < most[1]:
            nouns[verb][noun] = times
    ordered = sorted((item for item in nouns.items() if item[1]), key=lambda item: (-sum(item[1].values()), item[0]))
    return dict(ordered[: most[0]])


def verb_chart(verbs: Verbs, title: str, least: int = 1, most: tuple[int, int] = (20, 4)) -> HTML:
    """Draw root verbs as a ring and around each one its commonest object nouns, as wide as they are frequent.

    Args:
        verbs: the pairs of one kind.
        title: the chart's title.
        least, most: as for `drawn_pairs`.

    Returns:
        The drawing as SVG inside HTML; its `data` is the SVG. A wedge too narrow for its word has it as a tooltip.
    """
    from IPython.display import HTML

    drawn, asked = drawn_pairs(verbs, least, most), sum(verbs.found.values())
    total = sum(sum(nouns.values()) for nouns in drawn.values())
    note = f"{total:,} of {asked:,} questions" + (f"; pairs that occur {least:,} times or more" if least > 1 else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE + 28}" width="{WIDTH}" '
        f'style="max-width: 100%; margin: 4px 0" role="img" aria-label="{html.escape(title)}: {note}" '
        'font-family="DejaVu Sans, Verdana, sans-serif">',
        f'<rect width="100%" height="100%" rx="10" fill="{CARD}"/>',
        f'<text x="14" y="24" font-size="14" font-weight="bold" fill="{INK}">{html.escape(title)}</text>',
        f'<text x="14" y="42" font-size="11" fill="{MUTED}">{note}</text>',
    ]
    start = 0.0
    for k, (verb, nouns) in enumerate(drawn.items()):
        color = WHITE_ON[k % len(WHITE_ON)]
        width, inner = sum(nouns.values()) / total, start
        parts += _wedge((start, start + width), RINGS[:2], verb, f"{verb}: {sum(nouns.values()):,}", color, "#FFFFFF")
        for noun, times in nouns.items():
            end, said = inner + times / total, f"{verb} {noun}: {times:,}"
            parts += _wedge((inner, end), RINGS[1:], noun, said, _tint(color), INK)
            inner = end
        start += width
    if not drawn:
        x, y = CENTER
        words = "no pair occurs that often" if verbs.pairs else "no question has a verb with an object noun"
        parts.append(f'<text x="{x}" y="{y}" font-size="12" fill="{MUTED}" text-anchor="middle">{words}</text>')
    return HTML("".join([*parts, "</svg>"]))


def _tint(color: str) -> str:
    """A color mixed with the card's, light enough for dark letters."""
    pairs = ((int(c[k : k + 2], 16) for c in (color, CARD)) for k in (1, 3, 5))
    return "#" + "".join(f"{round(0.32 * a + 0.68 * b):02X}" for a, b in pairs)


def _wedge(
    turn: tuple[float, float], radii: Sequence[float], word: str, said: str, color: str, ink: str
) -> tuple[str, ...]:
    """One part of a ring, from and to a share of the full turn, with its word where there is room."""
    (x, y), (low, high) = CENTER, radii
    begin, end = (2 * math.pi * share for share in turn)
    middle, radius = (begin + end) / 2, (low + high) / 2

    def at(angle: float, radius: float) -> str:
        return f"{x + radius * math.sin(angle):.1f} {y - radius * math.cos(angle):.1f}"

    # in two halves: an arc that ends where it began, as that of a full ring, would be none
    there = "".join(f"A{high} {high} 0 0 1 {at(angle, high)}" for angle in (middle, end))
    back = "".join(f"A{low} {low} 0 0 0 {at(angle, low)}" for angle in (middle, begin))
    path = f"M{at(begin, low)}L{at(begin, high)}{there}L{at(end, low)}{back}Z"
    wedge = (
        f'<path d="{path}" fill="{color}" stroke="{CARD}" stroke-width="1.2"><title>{html.escape(said)}</title></path>'
    )
    letter = min((end - begin) * radius, LETTERS[1])
    if letter < LETTERS[0]:
        return (wedge,)
    # letters run outwards, and are never upside down; a wide wedge has room for a level word
    degrees = 0.0 if end - begin > 1.6 else math.degrees(middle) + (90 if middle > math.pi else -90)
    room = int((high - low) / (0.6 * letter))
    word = word if len(word) <= room else f"{word[: room - 1]}…"
    place = at(middle, radius)
    label = (
        f'<text transform="translate({place}) rotate({degrees:.1f})" font-size="{letter:.1f}" fill="{ink}" '
        f'text-anchor="middle" dominant-baseline="central" pointer-events="none">{html.escape(word)}</text>'
    )
    return wedge, label


def thresholds(verbs: Mapping[str, Verbs]) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... up to the count of the commonest pair."""
    largest = max((times for found in verbs.values() for times in found.pairs.values()), default=1)
    series = (step * 10**power for power in range(len(str(largest))) for step in (1, 2, 5))
    return [value for value in series if value <= largest]


def verb_browser(verbs: Mapping[str, Verbs], most: tuple[int, int] = (20, 4)) -> Any:
    """Show the charts of all kinds below a slider: how often a pair must occur to be drawn.

    Returns:
        An ipywidgets box whose slider works without a kernel.
    """
    steps = thresholds(verbs)
    pages = [
        _row([verb_chart(found, kind, least, most).data for kind, found in verbs.items() if found.found[PAIR]])
        for least in steps
    ]
    return _leaf(pages, [f"{least:,}" for least in steps], "least count")


# ------------------------------------------------------------------------------------------------ samples


def sample_html(image: Image | None, turns: Sequence[tuple[str, str]], context: str | None, tokens: HTML) -> str:
    """Return a sample as a page of the browser: image and dialogue, what its writer read, which tokens are learned.

    Args:
        image: as the model sees it.
        turns: (question, answer).
        context: the text that the teacher read, or None where it is not recorded.
        tokens: what `figures.supervised_text_html` returns.
    """
    said = [(question.replace("<image>", "⟨image⟩ ").replace("\n", " "), answer) for question, answer in turns]
    read = html.escape(context) if context else "(not recorded)"
    style = "white-space: pre-wrap; margin: .2em 0 1em; font-size: .85em; line-height: 1.4"
    return (
        f"{dialogue_html(image, said, ('Human', 'Assistant')).data}"
        f'<b>What the teacher read</b><pre style="{style}">{read}</pre>'
        f"<b>What is learned</b>{tokens.data}"
    )


def sample_browser(pages: Mapping[str, Sequence[str]]) -> Any:
    """Show samples to leaf through: a tab per kind, and a slider over the samples of each.

    Args:
        pages: kind -> its samples, made by `sample_html`.

    Returns:
        An ipywidgets box whose controls work without a kernel.
    """
    import ipywidgets as widgets

    leaves = [_leaf(list(own), [f"{k}" for k in range(1, len(own) + 1)], "sample") for own in pages.values()]
    return widgets.Tab(leaves, titles=list(pages), selected_index=0)


def _row(parts: Sequence[str]) -> str:
    items = "".join(f'<div style="flex: 1 1 300px; max-width: {SIZE}px">{part}</div>' for part in parts)
    return f'<div style="display: flex; flex-wrap: wrap; gap: 12px">{items}</div>'


def _leaf(pages: Sequence[str], labels: Sequence[str], name: str) -> Any:
    """Pages of HTML of which a slider shows one. The link is the browser's own, so it needs no kernel."""
    import ipywidgets as widgets

    slider = widgets.SelectionSlider(options=list(labels), index=0, description=name, layout={"width": "360px"})
    # without a line height of its own a widget's text has the height of one line of controls
    stack = widgets.Stack([widgets.HTML(f'<div style="line-height: 1.45">{page}</div>') for page in pages])
    stack.selected_index = 0
    widgets.jslink((slider, "index"), (stack, "selected_index"))
    return widgets.VBox([slider, stack])
