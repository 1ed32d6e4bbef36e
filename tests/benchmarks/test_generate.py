"""The generation benchmark: equal tokens of both models, one row per batch size."""

from __future__ import annotations

import pytest

from benchmarks import generate as bench_of
from benchmarks.generate import bench_generate


def test_generate_rows_have_equal_tokens_of_both_models() -> None:
    result = bench_generate("tiny", (1, 3), new_tokens=6, rounds=1, memory=False)
    assert result["same_tokens"] is True
    assert result["peak_memory_ratio"] is None
    assert [row["batch"] for row in result["cases"]] == [1, 3]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in result["cases"])
    assert all(0 < row["products"] < 1 for row in result["cases"])
    assert result["ratio"] == min(row["ratio"] for row in result["cases"])
    assert result["device"] == "cpu"
    assert bench_of.peak("ours", "tiny", 1, 2, "cpu") > 50


def test_generate_refuses_different_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    of = bench_of.peer_model
    monkeypatch.setattr(bench_of, "peer_model", lambda shape, device, ours: of(shape, device))
    assert bench_generate("tiny", (1,), new_tokens=6, rounds=1, memory=False)["same_tokens"] is False
