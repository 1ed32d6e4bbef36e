"""`launch(run)` returns the finished record of a run: an existing one, a resumed one, or one trained now.

The scale's `launcher` decides whether a run is trained in this process or by torchrun on all GPUs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import ROOT, CompanionError, display_path, file_lock, fingerprint, set_offline, sha256_file

# The code that decides a run's numbers: all files of these folders except those used only after training.
CODE_FOLDERS = ("ops", "models", "data", "checkpoints", "train")
NOT_TRAINING = {"models/generation.py", "models/kv_cache.py"}
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


def launch(config: RunConfig, resume: bool = True) -> RunRecord:
    """Return the finished record of a run; the run that it starts from is launched first if it is not there.

    Args:
        config: from `load_experiment` or `resolve_run`.
        resume: go on from the saved state of a run that was interrupted.

    Raises:
        CompanionError: data, base model or training failed; the message names file and fix.
    """
    if config.scale.offline:
        set_offline()
    initial: Path | None = None
    inherited: dict[str, Any] = {}
    if (upstream := config.upstream()) is not None:
        first = launch(upstream, resume)
        initial, inherited = first.checkpoint, {"init": first.run_id}
    record = RunRecord.open(config, {**run_inputs(config), **inherited})
    # chapters that need the same run at the same time train it once: the others wait
    with file_lock(record.path / ".lock"):
        if not record.finished:
            _start(config, record, initial, resume)
    return record


def _start(config: RunConfig, record: RunRecord, initial: Path | None, resume: bool) -> None:
    if config.scale.parallel.kind == "none":
        from llava_core.train.trainer import train_record

        train_record(record, initial, resume)
        return
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "gpu",
        "-m", "llava_core.train", str(record.path),
        *(["--init", str(initial)] if initial else []), *([] if resume else ["--no-resume"]),
    ]  # fmt: skip
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise CompanionError(f"{display_path(record.path)}: training failed; its log is above; start again to resume")
