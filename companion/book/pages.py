"""A Sphinx extension: claim chips in the chapters and values from records in every page.

It changes the text that Sphinx reads, not the files. A page may contain

    {{ claim:ID }}                                           a claim's number
    {{ config:EXPERIMENT:FIELD }}                            an experiment's value
    {{ constant:MODULE:NAME }}                               a number or text of one of our modules
    {{ record:FILE.csv:COLUMN=VALUE,...:COLUMN:FORMAT }}     the number of the last row that matches
"""

from __future__ import annotations

import csv
import html
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from companion.book.notebooks import PACKAGES
from companion.figures import markdown_safe
from companion.paper.claims import EVIDENCE, Claim, all_claims, claim
from llava_core.config import load_experiment
from llava_core.config_files import value_of
from llava_core.registry import unknown
from llava_core.runtime import ROOT, ConfigError, DataError

CLAIMS = "claims"


def chip(known: Claim) -> str:
    """Return a claim's label: the kind of evidence by its color, id and value, and a link to the claim's row."""
    title = html.escape(f"{known.text} ({known.place}): {known.why or EVIDENCE[known.evidence]}")
    return (
        f'<a class="chip {known.evidence}" href="{CLAIMS}.html#{known.id}" title="{title}">'
        f"<b>{known.evidence.replace('_', ' ')}</b> {known.id}: {html.escape(known.value_text)}</a>"
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


def _record_value(file: str, where: str, column: str, number_format: str = "") -> str:
    wanted = dict(part.partition("=")[::2] for part in where.split(","))
    path = (ROOT / file).resolve()
    if not path.is_relative_to(ROOT.resolve()) or path.suffix != ".csv" or not path.is_file():
        raise DataError(f"{file}: not a .csv file below the project's folder")
    with open(path, encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if all(row.get(k) == v for k, v in wanted.items())]
    if not rows or not rows[-1].get(column):
        raise DataError(f"{file}: no row with {where} has a value of '{column}'; measure it, or correct the page")
    value = rows[-1][column]
    return format(float(value), number_format) if number_format else markdown_safe(value)


VALUES: dict[str, Callable[..., str]] = {
    "claim": _claim_value,
    "config": _config_value,
    "constant": _constant,
    "record": _record_value,
}


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


def rendered(text: str, page: str, notebook: bool) -> str:
    """Return the source of a page with values and chips, for Sphinx; the first cell of a notebook may name claims."""
    if not notebook:
        return with_values(text, page)
    content = json.loads(text)
    for number, cell in enumerate(cell for cell in content["cells"] if cell["cell_type"] == "markdown"):
        source = with_values("".join(cell["source"]), page)
        cell["source"] = with_chips(source) if number == 0 else source
    return json.dumps(content, ensure_ascii=False)


def setup(app: Any) -> dict[str, bool]:

    def read(app: Any, name: str, source: list[str]) -> None:
        source[0] = rendered(source[0], name, Path(app.env.doc2path(name)).suffix == ".ipynb")

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
