"""Trackers: where the rows of the metrics are also logged (TensorBoard, Weights & Biases, Trackio)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

from llava_core.config import RunConfig
from llava_core.record import RunRecord
from llava_core.runtime import ConfigError, rank


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError for a tracker of the scale whose package is not installed."""
    for name in config.scale.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"scale.trackers: '{name}' is not installed; fix: pip install {name}")


class Trackers:
    """The scale's trackers of a run, none on the ranks above 0; one that fails is dropped with a warning."""

    def __init__(self, config: RunConfig, record: RunRecord) -> None:
        self._open = {name: _open(name, config, record) for name in config.scale.trackers if rank() == 0}

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row of the metrics."""
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for name, (write, _) in list(self._open.items()):
            try:
                write(numbers, step)
            except Exception as error:
                del self._open[name]
                sys.stderr.write(f"step {step}: {name} failed and is not used any more: {error}\n")

    def close(self) -> None:
        for name, (_, finish) in self._open.items():
            try:
                finish()
            except Exception as error:
                sys.stderr.write(f"{name} did not close: {error}\n")


def _open(name: str, config: RunConfig, record: RunRecord) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """Open a tracker: what logs numbers at a step, and what ends it. A resumed run goes on where it was."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(record.path / "tensorboard"))
        return lambda numbers, step: [writer.add_scalar(k, v, step) for k, v in numbers.items()], writer.close
    options: dict[str, Any] = {}
    if name == "wandb":
        options = {"id": record.run_id, "dir": str(record.path), "mode": "offline" if config.scale.offline else None}
    title, settings = f"{config.experiment.name}-{record.run_id}", config.model_dump(mode="json")
    run = importlib.import_module(name).init(project="llava", name=title, config=settings, resume="allow", **options)
    return lambda numbers, step: run.log(numbers, step=step), run.finish
