"""`launch(run)` returns the finished record of a run: found, resumed, or trained now.

What launched it never shows: in this process at `mini`, by torchrun at larger scales, or not at all if the record is
there.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import ROOT, CompanionError, fingerprint, set_offline, sha256_file, shown

FAST = {"data.limit": 96, "train.epochs": 1}
"""What `--fast` overrides: enough to prove that every step runs, far too little to learn."""

# Code that decides the numbers of a run, with what comes after training left out.
CODE_FOLDERS = ("ops", "models", "data", "checkpoints", "train")
NOT_TRAINING = ("models/generation.py", "models/kv_cache.py")


def resolve_run(name: str, scale: str = "mini", fast: bool = False, **overrides: Any) -> RunConfig:
    """The run that a chapter asks for.

    Args:
        name: experiment.
        scale: scale.
        fast: shrink it to the `--fast` budget; its numbers then mean nothing.
        overrides: dotted fields with `__` for the dot (`train__seed=1`).
    """
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_experiment(name, scale, {**(FAST if fast else {}), **dotted})


def run_inputs(config: RunConfig) -> dict[str, Any]:
    """What besides the configuration decides a run: data files, base models, the code that trains."""
    from llava_core.checkpoints.base_models import base_hash
    from llava_core.train.dataset import training_files

    package = Path(__file__).parents[1]
    code = sorted(
        file for folder in CODE_FOLDERS for file in (package / folder).rglob("*.py")
        if str(file.relative_to(package)) not in NOT_TRAINING
    )  # fmt: skip
    return {
        "data": {shown(f): sha256_file(f) for f in training_files(config)},
        "base": {name: base_hash(config.model_source(name)) for name in config.base_models},
        "code": fingerprint([sha256_file(f) for f in code]),
    }


def launch(config: RunConfig, resume: bool = True) -> RunRecord:
    """Return the finished record of a run.

    Args:
        config: from `load_experiment` or `resolve_run`; the run it starts from is launched first if it is not there.
        resume: go on from the saved state of a run that was interrupted.

    Returns:
        The record, with `summary`, `metrics()` and `checkpoint`.

    Raises:
        CompanionError: data, base model or training failed; the message names file and fix.
    """
    if config.scale.name == "mini":
        set_offline()
    upstream = config.upstream()
    initial: Path | None = None
    inherited: dict[str, Any] = {}
    if upstream is not None:
        if config.experiment.data.limit == FAST["data.limit"]:
            upstream = load_experiment(upstream.experiment.name, config.scale.name, {**_model(upstream), **FAST})
        first = launch(upstream, resume)
        initial, inherited = first.checkpoint, {"init": first.run_id}
    record = RunRecord.open(config, {**run_inputs(config), **inherited})
    with _alone(record):
        if not record.finished:
            _start(config, record, initial, resume)
    return record


def _model(config: RunConfig) -> Mapping[str, Any]:
    return {f"model.{k}": v for k, v in config.experiment.model.model_dump().items()}


@contextmanager
def _alone(record: RunRecord) -> Iterator[None]:
    """Two chapters that need the same run train it once: the second waits and finds it finished."""
    with open(record.path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(config: RunConfig, record: RunRecord, initial: Path | None, resume: bool) -> None:
    if config.scale.launcher == "in_process":
        from llava_core.train.trainer import train_record

        train_record(record, initial, resume)
        return
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "gpu",
        "-m", "llava_core.train", str(record.path),
        *(["--init", str(initial)] if initial else []), *([] if resume else ["--no-resume"]),
    ]  # fmt: skip
    if config.scale.launcher == "deepspeed":
        raise CompanionError("launcher 'deepspeed' is still to come; fix: use a scale with launcher torchrun")
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise CompanionError(f"{shown(record.path)}: training failed; its log is above; start again to resume")
