"""Attention over packed rows, with several backends.

`auto` takes the first available backend; a backend named explicitly never falls back.
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
from llava_core.ops.block_mask import block_table, causal_mask
from llava_core.ops.cpu_varlen import cpu_varlen
from llava_core.ops.packed_mask import PackedMask
from llava_core.registry import Registry
from llava_core.runtime import CompanionError, ConfigError

log = logging.getLogger(__name__)
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedMask | None], torch.Tensor]

HAS_TRITON = importlib.util.find_spec("triton") is not None
MAX_HEAD_DIM = 128  # of the Triton kernel, by its shared memory
FLEX_BLOCK = 128  # the default of FlexAttention


@dataclass(frozen=True)
class Backend:
    """An implementation, and the reason why it cannot run for given queries (None if it can)."""

    name: str
    run: Run
    unavailable: Callable[[torch.Tensor], str | None] = lambda q: None


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask | None) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    if packed_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    mask = reference.dense_mask(q.shape[2], packed_mask, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _flex_mask(packed_mask: PackedMask) -> Any:
    """FlexAttention's BlockMask from the table of blocks, without a T x T matrix."""
    from torch.nn.attention.flex_attention import BlockMask

    ends = packed_mask.ends
    table = packed_mask.cached(block_table, FLEX_BLOCK, FLEX_BLOCK, "q")[:, None]  # (B, 1, query blocks, 2 + blocks)
    n_full, n_partial = table[..., 0] - 2, table[..., 1] - table[..., 0]
    blocks = table[..., 2:].contiguous()
    index = torch.arange(blocks.shape[-1], device=ends.device) + n_full[..., None]  # partial blocks follow full ones
    partial_blocks = blocks.gather(-1, index.clamp(max=blocks.shape[-1] - 1).long())

    def mask_mod(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < ends[row, key])

    length = ends.shape[1]
    return BlockMask.from_kv_blocks(
        n_partial.contiguous(), partial_blocks, n_full.contiguous(), blocks,
        BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=(length, length),
    )  # fmt: skip


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask | None) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    packed_mask = causal_mask(q.shape[0], q.shape[2], q.device) if packed_mask is None else packed_mask.to(q.device)
    options = {"block_mask": packed_mask.cached(_flex_mask), "enable_gqa": q.shape[1] != k.shape[1]}
    if q.is_cuda:
        return _compiled_flex()(q, k, v, **options)
    with warnings.catch_warnings():  # uncompiled it materialises all scores: on a CPU only for comparison
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(q, k, v, **options)


def _no_flex(q: torch.Tensor) -> str | None:
    if q.device.type == "cpu":
        return "FlexAttention has no backward pass on a CPU; the queries need one" if q.requires_grad else None
    return None if q.is_cuda else "FlexAttention needs a CUDA GPU"


def _triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask | None) -> torch.Tensor:
    from llava_core.ops.triton_attention import triton_attention

    return triton_attention(q, k, v, packed_mask)


def _no_triton(q: torch.Tensor) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel does not support {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the kernel supports a head_dim of at most {MAX_HEAD_DIM}, not {q.shape[-1]}"
    if q.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the kernel needs a GPU, or TRITON_INTERPRET=1 in the environment for Triton's interpreter"
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
    Backend("cpu_varlen", cpu_varlen, lambda q: None if q.device.type == "cpu" else "it runs on a CPU only"),
    Backend("triton", _triton, _no_triton),
    Backend("flex", _flex, _no_flex),
    Backend("reference", reference.attention),
):
    BACKENDS.register(_backend.name)(_backend)


@cache
def self_test(name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compare a backend with the reference on a small packed row, forward and backward; returns the failure, or None.

    If the kernel does not compile for this GPU or gives wrong values, `auto` takes the next backend at once.
    """
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([[300] * 70 + [160] * 90 + [300] * 140], dtype=torch.int32)
    shapes = ((4, 300, head_dim), (2, 300, head_dim), (2, 300, head_dim))
    inputs = [torch.randn(1, *shape, generator=generator).to(device, dtype) for shape in shapes]

    def run(run: Run, precision: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.to(precision).requires_grad_() for x in inputs)
        with torch.enable_grad():
            out = run(q, k, v, PackedMask(ends.to(device)))
            grads = torch.autograd.grad(out.float().square().sum(), [q, k, v])
        return [x.detach().float() for x in (out, *grads)]

    try:
        result = run(BACKENDS.get(name).run, dtype)
    except Exception as error:
        return f"its self-test ended with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    exact, plain = run(reference.attention, torch.float32), run(reference.attention, dtype)
    for part, (r, e, p) in enumerate(zip(result, exact, plain, strict=True)):
        # the ratio rule of the tests, with an allowance for the order of summation
        allowance = (4 if part == 0 else 6) * float((p - e).abs().max()) + 2e-3 * float(e.abs().max())
        if not float((r - e).abs().max()) <= allowance:
            return "its self-test differs from the reference"
    return None


def choose(q: torch.Tensor, packed_mask: PackedMask | None) -> tuple[str, str]:
    """The name in `BACKENDS` that `auto` selects for queries (B, heads, T, head_dim), and the reason, for the log."""
    if packed_mask is None:
        return "sdpa", "PyTorch's causal kernel suffices for rows of one sample"
    if q.device.type == "cpu":
        return "cpu_varlen", "with a mask a CPU also computes masked pairs; separate samples have few"
    rejected: list[str] = []
    for name in ("triton", "flex"):
        reason = BACKENDS.get(name).unavailable(q)
        if reason is None and not torch.compiler.is_compiling():  # a compiler would trace the self-test
            reason = self_test(name, q.shape[-1], q.dtype, q.device)
        if reason is None:
            return name, "; ".join(["it skips empty blocks", *rejected])
        rejected.append(f"{name}: {reason}")
    return "sdpa", "; ".join(["a dense T x T mask", *rejected])


@cache
def _log_choice(name: str, why: str) -> None:
    log.info("attention backend auto -> %s (%s)", name, why)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, packed_mask: PackedMask | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Causal attention (B, heads, T, head_dim) within the samples of packed rows, which may share prefixes.

    Args:
        q: (B, heads, T, head_dim).
        k, v: (B, kv_heads, T, head_dim).
        packed_mask: of packed rows; None if each row is one sample.
        backend: a name in `BACKENDS`, or "auto": see `choose`.

    Raises:
        ConfigError: unknown backend, or a packed_mask of another shape.
        CompanionError: the named backend cannot run here; the message says why.
    """
    if packed_mask is not None and packed_mask.ends.shape != (q.shape[0], q.shape[2]):
        raise ConfigError(
            f"packed_mask has rows of {tuple(packed_mask.ends.shape)}, the queries are {(q.shape[0], q.shape[2])}; "
            "fix: one row of `ends` per row of the batch"
        )
    if backend == "auto":
        backend, why = choose(q, packed_mask)
        if not torch.compiler.is_compiling():
            _log_choice(backend, why)
        return BACKENDS.get(backend).run(q, k, v, packed_mask)
    chosen = BACKENDS.get(backend)
    if (reason := chosen.unavailable(q)) is not None:
        raise CompanionError(
            f"attention backend '{backend}' cannot run on {q.device}: {reason}; fix: use backend='auto'"
        )
    return chosen.run(q, k, v, packed_mask)
