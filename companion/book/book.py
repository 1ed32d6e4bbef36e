"""Build the Jupyter Book from the executed notebooks, with generated pages of results and claims."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from companion.book import generated, pages, questions, scales, site
from llava_core.runtime import (
    CompanionError,
    DataError,
    atomic_write,
    display_path,
    fingerprint,
    read_json,
    sha256_file,
    write_json,
)

TOOLS = ("jupyter-book", "sphinx", "sphinx-book-theme", "django-static-mathjax")  # whose versions the pages depend on


def chapter_checks(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Collect the rows (claim, published, measured, verdict) of the chapters that have saved their numbers."""
    rows = []
    for name in names:
        with contextlib.suppress(DataError):
            rows += [{"notebook": name, **row} for row in read_json(out / f"{name}.json").get("checks", [])]
    return rows


def _toc(source: Path, pages: Sequence[str]) -> dict[str, Any]:
    """Replace each `glob` of the table of contents by the existing pages, and drop empty parts."""
    toc: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    parts = []
    for part in toc.get("parts", []):
        chapters: list[Any] = []
        for entry in part["chapters"]:
            if "glob" in entry:
                chapters += [{"file": page} for page in pages if fnmatch(page, entry["glob"])]
            else:
                chapters.append(entry)
        if chapters:
            parts.append({**part, "chapters": chapters})
    return {**toc, "parts": parts}


def _config(source: Path, partial: bool) -> dict[str, Any]:
    """Return the configuration; in a `partial` book a page may link to a chapter that has not run."""
    config: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    if partial:
        sphinx = config.setdefault("sphinx", {}).setdefault("config", {})
        sphinx.setdefault("suppress_warnings", []).extend(["myst.xref_missing", "ref.doc"])
    return config


def _content(path: Path) -> str:
    """Return a hash of what Sphinx reads: the page with its values and chips."""
    if path.suffix not in (".md", ".ipynb"):
        return sha256_file(path)
    return fingerprint(pages.rendered(path.read_text(encoding="utf-8"), display_path(path), path.suffix == ".ipynb"))


def build_book(out: Path, names: Sequence[str], scale: str) -> Path:
    """Build the HTML book, with warnings as errors, and return its first page; skip it when nothing changed.

    `out` has the executed copies, its parent the book's pages, and the parent of that the configuration. Of all
    chapters `names`, in order, those without an executed copy are left out. A CompanionError quotes warnings.
    """
    book, source = out.parent, out.parent.parent / "jupyter_book_config.yml"
    for path in (book / "_toc.yml", source):
        if not path.exists():
            raise CompanionError(
                f"{display_path(path)}: no such file, so no book can be built; take it from the repository"
            )
    present = [name for name in names if (out / f"{name}.ipynb").exists() and (out / f"{name}.json").exists()]
    missing = [name for name in names if name not in present]
    measured = generated.all_measured(out)
    generated_pages = {
        "results": generated.results_page(out, present, missing, scale),
        pages.CLAIMS: generated.claims_page(measured),
        "differences": generated.differences_page(),
        "ledger_state": generated.ledger_state(measured, out, present),
        "questions": questions.questions_page(out),
        "scales": scales.scales_page(out, present, scale),
    }
    generated_pages = {name: text for name, text in generated_pages.items() if text}
    for name, text in generated_pages.items():
        page = out / f"{name}.md"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            atomic_write(page, text)

    toc = _toc(book / "_toc.yml", [f"{out.name}/{name}" for name in [*present, *generated_pages]])
    config = _config(source, bool(missing))
    build = book / "_build"
    first, stamp, effective = build / "html" / "index.html", build / "built.json", build / "effective"
    outputs = (build, out)
    files = [f for f in book.rglob("*") if f.is_file() and not any(folder in f.parents for folder in outputs)]
    files += [*(out / f"{name}.md" for name in generated_pages), *(out / f"{name}.ipynb" for name in present)]
    state = {
        "files": {str(path.relative_to(book)): _content(path) for path in sorted(files)},
        "toc": toc,
        "config": config,
        "code": [sha256_file(Path(module.__file__ or "")) for module in (pages, site)],
        "tools": [importlib.metadata.version(tool) for tool in TOOLS],
    }
    built_from = {"state": fingerprint(state)}
    if first.exists() and stamp.exists() and read_json(stamp) == built_from:
        print("the book is up to date", file=sys.stderr)
        return first
    if missing:
        print(f"the book leaves out what has not run: {', '.join(missing)}", file=sys.stderr)

    print(f"building the book of {len(present)} chapters", file=sys.stderr, flush=True)
    for folder in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(build / folder, ignore_errors=True)  # else pages of removed chapters would stay
    stamp.unlink(missing_ok=True)
    for name, content in (("_config.yml", config), ("_toc.yml", toc)):
        atomic_write(effective / name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(book), "--all"]
    command += ["--config", str(effective / "_config.yml"), "--toc", str(effective / "_toc.yml"), "-W", "--keep-going"]
    environment: Mapping[str, str] = {**os.environ, "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=book.parent, env=environment, capture_output=True, text=True)
    log = atomic_write(build / "build.log", done.stdout + done.stderr)
    if done.returncode != 0 or not first.exists():
        text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
        lines = [line for line in text.splitlines() if re.search(r"WARNING|ERROR|Error:", line)]
        raise CompanionError(f"the book could not be built; the full log is {display_path(log)}", *lines[:10])
    site.add_to_site(book, toc)
    write_json(stamp, built_from)
    return first
