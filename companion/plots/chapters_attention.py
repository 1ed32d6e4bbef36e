"""Figures and tables of the chapter on attention: packed masks, errors of the backends, mutants of the kernel."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from companion.mutants import ATTENTION, mutated_module
from companion.plots.figures import CARD, COLORS, INK, _axes, _styled
from llava_core.ops import BACKENDS, PackedMask, attention
from llava_core.ops.attention import choose
from llava_core.ops.block_mask import EMPTY, block_states
from llava_core.ops.cpu_varlen import make_schedule
from llava_core.ops.reference import dense_mask
from llava_core.runtime import resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIO = {"output": 2.0, "gradient": 3.0}
"""How many times the error of plain PyTorch in a dtype a backend may make in that dtype, against fp32."""
FLOOR = 1e-6  # below this an error is that of the last bit, and a ratio of two such errors says nothing
BLOCK = 16  # so small that a row that can be drawn has several


def interpret_kernels() -> None:
    """Without a GPU, let triton run kernels on the processor, step by step; to be called before triton is loaded."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


# ------------------------------------------------------------------------------------------------ rows


def shared_row(images: Sequence[tuple[int, Sequence[int]]]) -> PackedMask:
    """One row of samples that share the tokens of their image.

    Args:
        images: of each image the tokens before the first question, and those of each sample after them.
    """
    ends: list[int] = []
    for opening, texts in images:
        ends += [len(ends) + opening + sum(texts)] * opening
        for own in texts:
            ends += [len(ends) + own] * own
    return PackedMask(torch.tensor([ends], dtype=torch.int32))


def _tokens(packed_mask: PackedMask) -> list[list[int]]:
    """Of each sample of the first row the positions of its tokens."""
    return [[t for first, last in ranges for t in range(first, last)] for ranges in packed_mask.samples[0]]


def pair_counts(packed_mask: PackedMask, block: int = BLOCK) -> dict[str, int]:
    """How many pairs of positions are needed, and how many several ways of computing them make."""
    samples, (rows, width) = _tokens(packed_mask), packed_mask.ends.shape
    seen = dense_mask(width, packed_mask, packed_mask.ends.device)
    return {
        "needed, packed": int(seen.sum()),
        f"packed, blocks of {block}": int((block_states(packed_mask, block, block) != EMPTY).sum()) * block**2,
        "packed, sample by sample": sum(sum(group.pairs) for group in make_schedule(packed_mask).groups),
        "padded": len(samples) * max(map(len, samples)) ** 2,
        "packed, all": rows * width**2,
    }


@_styled
def mask_figure(packed_mask: PackedMask, names: Sequence[str]) -> Figure:
    """The attention mask of a padded batch and of one packed row of the same samples."""
    from matplotlib.colors import ListedColormap

    samples, total = _tokens(packed_mask), packed_mask.ends.shape[1]
    longest, count = max(map(len, samples)), len(samples)
    shade = np.zeros(total)
    for k, tokens in enumerate(samples):
        shade[tokens] = np.where(shade[tokens] > 0, count + 1, k + 1)  # of several samples: a shade of its own
    padded = np.zeros((longest, longest * count))
    for k, tokens in enumerate(samples):
        n = len(tokens)
        padded[:n, k * longest : k * longest + n] = np.tril(np.ones((n, n))) * shade[tokens][:, None]
    packed = dense_mask(total, packed_mask, torch.device("cpu"))[0, 0].numpy() * shade[:, None]
    figure, axes = _axes(8.2, 3.5, 1, 2)
    if (columns := axes[0].get_gridspec()) is not None:
        columns.set_width_ratios([longest * count, total])  # one scale for both
    shades = ListedColormap([CARD, *COLORS[:count], COLORS[-1]])
    shapes = (f"padded: {count} × {longest} × {longest}", f"packed: {total} × {total}")
    for ax, grid, shape in zip(axes, (padded, packed), shapes, strict=True):
        ax.imshow(grid, cmap=shades, vmin=0, vmax=count + 1)
        ax.set_title(f"{shape} pairs, {float((grid > 0).mean()):.0%} needed", fontsize=10, fontweight="normal")
        ax.set(xlabel="position attended to")
        ax.grid(visible=False)
    axes[0].set(ylabel="position that attends", xticks=[k * longest for k in range(count)], xticklabels=["0"] * count)
    for k, (name, tokens) in enumerate(zip(names, samples, strict=True)):
        axes[0].axvline(k * longest - 0.5, color=INK, linewidth=0.8)
        axes[0].annotate(name, ((k + 0.96) * longest, 0.14 * longest), ha="right", fontsize=9)
        own = [t for t in tokens if shade[t] == k + 1]
        room = own[-1] < 0.75 * total  # to the right of the block
        place = (own[-1] + 3 if room else min(t for t in tokens) - 2, (own[0] + own[-1]) / 2)
        axes[1].annotate(name, place, ha="left" if room else "right", va="center", fontsize=9)
    return figure


# ------------------------------------------------------------------------------------------------ backends


def attention_inputs(
    packed_mask: PackedMask, heads: int = 2, kv_heads: int = 1, head_dim: int = 32
) -> list[torch.Tensor]:
    """Random q, k, v and a random gradient of the output for packed rows, by a fixed seed, on the mask's device."""
    generator = torch.Generator().manual_seed(0)
    b, t = packed_mask.ends.shape
    shapes = [(b, h, t, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(packed_mask.ends.device) for shape in shapes]


def what_runs(backend: str, like: torch.Tensor) -> str:
    """What of a backend runs where a tensor lies: `forward and backward`, `forward`, or nothing (an empty text)."""
    unavailable, like = BACKENDS.get(backend).unavailable, like.detach()
    if unavailable(like) is not None:
        return ""
    return "forward" if unavailable(like.clone().requires_grad_(True)) is not None else "forward and backward"


def backend_rows(inputs: Sequence[torch.Tensor], packed_mask: PackedMask) -> list[dict[str, Any]]:
    """Of every backend what runs here, why not more, and whether `auto` takes it."""
    wanted = inputs[0].clone().requires_grad_(True)
    taken, why = choose(wanted, packed_mask)
    rows = []
    for name in BACKENDS.names():
        reason = why if name == taken else BACKENDS.get(name).unavailable(wanted)
        row = {"backend": name, "runs here": what_runs(name, wanted) or "no", "auto takes it": name == taken}
        rows.append(row | {"because": reason or ""})
    return rows


def forward_backward(
    backend: str, inputs: Sequence[torch.Tensor], packed_mask: PackedMask, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Output and, where there is a backward pass, gradients of a backend, run in a dtype and returned in fp32."""
    *qkv, gradient = (x.to(dtype) for x in inputs)
    backward = what_runs(backend, qkv[0]) != "forward"
    leaves = [x.clone().requires_grad_(backward) for x in qkv]
    output = attention(leaves[0], leaves[1], leaves[2], packed_mask=packed_mask, backend=backend)
    grads = torch.autograd.grad(output, leaves, gradient) if backward else ()
    return {
        "output": output.detach().float(),
        **{f"gradient of {n}": g.float() for n, g in zip("qkv", grads, strict=False)},
    }


def largest_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Largest absolute difference of the output and of the gradients that were found; no number counts as infinite."""
    differences = {name: (value - expected[name]).abs() for name, value in found.items()}
    return {name: float(value.nan_to_num(nan=float("inf")).max()) for name, value in differences.items()}


def allowances(exact: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Rounding of sixteen units in the last place of the largest value: what is measured by where nothing errs."""
    return {part: 16 * torch.finfo(dtype).eps * float(value.abs().max()) for part, value in exact.items()}


def parity_rows(inputs: Sequence[torch.Tensor], packed_mask: PackedMask, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Errors of every backend that runs here, in a dtype, against the definition in fp32, judged by the ratio rule.

    The measure is what the definition itself errs in that dtype; in fp32, where it errs nothing against itself, it is
    `allowances`.
    """
    exact = forward_backward("reference", inputs, packed_mask)
    plain = largest_error(forward_backward("reference", inputs, packed_mask, dtype), exact)
    rows = []
    for name in BACKENDS.names():
        if name == "reference" or not what_runs(name, inputs[0].to(dtype)):
            continue
        for part, error in largest_error(forward_backward(name, inputs, packed_mask, dtype), exact).items():
            limit = RATIO["output" if part == "output" else "gradient"]
            measure = plain[part] if dtype != torch.float32 else allowances(exact)[part]
            row = {"backend": name, "dtype": str(dtype).removeprefix("torch."), "of": part, "error": error}
            rows.append(row | {"measure": measure, "ratio": error / max(measure, FLOOR), "allowed": limit})
    return rows


@_styled
def parity_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Errors of the backends beside what the ratio rule allows, from the rows of `parity_rows`."""
    places = list(dict.fromkeys((row["dtype"], row["of"]) for row in rows))
    names = list(dict.fromkeys(row["backend"] for row in rows))
    figure, (axes,) = _axes(height=0.9 + 0.36 * len(places), grid="x")
    for k, name in enumerate(names):
        own = [row for row in rows if row["backend"] == name]
        offset = 0.6 * ((k + 0.5) / len(names) - 0.5)
        heights = [places.index((row["dtype"], row["of"])) + offset for row in own]
        errors = [max(row["error"], 1e-8) for row in own]  # a logarithmic axis has no place for an error of zero
        axes.plot(errors, heights, "os^D"[k % 4], color=COLORS[k], markersize=6, label=name)
    for row in rows:
        y = places.index((row["dtype"], row["of"]))
        axes.plot([row["allowed"] * row["measure"]] * 2, [y - 0.38, y + 0.38], color=INK, linewidth=2.2,
                  label="allowed" if row is rows[0] else None)  # fmt: skip
    axes.set_yticks(range(len(places)), [f"{part}, {dtype}" for dtype, part in places])
    axes.set(xscale="log", xlabel="largest error against the definition in float32", title=title)
    axes.invert_yaxis()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def apart(inputs: Sequence[torch.Tensor], packed_mask: PackedMask) -> float:
    """Largest difference between what a token of the first row gets in the row and what it gets in a sample alone."""
    q, k, v = (x[:1] for x in inputs[:3])
    packed, found = attention(*(x for x in inputs[:3]), packed_mask=packed_mask)[:1], []
    for tokens in _tokens(packed_mask):
        alone = attention(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens])
        found.append(float((packed[:, :, tokens] - alone).abs().max()))
    return max(found)


# ------------------------------------------------------------------------------------------------ broken on purpose


def moved_border(packed_mask: PackedMask, sample: int = 0) -> PackedMask:
    """The same row, but the first token after a sample belongs to that sample: a bug by one."""
    ends = packed_mask.ends.clone()
    end = _tokens(packed_mask)[sample][-1] + 1
    ends[0, ends[0] == end] = end + 1
    ends[0, end] = end + 1
    return PackedMask(ends)


def caught_rows(
    found: Mapping[str, Mapping[str, torch.Tensor]], exact: Mapping[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """Whether the comparison sees what is broken: an error of a hundred times what is allowed, anywhere.

    An error is None where what came out is no number.
    """
    rows, least = [], allowances(exact)
    for name, values in found.items():
        errors = largest_error(values, exact)
        limits = {part: least[part] * RATIO["output" if part == "output" else "gradient"] for part in errors}
        caught = any(error > 100 * limits[part] for part, error in errors.items())
        shown = {part: error if math.isfinite(error) else None for part, error in errors.items()}
        rows.append({"broken": name, "caught": caught, **shown})
    return rows


def broken_kernels(
    inputs: Sequence[torch.Tensor], packed_mask: PackedMask, names: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """What our Triton kernel gives with one place of its source changed, for each of some changes.

    Args:
        inputs: as `attention_inputs` makes them.
        packed_mask: of the rows.
        names: of those in `mutants.ATTENTION` that change the kernel itself.

    Returns:
        Name of the change -> output and gradients; empty where the kernel does not run.
    """
    if not what_runs("triton", inputs[0]):
        return {}
    from llava_core.ops import triton_attention as kernel

    found, small = {}, kernel.Blocks(BLOCK, BLOCK, 4, 1)
    for name in names:
        module: Any = mutated_module(ATTENTION[name])
        module.blocks = lambda head_dim, dtype: (small, small, small)
        leaves = [x.clone().requires_grad_(True) for x in inputs[:3]]
        output = module.triton_attention(*leaves, packed_mask)
        grads = torch.autograd.grad(output, leaves, inputs[3])
        parts = {f"gradient of {n}": g for n, g in zip("qkv", grads, strict=True)}
        found[name] = {"output": output.detach(), **parts}
    return found


# ------------------------------------------------------------------------------------------------ speed


def recorded_times() -> list[dict[str, Any]]:
    """The latest benchmark of each device: rows of `benchmarks/results/attention.csv`, numbers as numbers."""
    with resolve("benchmarks/results/attention.csv").open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    latest = {row["device"]: row["date"] for row in rows}  # the last one stands
    shown = ("device", "date", "case", "heads", "head_dim", "length", "samples", "candidate", "ms", "peer", "ratio")
    numbers = {"heads": int, "head_dim": int, "length": int, "samples": int, "ms": float, "ratio": float}
    return [
        {name: numbers.get(name, str)(row[name]) for name in shown}
        for row in rows
        if row["date"] == latest[row["device"]]
    ]


def timed_here(like: torch.Tensor) -> list[str]:
    """Backends whose time means something here: not an interpreted kernel or an uncompiled FlexAttention."""
    return [
        name
        for name in BACKENDS.names()
        if what_runs(name, like) == "forward and backward" and (like.is_cuda or name != "triton")
    ]
