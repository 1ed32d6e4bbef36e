"""One attention op, several backends.

A backend is a record: what it needs, why it is not to be had here, and how it runs. `auto` takes the first that can
run; a backend named explicitly never falls back.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from llava_core.ops import reference
from llava_core.ops.block_mask import one_sample, visits
from llava_core.ops.cpu_varlen import per_sample
from llava_core.ops.packed_mask import Segments
from llava_core.registry import Registry
from llava_core.runtime import CompanionError, ConfigError

log = logging.getLogger(__name__)
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments | None], torch.Tensor]

HAS_TRITON = importlib.util.find_spec("triton") is not None
MOST_HEAD_DIM = 128  # what a block of the kernel holds in shared memory
FLEX_BLOCK = 128  # the size that FlexAttention's own masks have


@dataclass(frozen=True)
class Backend:
    """How an implementation runs, and why it cannot for these tensors (None: it can)."""

    name: str
    run: Run
    unavailable: Callable[[torch.Tensor], str | None] = lambda q: None


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    mask = reference.allowed(q.shape[2], segments, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _flex_mask(segments: Segments) -> Any:
    """FlexAttention's description of who sees whom, from our own table of visits: nothing of T x T is made."""
    from torch.nn.attention.flex_attention import BlockMask

    ends = segments.ends
    table = segments.plan(visits, FLEX_BLOCK, FLEX_BLOCK, "q")[:, None]  # one for all heads
    everything, something = table[..., 0] - 2, table[..., 1] - table[..., 0]
    blocks = table[..., 2:].contiguous()
    # blocks that need the mask follow those that need none
    place = torch.arange(blocks.shape[-1], device=ends.device) + everything[..., None]
    partial = blocks.gather(-1, place.clamp(max=blocks.shape[-1] - 1).long())

    def seen(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < ends[row, key])

    length = ends.shape[1]
    return BlockMask.from_kv_blocks(
        something.contiguous(), partial, everything.contiguous(), blocks,
        BLOCK_SIZE=FLEX_BLOCK, mask_mod=seen, seq_lengths=(length, length),
    )  # fmt: skip


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention)
    return compiled


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    segments = one_sample(q.shape[0], q.shape[2], q.device) if segments is None else segments.to(q.device)
    how = {"block_mask": segments.plan(_flex_mask), "enable_gqa": q.shape[1] != k.shape[1]}
    if q.is_cuda:
        return _compiled_flex()(q, k, v, **how)
    with warnings.catch_warnings():  # not compiled it makes all scores: on a CPU to compare with, and nothing else
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        out: torch.Tensor = flex_attention(q, k, v, **how)
    return out


def _no_flex(q: torch.Tensor) -> str | None:
    if q.device.type == "cpu":
        return "FlexAttention has no backward pass there, and the queries want a gradient" if q.requires_grad else None
    return None if q.is_cuda else "FlexAttention needs a CUDA GPU"


def _triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    from llava_core.ops.triton_attention import triton_attention

    return triton_attention(q, k, v, segments)


def _no_triton(q: torch.Tensor) -> str | None:
    """Why our kernel cannot run for queries like these; None: it can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel has no {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] > MOST_HEAD_DIM:
        return f"the kernel's heads have at most {MOST_HEAD_DIM} features, not {q.shape[-1]}"
    if q.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "a kernel needs a GPU, or TRITON_INTERPRET=1 in the environment, which runs it step by step"
        from llava_core.ops.triton_attention import not_interpreted

        return not_interpreted()
    if not q.is_cuda:
        return "the kernel needs a GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "triton needs a GPU of compute capability 8.0 or newer"
    return None


BACKENDS: Registry[Backend] = Registry("attention backend")
for _backend in (
    Backend("sdpa", _sdpa),
    Backend("per_sample", per_sample, lambda q: None if q.device.type == "cpu" else "it is written for a CPU"),
    Backend("triton", _triton, _no_triton),
    Backend("flex", _flex, _no_flex),
    Backend("reference", reference.attention),
):
    BACKENDS.register(_backend.name)(_backend)


@cache
def trial(name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Let a backend compute a small packed row, forward and backward, once per process.

    A kernel is compiled for the GPU at hand; where that fails, or gives something else than the definition, a run of
    days should begin with another backend instead of ending at its first step.

    Returns:
        What went wrong, or None.
    """
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([[300] * 70 + [160] * 90 + [300] * 140], dtype=torch.int32)
    shapes = ((4, 300, head_dim), (2, 300, head_dim), (2, 300, head_dim))
    given = [torch.randn(1, *shape, generator=generator).to(device, dtype) for shape in shapes]

    def run(run: Run, precision: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.to(precision).requires_grad_() for x in given)
        with torch.enable_grad():
            out = run(q, k, v, Segments(ends.to(device)))
            grads = torch.autograd.grad(out.float().square().sum(), [q, k, v])
        return [x.detach().float() for x in (out, *grads)]

    try:
        found = run(BACKENDS.get(name).run, dtype)
    except Exception as error:
        return f"its trial ended with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    exact, plain = run(reference.attention, torch.float32), run(reference.attention, dtype)
    for part, (f, e, p) in enumerate(zip(found, exact, plain, strict=True)):
        # the rule of the tests, with room for the order of the sums
        allowance = (4 if part == 0 else 6) * float((p - e).abs().max()) + 2e-3 * float(e.abs().max())
        if not float((f - e).abs().max()) <= allowance:
            return "its trial differs from the definition"
    return None


def choose(q: torch.Tensor, segments: Segments | None) -> tuple[str, str]:
    """The backend that `auto` stands for, and why.

    Args:
        q: (B, heads, T, head_dim).
        segments: of the rows.

    Returns:
        A name in `BACKENDS`; the reason, for the log.
    """
    if segments is None:
        return "sdpa", "rows of one sample need nothing but PyTorch's causal kernel"
    if q.device.type == "cpu":
        return "per_sample", "a CPU computes a mask's forbidden pairs too; sample by sample there are few"
    passed: list[str] = []
    for name in ("triton", "flex"):
        reason = BACKENDS.get(name).unavailable(q)
        if reason is None and not torch.compiler.is_compiling():  # a compiler would trace the trial into the model
            reason = trial(name, q.shape[-1], q.dtype, q.device)
        if reason is None:
            return name, "; ".join(["it leaves out what no token sees", *passed])
        passed.append(f"{name}: {reason}")
    return "sdpa", "; ".join(["a mask of T x T", *passed])


@cache
def _say(name: str, why: str) -> None:
    log.info("attention backend auto -> %s (%s)", name, why)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    segments: Segments | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention within the samples of packed rows, which may have their beginnings in common.

    Args:
        q: (B, heads, T, head_dim).
        k, v: (B, kv_heads, T, head_dim).
        segments: which tokens belong together; None where a row is one sample.
        backend: a name in `BACKENDS`, or "auto": see `choose`.

    Returns:
        (B, heads, T, head_dim).

    Raises:
        ConfigError: unknown backend; segments of other rows.
        CompanionError: the named backend cannot run here; the message says why.
    """
    if segments is not None and segments.ends.shape != (q.shape[0], q.shape[2]):
        raise ConfigError(
            f"segments describe rows of {tuple(segments.ends.shape)}, the queries are {(q.shape[0], q.shape[2])}; "
            "fix: one row of `ends` per row of the batch"
        )
    if backend == "auto":
        backend, why = choose(q, segments)
        if not torch.compiler.is_compiling():
            _say(backend, why)
        return BACKENDS.get(backend).run(q, k, v, segments)
    chosen = BACKENDS.get(backend)
    if (reason := chosen.unavailable(q)) is not None:
        raise CompanionError(
            f"attention backend '{backend}' cannot run on {q.device}: {reason}; fix: use backend='auto'"
        )
    return chosen.run(q, k, v, segments)
