"""What a run's id depends on besides its configuration: data files, base models, the code that trains."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_core.config import RunConfig
from llava_core.runtime import display_path, fingerprint, sha256_file

# The code that decides a run's numbers: all files of these folders except those used only after or around training.
CODE_FOLDERS = ("ops", "models", "data", "checkpoints", "train")
NOT_TRAINING = {"models/generation.py", "models/kv_cache.py"} | {
    f"train/{name}.py" for name in ("__main__", "identity", "processes", "signals", "trackers")
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def run_inputs(config: RunConfig) -> dict[str, Any]:
    """What besides the configuration decides a run: data files, base models, the code that trains."""
    from llava_core.checkpoints.base_models import base_hash  # here: a plan needs no torch

    return {
        "data": {display_path(f): sha256_file(f) for f in config.training_files},
        "base": {name: base_hash(config.model_source(name)) for name in config.base_models},
        "code": code_fingerprint(),
    }


def code_fingerprint(package: Path = Path(__file__).parents[1]) -> str:
    """Return 12 hex digits over the source files that decide a run's numbers; comments and docstrings do not count."""
    names = {f.relative_to(package).as_posix(): f for d in CODE_FOLDERS for f in (package / d).rglob("*.py")}
    return source_fingerprint(names[name] for name in sorted(names.keys() - NOT_TRAINING))


def source_fingerprint(files: Iterable[Path]) -> str:
    """Return 12 hex digits over Python files; comments and docstrings do not count."""
    return fingerprint([_code_lines(file.read_text(encoding="utf-8")) for file in files])


def _code_lines(source: str) -> list[str]:
    """Source lines without docstrings, comment lines and blank lines."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            for k in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[k] = ""
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
