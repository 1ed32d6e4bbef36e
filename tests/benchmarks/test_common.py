"""Timing in turns, peak memory and result files of the benchmarks."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.common import TooNoisyError, append_rows, in_own_process, in_turns
from benchmarks.run import BENCHMARKS, RESULTS, code_of, stored_rows
from companion.cli import main
from llava_core.runtime import ROOT, DataError


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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; a timed function sets it forward."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.common.time.perf_counter", lambda: now[0])
    return now


def test_more_rounds_until_the_ratio_is_steady(clock: list[float]) -> None:
    peer_seconds = iter([9.0, 1.0, 4.0, 2.0, 2.1, 1.9, *[50.0] * 20])

    def peer() -> None:
        clock[0] += next(peer_seconds)

    def ours() -> None:
        clock[0] += 1.0

    assert in_turns(ours, peer, 3) == pytest.approx(
        {"ours": 1, "peer": 2, "ratio": 2, "ratio_low": 1.9, "ratio_high": 2.1}
    )
    assert next(peer_seconds) == 50.0, "no round after the first steady ones"


def test_no_ratio_of_a_noisy_measurement(clock: list[float]) -> None:
    rounds = []

    def peer() -> None:
        rounds.append(1)
        clock[0] += 1.0 if len(rounds) % 2 else 1.6

    def ours() -> None:
        clock[0] += 1.0

    with pytest.raises(TooNoisyError, match=r"after 15 rounds the ratio of peer to ours still differs .* by (60|38) %"):
        in_turns(ours, peer, 3)
    assert len(rounds) == 15


def test_benchmarks_pin_threads_and_name_their_code(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        command = ["bench", "loss", "--rows", "8", "--width", "8", "--words", "16", "--rounds", "1", "--json"]
        assert main(command) == 0
        cases = json.loads(capsys.readouterr().out)["cases"]
        assert [(row["threads"], row["code"]) for row in cases] == [(1, code_of("loss"))] * 2
    finally:
        torch.set_num_threads(before)


def test_stored_rows_say_whether_their_code_is_present(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.run.RESULTS", tmp_path)
    rows = [{"ratio": 2.0, "code": code_of("loss")}, {"ratio": 3.0, "code": "0123456789ab"}, {"ratio": 4.0, "code": ""}]
    append_rows(tmp_path / "loss.csv", rows)
    assert list(stored_rows("loss")["code"]) == ["present", "older", "older"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_code_and_results_of_a_benchmark_exist(name: str) -> None:
    own = BENCHMARKS[name]
    assert all((ROOT / place).exists() for place in own.code)
    path = RESULTS / f"{own.module}.csv"
    if path.exists():
        assert {"code", "threads", "torch"} <= set(path.read_text().splitlines()[0].split(","))


def test_peak_memory_is_that_of_the_work() -> None:
    code = """
import json, torch
from benchmarks.common import peak_mib

cpu = torch.device("cpu")
torch.ones(2**10).sum()
before = peak_mib(lambda: None, cpu)
kept = torch.ones(2**22)  # 16 MiB that stay
high = peak_mib(lambda: torch.ones(48 * 2**18).sum(), cpu)  # 48 MiB for a moment
print(json.dumps([before, high, peak_mib(lambda: None, cpu)]))
"""  # in a process of its own: what other tests leave to be freed would count
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, high, after = json.loads(done.stdout)
    assert high - before > 50
    assert high - after > 30


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
