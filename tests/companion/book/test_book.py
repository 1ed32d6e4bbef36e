"""The book: its contents, when it is rebuilt, and that a warning is an error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from bs4 import BeautifulSoup
from PIL import Image

from companion.book import book, scales
from llava_core.runtime import ROOT, CompanionError
from tests.companion.browser import BROWSER, PATIENCE, launched

NAMES = ["20_alignment", "30_bench"]


PLOT = (
    "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'>"
    "<!-- loss of stage 1 --><!-- 0.5 --><!-- $\\mathdefault{1}$ --><!-- steps &amp; more --><path d='M0 0h9'/></svg>"
)
TABLE = '<table class="companion"><thead><tr><th>a</th><th>b</th></tr></thead><tr><td>x|y</td><td>2</td></tr></table>'


def chapter(out: Path, name: str, text: str, checks: list[dict[str, Any]]) -> None:
    """Write the files of an executed notebook, with a plot, a table, long imports and the parameters of the run."""
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": text}]
    outputs = [
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": TABLE}},
        {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": PLOT}},
    ]
    imports = "\n".join(f"import module{k}" for k in range(9))
    for k, (source, shown, tags) in enumerate(
        [("fast = True", [], ["injected-parameters"]), (imports, [], []), ("show()", outputs, [])]
    ):
        code = {"cell_type": "code", "id": f"c{k}", "metadata": {"tags": tags}, "execution_count": 1}
        cells.append({**code, "source": source, "outputs": shown})
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


PAGES = ("intro", "how_to_read", "score_your_own_files", "checkpoints", "glossary", "notebooks/results")
PAGES += (
    "notebooks/claims",
    "notebooks/differences",
    "notebooks/scales",
    "notebooks/questions",
    "notebooks/20_alignment",
)
MODES = {"light": (1280, "light"), "dark": (1280, "dark"), "phone": (390, "light")}
# of the theme, on a page of a file; and of its scroll spy, in a book that lacks chapters to which the first page links
KNOWN_ERRORS = ("Got invalid theme mode", "'#notebooks/")


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of executed copies in a copy of the book's sources."""
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=shutil.ignore_patterns("_build", "notebooks"))
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    shutil.copy(ROOT / "jupyter_book_config.yml", tmp_path)
    plan = {"scale": "gpu", "experiment": "finetune", "processes": 1, "gpu": "A100-80", "steps": 1234, "hours": 2.0}
    plan |= {
        "memory_gib": 30.2,
        "limit_gib": 79.2,
        "host_gib": 3.0,
        "disk_gib": {"saved states": 5.0},
        "hours_least": 1.0,
    }
    plan |= {"usd": 4.0, "usd_least": 2.0, "assumed": {"hours": "a <b>", "usd": "--price USD"}}
    monkeypatch.setattr(scales, "plan_rows", lambda *_: [plan])  # tests/companion/test_planner.py has the planner
    return tmp_path / "book" / "notebooks"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_book_is_built_from_executed_notebooks(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = {"claim": "a <claim>", "published": 1.5, "measured": [1, 2], "verdict": "agrees", "note": "n"}
    chapter(out, NAMES[0], "# Alignment\n\nClaims: `ablation-7b`.\n\nSee [the bench](30_bench.ipynb): $x^2$.", [check])
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
    assert "../_static/mathjax/tex-mml-chtml.js" in chapter_page
    assert "https://cdn" not in chapter_page
    mathjax = first.parent / "_static" / "mathjax"
    assert {"LICENSE", "tex-mml-chtml.js"} <= {path.name for path in mathjax.iterdir()}
    assert list(mathjax.glob("output/chtml/fonts/woff-v2/*.woff"))
    assert not (first.parent / "notebooks" / "30_bench.html").exists()
    assert "Ablations" not in chapter_page  # a part without chapters has no heading

    assert chapter_page.count("Imports") == 2  # folded, with its two labels
    assert 'alt="Alignment: loss of stage 1; steps &amp; more"' in chapter_page
    assert "1 to 2 hours" not in (planned := (first.parent / "notebooks" / "scales.html").read_text())
    for text in ("1,234", "30 of 79", "1.0 to 2.0", "a &lt;b&gt;", "make reproduce SCALE=gpu"):
        assert text in re.sub(r"<span[^>]*>|</span>", "", planned)
    check_links(first.parent)
    check_twins(first.parent)

    capsys.readouterr()
    book.build_book(out, NAMES, "mini")
    assert capsys.readouterr().err == "the book is up to date\n"

    chapter(out, NAMES[1], "# Bench\n\nSee [nothing](nothing.md).", [])
    with pytest.raises(CompanionError, match=r"could not be built(?s:.*)nothing\.md"):
        book.build_book(out, NAMES, "mini")
    assert not (out.parent / "_build" / "built.json").exists()


def check_links(html: Path) -> None:
    """Every link and every file that a page names is in the site, and so is the place on the page."""
    pages = {path: BeautifulSoup(path.read_text(), "html.parser") for path in html.rglob("*.html")}
    pages = {path: page for path, page in pages.items() if "_static" not in path.parts}
    places = {path: {node["id"] for node in page.select("[id]")} for path, page in pages.items()}
    broken = []
    for path, page in pages.items():
        for node in page.select("a[href], img[src], script[src], link[href]"):
            target = unquote(str(node.get("href") or node.get("src")))
            if re.match(r"[a-z]+:|//", target):
                continue
            file, _, place = target.partition("#")
            file = (path.parent / file.partition("?")[0]).resolve() if file else path
            if not file.exists() or (place and file in places and place not in places[file]):
                broken.append(f"{path.name}: {target}")
    absent = re.compile(r": #notebooks/|30_bench")  # chapters that have not run
    assert [link for link in broken if not absent.search(link)] == []
    assert len(pages) > 8


def check_twins(html: Path) -> None:
    """The twin of a page has its tables and images, the notebook to download no outputs, and llms.txt every page."""
    twin = (html / "notebooks" / "20_alignment.html.md").read_text()
    assert "| a | b |\n| --- | --- |\n| x\\|y | 2 |" in twin
    image = re.search(r"!\[loss of stage 1; steps & more\]\(\.\./(_images/\w+\.svg)\)", twin)
    assert image
    assert (html / image[1]).is_file()
    assert "base64" not in twin
    download = json.loads((html / "_sources" / "notebooks" / "20_alignment.ipynb").read_text())
    code = [cell for cell in download["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[], []]
    assert "fast = True" not in json.dumps(download)
    listed = re.findall(r"\]\((\S+\.html\.md)\)", (html / "llms.txt").read_text())
    assert {*listed, "intro.html.md"} == {str(p.relative_to(html)) for p in html.rglob("*.html.md")}
    first = (html / "intro.html.md").read_text()
    assert "claims.html.md), " in first  # the included line, with its link
    assert not re.search(r"<p|:::|\{\w+\}|\{\{|<!--", first)


def findings(browser: Any, file: Path, mode: str) -> list[str]:
    """What is wrong with a page in a browser: serious findings of axe, errors, width, images without a text."""
    from axe_playwright_python.sync_playwright import Axe

    width, scheme = MODES[mode]
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    page, errors = context.new_page(), list[str]()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_timeout(500)  # the theme fades from light to dark
    found = [error for error in errors if not any(known in error for known in KNOWN_ERRORS)]
    if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
        found.append(f"{wide} pixels wide")
    silent = "[...document.querySelectorAll('article img')].filter((image) => !image.alt).map((image) => image.src)"
    found += [f"no text: {source[:80]}" for source in page.evaluate(silent)]
    # the controls of Jupyter's own viewer of widgets are not ours
    context_of_axe = {"exclude": [[".widget-subarea"]]}
    result = Axe().run(page, context_of_axe, {"resultTypes": ["violations"], "preload": False}).response
    for violation in result["violations"]:
        if violation["impact"] in ("serious", "critical"):
            found.append(f"{violation['id']}: {[node['html'][:80] for node in violation['nodes'][:3]]}")
    context.close()
    return [f"{file.stem}, {mode}: {what}" for what in found]


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_pages_in_a_browser(out: Path, picture: Path) -> None:
    """Every page of a small book, and those of the whole book where it is built, in light, in dark and on a phone."""
    chapter(out, NAMES[0], "# Alignment\n\nClaims: `ablation-7b`.", [])
    row = {"image": str(picture), "request": "What?", "caption": "a red car", "reference": "red", "cider": 51.4}
    numbers = {"numbers": {"captions": [row, row | {"caption": "a blue car"}]}}
    (out / "32_captioning.json").write_text(json.dumps(numbers))
    html = book.build_book(out, NAMES, "mini").parent
    whole = ROOT / "book" / "_build" / "html"
    files = [html / f"{name}.html" for name in PAGES]
    pages_of_whole = [whole / f"{name}.html" for name in PAGES[:-1]]
    if (whole.parent / "built.json").is_file() and all(file.is_file() for file in pages_of_whole):
        check_links(whole)
        files = [*pages_of_whole, *sorted(whole.glob("notebooks/2*.html")), files[-1]]
    with launched() as browser:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto((html / "notebooks" / "questions.html").as_uri())
        page.get_by_label("Words").fill("BLUE")
        assert page.locator(".question-filter output").inner_text() == "1 of 2"
        assert page.locator(".questions > article:visible").count() == 1
        assert [text for file in files for mode in MODES for text in findings(browser, file, mode)] == []


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


def test_missing_page_sources_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompanionError, match=r"_toc\.yml: no such file"):
        book.build_book(tmp_path / "book" / "notebooks", [], "mini")
