"""The process that executes one notebook: `python -m companion.book.worker SPEC`, started by the pipeline."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from companion.book.notebooks import source_of, state_path
from llava_core.runtime import ROOT, DataError, display_path, printable, read_json, sha256_file, write_json


def _end_with(parent: int) -> None:
    """End this process when its parent ends, also after kill -9."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()  # covers a parent that ended before the call above


def _failure(name: str, copy: Path, error: BaseException) -> str:
    cells = read_json(copy)["cells"] if copy.exists() else []
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    begun = [cell for cell in code if cell["metadata"].get("papermill", {}).get("start_time")]
    errors = [(cell, out) for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    what = f"{errors[-1][1]['ename']}: {errors[-1][1]['evalue']}" if errors else f"{type(error).__name__}: {error}"
    if not (errors or begun) or isinstance(error, DataError):
        return f"{name}: {error}"
    cell = errors[-1][0] if errors else begun[-1]  # a kernel that died leaves no error in its cell
    line = next((text for text in source_of(cell).splitlines() if text.strip()), "")
    place = f"cell [{cell['execution_count'] or code.index(cell) + 1}] `{textwrap.shorten(line, 80)}`"
    return "\n  ".join(map(printable, f"{name}, {place}: {what}".splitlines()))


def _execute(source: str, copy: str, parameters: Mapping[str, Any]) -> None:
    """Run a notebook into a copy; start again if two kernels that start at once chose the same port."""
    import papermill

    for retries in (2, 1, 0):
        try:
            papermill.execute_notebook(
                source,
                copy,
                parameters=parameters,
                kernel_name="python3",
                language="python",
                progress_bar={"bar_format": "cell {n_fmt}/{total_fmt} ", "mininterval": 0},
                start_timeout=120,
                store_widget_state=False,  # pages show no live widget of a kernel
            )
            return
        except RuntimeError as error:
            if not retries or "died before replying" not in str(error):
                raise


def run(spec: Mapping[str, Any]) -> int:
    _end_with(spec["parent"])
    begun = time.monotonic()
    name, out = spec["name"], Path(spec["out"])
    part, failed = out / ".state" / f"{name}.part.ipynb", out / f"{name}.failed.ipynb"
    final, numbers, state = out / f"{name}.ipynb", out / f"{name}.json", state_path(out, name)
    for path in (part, failed, numbers):
        path.unlink(missing_ok=True)
    try:
        _execute(spec["source"], os.path.relpath(part, ROOT), spec["parameters"])
        if not numbers.exists():
            raise DataError(f"no {numbers.name} was written; the notebook must end with save_numbers('{name}', ...)")
    except Exception as error:
        message = _failure(name, part, error)
        if part.exists():
            os.replace(part, failed)
            message += f"\nthe executed copy is {display_path(failed)}"
        write_json(out / ".state" / f"{name}.error.json", {"message": message})
        return 1
    copy = read_json(part)
    copy["metadata"].pop("papermill", None)  # paths and times of this machine
    for cell in copy["cells"]:
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("hide-cell")  # folded in the book
            cell["metadata"]["mystnb"] = {"code_prompt_show": "The parameters of this run"}
    write_json(part, copy)
    os.replace(part, final)
    result = {
        "parts": spec["parts"],
        "outputs": {path.name: sha256_file(path) for path in (final, numbers)},
        "runs": read_json(numbers).get("runs", []),
        "seconds": round(time.monotonic() - begun, 1),
    }
    write_json(state, result)
    return 0


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1])))
