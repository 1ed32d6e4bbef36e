from __future__ import annotations

import _thread
import errno
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from companion import training_run
from companion.training_run import TrainingRun, attach, start
from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import CompanionError, ConfigError, DataError, child_environment
from llava_core.train import launch as launching
from llava_core.train.signals import Interrupted

WORKER = """
import sys, time
from pathlib import Path
from llava_core.record import RunRecord
from llava_core.runtime import DataError
from llava_core.train.processes import end_with_error
from llava_core.train.signals import Interrupted, stop_on_signal
record = RunRecord(Path(sys.argv[1]))
try:
    with stop_on_signal() as stop:
        print("arguments", *sys.argv[2:], flush=True)
        while not (stop.requested or (record.path / "go").exists()):
            time.sleep(0.02)
        if stop.requested:
            raise Interrupted("saved at step 3")
        if (record.path / "go").read_text() == "fail":
            raise DataError("a.json: bad")
    record.finish({"final_loss": 1.0})
except BaseException as error:
    end_with_error(record, "launch", error)
"""


@pytest.fixture
def config(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run whose process waits for the file `go` in its record."""
    monkeypatch.setattr(launching, "run_inputs", lambda config: {})
    (workspace / "worker.py").write_text(WORKER)
    monkeypatch.setattr(training_run, "WORKER", [sys.executable, str(workspace / "worker.py")])
    return load_experiment("pretrain", "mini", {"train.seed": 3})


def go(run: TrainingRun, how: str = "") -> None:
    (run.record.path / "writing").write_text(how)
    (run.record.path / "writing").rename(run.record.path / "go")


def test_followed_run_shows_its_log_and_returns_the_record(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(config)
    assert run.status == "running"
    assert start(config).log == run.log  # no second process
    go(run)
    assert run.follow() == run.record
    assert run.status == "finished"
    assert start(config).status == "finished"
    assert capsys.readouterr().err == "arguments\n"


def test_failed_run_raises_its_error_and_starts_again(config: RunConfig) -> None:
    run = start(config, resume=False)
    go(run, "fail")
    with pytest.raises(CompanionError, match=r"a\.json: bad"):
        run.follow()
    assert run.status == "failed"
    assert run.log.read_text() == "arguments --no-resume\nerror: a.json: bad\n"
    go(run)
    assert start(config).follow() is not None


def test_process_launches_the_run_and_leaves_its_error(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "run_inputs", lambda config: {})  # the process has the real one, and no data
    with pytest.raises(CompanionError, match="no such file"):
        start(load_experiment("pretrain", "mini")).follow()


def test_interrupted_follow_detaches_only(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(config)
    # a shell starts background jobs with SIGINT ignored
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, _thread.interrupt_main).start()
        assert run.follow() is None
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert run.status == "running"
    assert f"attach('{run.record.path.relative_to(run.record.path.parents[3])}')" in capsys.readouterr().err
    go(run)
    assert run.follow() == run.record


def test_run_survives_its_kernel_and_is_cancelled_from_another(config: RunConfig, workspace: Path) -> None:
    code = f"""
import os
from llava_core.config import load_experiment
from companion import training_run
from llava_core.train import launch
training_run.WORKER, launch.run_inputs = {training_run.WORKER!r}, lambda config: {{}}
print(training_run.start(load_experiment("pretrain", "mini", {{"train.seed": 3}})).record.path, flush=True)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", code]
    kernel = subprocess.run(
        command, env=child_environment(), stdout=subprocess.PIPE, text=True, check=False, timeout=100
    )
    run = attach(kernel.stdout.strip())
    while "arguments" not in run.log.read_text():
        time.sleep(0.02)
    assert run.status == "running"
    run.cancel()
    with pytest.raises(Interrupted, match="saved at step 3"):
        run.follow()
    assert run.status == "stopped"
    run.cancel()  # nothing to do


def test_run_cancelled_before_it_trains_is_stopped(config: RunConfig) -> None:
    run = start(config)
    run.cancel()
    with pytest.raises(Interrupted, match="cancelled"):
        run.follow()
    assert run.status == "stopped"


def test_killed_run_is_failed(config: RunConfig) -> None:
    run = start(config)
    pid = int(run._lock.read_text().split()[1])
    subprocess.run(["kill", "-9", str(pid)], check=True)
    with pytest.raises(CompanionError, match="was killed; fix: start it again"):
        run.follow()
    assert run.status == "failed"


def test_attach_needs_a_run_of_start_or_a_finished_one(config: RunConfig) -> None:
    with pytest.raises(DataError, match="not the record of a run"):
        attach("runs/nothing")
    record = RunRecord.open(config)
    with pytest.raises(DataError, match=r"of a run of start\(\)"):
        attach(record.path)
    record.finish({"final_loss": 1.0})  # as `launch` does
    run = attach(record.path)
    assert run.follow() is run.record


def test_file_system_without_locks_is_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(training_run.fcntl, "flock", no_locks)
    with pytest.raises(ConfigError, match=r"runs/pretrain/mini/.*needs file locks: No locks available; fix:"):
        start(config)
