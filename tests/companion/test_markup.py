"""Texts of data, of models and of servers stay texts in every page: the tags of a page do not depend on them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from markdown_it import MarkdownIt
from nbconvert import HTMLExporter
from PIL import Image

from companion import figures
from companion.ablation_records import explain
from companion.book import generated, pages
from companion.data_tools import data_card
from companion.data_tools.audit import Fault
from companion.data_tools.verbs import Verbs
from llava_core.data.instruct import Sample

HOSTILE = [
    "<script>hit()</script>",
    '<img src=x onerror="hit()">',
    "</code></td></table><svg/onload=hit()>",
    "a\n```\n\n<img src=x onerror=hit()>\n\n```{eval-rst}\n",
    "[x](javascript:hit()) ![y](x) [z]: javascript:hit()",
    "javascript:hit() https://example.com www.example.com a@b.example",
    "a | b\n|---|\n| <b onclick=hit()>c</b> |",
    "{{ constant:os:environ }} {{ env.config }} {{\nenv\n}} {eval-rst}`x`",
    "`code` *em* __strong__ _em_ ~~s~~ &lt;img&gt; <!-- c -->",
    r"$\href{javascript:hit()}{x}$ \(x\) $$y$$ \begin{align}z\end{align}",
    "# heading",
    "- item\n- item",
    "1. item",
    "    code",
    ":::{note}\n:::",
    "---",
    "(target)=",
    "\x1b]0;x\x07\u202e",
]
WORD = "word"


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text; `markdown_safe` adds only <span>."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if (tag, attrs) != ("span", []):
            self.tags.append(
                f"{tag} {[(name, value) for name, value in attrs if not (value or '').startswith('data:')]}"
            )

    def handle_data(self, data: str) -> None:
        self.text += data


def markdown(text: str) -> str:
    return MarkdownIt("gfm-like").render(text) + MarkdownIt("commonmark").enable("table").render(text)


def inline(_: Path, text: str) -> str:
    safe = figures.markdown_safe(text)
    return markdown(
        f"{safe}\n\n**{safe}** · <code>{safe}</code>\n\n## {safe}\n\n| a |\n|---|\n| {safe} |\n\n- {safe}({safe})"
    )


def table(_: Path, text: str) -> str:
    return figures.table([{"a": text, text: [text, Path(text)]}], caption=text).to_html(uuid="t")


def cards(_: Path, text: str) -> str:
    return figures.cards([Image.new("RGB", (4, 4))], [[(text, text)]]).data


def tokens(_: Path, text: str) -> str:
    return figures.supervised_text_html([text, text], [-100, 5]).data


def card(folder: Path, text: str) -> str:
    path = folder / f"{WORD}.json"
    path.touch()
    (folder / "card.json").write_text(json.dumps(dict.fromkeys(("name", "about", "license"), text)))
    (folder / "boxes.json").touch()
    row = dict.fromkeys(("type", "request", "prompt", "client", "temperature", "asked_model", "model", "date"), text)
    (folder / "provenance.jsonl").write_text(json.dumps(row))
    fault = Fault(text, "texts", {text: 1}, {text: 1}, [{"kind": text, "record": text, "text": text}])
    samples = [Sample(text, [(text, text)], kind=text)]
    verbs = {text: Verbs({(text, text): 1}, {"questions": 1})}
    return markdown(data_card.card_text(data_card.summary(path, samples, [fault], verbs, folder / "boxes.json")))


def results(folder: Path, text: str) -> str:
    row = {"claim": text, "published": text, "measured": [text, text], "verdict": "agrees", "place": text, "note": text}
    chapter = {"scale": text, "fast": True, "checks": [row], "runs": [text]}
    chapter["solutions"] = {"solution_1": {text: [text]}}
    (folder / "20_x.json").write_text(json.dumps(chapter))
    title = " ".join(text.split())
    (folder / "20_x.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": f"# a {title}"}]}))
    page = generated.results_page(folder, ["20_x"], [], "mini")
    assert "{{" not in page
    return markdown(pages.with_values(page, "results"))


def ablation(_: Path, text: str) -> str:
    row = {"control": False, "verdict": "agrees", "effect": 1.0, "interval": [0.0, 2.0]}
    result = {"differences": {text: row}, "reference": text, "shortfall": [text], "above_baselines": {text: False}}
    return markdown(explain(result | {"seeds": [0, 1], "chance": 25.0, "lookup_table": 30.0, "margin": 2.5}))


OUTPUTS = [inline, table, cards, tokens, card, results, ablation]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("text", HOSTILE)
def test_tags_do_not_depend_on_texts_of_data(
    output: Callable[[Path, str], str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, found = Page(output(tmp_path, WORD)), Page(output(tmp_path, text))
    assert found.tags == known.tags
    assert not set("\x1b\x07\u202e") & set(found.text)
    if text.isprintable() or "\n" in text:
        assert "".join(text.split()) in "".join(found.text.replace("↵", "").split())


@pytest.mark.parametrize("text", HOSTILE[:-1])  # SVG cannot hold control characters
def test_titles_of_figures_are_texts(text: str) -> None:
    with plt.style.context(figures.STYLE):
        figure, ax = plt.subplots()
        ax.set_title(text)
        figure.savefig(buffer := io.StringIO(), format="svg")
        plt.close(figure)
    names = {element.tag.rpartition("}")[2] for element in ET.fromstring(buffer.getvalue()).iter()}
    assert not names & {"script", "img", "a", "image", "foreignObject"}


def test_browser_runs_no_script_of_data(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")

    def title(content: str) -> str:
        page = tmp_path / "page.html"
        page.write_text(f"<title>none</title><script>function hit() {{ document.title = 'hit' }}</script>{content}")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
        dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
        return dom.partition("<title>")[2].partition("<")[0]

    def notebook(*outputs: dict[str, str]) -> str:
        cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data) for data in outputs])
        return HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0]

    texts = [text for text in HOSTILE if "\x1b" not in text]
    assert title("".join(texts)) == title(notebook(*({"text/html": text} for text in texts))) == "hit"
    pages_of_data = "".join(output(tmp_path, text) for output in OUTPUTS[:-1] for text in texts)
    assert title(pages_of_data) == "none"
    safe = [figures.markdown_safe(text) for text in texts]
    shown = [
        {"text/markdown": f"{text}\n\n**{text}** <code>{text}</code>\n\n| a |\n|---|\n| {text} |"} for text in safe
    ]
    shown += [{"text/html": output(tmp_path, text)} for output in (table, cards, tokens) for text in texts]
    assert title(notebook(*shown)) == "none"
