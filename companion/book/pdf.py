"""The built book as one PDF, printed by Chromium: `python -m companion.book.pdf`."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

import yaml
from bs4 import BeautifulSoup, Tag

from companion.figures import html_safe
from llava_core.runtime import ROOT, CompanionError, atomic_write, display_path

FOOTER = '<p style="width: 100%; text-align: center; font-size: 8pt"><span class="pageNumber"></span></p>'
STYLE = """
@page { size: A4; margin: 18mm 15mm; }
body { font-size: 10pt; background: white; }
h1 { font-size: 20pt !important; } h2 { font-size: 14pt !important; } h3 { font-size: 12pt !important; }
article.bd-article { break-before: page; width: 180mm; overflow-x: clip; }
article article { break-inside: avoid; }
td, th { white-space: normal !important; }
.title-page { padding-top: 30vh; break-after: page; }
nav > ul { columns: 2; }
pre, .output { white-space: pre-wrap !important; overflow: visible !important; overflow-wrap: anywhere; }
.wide, .pst-scrollable-table-container, .cell_output { overflow: visible !important; }
table { font-size: 8pt; overflow-wrap: anywhere; }
th, td.number { overflow-wrap: normal; }
img, svg { max-width: 100% !important; break-inside: avoid; }
.headerlink, .copybtn, .question-filter, .llava-live, .live-start, .tb-button { display: none !important; }
"""


def _article(html: Path, name: str, names: list[str]) -> Tag:
    """Return the text of a page; its images are named from the site's folder, and links lead to places in the book."""
    soup = BeautifulSoup((html / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
    article, folder = soup.select_one("article.bd-article"), os.path.dirname(name)
    if article is None:
        raise CompanionError(f"{display_path(html / name)}.html: no article; build the book again with `make book`")
    for part in article.select("script, style, iframe, button"):
        part.decompose()
    for details in article.select("details"):
        if "Imports" not in details.get_text()[:40]:
            details["open"] = ""
    for image in article.select("img[src]"):
        if not str(image["src"]).startswith("data:"):
            image["src"] = os.path.normpath(os.path.join(folder, str(image["src"])))
    for link in article.select("a[href]"):
        target = str(link["href"])
        page = os.path.normpath(os.path.join(folder, re.sub(r"\.html(#.*)?$", "", target)))
        if page in names:
            link["href"] = f"#page-{names.index(page)}"
        elif not re.match(r"https?:|#", target):
            link.unwrap()
    article["id"] = f"page-{names.index(name)}"
    return article


def one_page(html: Path) -> str:
    """Return all pages of the built site as one, with a title page and the list of contents."""
    toc = yaml.safe_load((html.parent / "effective" / "_toc.yml").read_text(encoding="utf-8"))
    parts = {"": [toc["root"]]} | {p["caption"]: [e["file"] for e in p["chapters"]] for p in toc["parts"]}
    names = [name for group in parts.values() for name in group]
    first = BeautifulSoup((html / f"{toc['root']}.html").read_text(encoding="utf-8"), "html.parser")
    contents, articles = [], []
    for caption, group in parts.items():
        contents.append(f"<li>{html_safe(caption)}<ul>" if caption else "<li><ul>")
        for name in group:
            article = _article(html, name, names)
            heading = article.select_one("h1")
            title = heading.get_text().rstrip("#") if heading else name
            contents.append(f'<li><a href="#{article["id"]}">{html_safe(title)}</a></li>')
            articles.append(str(article))
        contents.append("</ul></li>")
    heading = first.select_one("article h1")
    title = html_safe(heading.get_text().rstrip("#") if heading else toc["root"])
    scripts = [node for node in first.select("head script") if "mathjax" in str(node).lower()]
    head = "".join(map(str, [*first.select('head link[rel="stylesheet"]'), *scripts]))
    cover = f'<div class="title-page"><h1>{title}</h1></div><nav><h2>Contents</h2><ul>{"".join(contents)}</ul></nav>'
    return (
        f'<!doctype html><html lang="en" data-theme="light" data-mode="light"><head><meta charset="utf-8">'
        f"<title>{title}</title>{head}<style>{STYLE}</style></head>"
        f"<body>{cover}{''.join(articles)}</body></html>"
    )


def print_book(html: Path, target: Path) -> Path:
    """Print the built site to a PDF with page numbers and an outline.

    Raises:
        CompanionError: no book is built, or Chromium or playwright is not installed.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not (html.parent / "built.json").is_file():
        raise CompanionError("no built book; fix: make book")
    if browser is None:
        raise CompanionError("no Chromium; fix: install the package chromium, or Chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise CompanionError("playwright is not installed; fix: make setup") from None
    page_file = atomic_write(html / "_book.html", one_page(html))
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page()
            page.set_default_timeout(0)
            page.route(re.compile("^https?:"), lambda route: route.abort())
            page.goto(page_file.as_uri())
            page.evaluate("window.MathJax?.startup?.promise")
            page.pdf(
                path=target, display_header_footer=True, header_template="<p></p>", footer_template=FOOTER,
                prefer_css_page_size=True, outline=True, tagged=True,
            )  # fmt: skip
            chromium.close()
    finally:
        page_file.unlink()
    return target


if __name__ == "__main__":
    begun, build = time.monotonic(), ROOT / "book" / "_build"
    try:
        made = print_book(build / "html", build / "book.pdf")
    except CompanionError as error:
        sys.exit(f"error: {error}")
    print(f"{display_path(made)}: {made.stat().st_size / 1e6:.1f} MB, {time.monotonic() - begun:.0f} s")
