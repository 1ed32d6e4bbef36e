"""`launch(run)` returns the finished record of a run: an existing one, a resumed one, or one trained now.

A run of one process is trained in this one. Ranks on this machine are processes of `llava_core.train.processes`; if
torchrun or srun started this process, it is one of the ranks itself.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import display_path, rank, set_offline, world_size
from llava_core.train.identity import run_inputs
from llava_core.train.processes import check_ranks, launched, record_lock, run_ranks
from llava_core.train.signals import Interrupted
from llava_core.train.trackers import check_trackers


def resolve_run(name: str, scale: str = "mini", fast: bool = False, **overrides: Any) -> RunConfig:
    """The run that a chapter asks for; `overrides` are dotted fields with `__` for the dot (`train__seed=1`)."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_experiment(name, scale, dotted, fast)


def open_record(config: RunConfig, first: RunRecord | None = None) -> RunRecord:
    """Return the record of a run, begun if there is none; `first` is that of the run that it starts from."""
    upstream = config.upstream()
    if first is None and upstream is not None:
        first = open_record(upstream)
    return RunRecord.open(config, {**run_inputs(config), **({"init": first.run_id} if first else {})})


def launch(config: RunConfig, resume: bool = True) -> RunRecord:
    """Return the finished record of a run; the run that it starts from is launched first if it is not there.

    Args:
        config: from `load_experiment` or `resolve_run`.
        resume: go on from the saved state of a run that was interrupted.

    Raises:
        CompanionError: data, base model or training failed; the message names file and fix.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    if config.scale.offline:
        set_offline()
    check_ranks(config)
    check_trackers(config)
    upstream = config.upstream()
    first = launch(upstream, resume) if upstream is not None else None
    record, initial = open_record(config, first), first.checkpoint if first else None
    in_process = launched() or config.scale.parallel.kind == "none"
    # rank 0 holds the lock as long as it lives, not its launcher; others that need this run wait
    with record_lock(record.path) if rank() == 0 else contextlib.nullcontext() as lock:
        if rank() == 0 and record.finished:
            shutil.rmtree(record.path / "states", ignore_errors=True)  # left by a kill after the summary
            _note_differences(record, config)
        elif rank() == 0:
            record.set_scale(config)
        if in_process:
            _train_in_process(config, record, initial, resume)
        elif lock and not record.finished:
            arguments = [*(["--init", str(initial)] if initial else []), *([] if resume else ["--no-resume"])]
            run_ranks(record, arguments, lock)
    return record


def _note_differences(record: RunRecord, config: RunConfig) -> None:
    """Print which fields that the run's id leaves out, and its numbers depend on, differ from a finished run's."""
    stored = record.config
    fields: dict[str, tuple[object, object]] = {
        "eval_samples": (stored.scale.eval_samples, config.scale.eval_samples),
        f"data.{config.experiment.data.name}_images": (stored.images_path, config.images_path),
    }
    for field, (was, asked) in fields.items():
        if was != asked:
            sys.stderr.write(
                f"{display_path(record.path)}: finished with scale.{field} = {was}, and its numbers stay those; "
                f"fix: to train it with {asked}, remove the folder\n"
            )


def _train_in_process(config: RunConfig, record: RunRecord, initial: Path | None, resume: bool) -> None:
    """Train as the only process or as one rank; returns and raises `Interrupted` on all ranks together."""
    from llava_core.checkpoints.base_models import no_downloads
    from llava_core.train.engine import make_engine
    from llava_core.train.trainer import train_record

    if record.finished and world_size() == 1:
        return
    engine = make_engine(config)
    # the other ranks wait here for rank 0, which may have waited for the lock and writes this start's scale
    if engine.all_gather([record.finished]).any():
        return
    record = RunRecord(record.path)
    try:
        # the libraries read `set_offline`'s variables when they are imported, which a notebook did before
        with no_downloads() if config.scale.offline else contextlib.nullcontext():
            train_record(record, initial, resume, engine)
    except Interrupted:
        engine.all_gather([0])  # the state is complete before srun sees the first rank end
        raise
    engine.all_gather([0])  # the record is complete before a rank reads it
