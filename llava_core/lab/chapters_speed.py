"""What the chapters on attention and speed measure: masks, errors, and training steps beside transformers' loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_core.lab.figures import BLUE, CARD, COLORS, INK, _axes, _styled
from llava_core.ops import BACKENDS, attention
from llava_core.ops.reference import allowed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIO = {"output": 2.0, "gradient": 3.0}
"""How many times the error of plain PyTorch in a dtype a backend may make in that dtype, against fp32."""
FLOOR = 1e-6  # below this an error is that of the last bit, and a ratio of two such errors says nothing

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
    _wait()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(rounds):
        names = list(functions)
        for name in names if k % 2 else names[::-1]:
            begin = time.perf_counter()
            functions[name]()
            _wait()
            seconds[name].append(time.perf_counter() - begin)
    return {n: {"median": statistics.median(s), "low": min(s), "high": max(s)} for n, s in seconds.items()}


def _wait() -> None:
    """Wait for a GPU, which works on after a call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(like: torch.Tensor, size: int = 1024, rounds: int = 7) -> float:
    """Measured operations per second of a square matrix product, on the device and in the dtype of `like`."""
    a, b = torch.randn(2, size, size).to(like)
    return 2 * size**3 / interleaved({"matmul": lambda: a @ b}, rounds)["matmul"]["median"]


# ------------------------------------------------------------------------------------------------ attention


def packed_segments(lengths: Sequence[int]) -> torch.Tensor:
    """Segment numbers (1, T) of samples of these lengths, packed into one row."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def attention_inputs(
    segments: torch.Tensor, heads: int = 4, kv_heads: int = 2, head_dim: int = 32
) -> list[torch.Tensor]:
    """Random q, k, v and a random gradient of the output for a packed row, by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    b, t = segments.shape
    return [torch.randn(b, h, t, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads, heads)]


def forward_backward(
    backend: str, inputs: Sequence[torch.Tensor], segments: torch.Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Output and gradients of a backend, run in a dtype and returned in fp32."""
    *qkv, gradient = (x.to(dtype) for x in inputs)
    leaves = [x.clone().requires_grad_(True) for x in qkv]
    output = attention(*leaves, segments=segments, backend=backend)
    grads = torch.autograd.grad(output, leaves, gradient)
    return {
        "output": output.detach().float(),
        **{f"gradient of {n}": g.float() for n, g in zip("qkv", grads, strict=True)},
    }


def largest_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Largest absolute difference of the output and of the gradients."""
    return {name: float((found[name] - expected[name]).abs().max()) for name in expected}


def parity_rows(inputs: Sequence[torch.Tensor], segments: torch.Tensor, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Errors of every backend in a dtype against the definition in fp32, judged by the ratio rule.

    The measure is what the definition itself errs in that dtype; in fp32, where it errs nothing against itself, it is
    the rounding of one unit in the last place of the largest value.
    """
    exact = forward_backward("reference", inputs, segments)
    plain = largest_error(forward_backward("reference", inputs, segments, dtype), exact)
    rows = []
    for name in BACKENDS.names():
        if name == "reference":
            continue
        for part, error in largest_error(forward_backward(name, inputs, segments, dtype), exact).items():
            limit = RATIO["output" if part == "output" else "gradient"]
            allowance = 16 * torch.finfo(dtype).eps * float(exact[part].abs().max())
            measure = plain[part] if dtype != torch.float32 else allowance
            row = {"backend": name, "dtype": str(dtype).removeprefix("torch."), "of": part, "error": error}
            rows.append(row | {"measure": measure, "ratio": error / max(measure, FLOOR), "allowed": limit})
    return rows


@_styled
def mask_figure(lengths: Sequence[int], names: Sequence[str]) -> Figure:
    """Who sees whom, in a padded batch and in one packed row of the same samples."""
    from matplotlib.colors import ListedColormap

    longest, total, count = max(lengths), sum(lengths), len(lengths)
    padded = np.zeros((longest, longest * count))
    for k, n in enumerate(lengths):
        padded[:n, k * longest : k * longest + n] = np.tril(np.ones((n, n))) * (k + 1)
    segments = packed_segments(lengths)
    packed = allowed(total, segments, segments.device)[0, 0].numpy() * (segments[0].numpy()[:, None] + 1)
    figure, axes = _axes(8.2, 3.5, 1, 2)
    if (columns := axes[0].get_gridspec()) is not None:
        columns.set_width_ratios([longest * count, total])  # one scale for both
    shades = ListedColormap([CARD, *COLORS[:count]])
    shapes = (f"padded: {count} × {longest} × {longest}", f"packed: {total} × {total}")
    for ax, grid, shape in zip(axes, (padded, packed), shapes, strict=True):
        ax.imshow(grid, cmap=shades, vmin=0, vmax=count)
        ax.set_title(f"{shape} pairs, {float((grid > 0).mean()):.0%} needed", fontsize=10, fontweight="normal")
        ax.set(xlabel="position attended to")
        ax.grid(visible=False)
    axes[0].set(ylabel="position that attends", xticks=[k * longest for k in range(count)], xticklabels=["0"] * count)
    for k, name in enumerate(names):
        axes[0].axvline(k * longest - 0.5, color=INK, linewidth=0.8)
        axes[0].annotate(name, ((k + 0.96) * longest, 0.14 * longest), ha="right", fontsize=9)
        start, end = sum(lengths[:k]), sum(lengths[: k + 1])
        room = end < 0.75 * total  # to the right of the block
        place = (end + 2 if room else start - 2, (start + end) / 2)
        axes[1].annotate(name, place, ha="left" if room else "right", va="center", fontsize=9)
    return figure


@_styled
def parity_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Errors of the backends beside what the ratio rule allows, from the rows of `parity_rows`."""
    places = list(dict.fromkeys((row["dtype"], row["of"]) for row in rows))
    figure, (axes,) = _axes(height=0.9 + 0.36 * len(places))
    for k, name in enumerate(dict.fromkeys(row["backend"] for row in rows)):
        own = [row for row in rows if row["backend"] == name]
        heights = [places.index((row["dtype"], row["of"])) + 0.16 * (2 * k - 1) for row in own]
        errors = [max(row["error"], 1e-8) for row in own]  # a logarithmic axis has no place for an error of zero
        axes.plot(errors, heights, "os^D"[k % 4], color=COLORS[k], markersize=7, label=name)
    for row in rows:
        y = places.index((row["dtype"], row["of"]))
        axes.plot([row["allowed"] * row["measure"]] * 2, [y - 0.38, y + 0.38], color=INK, linewidth=2.2,
                  label="allowed" if row is rows[0] else None)  # fmt: skip
    axes.set_yticks(range(len(places)), [f"{part}, {dtype}" for dtype, part in places])
    axes.set(xscale="log", xlabel="largest error against the definition in float32", title=title)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


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
