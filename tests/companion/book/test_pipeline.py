"""The pipeline on tiny notebooks: order, skipping, errors, resuming, and a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from companion.book import notebooks as parts
from companion.book import pipeline, worker
from llava_core.runtime import CheckpointError, CompanionError, ConfigError, sha256_file

PARAMETERS = 'scale: str = "mini"\nfast: bool = False\n'
SAVE = """
import json, os, pathlib
out = pathlib.Path(os.environ["LLAVA_OUT"])
checks = [{"claim": "it runs", "published": 1.0, "measured": 2.0, "verdict": "agrees"}]
numbers = {"notebook": NAME, "scale": scale, "fast": fast, "numbers": {"x": 1}, "checks": checks, "runs": []}
(out / f"{NAME}.json").write_text(json.dumps(numbers))
"""


def write(folder: Path, name: str, *code: str, needs: list[str] | None = None, parameters: str = "") -> Path:
    """Write a notebook: a title, the parameters, these cells, and the numbers."""
    save = SAVE.replace("NAME", repr(name))
    sources = [("markdown", f"# {name}"), ("code", PARAMETERS + parameters), *(("code", c) for c in (*code, save))]
    cells: list[dict[str, Any]] = []
    for number, (kind, source) in enumerate(sources):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"c{number}", "metadata": {}, "source": source}
        if kind == "code":
            cell |= {"outputs": [], "execution_count": None}
        if number == 1:
            cell["metadata"] = {"tags": ["parameters"]}
        cells.append(cell)
    metadata = {"companion": {"needs": needs or []}, "kernelspec": {"name": "python3", "display_name": "Python 3"}}
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the arguments of `reproduce` for a folder of its own, without the miniature's data and without a book."""
    monkeypatch.setattr(pipeline, "shared_parts", lambda scale, dry_run: {})
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    return {"notebooks_dir": notebooks, "out_dir": tmp_path / "out", "book": "no"}


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["status"] for row in result["notebooks"]}


def test_notebooks_run_in_order_and_skip_with_a_reason(
    folders: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    notebooks, out = folders["notebooks_dir"], folders["out_dir"]
    trace = out.parent / "trace.txt"
    first = write(notebooks, "20_first", f"open({str(trace)!r}, 'a').write('first ')")
    write(notebooks, "10_second", f"open({str(trace)!r}, 'a').write('second ')", needs=["20_first"])
    plan = pipeline.reproduce(**folders, dry_run=True)
    assert statuses(plan) == {"20_first": "would run", "10_second": "would run"}
    assert not out.exists()

    result = pipeline.reproduce(**folders)
    assert statuses(result) == {"20_first": "ran", "10_second": "ran"}
    assert trace.read_text() == "first second "
    assert result["failed"] == []
    assert [row["notebook"] for row in result["checks"]] == ["20_first", "10_second"]
    assert "it runs" in capsys.readouterr().err
    assert (out / "10_second.ipynb").exists()

    assert statuses(pipeline.reproduce(**folders)) == {"20_first": "up to date", "10_second": "up to date"}
    (out / "10_second.json").write_text("{}")
    reasons = {row["name"]: row["reason"] for row in pipeline.reproduce(**folders, dry_run=True)["notebooks"]}
    assert reasons == {"20_first": None, "10_second": "10_second.json was changed after the run"}
    first.write_text(first.read_text().replace("first ')", "again ')"))
    reasons = {row["name"]: row["reason"] for row in pipeline.reproduce(**folders, dry_run=True)["notebooks"]}
    assert reasons["20_first"] == "changed: the notebook"
    assert reasons["10_second"] == "changed: 20_first"
    assert list(statuses(pipeline.reproduce(**folders, dry_run=True, only="10"))) == ["20_first", "10_second"]


def test_stored_results_that_a_notebook_reads_are_dependencies(
    folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "STORED", {"companion/single_runs.py": "benchmarks/results/attention.csv"})
    write(folders["notebooks_dir"], "01_reads", "from companion.single_runs import RECORD")
    write(folders["notebooks_dir"], "02_reads", "path = 'benchmarks/results/loss.csv'")
    pipeline.reproduce(**folders)
    stored_parts = [parts.read_state(folders["out_dir"], name)["parts"] for name in ("01_reads", "02_reads")]
    stored = [{name for name in own if name.startswith("benchmarks/results")} for own in stored_parts]
    assert stored == [{"benchmarks/results/attention.csv"}, {"benchmarks/results/loss.csv"}]


def test_broken_cell_stops_dependents_until_the_next_call(
    folders: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    notebooks, out = folders["notebooks_dir"], folders["out_dir"]
    write(notebooks, "01_good", "x = 1")
    write(notebooks, "02_needs", needs=["03_broken"])
    broken = write(notebooks, "03_broken", "y = 1", "value = 1 / 0  # broken on purpose")
    result = pipeline.reproduce(**folders)
    assert statuses(result) == {"01_good": "ran", "03_broken": "failed", "02_needs": "stopped"}
    assert result["failed"] == ["03_broken", "02_needs"]
    assert result["book"] is None
    error = capsys.readouterr().err
    assert "03_broken, cell [4] `value = 1 / 0 # broken on purpose`: ZeroDivisionError: division by zero" in error
    assert (out / "03_broken.failed.ipynb").exists()
    assert not (out / "03_broken.ipynb").exists()

    broken.write_text(broken.read_text().replace("1 / 0", "1 / 1"))
    result = pipeline.reproduce(**folders)
    assert statuses(result) == {"01_good": "up to date", "03_broken": "ran", "02_needs": "ran"}
    assert not (out / "03_broken.failed.ipynb").exists()


def test_dead_kernel_and_missing_numbers_are_named(folders: dict[str, Any]) -> None:
    write(folders["notebooks_dir"], "01_dies", "import os; os.kill(os.getpid(), 9)")
    path = write(folders["notebooks_dir"], "02_silent")
    path.write_text(path.read_text().replace(".write_text", ".joinpath"))
    errors = {row["name"]: row["error"] for row in pipeline.reproduce(**folders)["notebooks"]}
    assert "01_dies, cell [" in errors["01_dies"]
    assert "`import os; os.kill(os.getpid(), 9)`: DeadKernelError" in errors["01_dies"]
    assert "no 02_silent.json was written" in errors["02_silent"]


def test_parameters_reach_notebooks_that_declare_them(folders: dict[str, Any]) -> None:
    write(folders["notebooks_dir"], "10_plain")
    write(folders["notebooks_dir"], "11_own", "assert annotations == 'x.jsonl' and fast", parameters="annotations = ''")
    with pytest.raises(ConfigError, match=r"parameter 'anotations'.*10_plain has none; 11_own has annotations"):
        pipeline.reproduce(**folders, parameters={"anotations": "x"})
    result = pipeline.reproduce(**folders, only="11", fast=True, parameters={"annotations": "x.jsonl"})
    assert statuses(result) == {"11_own": "ran"}
    copy = json.loads((folders["out_dir"] / "11_own.ipynb").read_text())
    injected = [cell for cell in copy["cells"] if "injected-parameters" in cell["metadata"].get("tags", [])]
    assert "hide-cell" in injected[0]["metadata"]["tags"]
    assert "papermill" not in copy["metadata"]
    reason = pipeline.reproduce(**folders, only=["11"], fast=True, dry_run=True)["notebooks"][0]["reason"]
    assert reason == "changed: its parameters"


def test_wrong_calls_list_known_names(folders: dict[str, Any]) -> None:
    notebooks = folders["notebooks_dir"]
    with pytest.raises(ConfigError, match="no notebooks"):
        pipeline.reproduce(**folders)
    write(notebooks, "10_one", needs=["20_two"])
    with pytest.raises(ConfigError, match="needs '20_two', which is not in"):
        pipeline.reproduce(**folders)
    write(notebooks, "20_two", needs=["10_one"])
    with pytest.raises(ConfigError, match="circle: 10_one -> 20_two -> 10_one"):
        pipeline.reproduce(**folders)
    write(notebooks, "20_two")
    for wrong in ({"only": "21"}, {"start": 30}, {"start": "x"}):
        with pytest.raises(ConfigError, match="known: 20_two, 10_one"):
            pipeline.reproduce(**folders, **wrong)
    with pytest.raises(ConfigError, match="mini"):
        pipeline.reproduce(**folders, scale="minni")
    assert list(statuses(pipeline.reproduce(**folders, start=20, dry_run=True))) == ["20_two"]
    path = write(notebooks, "20_two")
    path.write_text(path.read_text().replace("fast: bool = False", "quick = 1"))
    with pytest.raises(ConfigError, match="must assign fast; it has scale, quick"):
        pipeline.reproduce(**folders)


def test_concurrent_calls_do_not_mix(folders: dict[str, Any]) -> None:
    write(folders["notebooks_dir"], "10_one")
    with pipeline._output_lock(folders["out_dir"]), pytest.raises(CompanionError, match="another `llava reproduce`"):
        pipeline.reproduce(**folders)


def test_imported_code_follows_imports_and_ignores_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llava_core"
    for name, text in {
        "__init__": "",
        "a/__init__": "",
        "a/one": "def f():\n    from . import two\n    from ..b import three\n",
        "a/two": "import os\n",
        "b/__init__": "from llava_core import facts\n",
        "b/three": "x = 1\n",
        "facts": "",
        "unrelated": "",
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (package / "b" / "table.yaml").write_text("1")
    monkeypatch.setattr(parts, "CODE_ROOT", tmp_path)

    def reached() -> dict[str, str]:
        return {
            str(Path(path).relative_to(package)): value
            for path, value in parts.imported_code(["llava_core.a.one", "llava_core.a.one.f", "torch"]).items()
        }

    before = reached()
    files = ("__init__.py", "a/__init__.py", "a/one.py", "a/two.py", "b/__init__.py", "b/three.py", "b/table.yaml")
    assert set(before) == {*files, "facts.py"}
    (package / "b" / "three.py").write_text("# a comment\nx = 1\n")
    assert reached() == before
    (package / "b" / "three.py").write_text("x = 1000\n")
    assert {name for name, value in reached().items() if value != before[name]} == {"b/three.py"}


def test_most_needed_chapters_start_first() -> None:
    needs = {"a": [], "b": ["a"], "c": ["b"], "d": []}
    plan = [parts.Chapter(name, Path(name), {}, upstream, []) for name, upstream in needs.items()]
    assert pipeline._dependents("a", plan) == {"b", "c"}
    assert pipeline._dependents("d", plan) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_kill_9_leaves_no_process_and_no_partial_copy(folders: dict[str, Any]) -> None:
    notebooks, out = folders["notebooks_dir"], folders["out_dir"]
    pid_file = out.parent / "kernel.pid"
    wait = f"import os, time, pathlib\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(SLEEP)"
    path = write(notebooks, "20_long", wait.replace("SLEEP", "60"))
    script = f"""
        from companion.book import pipeline
        pipeline.shared_parts = lambda scale, dry_run: {{}}
        pipeline.reproduce(notebooks_dir={str(notebooks)!r}, out_dir={str(out)!r}, book="no")
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        kernel = int(pid_file.read_text())
        os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while _alive(kernel) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _alive(kernel)
    finally:
        parent.kill()
        parent.wait()
    assert not list(out.glob("*.ipynb"))
    path.write_text(path.read_text().replace("sleep(60)", "sleep(0)"))
    assert statuses(pipeline.reproduce(**folders)) == {"20_long": "ran"}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_damaged_base_model_is_reported_before_any_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "models" / "mini" / "clip"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    digest = sha256_file(model / "model.safetensors")
    (model / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": digest}}))
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setattr(
        parts, "load_scale", lambda _: SimpleNamespace(models={"clip": "models/mini/clip"}, miniature=True)
    )
    assert any(name.endswith("clip/manifest.json") for name in parts.shared_parts("mini", dry_run=True))
    (model / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing, or its SHA-256"):
        parts.shared_parts("mini", dry_run=True)
    (model / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no base model here"):
        parts.shared_parts("mini", dry_run=True)


@pytest.mark.parametrize(("failures", "message"), [(2, None), (3, "died before"), (1, "cell")])
def test_kernel_start_is_retried_twice(failures: int, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import papermill

    output = "Kernel died before replying to kernel_info" if message != "cell" else "a cell failed"
    calls: list[str] = []

    def execute(source: str, copy: str, **_: Any) -> None:
        calls.append(copy)
        if len(calls) <= failures:
            raise RuntimeError(output)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    if message is None:
        worker._execute("a", "b", {})
    else:
        with pytest.raises(RuntimeError, match=message):
            worker._execute("a", "b", {})
    assert len(calls) == (1 if message == "cell" else 3)


def test_chapter_key_covers_checkpoint_loading_code() -> None:
    assert "llava_core/chat.py" in parts.imported_code(["llava_core.load"])
