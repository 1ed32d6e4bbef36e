"""Attention forward and backward on packed rows: our backends, PyTorch's and a padded batch."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch.nn import functional as F

from benchmarks.common import Clock, circumstances, in_own_process, peak_mib, ratios, steady_in_turns
from llava_core.ops import BACKENDS, PackedMask
from llava_core.runtime import resolve_device

Tensors = Sequence[torch.Tensor]

Shape = Literal["vicuna-7b", "llama-3.2-1b", "128", "64", "tiny"]
HEADS: dict[str, list[int]] = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text())["attention"]
"""Shape -> heads, kv_heads, head_dim."""

SYSTEM, PATCHES = 40, 256  # tokens before the first question: the template's opening, then CLIP ViT-L/14 at 224 pixels
# LLaVA-Instruct-158K has 1.95 samples per image. How many images have one, two or three of them, and how long the texts
# are, is assumed: no source gives it.
PER_IMAGE, TEXT = {1: 0.25, 2: 0.55, 3: 0.2}, (4.9, 0.5, 24, 800)  # log-normal: mean, deviation, shortest, longest


@dataclass(frozen=True)
class Case:
    """Rows of samples; packed_mask None: each row is one sample."""

    name: str
    packed_mask: PackedMask | None
    rows: int
    length: int

    @property
    def samples(self) -> list[tuple[int, torch.Tensor]]:
        """(row, positions of its tokens) of each sample."""
        if self.packed_mask is None:
            return [(b, torch.arange(self.length)) for b in range(self.rows)]
        return [
            (b, torch.cat([torch.arange(first, last) for first, last in ranges]))
            for b, row in enumerate(self.packed_mask.samples)
            for ranges in row
        ]


def instruct_cases(length: int, rows: int = 1, seed: int = 0, scale: float = 1.0) -> list[Case]:
    """Rows of one sample; packed rows; packed rows with shared image prefixes.

    Args:
        length: tokens of a row; the last sample of a row is cut off there.
        rows: of the batch.
        seed: of the drawn lengths.
        scale: of the samples' lengths, so that small rows hold several, too.
    """
    draw = random.Random(seed)
    opening = max(1, round((SYSTEM + PATCHES) * scale))

    def text() -> int:
        mean, deviation, low, high = TEXT
        return max(1, round(scale * min(high, max(low, draw.lognormvariate(mean, deviation)))))

    packed, shared = [], []
    for _ in range(rows):
        ends: list[int] = []
        while len(ends) < length:
            own = opening + text()
            ends += [len(ends) + own] * own
        packed.append([min(end, length) for end in ends[:length]])
        ends = []
        while len(ends) < length:
            texts = [text() for _ in range(draw.choices(list(PER_IMAGE), list(PER_IMAGE.values()))[0])]
            ends += [len(ends) + opening + sum(texts)] * opening
            for own in texts:
                ends += [len(ends) + own] * own
        shared.append([min(end, length) for end in ends[:length]])
    described = [PackedMask(torch.tensor(table, dtype=torch.int32)) for table in (packed, shared)]
    return [
        Case("causal", None, rows, length),
        Case("packed", described[0], rows, length),
        Case("packed, shared prefixes", described[1], rows, length),
    ]


# ------------------------------------------------------------------------------------------------ candidates


@dataclass(frozen=True)
class Candidate:
    """An implementation: its inputs q, k, v, the call, and how its output maps back to the rows."""

    inputs: list[torch.Tensor]
    run: Callable[..., torch.Tensor]
    in_rows: Callable[[torch.Tensor], torch.Tensor]

    def forward_backward(self) -> None:
        """The timed work."""
        out = self.run(*self.inputs)
        torch.autograd.grad(out, self.inputs, torch.ones_like(out))


def backend(name: str, case: Case, given: Tensors) -> Candidate:
    """An attention backend on the packed rows."""
    packed_mask = None if case.packed_mask is None else case.packed_mask.to(given[0].device)
    run = BACKENDS.get(name).run
    return Candidate(_leaves(given), lambda q, k, v: run(q, k, v, packed_mask), lambda out: out)


def padded(case: Case, given: Tensors) -> Candidate:
    """Attention without packing: one sample per row, padded to the longest, with a mask as in transformers.

    Only the op is compared; the layers around it also compute the padding and repeated prefixes.
    """
    device, samples = given[0].device, case.samples
    lengths = torch.tensor([len(tokens) for _, tokens in samples], device=device)
    longest = int(lengths.max())
    place = torch.stack([F.pad(tokens, (0, longest - len(tokens))) for _, tokens in samples]).to(device)
    row = torch.tensor([b for b, _ in samples], device=device)
    inputs = [x.transpose(1, 2)[row[:, None], place].transpose(1, 2) for x in given]
    position = torch.arange(longest, device=device)
    mask = (position[:, None] >= position) & (position < lengths[:, None])[:, None, None, :]
    gqa = given[0].shape[1] != given[1].shape[1]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)

    def in_rows(out: torch.Tensor) -> torch.Tensor:
        back = torch.empty_like(given[0])
        for k, (b, tokens) in enumerate(samples):
            back[b, :, tokens.to(device)] = out[k, :, : len(tokens)]
        return back

    return Candidate(_leaves(inputs), run, in_rows)


def _leaves(given: Tensors) -> list[torch.Tensor]:
    return [x.detach().requires_grad_(True) for x in given]


def candidates(case: Case, given: Tensors) -> dict[str, Candidate]:
    """All implementations that can compute a case here, the peer first.

    Left out are the reference and, on a CPU, the interpreted kernel and uncompiled FlexAttention.
    """
    like = given[0].detach().requires_grad_(True)
    usable = [
        name
        for name in BACKENDS.names()
        if name != "reference"
        and (like.is_cuda or name not in ("triton", "flex"))
        and BACKENDS.get(name).unavailable(like) is None
    ]
    backends = {name: backend(name, case, given) for name in usable}
    peer = {"sdpa": backends.pop("sdpa")} if case.packed_mask is None else {"padded": padded(case, given)}
    return peer | backends


# ------------------------------------------------------------------------------------------------ the measurement


def rows_of(case: Case, shape: str, device: torch.device) -> list[torch.Tensor]:
    """Random q, k, v of a case, fp32 on a CPU and bf16 on a GPU; heads are contiguous per token."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, kv_heads, head_dim = HEADS[shape]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(case.rows, case.length, h, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]


def peak(candidate: str, shape: str, length: int, rows: int, device: str, scale: float) -> float:
    """Peak memory (MiB) of one candidate on rows with shared prefixes; call it in a process of its own."""
    place, case = resolve_device(device), instruct_cases(length, rows, scale=scale)[-1]
    given = rows_of(case, shape, place)
    way = padded(case, given) if candidate == "padded" else backend(candidate, case, given)
    del given
    return peak_mib(way.forward_backward, place)


def bench_attention(
    shapes: Sequence[Shape] = ("128", "64"),
    length: int = 2048,
    rows: int = 1,
    rounds: int = 7,
    device: Literal["cpu", "cuda", "auto"] = "cpu",
    clock: Clock = "wall",
    scale: float = 1.0,
    memory: bool = True,
) -> dict[str, Any]:
    """Time attention forward and backward, interleaved, on rows of samples like LLaVA-Instruct's.

    Args:
        shapes: names of `HEADS`.
        length: tokens of a row.
        rows: of the batch.
        rounds: timed turns per case.
        device: "cpu" (fp32), "cuda" (bf16) or "auto".
        clock: as in `in_turns`.
        scale: as in `instruct_cases`.
        memory: also measure the peak, in processes of their own.

    Returns:
        Of the case with shared prefixes and the first shape: `ours` and `peer` (milliseconds of the fastest backend,
        the `candidate`, and of the padded batch), their `ratio` and `peak_memory_ratio` (ours / peer, None if not
        measured); `device`; `cases`, one row per case, shape and candidate.

    Raises:
        AssertionError: two candidates do not compute the same.
        TooNoisyError: as `steady_in_turns`.
    """
    place = resolve_device(device)
    facts, cases = circumstances(place), []
    for shape in shapes:
        heads, kv_heads, head_dim = HEADS[shape]
        for case in instruct_cases(length, rows, scale=scale):
            given = rows_of(case, shape, place)
            ways = candidates(case, given)
            _agree(ways)
            for way in ways.values():
                way.forward_backward()
            peer = next(iter(ways))
            work = {name: way.forward_backward for name, way in ways.items()}
            seconds = steady_in_turns(work, peer, rounds, clock)
            for name, values in seconds.items():
                times = {"low": min(values), "high": max(values), "ms": statistics.median(values)}
                cases.append(
                    {
                        **facts, "case": case.name, "shape": shape, "heads": heads, "kv_heads": kv_heads,
                        "head_dim": head_dim, "dtype": str(given[0].dtype).removeprefix("torch."), "rows": rows,
                        "length": length, "samples": len(case.samples), "candidate": name,
                        **{key: round(1000 * times[key], 3) for key in ("ms", "low", "high")}, "peer": peer,
                        **{key: round(value, 3) for key, value in ratios(values, seconds[peer]).items()},
                        "rounds": rounds, "clock": clock,
                    }
                )  # fmt: skip
    last = [row for row in cases if row["shape"] == shapes[0] and row["case"] == "packed, shared prefixes"]
    best = max(last[1:], key=lambda row: row["ratio"])
    peaks: list[float] = []
    if memory:
        same = {"shape": shapes[0], "length": length, "rows": rows, "device": device, "scale": scale}
        peaks = [in_own_process(f"{__name__}:peak", candidate=name, **same) for name in (best["candidate"], "padded")]
    return {
        "ratio": best["ratio"], "ours": best["ms"], "peer": last[0]["ms"], "candidate": best["candidate"],
        "peak_memory_ratio": round(peaks[0] / peaks[1], 3) if peaks else None, "device": facts["device"],
        "cases": cases,
    }  # fmt: skip


def _agree(ways: dict[str, Candidate]) -> None:
    with torch.no_grad():
        outputs = {name: way.in_rows(way.run(*way.inputs)).float() for name, way in ways.items()}
    (first, expected), *others = outputs.items()
    allowed = 1e-4 if next(iter(ways.values())).inputs[0].dtype == torch.float32 else 4e-2
    for name, output in others:
        error = float((output - expected).abs().max())
        assert error < allowed, f"{name} and {first} differ by {error:.2g}, so their times cannot be compared"
