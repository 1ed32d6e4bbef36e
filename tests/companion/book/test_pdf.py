"""The pages of the built site as one page, for printing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from companion.book import pdf
from llava_core.runtime import CompanionError
from tests.companion.browser import BROWSER

PAGE = """<html><head><title>The book</title><link rel="stylesheet" href="_static/a.css"><script src="x.js"></script>
</head><body><nav>menu</nav><article class="bd-article"><h1>{title}<a class="headerlink" href="#t">#</a></h1>
<img src="{up}_images/a.svg"><a href="{up}one.html#x">one</a><a href="gone.html">gone</a><script>1</script>
<a href="https://a.b/c">out</a></article></body></html>"""


def test_pages_become_one_with_contents_images_and_links(tmp_path: Path) -> None:
    html = tmp_path / "html"
    (html / "notebooks").mkdir(parents=True)
    (tmp_path / "effective").mkdir()
    (tmp_path / "effective" / "_toc.yml").write_text(
        "root: one\nparts: [{caption: A & B, chapters: [{file: notebooks/two}]}]"
    )
    (html / "one.html").write_text(PAGE.format(title="First", up=""))
    (html / "notebooks" / "two.html").write_text(PAGE.format(title="Second", up="../"))
    text = pdf.one_page(html)
    page = BeautifulSoup(text, "html.parser")
    assert [a.get_text() for a in page.select("nav a")] == ["First", "Second"]
    assert [a["href"] for a in page.select("nav a")] == ["#page-0", "#page-1"]
    assert [image["src"] for image in page.select("article img")] == ["_images/a.svg"] * 2
    links = [link["href"] for link in page.select("article a:not(.headerlink)")]
    assert links == ["#page-0", "https://a.b/c"] * 2
    assert "A &amp; B" in text
    assert not page.select("script")
    assert "menu" not in text


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_only_the_pages_of_the_book_begin_a_new_page(tmp_path: Path) -> None:
    html = tmp_path / "html"
    html.mkdir()
    (tmp_path / "effective").mkdir()
    (tmp_path / "effective" / "_toc.yml").write_text("root: one\nparts: []")
    (tmp_path / "built.json").write_text("{}")
    questions = "".join(f"<article><p>Question {k}</p></article>" for k in range(6))
    (html / "one.html").write_text(PAGE.format(title=f"Questions</h1>{questions}<h1>", up=""))
    content = pdf.print_book(html, tmp_path / "book.pdf").read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", content)) == 3, "title, contents and one page of questions"


def test_a_book_that_is_not_built_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompanionError, match="make book"):
        pdf.print_book(tmp_path / "html", tmp_path / "book.pdf")
