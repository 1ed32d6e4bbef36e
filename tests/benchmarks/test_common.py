"""Timing in turns, peak memory and result files of the benchmarks."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch

from benchmarks.common import append_rows, in_own_process, in_turns, peak_mib
from llava_core.runtime import DataError

CPU = torch.device("cpu")


def test_ratio_is_above_one_when_the_peer_is_slower() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    result = in_turns(lambda: work("ours", 0.01), lambda: work("peer", 0.03), 4)
    assert 1.5 < result["ratio_low"] <= result["ratio"] <= result["ratio_high"]
    assert result["peer"] > result["ours"] > 0.009
    assert sorted([tuple(order[k : k + 2]) for k in range(0, 8, 2)]) == [("ours", "peer")] * 2 + [("peer", "ours")] * 2
    idle = in_turns(lambda: time.sleep(0.05), lambda: sum(range(10**6)), 3, clock="cpu")
    assert idle["ours"] < idle["peer"]


def test_peak_memory_is_measured_in_its_own_process() -> None:
    before = peak_mib(lambda: None, CPU)
    kept = torch.ones(2**22)  # 16 MiB that stay
    high = peak_mib(lambda: torch.ones(48 * 2**18).sum(), CPU)  # 48 MiB for a moment
    after = peak_mib(lambda: None, CPU)
    assert high - before > 50
    assert high - after > 30
    del kept


def test_function_in_its_own_process() -> None:
    assert in_own_process("json:dumps", obj=[1, "a"]) == '[1, "a"]'
    with pytest.raises(RuntimeError, match="no_such_name"):
        in_own_process("json:no_such_name")


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.csv"
    append_rows(path, [{"a": 1, "b": "x, y"}])
    append_rows(path, [{"a": 2, "b": None}, {"a": 3, "b": "z"}])
    with path.open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}, {"a": "3", "b": "z"}]
    with pytest.raises(DataError, match="columns are not a, c"):
        append_rows(path, [{"a": 1, "c": 2}])
