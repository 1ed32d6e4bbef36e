from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch

from benchmarks import generate as bench_of
from benchmarks.attention import bench_attention, instruct_cases
from benchmarks.attention import peak as bench_attention_peak
from benchmarks.common import append_rows, in_own_process, in_turns, peak_mib
from benchmarks.generate import bench_generate
from llava_core.ops import BACKENDS
from llava_core.ops.attention import Backend
from llava_core.runtime import DataError

CPU = torch.device("cpu")


def test_ratio_is_above_one_when_the_peer_is_slower() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    found = in_turns(lambda: work("ours", 0.01), lambda: work("peer", 0.03), 4)
    assert 1.5 < found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert found["peer"] > found["ours"] > 0.009
    assert sorted([tuple(order[k : k + 2]) for k in range(0, 8, 2)]) == [("ours", "peer")] * 2 + [("peer", "ours")] * 2
    idle = in_turns(lambda: time.sleep(0.05), lambda: sum(range(10**6)), 3, clock="cpu")
    assert idle["ours"] < idle["peer"]


def test_peak_memory_is_measured_in_its_own_process() -> None:
    before = peak_mib(lambda: None, CPU)
    held = torch.ones(2**22)  # 16 MiB that stay
    high = peak_mib(lambda: torch.ones(48 * 2**18).sum(), CPU)  # 48 MiB for a moment
    after = peak_mib(lambda: None, CPU)
    assert high - before > 50
    assert high - after > 30
    del held


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


def test_generate_rows_have_equal_tokens_of_both_models() -> None:
    found = bench_generate("tiny", (1, 3), new_tokens=6, rounds=1, memory=False)
    assert found["same_tokens"] is True
    assert found["peak_memory_ratio"] is None
    assert [row["batch"] for row in found["cases"]] == [1, 3]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in found["cases"])
    assert found["ratio"] == min(row["ratio"] for row in found["cases"])
    assert found["device"] == "cpu"
    assert bench_of.peak("ours", "tiny", 1, 2, "cpu") > 50


def test_generate_refuses_different_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    of = bench_of.peer_model
    monkeypatch.setattr(bench_of, "peer_model", lambda shape, device, ours: of(shape, device))
    assert bench_generate("tiny", (1,), new_tokens=6, rounds=1, memory=False)["same_tokens"] is False


def test_attention_rows_of_equal_outputs() -> None:
    found = bench_attention(("tiny",), length=96, rows=2, rounds=2, scale=0.08, memory=False)
    rows = found["cases"]
    assert {row["case"] for row in rows} == {"causal", "packed", "packed, shared prefixes"}
    assert {row["candidate"] for row in rows} >= {"padded", "sdpa", "cpu_varlen"}
    assert all(row["low"] <= row["ms"] <= row["high"] for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["candidate"] == row["peer"])
    assert min(row["samples"] for row in rows if row["case"] == "packed") > 4
    assert found["ratio"] == max(row["ratio"] for row in rows[-2:])
    assert found["peak_memory_ratio"] is None
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
