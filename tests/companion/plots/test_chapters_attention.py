from __future__ import annotations

import csv
import subprocess
import sys

import pytest
import torch

from companion.plots import chapters_attention as show
from llava_core.ops import BACKENDS, PackedMask
from llava_core.ops.attention import Backend
from llava_core.runtime import ROOT

ROW = show.shared_row([(6, [4, 7]), (3, [5])])


def test_what_the_chapter_imports_loads_no_compiler() -> None:
    """Triton reads at its import whether it is to interpret, so the chapter must come first; and it takes seconds."""
    modules = "chapters_attention", "chapters_speed", "figures"
    code = f"import sys; from companion.plots import {', '.join(modules)}; from llava_core.ops import BACKENDS; "
    code += "print([name for name in ('triton', 'torch._dynamo') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_row_of_images_with_several_samples() -> None:
    assert ROW.ends.tolist() == [[17] * 6 + [10] * 4 + [17] * 7 + [25] * 3 + [25] * 5]
    assert ROW.samples == [[[(0, 10)], [(0, 6), (10, 17)], [(17, 25)]]]
    counts = show.pair_counts(ROW, 4)
    assert counts["needed, packed"] == 17 * 18 // 2 - 4 * 7 + 8 * 9 // 2
    assert counts["padded"] == 3 * 13**2
    assert counts["packed, sample by sample"] == 2 * 10**2 + 7 * 13  # the two that begin a row are stacked
    assert counts["packed, all"] == 25**2
    assert counts["needed, packed"] < counts["packed, blocks of 4"] < counts["packed, all"]


def test_every_backend_that_runs_holds_the_ratio_rule_in_both_precisions() -> None:
    inputs = show.attention_inputs(ROW, head_dim=16)
    running = {name for name in BACKENDS.names() if show.what_runs(name, inputs[0])}
    assert running >= {"sdpa", "cpu_varlen", "flex", "reference"}
    for dtype in (torch.float32, torch.bfloat16):
        rows = show.parity_rows(inputs, ROW, dtype)
        assert {row["backend"] for row in rows} == running - {"reference"}
        assert all(row["ratio"] <= row["allowed"] for row in rows)
        show.parity_figure(rows)


def test_the_table_says_what_runs_and_why_not() -> None:
    rows = {row["backend"]: row for row in show.backend_rows(show.attention_inputs(ROW), ROW)}
    assert [name for name, row in rows.items() if row["auto takes it"]] == ["cpu_varlen"]
    if not torch.cuda.is_available():
        assert rows["flex"]["runs here"] == "forward"
        assert "no backward pass" in rows["flex"]["because"]
    assert rows["cpu_varlen"]["because"]


def test_the_ratio_rule_sees_a_missing_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = show.attention_inputs(ROW, head_dim=16)
    right = BACKENDS.get("cpu_varlen").run
    broken = Backend("cpu_varlen", lambda q, k, v, s: right(q * 1.01, k, v, s))
    monkeypatch.setattr(BACKENDS, "get", lambda name, get=BACKENDS.get: broken if name == "cpu_varlen" else get(name))
    rows = [r for r in show.parity_rows(inputs, ROW, torch.float32) if r["backend"] == "cpu_varlen"]
    assert max(row["ratio"] / row["allowed"] for row in rows) > 10


def test_a_moved_border_is_caught_and_nothing_else_is() -> None:
    inputs = show.attention_inputs(ROW, head_dim=16)
    exact = show.forward_backward("reference", inputs, ROW)
    wrong = show.moved_border(ROW)
    assert wrong.samples == [[[(0, 11)], [(0, 6), (11, 17)], [(17, 25)]]]
    found = {name: show.forward_backward("cpu_varlen", inputs, row) for name, row in (("ROW", ROW), ("wrong", wrong))}
    assert [row["caught"] for row in show.caught_rows(found, exact)] == [False, True]
    assert show.apart(inputs, ROW) < 1e-5
    no_number = {"nan": {"output": torch.full_like(exact["output"], float("nan"))}}
    assert show.caught_rows(no_number, exact)[0]["caught"]


def test_a_broken_kernel_is_caught() -> None:
    inputs = show.attention_inputs(ROW, head_dim=16)
    if not show.what_runs("triton", inputs[0]):
        assert show.broken_kernels(inputs, ROW, ["dk lacks the scale"]) == {}
        pytest.skip(f"triton: {BACKENDS.get('triton').unavailable(inputs[0])}")
    found = show.broken_kernels(inputs, ROW, ["dk lacks the scale"])
    exact = show.forward_backward("reference", inputs, ROW)
    assert [row["caught"] for row in show.caught_rows(found, exact)] == [True]


def test_the_picture_shows_shared_tokens_in_a_shade_of_their_own() -> None:
    left, right = show.mask_figure(ROW, ["a", "b", "c"]).axes
    assert left.images[0].get_array().shape == (13, 39)
    packed = right.images[0].get_array()
    assert packed.shape == (25, 25)
    assert set(packed[:6].flatten().tolist()) == {0, 4}
    assert packed[12, :6].tolist() == [2] * 6
    assert packed[12, 6:10].tolist() == [0] * 4
    assert packed[20, 10:].max() == 3


def test_recorded_times_are_the_latest_of_each_device() -> None:
    rows = show.recorded_times()
    with (ROOT / "benchmarks" / "results" / "attention.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert rows[-1]["date"] == last["date"]
    assert {row["case"] for row in rows} == {"causal", "packed", "packed, shared prefixes"}
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert len({(row["device"], row["date"]) for row in rows}) == len({row["device"] for row in rows})


def test_only_real_times_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    names = show.timed_here(torch.zeros(1, 1, 4, 16))
    assert {"sdpa", "cpu_varlen", "reference"} == set(names)


def test_segments_of_lengths_are_a_row_without_images() -> None:
    assert PackedMask.from_lengths([[4, 7]]).ends.tolist() == show.shared_row([(0, [4, 7])]).ends.tolist()
