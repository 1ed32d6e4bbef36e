"""Our kernel, on a GPU where there is one and else step by step in Triton's interpreter.

It equals the definition forward and backward, and every way of breaking it that was thought of is seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_rows import TREES, forest, tree

from companion import mutants
from llava_core.ops import BACKENDS, Segments, attention
from llava_core.ops import block_mask as visits
from llava_core.runtime import ROOT, CompanionError, DataError

pytest.importorskip("triton", reason="triton is not installed (the dev extra brings it on Linux, x86-64)")

from llava_core.ops import triton_attention as kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if (missing := BACKENDS.get("triton").unavailable(torch.zeros(1, 1, 1, 16, device=DEVICE))) is not None:
    pytest.skip(missing, allow_module_level=True)

Cuts = tuple[kernel.Blocks, kernel.Blocks, kernel.Blocks]
SMALL = kernel.Blocks(16, 16, 4, 1)
CUTS: dict[str, Cuts] = {
    "16": (SMALL, SMALL, SMALL),
    "unlike": (kernel.Blocks(32, 16, 4, 1), kernel.Blocks(16, 32, 4, 1), kernel.Blocks(16, 32, 4, 1)),
}
# two images with two conversations each, a text in between, padding: 16 x 16 blocks without, with and with half a mask
LARGE = [[70] * 20 + [45] * 15 + [41] * 6 + [45] * 4 + [70] * 25 + [75] * 5 + [76, 77]]
# a sample that ends one token into a block, and one that ends one token before a block does
TWO_ROWS = [[52] * 16 + [49] * 33 + [52] * 3, [31] * 31 + [52] * 21]


def made(ends: list[list[int]]) -> Segments:
    return Segments(torch.tensor(ends, dtype=torch.int32, device=DEVICE))


def inputs(
    rows: int, length: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator, (heads, kv, d) = torch.Generator().manual_seed(0), shape
    return [torch.randn(rows, h, length, d, generator=generator).to(DEVICE, dtype) for h in (heads, kv, kv, heads)]


def run(backend: str, given: list[torch.Tensor], segments: Segments | None) -> list[torch.Tensor]:
    """Output and gradients, in fp32."""
    *qkv, gradient = given
    leaves = [x.detach().requires_grad_(True) for x in qkv]
    run = BACKENDS.get(backend).run
    out = run(leaves[0], leaves[1], leaves[2], segments)
    return [x.detach().float() for x in (out, *torch.autograd.grad(out, leaves, gradient))]


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference in units of 1e-5 x (1 + |value|); 1 is what fp32 may err, and no number errs without end."""
    errors = [((f - e).abs() / (1e-5 + 1e-5 * e.abs())).max() for f, e in zip(found, expected, strict=True)]
    return float(torch.stack(errors).nan_to_num(nan=float("inf")).max())


def equals_the_definition(given: list[torch.Tensor], segments: Segments | None) -> None:
    assert worst(run("triton", given, segments), run("reference", given, segments)) < 1


@pytest.fixture(params=CUTS)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks so small that a short row has several."""
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: CUTS[request.param])
    return str(request.param)


@pytest.mark.parametrize("name", TREES)
def test_the_kernel_equals_the_definition(name: str, cut: str) -> None:
    segments = tree(name).to(DEVICE)
    equals_the_definition(inputs(*segments.ends.shape, (2, 1, 8)), segments)


@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (2, 1, 80), (1, 1, 96), (1, 1, 128), (4, 1, 16), (4, 2, 8), (3, 3, 20)], ids=str
)
def test_every_head_size_and_every_sharing_of_keys(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: CUTS["16"])
    ends = LARGE if shape[0] < 3 else tree("two levels").ends.tolist()
    equals_the_definition(inputs(1, len(ends[0]), shape), made(ends))


def test_blocks_of_all_kinds_were_met() -> None:
    for ends in (LARGE, TWO_ROWS):
        assert set(visits.states(made(ends), 16, 16).flatten().tolist()) == {0, 1, 2}


def test_several_rows_and_forests_without_a_pattern(cut: str) -> None:
    equals_the_definition(inputs(2, 52, (2, 1, 16)), made(TWO_ROWS))
    drawn = Segments(torch.cat([forest(seed, 53).ends for seed in (3, 5)]).to(DEVICE))
    equals_the_definition(inputs(2, 53, (1, 1, 16)), drawn)


@pytest.mark.parametrize("length", [1, 16, 45])
def test_rows_without_segments_are_causal(length: int, cut: str) -> None:
    equals_the_definition(inputs(1, length, (2, 1, 16)), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_table_s_own_blocks(head_dim: int, dtype: torch.dtype) -> None:
    length = 150
    segments = made([[140] * 60 + [100] * 40 + [140] * 40 + list(range(141, 151))])
    given = inputs(1, length, (1, 1, head_dim), dtype)
    exact = run("reference", [x.float() for x in given], segments)
    plain, ours = run("reference", given, segments), run("triton", given, segments)
    within_the_ratio(ours, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 32), (1, 1, 80)], ids=str)
def test_low_precision_errs_at_most_by_the_ratio_rule(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: CUTS["unlike"])
    given = inputs(1, 77, shape, dtype)
    exact = run("reference", [x.float() for x in given], made(LARGE))
    within_the_ratio(run("triton", given, made(LARGE)), run("reference", given, made(LARGE)), exact)


def within_the_ratio(ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    for k, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert float((o - e).abs().max()) <= (2 if k == 0 else 3) * float((p - e).abs().max()) + 1e-5


def test_tensors_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one projection, features that do not lie together, a gradient that is one number for all."""
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: CUTS["16"])
    both = torch.randn(2, 40, 4, 24, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    q, k, v = both[:, :, :2].transpose(1, 2), both[:, :, 2:3].transpose(1, 2), both[:, :, 3:].transpose(1, 2)
    turned = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert turned.stride(-1) != 1
    gradient = torch.ones((), device=DEVICE).expand(2, 2, 40, 24)
    expected = run("reference", [q, k, v, gradient], None)
    assert worst(run("triton", [q, k, v, gradient], None), expected) < 1
    assert worst(run("triton", [q, k, turned, gradient], None), expected) < 1
    out = attention(q, k, v, backend="triton")
    assert out.transpose(1, 2).is_contiguous()  # what the next layer reads


def test_equal_inputs_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: CUTS["16"])
    given = inputs(2, 52, (2, 1, 8))
    first, second = (run("triton", given, made(TWO_ROWS)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_scores_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: CUTS["16"])
    q, k, v, gradient = inputs(1, 77, (1, 1, 16))
    found = run("triton", [60 * q, 60 * k, v, gradient], made(LARGE))
    expected = run("reference", [60 * q, 60 * k, v, gradient], made(LARGE))
    assert all(bool(x.isfinite().all()) for x in found)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


def test_a_graph_goes_through_the_kernel_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: CUTS["16"])
    *qkv, gradient = inputs(1, 40, (2, 1, 16))
    segments = made([[30] * 10 + [20] * 10 + [30] * 10 + [40] * 10])

    def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
        return attention(attention(q, k, v, segments=segments, backend="triton") + q, k, v, segments=segments,
                         backend="triton")  # fmt: skip

    found = []
    for function in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        leaves = [x.detach().requires_grad_(True) for x in qkv]
        out = function(*leaves, Segments(segments.ends))
        found.append([out.detach(), *torch.autograd.grad(out, leaves, gradient)])
    assert worst(found[1], found[0]) < 1


def test_the_operators_keep_pytorch_s_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks", lambda head_dim, dtype: CUTS["16"])
    q, k, v, _ = (x.requires_grad_(True) for x in inputs(1, 20, (2, 1, 8)))
    segments = made([[12] * 12 + [20] * 8])
    plans = [segments.plan(visits.visits, 16, 16, of) for of in "qqk"]
    torch.library.opcheck(
        kernel._attention, (q, k, v, segments.ends, *plans), test_utils=("test_schema", "test_faketensor")
    )


def test_what_the_kernel_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.zeros(1, 1, 4, 160, device=DEVICE)
    with pytest.raises(CompanionError, match="at most 128 features, not 160"):
        attention(wide, wide, wide, backend="triton")
    double = torch.zeros(1, 1, 4, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(CompanionError, match="no float64"):
        attention(double, double, double, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    here = torch.zeros(1, 1, 4, 16)
    with pytest.raises(CompanionError, match="needs a GPU, or TRITON_INTERPRET=1"):
        attention(here, here, here, backend="triton")


# ------------------------------------------------------------------------------------------------ broken on purpose


@pytest.fixture(scope="module")
def right() -> list[torch.Tensor]:
    return run("reference", inputs(2, 52, (2, 1, 16)), made(TWO_ROWS))


@pytest.mark.filterwarnings("ignore:invalid value")  # some break in just this way
@pytest.mark.parametrize("name", ["the kernel as it is", *mutants.ATTENTION])
def test_a_broken_kernel_is_seen(name: str, right: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = kernel
    if name in mutants.ATTENTION:
        broken: Any = mutants.broken_module(mutants.ATTENTION[name])
        if hasattr(broken, "triton_attention"):
            module = broken
        else:
            monkeypatch.setattr(module, "visits", broken.visits)
    monkeypatch.setattr(module, "blocks", lambda head_dim, dtype: CUTS["16"])
    *qkv, gradient = inputs(2, 52, (2, 1, 16))
    leaves = [x.requires_grad_(True) for x in qkv]
    out = module.triton_attention(*leaves, made(TWO_ROWS))
    error = worst([out.detach()], right[:1])
    if error < 1:  # a broken output says enough, and the interpreter takes its time
        error = worst(list(torch.autograd.grad(out, leaves, gradient)), right[1:])
    assert error > 100 if name in mutants.ATTENTION else error < 1


def test_a_mutant_breaks_one_place_or_none() -> None:
    with pytest.raises(DataError, match="stands there 0 times"):
        mutants.broken_module(mutants.Mutant("llava_core/ops/block_mask.py", "no such text", ""))


# ------------------------------------------------------------------------------------------------ for a GPU


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """The interpreter takes what the compiler does not; shared memory must do for every GPU of these capabilities."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), "bfloat16", "128", "80", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.keys() == {"80", "90"}
    for needed in found.values():
        assert needed.keys() == {"_forward", "_overlap", "_backward_q", "_backward_kv"}
        assert all(shared <= 99 * 1024 for shared in needed.values())
