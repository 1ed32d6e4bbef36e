"""The record of a run: the folder `runs/<experiment>/<scale>/<run id>`.

It holds `config.yaml` (resolved), `environment.json` (machine, versions, fingerprints of the inputs), `metrics.jsonl`
(one row per logged step), `states/` (what an interrupted run resumes from), `snapshots/` (weights for a learning
curve), `checkpoint/` (the final weights) and `summary.json` (the final numbers; it exists only when the run has
finished). Beside them: `logs/` and `.lock` of its processes, `tensorboard/` where that tracker is on.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_core import runtime
from llava_core.config import RunConfig
from llava_core.runtime import DataError


class RunRecord:
    """A run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint"
        self._warned = False

    @classmethod
    def open(cls, config: RunConfig, extra_inputs: Mapping[str, Any] | None = None) -> RunRecord:
        """Return the record of this very run, whatever experiment's name began it; begin it if there is none.

        `extra_inputs` are JSON-like values besides the configuration that change the result, such as checksums of
        the data and of the base models; they are part of the run's id.
        """
        inputs = dict(extra_inputs or {})
        run_id = runtime.fingerprint({"config": config.run_id, "inputs": inputs}) if inputs else config.run_id
        runs, scale = runtime.ROOT / "runs", config.scale.name
        path = runs / config.experiment.name / scale / run_id
        if not path.is_dir():
            path = next(iter(sorted(runs.glob(f"*/{scale}/{run_id}"))), path)
        record = cls(path)
        if not (path / "config.yaml").exists():
            facts = {**runtime.environment(), "run": run_id, "inputs": inputs}
            runtime.write_json(path / "environment.json", facts)
            config.write(path / "config.yaml")
        return record

    @property
    def run_id(self) -> str:
        return self.path.name

    @functools.cached_property
    def config(self) -> RunConfig:
        return RunConfig.read(self.path / "config.yaml")

    def set_scale(self, config: RunConfig) -> None:
        """Go on with this scale: the number of ranks, trackers and the like are not part of the run's id."""
        change = {"scale": config.scale, "scale_overrides": config.scale_overrides}
        self.config.model_copy(update=change).write(self.path / "config.yaml")
        del self.config  # read it again

    @property
    def environment(self) -> dict[str, Any]:
        """Machine, versions, date and the inputs' fingerprints."""
        return dict(runtime.read_json(self.path / "environment.json"))

    @property
    def finished(self) -> bool:
        """Whether the run has ended well."""
        return (self.path / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """The final numbers; a DataError if the run has not finished."""
        if not self.finished:
            raise DataError(
                f"{runtime.display_path(self.path)}: the run has not finished; start it again to go on with it"
            )
        return dict(runtime.read_json(self.path / "summary.json"))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to the metrics, with null for NaN and infinity.

        If that fails, as on a full disk, the row is left out with one warning per run.
        """
        line = (json.dumps(_finite(row), ensure_ascii=False) + "\n").encode()
        try:
            with open(self.path / "metrics.jsonl", "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    while line:  # a write may be short
                        line = line[file.write(line) :]
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            if not self._warned:
                sys.stderr.write(f"{error}: metrics.jsonl lacks step {row.get('step')}; the run goes on\n")
            self._warned = True

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged rows in order.

        A last row without its line end was cut off and is left out; so is, with a warning, another damaged line.
        """
        path = self.path / "metrics.jsonl"
        rows, damaged = [], []
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                damaged.append(str(number))
        if damaged:
            sys.stderr.write(f"{runtime.display_path(path)}: damaged, left out: line {', '.join(damaged)}\n")
        return rows

    def rewind(self, step: int | None) -> None:
        """Remove the rows after `step`, from whose saved state a run resumes; None: all rows."""
        rows = [] if step is None else [row for row in self.metrics() if row["step"] <= step]
        runtime.write_jsonl(self.path / "metrics.jsonl", rows)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the final numbers; from now on the run counts as finished."""
        runtime.write_json(self.path / "summary.json", _finite(summary))


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def final_loss(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean loss of the last 5 % of the rows of training steps, at least one."""
    tail = rows[-max(1, len(rows) // 20) :]
    return float(sum(row["loss"] for row in tail) / len(tail))
