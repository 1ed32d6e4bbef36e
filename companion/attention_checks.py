"""Acceptance checks of the attention backends: parity with the reference, packed against separate, mutation tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from companion.mutants import ATTENTION, mutated_module
from llava_core.ops import BACKENDS, PackedMask, attention

Parts = Mapping[str, torch.Tensor]  # the output and the gradients of q, k and v
RATIO = {"output": 2.0, "gradient": 3.0}
"""Error of a backend in a dtype, against fp32, as a multiple of the error of plain PyTorch in that dtype."""
FLOOR = 1e-6  # smaller errors are rounding of the last bit; their ratio means nothing
BLOCK = 16  # small enough that a row of a few dozen tokens has several blocks


def shared_prefix_row(images: Sequence[tuple[int, Sequence[int]]]) -> PackedMask:
    """Return the mask of a packed row; per image the length of its prefix and of the samples that share it."""
    ends: list[int] = []
    for prefix, lengths in images:
        ends += [len(ends) + prefix + sum(lengths)] * prefix
        for length in lengths:
            ends += [len(ends) + length] * length
    return PackedMask(torch.tensor([ends], dtype=torch.int32))


def sample_positions(packed_mask: PackedMask) -> list[list[int]]:
    """Return the positions of each sample of the first row, shared prefixes included."""
    return [[t for first, last in ranges for t in range(first, last)] for ranges in packed_mask.samples[0]]


def random_inputs(packed_mask: PackedMask, heads: int = 2, kv_heads: int = 1, head_dim: int = 32) -> list[torch.Tensor]:
    """Return random q, k, v and gradient of the output for packed rows, on the mask's device."""
    generator = torch.Generator().manual_seed(0)
    b, t = packed_mask.ends.shape
    shapes = [(b, h, t, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(packed_mask.ends.device) for shape in shapes]


def supported_passes(backend: str, like: torch.Tensor) -> str:
    """Return which passes a backend supports on a tensor's device: `forward and backward`, `forward`, or ``."""
    unavailable, like = BACKENDS.get(backend).unavailable, like.detach()
    if unavailable(like) is not None:
        return ""
    return "forward" if unavailable(like.clone().requires_grad_(True)) is not None else "forward and backward"


def forward_backward(
    backend: str, inputs: Sequence[torch.Tensor], packed_mask: PackedMask, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Run a backend in a dtype; return the output and, if it has a backward pass, the gradients, in fp32."""
    *qkv, gradient = (x.to(dtype) for x in inputs)
    backward = supported_passes(backend, qkv[0]) != "forward"
    leaves = [x.clone().requires_grad_(backward) for x in qkv]
    output = attention(leaves[0], leaves[1], leaves[2], packed_mask=packed_mask, backend=backend)
    grads = torch.autograd.grad(output, leaves, gradient) if backward else ()
    gradients = {f"gradient of {name}": g.float() for name, g in zip("qkv", grads, strict=False)}
    return {"output": output.detach().float(), **gradients}


def largest_errors(parts: Parts, expected: Parts) -> dict[str, float]:
    """Return the largest absolute difference of each part; NaN counts as infinite."""
    differences = {name: (value - expected[name]).abs() for name, value in parts.items()}
    return {name: float(value.nan_to_num(nan=float("inf")).max()) for name, value in differences.items()}


def rounding_errors(exact: Parts) -> dict[str, float]:
    """Return sixteen units in the last place of the largest fp32 value of each part."""
    return {part: 16 * torch.finfo(torch.float32).eps * float(value.abs().max()) for part, value in exact.items()}


def _ratio(part: str) -> float:
    return RATIO["output" if part == "output" else "gradient"]


def parity_rows(inputs: Sequence[torch.Tensor], packed_mask: PackedMask, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the errors of every backend that runs here, in a dtype, against the reference in fp32.

    The measure is the error of the reference in that dtype; in fp32, where it has none, it is `rounding_errors`.
    """
    exact = forward_backward("reference", inputs, packed_mask)
    plain = largest_errors(forward_backward("reference", inputs, packed_mask, dtype), exact)
    measures = plain if dtype != torch.float32 else rounding_errors(exact)
    rows = []
    for name in BACKENDS.names():
        if name == "reference" or not supported_passes(name, inputs[0].to(dtype)):
            continue
        for part, error in largest_errors(forward_backward(name, inputs, packed_mask, dtype), exact).items():
            row = {"backend": name, "dtype": str(dtype).removeprefix("torch."), "of": part, "error": error}
            ratio = error / max(measures[part], FLOOR)
            rows.append(row | {"measure": measures[part], "ratio": ratio, "allowed": _ratio(part)})
    return rows


def packed_difference(inputs: Sequence[torch.Tensor], packed_mask: PackedMask) -> float:
    """Return the largest difference between attention over the packed first row and over each sample separately."""
    q, k, v = (x[:1] for x in inputs[:3])
    packed = attention(inputs[0], inputs[1], inputs[2], packed_mask=packed_mask)[:1]
    differences = []
    for tokens in sample_positions(packed_mask):
        separate = attention(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens])
        differences.append(float((packed[:, :, tokens] - separate).abs().max()))
    return max(differences)


def moved_boundary(packed_mask: PackedMask, sample: int = 0) -> PackedMask:
    """Return the mask with an off-by-one error: the first token after a sample belongs to that sample."""
    ends = packed_mask.ends.clone()
    end = sample_positions(packed_mask)[sample][-1] + 1
    ends[0, ends[0] == end] = end + 1
    ends[0, end] = end + 1
    return PackedMask(ends)


def detection_rows(mutants: Mapping[str, Parts], exact: Parts) -> list[dict[str, Any]]:
    """Return whether each mutant has 100 times the allowed error in any part; error None: it is not finite."""
    rows, rounding = [], rounding_errors(exact)
    for name, parts in mutants.items():
        errors = largest_errors(parts, exact)
        caught = any(error > 100 * rounding[part] * _ratio(part) for part, error in errors.items())
        finite = {part: error if math.isfinite(error) else None for part, error in errors.items()}
        rows.append({"broken": name, "caught": caught, **finite})
    return rows


def mutated_kernels(
    inputs: Sequence[torch.Tensor], packed_mask: PackedMask, names: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return output and gradients of the Triton kernel by mutant; empty if it does not run here."""
    if not supported_passes("triton", inputs[0]):
        return {}
    from llava_core.ops import triton_attention as kernel

    results, small = {}, kernel.Blocks(BLOCK, BLOCK, 4, 1)
    for name in names:
        module: Any = mutated_module(ATTENTION[name])
        module.blocks = lambda head_dim, dtype: (small, small, small)
        leaves = [x.clone().requires_grad_(True) for x in inputs[:3]]
        output = module.triton_attention(*leaves, packed_mask)
        grads = torch.autograd.grad(output, leaves, inputs[3])
        gradients = {f"gradient of {n}": g for n, g in zip("qkv", grads, strict=True)}
        results[name] = {"output": output.detach(), **gradients}
    return results
