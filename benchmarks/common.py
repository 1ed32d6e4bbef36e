"""What the benchmarks share: interleaved timing, peak memory in a process of its own, one CSV row per case."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from llava_core.runtime import CompanionError, DataError, atomic_write, display_path, environment
from llava_core.train.processes import die_with_parent

Clock = Literal["wall", "cpu"]
MAX_RANGE = 0.25  # of a ratio: highest minus lowest of the rounds; a wider one is not reported
PATIENCE = 5  # times the rounds asked for, before a measurement is given up as too noisy


class TooNoisyError(CompanionError):
    """The rounds of a measurement differ too much for a ratio."""


def in_turns(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int, clock: Clock = "wall"
) -> dict[str, float]:
    """Time two functions interleaved, so that other load on the machine affects both.

    Args:
        ours, peer: the timed functions; call each once before.
        rounds: timed turns, at least; the order alternates.
        clock: "wall", or "cpu": computing time of this process, which other load does not change on one thread.

    Returns:
        Median seconds of `ours` and `peer`, and the `ratio` peer / ours as the median over the rounds with its lowest
        and highest: above 1 we are faster.

    Raises:
        TooNoisyError: as `steady_in_turns`.
    """
    seconds = steady_in_turns({"ours": ours, "peer": peer}, "peer", rounds, clock)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, **ratios(seconds["ours"], seconds["peer"])}


def all_in_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, clock: Clock = "wall"
) -> dict[str, list[float]]:
    """Time any number of functions interleaved, as `in_turns`, with as many rounds as asked for.

    Returns:
        Name -> seconds of each round.
    """
    timed = list(itertools.islice(_rounds(functions, clock), rounds))
    return {name: [seconds[name] for seconds in timed] for name in functions}


def steady_in_turns(
    functions: Mapping[str, Callable[[], object]], peer: str, rounds: int, clock: Clock = "wall"
) -> dict[str, list[float]]:
    """Time functions interleaved until the ratios of the last `rounds` rounds have ranges of at most `MAX_RANGE`.

    Returns:
        Name -> seconds of each of these rounds.

    Raises:
        TooNoisyError: not within `PATIENCE` times as many rounds; no ratio is reported.
    """
    timed: list[dict[str, float]] = []
    for seconds in itertools.islice(_rounds(functions, clock), PATIENCE * rounds):
        timed = [*timed, seconds][-rounds:]
        last = {name: [seconds[name] for seconds in timed] for name in functions}
        widths = {name: relative_range(own, last[peer]) for name, own in last.items()}
        if len(timed) == rounds and max(widths.values()) <= MAX_RANGE:
            return last
    widest = max(widths, key=lambda name: widths[name])
    raise TooNoisyError(
        f"too noisy: after {PATIENCE * rounds} rounds the ratio of {peer} to {widest} still differs between "
        f"{rounds} rounds by {100 * widths[widest]:.0f} % of it, and at most {100 * MAX_RANGE:.0f} % are reported",
        "fix: stop other work on this machine, or measure computing time with `--clock cpu`",
    )


def _rounds(functions: Mapping[str, Callable[[], object]], clock: Clock) -> Iterator[dict[str, float]]:
    """Seconds of each function, round by round; every second round has the opposite order."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    for k in itertools.count():
        seconds = {}
        for name in list(functions)[:: 1 if k % 2 else -1]:
            _finish()
            begin = now()
            functions[name]()
            _finish()
            seconds[name] = now() - begin
        yield seconds


def relative_range(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Highest minus lowest ratio of the rounds, divided by their median."""
    found = ratios(ours, peer)
    return (found["ratio_high"] - found["ratio_low"]) / found["ratio"]


def ratios(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """The `ratio` peer / ours as the median over the rounds, with its lowest and highest."""
    each = [p / o for o, p in zip(ours, peer, strict=True)]
    return {"ratio": statistics.median(each), "ratio_low": min(each), "ratio_high": max(each)}


PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)


def product_seconds(work: Callable[[], object]) -> float:
    """CPU seconds that a call spends in matrix products and attention kernels, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    return sum(event.self_cpu_time_total for event in profiled.key_averages() if event.key in PRODUCTS) / 1e6


def _finish() -> None:
    """Wait for the GPU's asynchronous work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib(work: Callable[[], object], device: torch.device) -> float:
    """Peak memory in MiB while `work` runs, including what is allocated before: of this process, or on the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    work()
    with suppress(OSError):
        # not ru_maxrss, which a child process inherits from its parent
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_own_process(function: str, **arguments: Any) -> Any:
    """Call `module:name` in a fresh process and return its result, a JSON value.

    Args:
        function: importable name.
        arguments: JSON values.
    """
    code = "import sys; from benchmarks.common import _serve; _serve(*sys.argv[1:])"
    command = [sys.executable, "-c", code, function, json.dumps(arguments)]
    # with this setting glibc returns large blocks at once; else the peak varies by several % between runs
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    if answer.returncode:
        raise RuntimeError(f"{function} failed in its own process:\n{answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def _serve(function: str, arguments: str) -> None:
    die_with_parent()
    module, _, name = function.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(**json.loads(arguments))))


def circumstances(device: torch.device) -> dict[str, Any]:
    """Columns of every row: date, device, machine, threads and versions."""
    here = environment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {name: here["packages"][name] for name in ("torch", "transformers")}
    machine = {"date": here["date"], "device": name, "cpu": here["cpu"], "cores": here["cores"]}
    return {**machine, "threads": torch.get_num_threads(), **versions}


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Append rows to a CSV file, all or none; the first rows write its header.

    Raises:
        DataError: the file has other columns.
    """
    columns = list(rows[0])
    before = path.read_text() if path.exists() else ""
    if before and before.splitlines()[0].split(",") != columns:
        raise DataError(f"{display_path(path)}: its columns are not {', '.join(columns)}; fix: move the file away")
    return atomic_write(path, before + pd.DataFrame(rows).to_csv(index=False, header=not before))


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Headline of a benchmark: ratio (above 1: ours is faster), seconds and memory of the last row, and all `cases`."""
    last = rows[-1]
    peaks = last["peak_mib"], last["peer_peak_mib"]
    memory = round(peaks[0] / peaks[1], 3) if all(peaks) else None
    numbers = {name: last[name] for name in ("ratio", "ours", "peer", "device")}
    return {**numbers, "peak_memory_ratio": memory, "cases": [*rows]}
