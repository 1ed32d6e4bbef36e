"""SIGTERM and Ctrl-C stop a real training after its step, with a state that resumes exactly."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from training_root import make_training_root

from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import child_environment
from llava_core.train.launch import launch

VALUES = {"train.epochs": 30, "train.global_batch": 8, "train.max_length": 96, "scale.states.every_s": 3600}


@pytest.fixture
def world(workspace: Path) -> Path:
    make_training_root(workspace)
    return workspace


def run(**more: object) -> RunConfig:
    return load_experiment("pretrain", "mini", {**VALUES, **more})


def rows(folder: Path) -> int:
    file = next(folder.glob("runs/*/mini/*/metrics.jsonl"), None)
    return file.read_text().count('"grad_norm"') if file else 0


def losses(record: RunRecord) -> list[float]:
    return [row["loss"] for row in record.metrics() if "loss" in row]


def test_ctrl_c_in_a_notebook_saves_and_resumes_exactly(world: Path) -> None:
    whole = losses(launch(run()))
    (world / "runs").rename(world / "whole")

    def interrupt() -> None:
        while rows(world) < 5:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step \d+ of 90; start it again to resume"):
        launch(run())
    (record,) = map(RunRecord, world.glob("runs/*/mini/*"))
    assert list(record.path.glob("states/*"))
    assert 5 <= len(losses(record)) < 90
    assert losses(launch(run())) == whole


@pytest.mark.slow
def test_sigterm_of_the_command_line_exits_75_and_two_ranks_resume(world: Path) -> None:
    ranks: dict[str, object] = {"scale.parallel.kind": "ddp", "scale.parallel.processes": 2}
    words = [word for key, value in {**VALUES, **ranks}.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "companion", "train", "pretrain", *words]
    training = subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True)
    while rows(world) < 5:
        assert training.poll() is None, shlex.join(command)
        time.sleep(0.02)
    training.terminate()
    _, text = training.communicate(timeout=60)
    assert training.returncode == 75
    (last,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "start it again to resume" in last
    assert 5 <= rows(world) < 90
    record = launch(run(**ranks))
    assert [row["step"] for row in record.metrics() if "loss" in row] == list(range(1, 91))
