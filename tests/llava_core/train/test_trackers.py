from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import ConfigError
from llava_core.train.launch import launch
from llava_core.train.trackers import Trackers, check_trackers


def run_with(*trackers: str) -> RunConfig:
    return load_experiment("pretrain", "mini", {"scale.trackers": list(trackers)})


class Fake(ModuleType):
    """A module like wandb and trackio that keeps what it is given; with `fails`, each row is refused."""

    def __init__(self, name: str, fails: bool = False) -> None:
        super().__init__(name)
        self.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        self.rows: list[Any] = []
        self.options: dict[str, Any] = {}
        self.finished, self.fails = False, fails

    def init(self, **options: Any) -> Fake:
        self.options = options
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.fails:
            raise RuntimeError("no connection")
        self.rows.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_of_a_row_are_logged(name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    config = run_with(name)
    check_trackers(config)
    trackers = Trackers(config, RunRecord.open(config))
    trackers.log(3, {"step": 3, "loss": 2.5, "trainable": ["a"], "global_batch": "8 = 1 x 8"})
    trackers.close()
    assert fake.rows == [(3, {"loss": 2.5})]
    assert fake.finished
    assert fake.options["resume"] == "allow"
    assert fake.options.get("mode") == {"wandb": "offline"}.get(name)  # the scale is offline


def test_failing_tracker_does_not_end_the_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb", fails=True))
    trackers = Trackers(run_with("wandb"), RunRecord.open(run_with("wandb")))
    for step in (1, 2):
        trackers.log(step, {"loss": 1.0})
    assert capsys.readouterr().err == "step 1: wandb failed and is not used any more: no connection\n"


def test_tracker_that_does_not_close_does_not_fail_the_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, Fake(name))
    monkeypatch.setattr(sys.modules["wandb"], "finish", lambda: 1 / 0)
    config = run_with("wandb", "trackio")
    Trackers(config, RunRecord.open(config)).close()
    assert capsys.readouterr().err == "wandb did not close: division by zero\n"
    assert sys.modules["trackio"].finished


def test_ranks_above_0_track_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    fake = Fake("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    Trackers(run_with("wandb"), RunRecord.open(run_with("wandb"))).log(1, {"loss": 1.0})
    assert not fake.rows


def test_missing_tracker_is_refused_before_training(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'trackio' is not installed; fix: pip install trackio"):
        launch(run_with("trackio"))


def test_tensorboard_writes_events_into_the_record(workspace: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    record = RunRecord.open(run_with("tensorboard"))
    trackers = Trackers(run_with("tensorboard"), record)
    trackers.log(1, {"loss": 2.0})
    trackers.close()
    assert list((record.path / "tensorboard").glob("events.*"))
