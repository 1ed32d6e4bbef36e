"""Ranks, their errors and signals, and the record's lock, with workers that train nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import CompanionError, ConfigError, child_environment
from llava_core.train import launch as launching
from llava_core.train import processes
from llava_core.train.launch import launch
from llava_core.train.signals import Interrupted, stop_on_signal

WORKER = """
import os, sys, time
from pathlib import Path
from llava_core.record import RunRecord
from llava_core.runtime import DataError
from llava_core.train.processes import die_with_parent, end_with_error
from llava_core.train.signals import Interrupted, stop_on_signal
die_with_parent()
record, rank = RunRecord(Path(sys.argv[1])), os.environ["RANK"]
(record.path / f"pid{rank}").write_text(str(os.getpid()))
try:
    with stop_on_signal() as stop:
BODY
    if rank == "0":
        record.finish({"final_loss": 1.0})
except BaseException as error:
    end_with_error(record, f"rank{rank}", error)
"""
WAIT = "while not (stop.requested or (record.path / 'go').exists()): time.sleep(0.02)"
SAVE = f"{WAIT}\nif stop.requested: time.sleep(0.3); raise Interrupted('saved at step 3')"
DDP = {"scale.parallel.kind": "ddp", "scale.parallel.processes": 2}


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def world(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root without data and models, whose runs do not depend on them."""
    monkeypatch.setattr(launching, "run_inputs", lambda config: {})
    return workspace


@pytest.fixture
def worker(world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Replaces the body of the ranks' training."""

    def replace(body: str) -> list[str]:
        script = world / "worker.py"
        script.write_text(WORKER.replace("BODY", textwrap.indent(body, " " * 8)))
        monkeypatch.setattr(processes, "WORKER", [sys.executable, str(script)])
        return processes.WORKER

    return replace


def two_ranks(**overrides: object) -> RunConfig:
    return load_experiment("pretrain", "mini", {**DDP, **overrides})


LAUNCHER = """
    import sys
    from llava_core.config import load_experiment
    from llava_core.train import launch, processes
    processes.WORKER, launch.run_inputs = sys.argv[1:], lambda config: {{}}
    launch.launch(load_experiment("pretrain", "mini", {ddp}))
"""


def start_launcher(command: list[str]) -> subprocess.Popen[str]:
    code = textwrap.dedent(LAUNCHER).format(ddp=DDP)
    words = [sys.executable, "-c", code, *command]
    return subprocess.Popen(words, env=child_environment(), stderr=subprocess.PIPE, text=True)


def pids(world: Path) -> list[int]:
    """The process ids of both ranks, once they run."""
    eventually(lambda: len([f for f in world.glob("runs/*/mini/*/pid?") if f.read_text()]) == 2)
    return [int(f.read_text()) for f in sorted(world.glob("runs/*/mini/*/pid?"))]


def test_ranks_finish_the_record(worker: Callable[[str], list[str]]) -> None:
    worker("print(os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'])")
    record = launch(two_ranks())
    assert record.finished
    assert (record.path / "logs" / "rank1.log").read_text() == "2 1\n"
    assert record.config.scale.parallel.processes == 2


@pytest.mark.parametrize(
    ("rank_1", "message"),
    [
        ("raise DataError('a.json: bad; fix: b')", "rank 1 of 2: a.json: bad; fix: b"),
        ("1 / 0", "rank 1 of 2:.*(?s:.)*ZeroDivisionError"),
        ("print('last words', flush=True); os.kill(os.getpid(), 9)", r"rank 1 of 2: ended by signal 9.*\n  last words"),
        ("os._exit(3)", "rank 1 of 2: ended by exit code 3"),
    ],
    ids=["known error", "traceback", "killed", "exit code"],
)  # fmt: skip
def test_failing_rank_ends_the_others_and_is_shown(
    world: Path, worker: Callable[[str], list[str]], rank_1: str, message: str
) -> None:
    worker(f"if rank == '1':\n    time.sleep(0.3); {rank_1}\ntime.sleep(60)")
    began = time.monotonic()
    with pytest.raises(CompanionError, match=message):
        launch(two_ranks())
    assert time.monotonic() - began < 30
    assert not any(alive(pid) for pid in pids(world))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_die_with_a_killed_launcher(world: Path, worker: Callable[[str], list[str]]) -> None:
    parent = start_launcher(worker("time.sleep(60)"))
    ranks = pids(world)
    parent.kill()
    parent.communicate()
    eventually(lambda: not any(alive(pid) for pid in ranks), seconds=5)


def test_rank_0_holds_the_lock_and_a_second_start_waits(world: Path, worker: Callable[[str], list[str]]) -> None:
    command = worker(WAIT)
    script = world / "worker.py"
    script.write_text(script.read_text().replace("die_with_parent()", "0"))
    parent = start_launcher(command)
    ranks = pids(world)
    second = None
    try:
        parent.kill()
        parent.wait()  # its stderr stays open in rank 0
        (record,) = world.glob("runs/*/mini/*")
        with open(record / ".lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        second = start_launcher(command)
        assert second.stderr is not None
        line = next(line for line in second.stderr if "waiting" in line)
        assert f"waiting, it is being trained by pid {ranks[0]} on " in line
        (record / "go").touch()
        assert second.wait(timeout=30) == 0
    finally:
        for pid in ranks:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        if second is not None:
            second.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_lets_the_ranks_save(
    world: Path, worker: Callable[[str], list[str]], number: signal.Signals
) -> None:
    parent = start_launcher(worker(SAVE))
    ranks = pids(world)
    parent.send_signal(number)
    _, text = parent.communicate(timeout=30)
    assert "Interrupted: saved at step 3" in text
    assert text.count("stopping after this step") == 1
    assert not any(alive(pid) for pid in ranks)


def test_stop_request_is_a_flag_until_the_second_ctrl_c(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # at once: the same Ctrl-C
        assert stop.since is not None
        stop.since -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_interrupted_is_what_notebooks_and_the_command_line_expect() -> None:
    error = Interrupted("saved")
    assert isinstance(error, KeyboardInterrupt)
    assert (error.exit_code, str(error)) == (75, "saved")


def test_srun_variables_become_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS", "16")  # also set in the job's shell
    assert not processes.launched()
    step = {"STEP_NUM_TASKS": "16", "PROCID": "9", "LOCALID": "1", "JOB_ID": "70001", "STEP_NODELIST": "gpu[03-04,7],x"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes.launched()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["9", "1", "16", "gpu03", "30001"]
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "rack[1-2]-n[1-4]")
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        processes.launched()


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            {"scale.parallel.nodes": 2},
            None,
            r"nodes is 2: .*llava train pretrain --scale mini --slurm.*torchrun --nnodes 2",
        ),
        ({"scale.parallel.processes": 3}, None, "global_batch is 16, which 3 ranks cannot share"),
        ({}, 4, "started as 4 processes .* 1 nodes x 2 processes"),
        ({"scale.parallel.processes": "gpus"}, None, "'gpus', and PyTorch sees no GPU"),
    ],
)
def test_impossible_ranks_are_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict, world_size: int | None, message: str
) -> None:
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        processes.check_ranks(two_ranks(**overrides))


def test_resumed_run_has_the_scale_of_this_start(worker: Callable[[str], list[str]]) -> None:
    worker("raise DataError('x')")
    with pytest.raises(CompanionError):
        launch(two_ranks())
    worker("pass")
    record = launch(two_ranks(**{"scale.parallel.processes": 1}))
    assert RunRecord(record.path).config.scale.parallel.processes == 1
