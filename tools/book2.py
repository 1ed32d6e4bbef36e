"""Try to build the book with Jupyter Book 2: `make book2`. It may fail; the reason is printed.

Jupyter Book 2 fetches its theme from the network for each new folder, so it cannot replace Jupyter Book 1 yet.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NoReturn

import yaml

from companion.book import pages
from llava_core.runtime import ROOT, atomic_write

VENV = ROOT / ".venv-book2"
BUILD = ROOT / "book" / "_build"
TIMEOUT_S = 600


def fail(what: str, output: str = "") -> NoReturn:
    lines = [line for line in output.splitlines() if any(word in line for word in ("rror", "⛔", "failed", "reason"))]
    sys.exit(
        "\n  ".join([f"Jupyter Book 2 does not build this book: {what}", *(lines or output.splitlines()[-5:])[:10]])
    )


def run(*command: str, folder: Path = ROOT) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        fail(f"{command[0]} took more than {TIMEOUT_S} s")
    output = done.stdout + done.stderr
    if done.returncode != 0:
        fail(f"{Path(command[0]).name} ended with code {done.returncode}", output)
    return output


def write_sources(folder: Path) -> None:
    """Write the pages with their values, and `myst.yml` with the contents of the built book."""
    toc = yaml.safe_load((BUILD / "effective" / "_toc.yml").read_text(encoding="utf-8"))
    names = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "figures", folder.parent / "figures", dirs_exist_ok=True)
    files = []
    for name in [*names, "notebooks/ledger_state"]:
        source = next(path for kind in (".md", ".ipynb") if (path := ROOT / "book" / f"{name}{kind}").is_file())
        text = pages.rendered(source.read_text(encoding="utf-8"), name, source.suffix == ".ipynb")
        atomic_write(folder / f"{name}{source.suffix}", text)
        files.append(f"{name}{source.suffix}")
    project = {"title": "Visual Instruction Tuning, step by step", "toc": [{"file": file} for file in files[:-1]]}
    myst = {"version": 1, "project": project, "site": {"template": "book-theme"}}
    atomic_write(folder / "myst.yml", yaml.safe_dump(myst, sort_keys=False))


def main() -> None:
    if not (BUILD / "built.json").is_file():
        sys.exit("error: no built book; fix: make book")
    if shutil.which("node") is None:
        fail("node is not installed")
    if not (VENV / "bin" / "jupyter-book").is_file():
        venv.create(VENV, with_pip=True)
        run(str(VENV / "bin" / "pip"), "install", "--quiet", "jupyter-book>=2")
    folder = BUILD / "book2" / "book"
    write_sources(folder)
    run(str(VENV / "bin" / "jupyter-book"), "build", "--html", "--ci", folder=folder)
    if not (folder / "_build" / "html" / "index.html").is_file():
        fail("it ended well, but wrote no index.html")
    print(f"Jupyter Book 2 built {folder.relative_to(ROOT) / '_build' / 'html'}")


if __name__ == "__main__":
    main()
