"""The book: its contents, when it is rebuilt, and that a warning is an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from companion.book import book
from llava_core.runtime import ROOT, CompanionError

NAMES = ["20_alignment", "30_bench"]


def chapter(out: Path, name: str, text: str, checks: list[dict[str, Any]]) -> None:
    """Write the files of an executed notebook."""
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": text}]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    out.mkdir(parents=True, exist_ok=True)
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    (out / f"{name}.ipynb").write_text(json.dumps(notebook))
    numbers = {
        "notebook": name,
        "scale": "mini",
        "fast": False,
        "numbers": {},
        "checks": checks,
        "runs": ["runs/a/mini/b"],
    }
    (out / f"{name}.json").write_text(json.dumps(numbers))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return the folder of executed copies in a copy of the book's sources."""
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=shutil.ignore_patterns("_build", "notebooks", "_vendor"))
    shutil.copy(ROOT / "jupyter_book_config.yml", tmp_path)
    return tmp_path / "book" / "notebooks"


def test_book_is_built_from_executed_notebooks(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = {"claim": "a <claim>", "published": 1.5, "measured": [1, 2], "verdict": "agrees", "note": "n"}
    chapter(out, NAMES[0], "# Alignment\n\nClaims: `ablation-7b`.\n\nSee [the bench](30_bench.ipynb).", [check])
    vendor = out.parent / "_vendor" / "mathjax"
    vendor.mkdir(parents=True)
    (vendor / "tex-mml-chtml.js").write_text("/* local */")
    first = book.build_book(out, NAMES, "mini")
    assert first == out.parent / "_build" / "html" / "index.html"
    assert "leaves out what has not run: 30_bench" in capsys.readouterr().err
    page = (first.parent / "notebooks" / "results.html").read_text()
    for text in (
        "a &lt;claim&gt;",
        "1 to 2",
        'class="verdict agrees"',
        "train.learning_rate",
        "runs/a/mini/b",
        "30_bench",
    ):
        assert text in page
    chapter_page = (first.parent / "notebooks" / "20_alignment.html").read_text()
    assert "companion.css" in chapter_page
    assert '<a class="chip measured" href="claims.html#ablation-7b"' in chapter_page
    assert "`ablation-7b`" in (out / "20_alignment.ipynb").read_text()  # the executed copy is not touched
    assert '<tr id="ablation-7b">' in (first.parent / "notebooks" / "claims.html").read_text()
    assert "Masks that drift" in (first.parent / "notebooks" / "differences.html").read_text()
    assert "{{" not in (first.parent / "bring_your_own_data.html").read_text()
    assert "cdn.jsdelivr.net/npm/mathjax" not in chapter_page
    assert not (first.parent / "notebooks" / "30_bench.html").exists()
    assert "Ablations" not in chapter_page  # a part without chapters has no heading

    capsys.readouterr()
    book.build_book(out, NAMES, "mini")
    assert capsys.readouterr().err == "the book is up to date\n"

    chapter(out, NAMES[1], "# Bench\n\nSee [nothing](nothing.md).", [])
    with pytest.raises(CompanionError, match=r"could not be built(?s:.*)nothing\.md"):
        book.build_book(out, NAMES, "mini")
    assert not (out.parent / "_build" / "built.json").exists()


def test_contents_list_executed_chapters_without_empty_parts() -> None:
    pages = [f"notebooks/{name}" for name in ("00_overview", "20_a", "21_b", "results")]
    toc = book._toc(ROOT / "book" / "_toc.yml", pages)
    assert toc["root"] == "intro"
    listed = {part["caption"]: [entry["file"] for entry in part["chapters"]] for part in toc["parts"]}
    assert listed["Read me"] == ["how_to_read", "notebooks/00_overview", "notebooks/results"]
    assert listed["Training"] == ["notebooks/20_a", "notebooks/21_b"]
    assert "Demo" not in listed


def test_every_notebook_of_the_project_has_a_part() -> None:
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    names = [path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")]
    listed = json.dumps(book._toc(ROOT / "book" / "_toc.yml", [f"notebooks/{name}" for name in names]))
    assert [name for name in names if f'"notebooks/{name}"' not in listed] == []
    assert toc["format"] == "jb-book"


def test_local_scripts_are_used_where_they_exist(tmp_path: Path) -> None:
    source = ROOT / "jupyter_book_config.yml"
    plain = book._config(source, tmp_path, partial=False)["sphinx"]["config"]
    assert plain["html_static_path"] == ["assets"]
    assert "mathjax_path" not in plain
    (tmp_path / "_vendor").mkdir()
    (tmp_path / "_vendor" / "embed.js").write_text("")
    local = book._config(source, tmp_path, partial=True)["sphinx"]["config"]
    assert local["html_static_path"] == ["assets", "_vendor"]
    assert local["nb_ipywidgets_js"] == {"embed.js": {}}
    assert "mathjax_path" not in local


def test_missing_page_sources_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompanionError, match=r"_toc\.yml: no such file"):
        book.build_book(tmp_path / "book" / "notebooks", [], "mini")
