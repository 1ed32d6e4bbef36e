"""The attention benchmark: equal outputs of all candidates, one row each."""

from __future__ import annotations

import math

import pytest

from benchmarks.attention import bench_attention, instruct_cases
from benchmarks.attention import peak as bench_attention_peak
from llava_core.ops import BACKENDS
from llava_core.ops.attention import Backend


def test_attention_rows_of_equal_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.common.MAX_RANGE", math.inf)  # the times are not looked at
    result = bench_attention(("tiny",), length=96, rows=2, rounds=2, scale=0.08, memory=False)
    rows = result["cases"]
    assert {row["case"] for row in rows} == {"causal", "packed", "packed, shared prefixes"}
    assert {row["candidate"] for row in rows} >= {"padded", "sdpa", "cpu_varlen"}
    assert all(row["low"] <= row["ms"] <= row["high"] for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["candidate"] == row["peer"])
    assert min(row["samples"] for row in rows if row["case"] == "packed") > 4
    assert result["ratio"] == max(row["ratio"] for row in rows[-2:])
    assert result["peak_memory_ratio"] is None
    assert bench_attention_peak("padded", "tiny", 96, 1, "cpu", 0.08) > 50


def test_attention_samples_share_prefixes_and_fill_rows() -> None:
    for case in instruct_cases(300, rows=2, scale=0.1)[1:]:
        lengths = [len(tokens) for _, tokens in case.samples]
        assert all(int(tokens[-1]) < 300 for _, tokens in case.samples)
        assert (sum(lengths) > 600) == (case.name == "packed, shared prefixes")


def test_attention_with_another_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS.get("cpu_varlen").run
    broken = Backend("cpu_varlen", lambda q, k, v, s: right(q, k, v, None))
    get = BACKENDS.get
    monkeypatch.setattr(BACKENDS, "get", lambda name: broken if name == "cpu_varlen" else get(name))
    with pytest.raises(AssertionError, match="cpu_varlen and padded differ"):
        bench_attention(("tiny",), length=96, rounds=1, scale=0.08)
