"""What the chapters on speed measure: times in turns, and training steps beside transformers' loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from benchmarks.common import all_in_turns
from companion.plots.figures import BLUE, CARD, COLORS, INK, _axes, _styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# ------------------------------------------------------------------------------------------------ timing


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, dict[str, float]]:
    """Time functions in turns, so that whatever else the machine does hits all of them alike.

    Args:
        functions: name -> what is timed; each runs once before the clock starts.
        rounds: timed turns.

    Returns:
        Name -> median, lowest and highest seconds.
    """
    for function in functions.values():
        function()
    seconds = all_in_turns(functions, rounds)
    return {n: {"median": statistics.median(s), "low": min(s), "high": max(s)} for n, s in seconds.items()}


# ------------------------------------------------------------------------------------------------ the training step


@_styled
def stacked_figure(parts: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """One bar per row, cut into the seconds of its parts."""
    figure, (axes,) = _axes(7.6, 1.3 + 0.5 * len(parts))
    names = list(dict.fromkeys(name for row in parts.values() for name in row))
    for y, row in enumerate(parts.values()):
        left, whole = 0.0, sum(row.values())
        for k, name in enumerate(names):
            seconds = row.get(name, 0.0)
            axes.barh(
                y,
                1000 * seconds,
                left=left,
                height=0.6,
                color=COLORS[k],
                edgecolor=CARD,
                label=name if y == 0 else None,
            )
            if seconds > 0.06 * whole:
                place = (left + 500 * seconds, y)
                axes.annotate(f"{seconds / whole:.0%}", place, ha="center", va="center", color="white", fontsize=9)
            left += 1000 * seconds
    axes.set_yticks(range(len(parts)), list(parts))
    axes.set(xlabel="milliseconds of one optimizer step", title=title)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=3)
    return figure


@_styled
def speed_figure(times: Mapping[str, Mapping[str, float]], reference: str, title: str = "") -> Figure:
    """How many times as fast as the reference each one is; whiskers from the fastest and slowest round."""
    figure, (axes,) = _axes(height=0.9 + 0.42 * len(times))
    base = times[reference]["median"]
    for k, row in enumerate(times.values()):
        ratio, low, high = base / row["median"], base / row["high"], base / row["low"]
        axes.barh(k, ratio, height=0.62, color=BLUE, alpha=0.85)
        axes.errorbar(
            ratio, k, xerr=[[max(0, ratio - low)], [max(0, high - ratio)]], color=INK, capsize=3, linewidth=1.2
        )
        axes.annotate(
            f"{ratio:.2f} × ({1000 * row['median']:.3g} ms)",
            (high, k),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.axvline(1, color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(times)), list(times))
    axes.set(
        xlabel=f"speed relative to {reference}",
        title=title,
        xlim=(0, 1.35 * max(base / r["low"] for r in times.values())),
    )
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    return figure
