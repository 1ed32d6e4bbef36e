"""What the chapter on checkpoints shows: the weight map, round trips, and where two models first differ."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.lab.figures import BLUE, COLORS, _axes, _styled
from llava_core.weights.convert import convert, key_map, open_checkpoint, targets
from llava_core.weights.description import Opened
from llava_core.weights.divergence import ModuleDifference, first_divergence
from llava_core.weights.layouts import LAYOUTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST = 1e-9  # where differences of zero are drawn on a logarithmic axis


def weight_map(opened: Opened) -> list[dict[str, Any]]:
    """The modules that hold the tensors, by their names in ours and in foreign layouts, numbered layers written once.

    Returns:
        Rows with `ours`, `original`, `hf` and `tensors`, how many the modules of that name hold.
    """
    columns = {name: {ours: theirs for _, ours, theirs, _ in key_map(opened, name)} for name in ("original", "hf")}
    rows: dict[str, dict[str, Any]] = {}
    for name in opened.tensors:
        general = _general(name)
        if general not in rows:
            theirs = {layout: _general(names[name]) for layout, names in columns.items()}
            rows[general] = {"ours": general, **theirs, "tensors": 0}
        rows[general]["tensors"] += 1
    return list(rows.values())


def _general(name: str) -> str:
    return re.sub(r"layers\.\d+\.", "layers.N.", name).removesuffix(".weight").removesuffix(".bias")


def round_trips(source: Path, folder: Path) -> list[dict[str, Any]]:
    """Convert a checkpoint into each layout under `folder` and back into ours, and compare every tensor.

    Returns:
        A row per layout: `layout`, `tensors`, `MB`, `seconds` there and back, `first difference` (None: not one).
    """
    opened, rows = open_checkpoint(source), []
    for name in targets():
        if LAYOUTS.get(name).alone:
            continue
        begin = time.perf_counter()
        report = convert(source, folder / name, name)
        convert(folder / name, folder / f"{name}-back", "llava")
        seconds = time.perf_counter() - begin
        found = first_divergence(opened, open_checkpoint(folder / f"{name}-back"))
        rows.append(
            {
                "layout": name,
                "what it is": LAYOUTS.get(name).text,
                "tensors": report["tensors"],
                "MB": report["bytes"] / 1e6,
                "seconds": seconds,
                "first difference": None if found is None else str(found),
            }
        )
    return rows


def perturbed(opened: Opened, name: str, amount: float = 0.01) -> Opened:
    """The same checkpoint with one number of one tensor changed."""

    def change(tensor: Any) -> Any:
        tensor = tensor.clone()
        tensor.view(-1)[0] += amount
        return tensor

    return replace(opened, tensors=opened.tensors | {name: opened.tensors[name].then(change)})


@_styled
def module_figure(runs: Mapping[str, Sequence[ModuleDifference]], title: str = "") -> Figure:
    """Draw the difference of each module's output, as a share of its size, in the order of the forward pass.

    Args:
        runs: label -> what `module_differences` gave.
        title: above the axes.
    """
    figure, (axes,) = _axes(height=3.4)
    for (label, found), color in zip(runs.items(), [BLUE, *COLORS[1:]], strict=False):
        axes.plot([max(d.relative, SMALLEST) for d in found], label=label, color=color, marker=".", markersize=4)
    last = list(next(iter(runs.values())))
    parts = [d.name.split(".")[0] for d in last]
    starts = [k for k, part in enumerate(parts) if k == 0 or part != parts[k - 1]]
    axes.set_xticks(starts, [parts[k].replace("_", " ") for k in starts], ha="left")
    axes.set_yscale("log")
    axes.set_ylabel("difference / size of the output")
    axes.set_title(title)
    axes.legend(loc="upper left")
    return figure
