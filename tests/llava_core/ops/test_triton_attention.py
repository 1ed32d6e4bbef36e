"""The Triton kernel, on a GPU or in the interpreter of Triton: equal to the reference, and every mutant is detected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_rows import ROWS, packed_row, random_row

from companion import mutants
from llava_core.ops import BACKENDS, PackedMask, attention
from llava_core.ops.block_mask import EMPTY, FULL, PARTIAL, block_states, block_table
from llava_core.runtime import ROOT, CompanionError, DataError

pytest.importorskip("triton", reason="triton is not installed (the dev extra brings it on Linux, x86-64)")

from llava_core.ops import triton_attention as kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if (missing := BACKENDS.get("triton").unavailable(torch.zeros(1, 1, 1, 16, device=DEVICE))) is not None:
    pytest.skip(missing, allow_module_level=True)

BlockSizes = tuple[kernel.Blocks, kernel.Blocks, kernel.Blocks]
SMALL = kernel.Blocks(16, 16, 4, 1)
SIZES: dict[str, BlockSizes] = {
    "16": (SMALL, SMALL, SMALL),
    "different": (kernel.Blocks(32, 16, 4, 1), kernel.Blocks(16, 32, 4, 1), kernel.Blocks(16, 32, 4, 1)),
}
# two images with two conversations each, a text in between, padding: full, partial and empty 16 x 16 blocks
LARGE = [[70] * 20 + [45] * 15 + [41] * 6 + [45] * 4 + [70] * 25 + [75] * 5 + [76, 77]]
# a sample that ends one token into a block, and one that ends one token before a block does
TWO_ROWS = [[52] * 16 + [49] * 33 + [52] * 3, [31] * 31 + [52] * 21]


def mask(ends: list[list[int]]) -> PackedMask:
    return PackedMask(torch.tensor(ends, dtype=torch.int32, device=DEVICE))


def inputs(
    rows: int, length: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator, (heads, kv, d) = torch.Generator().manual_seed(0), shape
    return [torch.randn(rows, h, length, d, generator=generator).to(DEVICE, dtype) for h in (heads, kv, kv, heads)]


def run(backend: str, tensors: list[torch.Tensor], packed_mask: PackedMask | None) -> list[torch.Tensor]:
    """Output and gradients, in fp32."""
    *qkv, gradient = tensors
    leaves = [x.detach().requires_grad_(True) for x in qkv]
    run = BACKENDS.get(backend).run
    out = run(leaves[0], leaves[1], leaves[2], packed_mask)
    return [x.detach().float() for x in (out, *torch.autograd.grad(out, leaves, gradient))]


def max_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference in units of 1e-5 x (1 + |value|), the tolerance of fp32; NaN counts as infinite."""
    errors = [((f - e).abs() / (1e-5 + 1e-5 * e.abs())).max() for f, e in zip(actual, expected, strict=True)]
    return float(torch.stack(errors).nan_to_num(nan=float("inf")).max())


def assert_equals_reference(tensors: list[torch.Tensor], packed_mask: PackedMask | None) -> None:
    assert max_error(run("triton", tensors, packed_mask), run("reference", tensors, packed_mask)) < 1


@pytest.fixture(params=SIZES)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Block sizes so small that a short row has several blocks."""
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: SIZES[request.param])
    return str(request.param)


@pytest.mark.parametrize("name", ROWS)
def test_kernel_equals_reference(name: str, small_blocks: str) -> None:
    packed_mask = packed_row(name).to(DEVICE)
    assert_equals_reference(inputs(*packed_mask.ends.shape, (2, 1, 8)), packed_mask)


@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (2, 1, 80), (1, 1, 96), (1, 1, 128), (4, 1, 16), (4, 2, 8), (3, 3, 20)], ids=str
)
def test_head_sizes_and_grouped_queries(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: SIZES["16"])
    ends = LARGE if shape[0] < 3 else packed_row("two levels").ends.tolist()
    assert_equals_reference(inputs(1, len(ends[0]), shape), mask(ends))


def test_rows_have_full_partial_and_empty_blocks() -> None:
    for ends in (LARGE, TWO_ROWS):
        assert set(block_states(mask(ends), 16, 16).flatten().tolist()) == {FULL, PARTIAL, EMPTY}


def test_several_rows_and_random_rows(small_blocks: str) -> None:
    assert_equals_reference(inputs(2, 52, (2, 1, 16)), mask(TWO_ROWS))
    drawn = PackedMask(torch.cat([random_row(seed, 53).ends for seed in (3, 5)]).to(DEVICE))
    assert_equals_reference(inputs(2, 53, (1, 1, 16)), drawn)


@pytest.mark.parametrize("length", [1, 16, 45])
def test_rows_without_mask_are_causal(length: int, small_blocks: str) -> None:
    assert_equals_reference(inputs(1, length, (2, 1, 16)), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_block_sizes(head_dim: int, dtype: torch.dtype) -> None:
    length = 150
    packed_mask = mask([[140] * 60 + [100] * 40 + [140] * 40 + list(range(141, 151))])
    tensors = inputs(1, length, (1, 1, head_dim), dtype)
    exact = run("reference", [x.float() for x in tensors], packed_mask)
    plain, ours = run("reference", tensors, packed_mask), run("triton", tensors, packed_mask)
    assert_ratio_rule(ours, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 32), (1, 1, 80)], ids=str)
def test_low_precision_error_follows_ratio_rule(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: SIZES["different"])
    tensors = inputs(1, 77, shape, dtype)
    exact = run("reference", [x.float() for x in tensors], mask(LARGE))
    assert_ratio_rule(run("triton", tensors, mask(LARGE)), run("reference", tensors, mask(LARGE)), exact)


def assert_ratio_rule(ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    for k, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert float((o - e).abs().max()) <= (2 if k == 0 else 3) * float((p - e).abs().max()) + 1e-5


def test_strided_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one projection, features that are not contiguous, an expanded gradient."""
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: SIZES["16"])
    both = torch.randn(2, 40, 4, 24, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    q, k, v = both[:, :, :2].transpose(1, 2), both[:, :, 2:3].transpose(1, 2), both[:, :, 3:].transpose(1, 2)
    turned = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert turned.stride(-1) != 1
    gradient = torch.ones((), device=DEVICE).expand(2, 2, 40, 24)
    expected = run("reference", [q, k, v, gradient], None)
    assert max_error(run("triton", [q, k, v, gradient], None), expected) < 1
    assert max_error(run("triton", [q, k, turned, gradient], None), expected) < 1
    out = attention(q, k, v, backend="triton")
    assert out.transpose(1, 2).is_contiguous()  # what the next layer reads


def test_equal_inputs_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: SIZES["16"])
    tensors = inputs(2, 52, (2, 1, 8))
    first, second = (run("triton", tensors, mask(TWO_ROWS)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_scores_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: SIZES["16"])
    q, k, v, gradient = inputs(1, 77, (1, 1, 16))
    actual = run("triton", [60 * q, 60 * k, v, gradient], mask(LARGE))
    expected = run("reference", [60 * q, 60 * k, v, gradient], mask(LARGE))
    assert all(bool(x.isfinite().all()) for x in actual)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)


def test_kernel_compiles_without_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: SIZES["16"])
    *qkv, gradient = inputs(1, 40, (2, 1, 16))
    packed_mask = mask([[30] * 10 + [20] * 10 + [30] * 10 + [40] * 10])

    def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_mask: PackedMask) -> torch.Tensor:
        first = attention(q, k, v, packed_mask=packed_mask, backend="triton")
        return attention(first + q, k, v, packed_mask=packed_mask, backend="triton")

    actual = []
    for function in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        leaves = [x.detach().requires_grad_(True) for x in qkv]
        out = function(*leaves, PackedMask(packed_mask.ends))
        actual.append([out.detach(), *torch.autograd.grad(out, leaves, gradient)])
    assert max_error(actual[1], actual[0]) < 1


def test_operator_passes_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: SIZES["16"])
    q, k, v, _ = (x.requires_grad_(True) for x in inputs(1, 20, (2, 1, 8)))
    packed_mask = mask([[12] * 12 + [20] * 8])
    tables = [packed_mask.cached(block_table, 16, 16, of) for of in "qqk"]
    torch.library.opcheck(
        kernel._attention, (q, k, v, packed_mask.ends, *tables), test_utils=("test_schema", "test_faketensor")
    )


def test_unsupported_inputs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.zeros(1, 1, 4, 160, device=DEVICE)
    with pytest.raises(CompanionError, match="head_dim of at most 128, not 160"):
        attention(wide, wide, wide, backend="triton")
    double = torch.zeros(1, 1, 4, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(CompanionError, match="does not support float64"):
        attention(double, double, double, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    here = torch.zeros(1, 1, 4, 16)
    with pytest.raises(CompanionError, match="needs a GPU, or TRITON_INTERPRET=1"):
        attention(here, here, here, backend="triton")


# ------------------------------------------------------------------------------------------------ mutation testing


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    return run("reference", inputs(2, 52, (2, 1, 16)), mask(TWO_ROWS))


@pytest.mark.filterwarnings("ignore:invalid value")  # of some mutants
@pytest.mark.parametrize("name", ["original", *mutants.ATTENTION])
def test_mutants_are_detected(name: str, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = kernel
    if name in mutants.ATTENTION:
        mutant: Any = mutants.mutated_module(mutants.ATTENTION[name])
        if hasattr(mutant, "triton_attention"):
            module = mutant
        else:
            monkeypatch.setattr(module, "block_table", mutant.block_table)
    monkeypatch.setattr(module, "blocks", lambda head_dim, dtype: SIZES["16"])
    *qkv, gradient = inputs(2, 52, (2, 1, 16))
    leaves = [x.requires_grad_(True) for x in qkv]
    out = module.triton_attention(*leaves, mask(TWO_ROWS))
    error = max_error([out.detach()], expected[:1])
    if error < 1:  # a wrong output is enough, and the interpreter is slow
        error = max_error(list(torch.autograd.grad(out, leaves, gradient)), expected[1:])
    assert error > 100 if name in mutants.ATTENTION else error < 1


def test_mutant_changes_exactly_one_place() -> None:
    with pytest.raises(DataError, match="occurs 0 times"):
        mutants.mutated_module(mutants.Mutant("llava_core/ops/block_mask.py", "no such text", ""))


# ------------------------------------------------------------------------------------------------ for a GPU


@pytest.mark.slow
def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """The interpreter accepts more than the compiler; shared memory must suffice on every GPU of these capabilities."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), "bfloat16", "128", "80", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    actual = json.loads(done.stdout)
    assert actual.keys() == {"80", "90"}
    for needed in actual.values():
        assert needed.keys() == {"_fwd", "_bwd_preprocess", "_bwd_dq", "_bwd_dkdv"}
        assert all(shared <= 99 * 1024 for shared in needed.values())
