"""A Sphinx extension: what the pages show beyond their files.

It changes what Sphinx reads, not the files: it adds chips of claims, folds cells of imports, describes images in words
and fills in values; and it copies MathJax into the built pages. A page may contain

    {{ claim:ID }}                                           a claim's number
    {{ config:EXPERIMENT:FIELD }}                            an experiment's value
    {{ constant:MODULE:NAME }}                               a number or text of one of our modules
"""

from __future__ import annotations

import ast
import contextlib
import html
import importlib
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]

from companion.book.notebooks import PACKAGES, source_of
from companion.paper.claims import EVIDENCE, Claim, all_claims, claim
from llava_core.config import load_experiment
from llava_core.config_files import value_of
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError

CLAIMS = "claims"


EVIDENCE_HERE = {
    "recomputed": "recomputed here",
    "measured": "measured on the miniature",
    "measured_gpu": "measured on a GPU",
    "configured": "configured here",
    "not_attempted": "not attempted here",
    "impossible": "impossible to measure",
}


def chip(known: Claim) -> str:
    """Return a claim's label: id, the paper's value, kind of evidence (also by color); it links to the claim's row."""
    here = "recomputed where the released answers are" if known.against.test else EVIDENCE_HERE[known.evidence]
    title = html.escape(f"{known.text} ({known.place}): {known.why or EVIDENCE[known.evidence]}")
    return (
        f'<a class="chip {known.evidence}" href="{CLAIMS}.html#{known.id}" title="{title}">'
        f"{known.id}: {html.escape(known.value_text)} in the paper; <b>{here}</b></a>"
    )


def with_chips(text: str) -> str:
    """Replace the ids in the paragraph that begins with `Claims` by chips."""
    match = re.search(r"^Claims\b[^\n:]*:.*?(?=\n\s*\n|\Z)", text, re.M | re.S)
    if not match:
        return text
    known = all_claims()
    chips = re.sub(r"`([\w-]+)`", lambda m: chip(known[m[1]]) if m[1] in known else m[0], match[0])
    return text[: match.start()] + re.sub(r"</a>,(?=\s+<a)", "</a>", chips) + text[match.end() :]


def _claim_value(name: str) -> str:
    return claim(name).number


def _config_value(experiment: str, field: str) -> str:
    return _plain(value_of(load_experiment(experiment, "a100x8").experiment, field), field)


def _constant(module: str, name: str) -> str:
    if module.partition(".")[0] not in PACKAGES or not name.isupper():
        raise ConfigError(f"'{module}:{name}' is not a constant of {', '.join(PACKAGES)}")
    return _plain(getattr(importlib.import_module(module), name), name)


def _plain(value: Any, name: str) -> str:
    if not isinstance(value, str | int | float | list | tuple | None):
        raise ConfigError(f"'{name}' is a {type(value).__name__}, not a number or a text")
    return f"{value}"


VALUES: dict[str, Callable[..., str]] = {"claim": _claim_value, "config": _config_value, "constant": _constant}


def with_values(text: str, page: str) -> str:
    """Replace each `{{ kind:... }}`; an unknown kind or missing value is a ConfigError that names the page."""

    def value(match: re.Match[str]) -> str:
        kind, _, rest = match[1].strip().partition(":")
        if kind not in VALUES:
            raise ConfigError(f"{page}: {match[0]}: {unknown('kind of value', kind, VALUES)}")
        try:
            return VALUES[kind](*rest.split(":"))
        except (ConfigError, DataError, AttributeError, ImportError, OSError, TypeError, ValueError) as error:
            raise ConfigError(f"{page}: {match[0]}: {error}") from error

    return re.sub(r"\{\{([^{}\n]+)\}\}", value, text)


def with_notebook_values(text: str, page: str) -> str:
    """Return a notebook whose texts have their values."""
    content = json.loads(text)
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_values(source_of(cell), page)
    return json.dumps(content, ensure_ascii=False)


FOLDED_LINES = 8  # from which a cell of imports is folded


def _is_set_up(source: str) -> bool:
    """Whether most lines of a long cell are imports."""
    with contextlib.suppress(SyntaxError):
        imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        lines = sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in imports)
        return lines >= FOLDED_LINES and lines > len(source.split("\n")) / 2
    return False


def rendered(text: str, page: str, notebook: bool) -> str:
    """Return the source of a page for Sphinx, with values.

    In a notebook, the first cell also gets chips of claims and a line that says how to run it, and imports are folded.
    """
    if not notebook:
        return with_values(text, page)
    content = json.loads(with_notebook_values(text, page))
    first = next((cell for cell in content["cells"] if cell["cell_type"] == "markdown"), None)
    if first is not None:
        name = Path(page).stem
        how = f'<p class="run-it">In JupyterLab: <code>make lab NB={name}</code>. To download: the arrow above.</p>'
        first["source"] = f"{with_chips(first['source'])}\n\n{how}"
    for cell in content["cells"]:
        tags = cell.setdefault("metadata", {}).setdefault("tags", [])
        folded = any(tag.startswith("hide-") for tag in tags)
        if cell["cell_type"] == "code" and not folded and _is_set_up(source_of(cell)):
            tags.append("hide-input")
            cell["metadata"]["mystnb"] = {"code_prompt_show": "Imports", "code_prompt_hide": "Imports"}
    return json.dumps(content, ensure_ascii=False)


def image_text(kind: str, content: str) -> str:
    """Return the words of a plot (title, axes, legend), which matplotlib leaves in its SVG as comments."""
    words = re.findall(r"<!-- (.+?) -->", content) if kind == "image/svg+xml" else []
    words = [word for word in dict.fromkeys(words) if re.search(r"[^\W\d_]{2}", word) and "$" not in word]
    return textwrap.shorten(html.unescape("; ".join(words)), 300, placeholder=" ...")


def describe_images(app: Any, doctree: nodes.document) -> None:
    """Give every image without one an alternative text: the title of its section and the words of the plot."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt"):
            section = next((node for node in _parents(image) if isinstance(node, nodes.section)), None)
            title = section[0].astext() if section else ""
            file = Path(app.srcdir) / image["uri"]
            words = image_text("image/svg+xml", file.read_text("utf-8")) if file.suffix == ".svg" else ""
            image["alt"] = ": ".join(filter(None, (title, words)))


def drop_thebe(app: Any, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Leave out the scripts of Thebe, whose constants Jupyter Book declares twice; no page of the book runs cells."""
    scripts = context.get("script_files", [])
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s.filename}{s.attributes.get('body')}".lower()]


def _parents(node: nodes.Node) -> Iterator[nodes.Node]:
    while node.parent is not None:
        node = node.parent
        yield node


def copy_mathjax(app: Any, error: Exception | None) -> None:
    """Copy MathJax with its fonts and license into the built pages, which then load nothing from the network."""
    if error is None and app.builder.format == "html":
        source, target = Path(str(files("mathjax")), "static", "mathjax"), Path(app.outdir, "_static", "mathjax")
        fonts = Path("output", "chtml", "fonts", "woff-v2")
        shutil.copytree(source / "es5" / fonts, target / fonts, dirs_exist_ok=True)
        for path in (source / "es5" / "tex-mml-chtml.js", source / "LICENSE"):
            shutil.copyfile(path, target / path.name)


def setup(app: Any) -> dict[str, bool]:

    def read(app: Any, name: str, source: list[str]) -> None:
        source[0] = rendered(source[0], name, Path(app.env.doc2path(name)).suffix == ".ipynb")

    app.connect("source-read", read)
    app.connect("doctree-read", describe_images)
    app.connect("html-page-context", drop_thebe)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
