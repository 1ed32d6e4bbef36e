"""What the chapter on checkpoints shows: the weight map, round trips, and where two models first differ."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.checkpoints.convert import convert, key_map, targets
from companion.checkpoints.divergence import ModuleDifference, first_divergence
from companion.plots.figures import BLUE, COLORS, MUTED, _axes, _styled
from llava_core.checkpoints.describe import Checkpoint
from llava_core.checkpoints.open import format_named, open_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST = 1e-9  # where differences of zero are drawn on a logarithmic axis


def weight_map(opened: Checkpoint) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """How the names of one layout become those of another.

    Returns:
        A row per renamed beginning: `ours`, one column per foreign layout, `tensors` that begin so; and a row per
        beginning with its `modules`, whose names are the same everywhere (numbered layers written once).
    """
    layouts = ("original", "hf", "mmpretrain")
    names = {layout: {ours: theirs for _, ours, theirs, _ in key_map(opened, layout)} for layout in layouts}
    rows: dict[str, dict[str, Any]] = {}
    modules: dict[str, list[str]] = {}
    for name in opened.tensors:
        begin = max((_begin(name, names[layout][name]) for layout in layouts), key=len)
        rest = name.removeprefix(begin)
        beginnings = {layout: names[layout][name].removesuffix(rest) for layout in layouts}
        shown = {layout: beginning or "(nothing)" for layout, beginning in beginnings.items()}
        row = rows.setdefault(begin + str(beginnings), {"ours": begin, **shown, "tensors": 0})
        row["tensors"] += 1
        module = re.sub(r"layers\.\d+\.", "layers.N.", rest).removesuffix(".weight").removesuffix(".bias")
        if module not in modules.setdefault(begin, []):
            modules[begin].append(module)
    return list(rows.values()), [{"ours": begin, "modules": ", ".join(found)} for begin, found in modules.items()]


def _begin(ours: str, theirs: str) -> str:
    """The part of our name that a layout replaces."""
    parts = ours.split(".")
    kept = next(k for k in range(len(parts)) if theirs.endswith(".".join(parts[k:])))
    return "".join(f"{part}." for part in parts[:kept])


def round_trips(source: Path, folder: Path) -> list[dict[str, Any]]:
    """Convert a checkpoint into each layout under `folder` and back into ours, and compare every tensor.

    Returns:
        A row per layout: `layout`, `tensors`, `MB`, `seconds` there and back, `first difference` (None: not one).
    """
    opened, rows = open_checkpoint(source), []
    for name in targets():
        if format_named(name).only_required_parts:
            continue
        begin = time.perf_counter()
        report = convert(source, folder / name, name)
        convert(folder / name, folder / f"{name}-back", "llava")
        seconds = time.perf_counter() - begin
        found = first_divergence(opened, open_checkpoint(folder / f"{name}-back"))
        rows.append(
            {
                "layout": name,
                "what it is": format_named(name).summary,
                "tensors": report["tensors"],
                "MB": report["bytes"] / 1e6,
                "seconds": seconds,
                "first difference": None if found is None else str(found),
            }
        )
    return rows


def perturbed(opened: Checkpoint, name: str, amount: float = 0.01) -> Checkpoint:
    """The same checkpoint with one number of one tensor changed."""

    def change(tensor: Any) -> Any:
        tensor = tensor.clone()
        tensor.view(-1)[0] += amount
        return tensor

    return replace(opened, tensors=opened.tensors | {name: opened.tensors[name].map(change)})


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
    parts = [d.name.split(".")[0] for d in next(iter(runs.values()))]
    starts = [k for k, part in enumerate(parts) if k == 0 or part != parts[k - 1]]
    middles = {(k + end) / 2: parts[k] for k, end in zip(starts, [*starts[1:], len(parts)], strict=True) if end - k > 5}
    axes.vlines(starts, *axes.get_ylim(), color=MUTED, linewidth=0.6)
    axes.set_xticks(list(middles), [part.replace("_", " ") for part in middles.values()])
    axes.set_xlabel("modules in the order of the forward pass")
    axes.set_yscale("log")
    axes.set_ylabel("difference / size of the output")
    axes.set_title(title)
    axes.legend(loc="upper left")
    return figure
