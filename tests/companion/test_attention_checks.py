from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from companion import attention_checks as checks
from llava_core.ops import BACKENDS, PackedMask
from llava_core.ops.attention import Backend
from llava_core.runtime import ROOT

ROW = checks.shared_prefix_row([(6, [4, 7]), (3, [5])])


def test_chapter_imports_load_no_compiler() -> None:
    """Triton reads at its import whether it is to interpret, so the chapter must come first; and it takes seconds."""
    modules = "benchmarks.common", "companion.attention_checks", "companion.figures", "llava_core.ops"
    code = f"import sys, {', '.join(modules)}; "
    code += "print([name for name in ('triton', 'torch._dynamo') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_row_with_shared_prefixes() -> None:
    assert ROW.ends.tolist() == [[17] * 6 + [10] * 4 + [17] * 7 + [25] * 3 + [25] * 5]
    assert ROW.samples == [[[(0, 10)], [(0, 6), (10, 17)], [(17, 25)]]]


def test_backends_hold_the_ratio_rule_in_both_precisions() -> None:
    inputs = checks.random_inputs(ROW, head_dim=16)
    running = {name for name in BACKENDS.names() if checks.supported_passes(name, inputs[0])}
    assert running >= {"sdpa", "cpu_varlen", "flex", "reference"}
    for dtype in (torch.float32, torch.bfloat16):
        rows = checks.parity_rows(inputs, ROW, dtype)
        assert {row["backend"] for row in rows} == running - {"reference"}
        assert all(row["ratio"] <= row["allowed"] for row in rows)


def test_ratio_rule_detects_a_missing_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = checks.random_inputs(ROW, head_dim=16)
    right = BACKENDS.get("cpu_varlen").run
    broken = Backend("cpu_varlen", lambda q, k, v, s: right(q * 1.01, k, v, s))
    monkeypatch.setattr(BACKENDS, "get", lambda name, get=BACKENDS.get: broken if name == "cpu_varlen" else get(name))
    rows = [r for r in checks.parity_rows(inputs, ROW, torch.float32) if r["backend"] == "cpu_varlen"]
    assert max(row["ratio"] / row["allowed"] for row in rows) > 10


def test_only_the_moved_boundary_is_detected() -> None:
    inputs = checks.random_inputs(ROW, head_dim=16)
    exact = checks.forward_backward("reference", inputs, ROW)
    wrong = checks.moved_boundary(ROW)
    assert wrong.samples == [[[(0, 11)], [(0, 6), (11, 17)], [(17, 25)]]]
    result = {
        name: checks.forward_backward("cpu_varlen", inputs, row) for name, row in (("ROW", ROW), ("wrong", wrong))
    }
    assert [row["caught"] for row in checks.detection_rows(result, exact)] == [False, True]
    assert checks.packed_difference(inputs, ROW) < 1e-5
    no_number = {"nan": {"output": torch.full_like(exact["output"], float("nan"))}}
    assert checks.detection_rows(no_number, exact)[0]["caught"]


def test_mutated_kernel_is_detected() -> None:
    inputs = checks.random_inputs(ROW, head_dim=16)
    if not checks.supported_passes("triton", inputs[0]):
        assert checks.mutated_kernels(inputs, ROW, ["dk lacks the scale"]) == {}
        pytest.skip(f"triton: {BACKENDS.get('triton').unavailable(inputs[0])}")
    result = checks.mutated_kernels(inputs, ROW, ["dk lacks the scale"])
    exact = checks.forward_backward("reference", inputs, ROW)
    assert [row["caught"] for row in checks.detection_rows(result, exact)] == [True]


def test_segments_of_lengths_are_a_row_without_images() -> None:
    assert PackedMask.from_lengths([[4, 7]]).ends.tolist() == checks.shared_prefix_row([(0, [4, 7])]).ends.tolist()
