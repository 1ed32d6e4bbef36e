"""`launch(run)` returns the finished record of a run: an existing one, a resumed one, or one trained now.

A run of one process is trained in this one. Ranks on this machine are processes of `llava_core.train.processes`; if
torchrun or srun started this process, it is one of the ranks itself.
"""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from typing import Any

from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import display_path, fingerprint, rank, set_offline, sha256_file
from llava_core.train.processes import check_ranks, launched, record_lock, run_ranks
from llava_core.train.signals import Interrupted
from llava_core.train.trackers import check_trackers

# The code that decides a run's numbers: all files of these folders except those used only after or around training.
CODE_FOLDERS = ("ops", "models", "data", "checkpoints", "train")
NOT_TRAINING = {"models/generation.py", "models/kv_cache.py"} | {
    f"train/{name}.py" for name in ("__main__", "handle", "processes", "signals", "trackers")
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def resolve_run(name: str, scale: str = "mini", fast: bool = False, **overrides: Any) -> RunConfig:
    """The run that a chapter asks for; `overrides` are dotted fields with `__` for the dot (`train__seed=1`)."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_experiment(name, scale, dotted, fast)


def run_inputs(config: RunConfig) -> dict[str, Any]:
    """What besides the configuration decides a run: data files, base models, the code that trains."""
    from llava_core.checkpoints.base_models import base_hash
    from llava_core.train.dataset import training_files

    return {
        "data": {display_path(f): sha256_file(f) for f in training_files(config)},
        "base": {name: base_hash(config.model_source(name)) for name in config.base_models},
        "code": code_fingerprint(),
    }


def code_fingerprint(package: Path = Path(__file__).parents[1]) -> str:
    """Return 12 hex digits over the source files that decide a run's numbers; comments and docstrings do not count."""
    names = {f.relative_to(package).as_posix(): f for d in CODE_FOLDERS for f in (package / d).rglob("*.py")}
    sources = [names[name].read_text(encoding="utf-8") for name in sorted(names.keys() - NOT_TRAINING)]
    return fingerprint([_code_lines(source) for source in sources])


def _code_lines(source: str) -> list[str]:
    """Source lines without docstrings, comment lines and blank lines."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            for k in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[k] = ""
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


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
        if rank() == 0 and not record.finished:
            record.set_scale(config)
        if in_process:
            _train_in_process(record, initial, resume)
        elif lock and not record.finished:
            arguments = [*(["--init", str(initial)] if initial else []), *([] if resume else ["--no-resume"])]
            run_ranks(record, arguments, lock)
    return record


def _train_in_process(record: RunRecord, initial: Path | None, resume: bool) -> None:
    """Train as the only process or as one rank; returns and raises `Interrupted` on all ranks together."""
    from llava_core.train.engine import start, sum_over_ranks
    from llava_core.train.trainer import train_record

    start()  # the other ranks wait here for rank 0, and rank 0 may have waited for the lock
    if sum_over_ranks(float(record.finished)):
        return
    try:
        train_record(RunRecord(record.path), initial, resume)
    except Interrupted:
        sum_over_ranks(0.0)  # the state is complete before srun sees the first rank end
        raise
    sum_over_ranks(0.0)  # the record is complete before a rank reads it
