"""What the site has besides its pages: notebooks to download, a Markdown twin of each page, and `llms.txt`.

A twin has the address of its page with `.md` at the end, as https://llmstxt.org proposes. It has the texts, tables and
code of the page; images are links to the files that the page shows.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import os
import re
import textwrap
from binascii import a2b_base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag

from companion.book import pages
from companion.book.notebooks import source_of
from llava_core.runtime import atomic_write

IMAGES = ("image/svg+xml", "image/png", "image/jpeg")


def _table(table: Tag) -> str:
    """Return a table of HTML as one of Markdown; its first row is the head, and cells lose their markup."""
    rows = [
        [re.sub(r"\s+", " ", cell.get_text(" ", strip=True)).replace("|", "\\|") for cell in row.select("th, td")]
        for row in table.select("tr")
    ]
    if not rows:
        return ""
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * width, *rows[1:]]]
    caption = f"*{table.caption.get_text(' ', strip=True)}*\n\n" if table.caption and table.caption.text else ""
    return f"{caption}{chr(10).join(lines)}"


def html_markdown(text: str) -> str:
    """Return HTML as Markdown: tables and texts; an image is its alternative text."""
    soup = BeautifulSoup(text, "html.parser")
    for table in soup.select("table"):
        table.replace_with(f"\n\n{_table(table)}\n\n")
    for part in soup.select("script, style, template, button, input, select"):
        part.decompose()
    for image in soup.select("img, svg"):
        label = str(image.get("alt") or image.get("aria-label") or "")
        image.replace_with(f"\n\n*Image: {label}*\n\n" if label else "")
    for block in soup.select("p, div, li, br, figcaption, summary, h2, h3, h4"):
        block.insert_before("\n")
        block.insert_after("\n")
    return re.sub(r"\n\s*\n+", "\n\n", soup.get_text()).strip()


def _image_name(kind: str, data: str) -> str:
    """The name of the file that myst-nb writes for an image of an output."""
    content = os.linesep.join(data.splitlines()).encode() if kind == "image/svg+xml" else a2b_base64(data)
    return f"{hashlib.sha256(content).hexdigest()}{mimetypes.guess_extension(kind)}"


def _output(output: Mapping[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```" if output["name"] == "stdout" else ""
    data = {kind: part if isinstance(part, str) else "".join(part) for kind, part in output.get("data", {}).items()}
    if "text/html" in data:
        return html_markdown(data["text/html"])
    for kind in IMAGES:
        if kind in data:
            return f"![{pages.image_text(kind, data[kind])}](../_images/{_image_name(kind, data[kind])})"
    return data.get("text/markdown") or (f"```text\n{data['text/plain']}\n```" if "text/plain" in data else "")


def notebook_markdown(content: Mapping[str, Any]) -> str:
    """Return an executed notebook of the site's folder `notebooks` as Markdown."""
    parts = []
    for cell in content["cells"]:
        source = source_of(cell).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            removed = "remove-output" in cell["metadata"].get("tags", [])
            outputs = [] if removed else [_output(output) for output in cell["outputs"]]
            parts += [f"```python\n{source}\n```", *outputs]
    return "\n\n".join(filter(None, parts)) + "\n"


def page_markdown(text: str) -> str:
    """Return a page of the book as Markdown without elements of HTML and directives."""

    def plain(part: str) -> str:
        part = re.sub(r"<table\b.*?</table>", lambda m: _table(BeautifulSoup(m[0], "html.parser")), part, flags=re.S)
        part = re.sub(r"<!--.*?-->|<(script|style)\b.*?</\1>", "", part, flags=re.S)
        part = re.sub(r"^:{3,}\{[\w-]+\} *([^\W\d].*)$", r"**\1**", part, flags=re.M)
        part = re.sub(r"^:{3,}.*$|^:[\w-]+:.*$", "", part, flags=re.M)
        part = re.sub(r"<(https?://[^<>\s]+)>", r"\1", part)
        return re.sub(r"</?[a-z][^<>\n]*>", "", part)

    image = r"^```\{image\} (?:\S*/)?(\S+)\n:alt: (.*)\n(?::.*\n)*```$"
    text = re.sub(image, r"![\2](_images/\1)", text, flags=re.M)
    text = re.sub(r"^```\{raw\}.*?^```$", "", text, flags=re.M | re.S)
    blocks = re.split(r"(^```.*?^```$|`[^`\n]+`)", text, flags=re.M | re.S)
    return re.sub(r"\n{3,}", "\n\n", "".join(b if b.startswith("`") else plain(b) for b in blocks)).strip() + "\n"


def _linked(text: str, names: Iterable[str], folder: str) -> str:
    """Let links to other pages lead to their twins."""

    def link(match: re.Match[str]) -> str:
        page = os.path.normpath(os.path.join(folder, match[1]))
        return f"]({match[1]}.html.md{match[2] or ''})" if page in names else match[0]

    return re.sub(r"\]\(([\w./-]+?)(?:\.(?:md|ipynb|html))?(#[\w-]*)?\)", link, text)


def _summary(markdown: str) -> tuple[str, str]:
    """Return the title of a twin and the beginning of its first paragraph."""
    title = re.search(r"^# +(.+)$", markdown, re.M)
    markdown = re.sub(r"^```.*?^```$|^\*\*[^*]+\*\* |\*\*", "", markdown, flags=re.M | re.S)
    paragraphs = re.split(r"\n\s*\n", markdown)
    first = next((part for part in paragraphs if part.lstrip()[:1].isalpha() and not part.startswith("Claims ")), "")
    return title[1] if title else "", textwrap.shorten(first, 160, placeholder=" ...")


def add_to_site(book: Path, toc: Mapping[str, Any]) -> None:
    """Write the twins and `llms.txt` into the built site, and take the outputs out of the notebooks to download."""
    html = book / "_build" / "html"
    parts = {"": [toc["root"]]}
    parts |= {part["caption"]: [entry["file"] for entry in part["chapters"]] for part in toc.get("parts", [])}
    names, lines = {name for group in parts.values() for name in group}, []
    for caption, group in parts.items():
        lines += ["", f"## {caption}", ""] if caption else []
        for name in group:
            source = next(path for kind in (".md", ".ipynb") if (path := book / f"{name}{kind}").is_file())
            download, text = html / "_sources" / f"{name}{source.suffix}", source.read_text(encoding="utf-8")
            if source.suffix == ".ipynb":
                content = json.loads(pages.with_notebook_values(text, name))
                twin = notebook_markdown(content)
                atomic_write(download, json.dumps(_without_outputs(content), indent=1, ensure_ascii=False))
            else:
                text = re.sub(
                    r"^```\{include\} (\S+)\n```$", lambda m: (book / m[1]).read_text("utf-8"), text, flags=re.M
                )
                text = pages.with_values(text, name)
                twin = page_markdown(text)
                atomic_write(download, text)
            twin = _linked(twin, names, os.path.dirname(name))
            atomic_write(html / f"{name}.html.md", twin)
            title, about = _summary(twin)
            if caption:
                lines.append(f"- [{title}]({name}.html.md): {about}".rstrip(": "))
            else:
                lines = [f"# {title}", "", f"> {about}"]
    atomic_write(html / "llms.txt", "\n".join(lines) + "\n")


def _without_outputs(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the notebook that a reader runs: an executed copy without outputs and without the run's parameters."""
    cells = [c for c in content["cells"] if "injected-parameters" not in c["metadata"].get("tags", [])]
    cells = [c | ({"outputs": [], "execution_count": None} if c["cell_type"] == "code" else {}) for c in cells]
    return {**content, "metadata": {**content["metadata"], "widgets": {}}, "cells": cells}
