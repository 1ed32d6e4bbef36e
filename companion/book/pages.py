"""Pages of the book that are made, not written: the claims, the differences, and what a page takes from records.

This module is an extension of Sphinx: it changes a page's text as the book is built and leaves the files alone. A
chapter gets chips for the claims that it names. What a page may take from elsewhere:

    {{ claim:ID }}                                           a claim's number
    {{ config:EXPERIMENT:FIELD }}                            an experiment's value
    {{ constant:MODULE:NAME }}                               a constant of the package
    {{ record:FILE.csv:COLUMN=VALUE,...:COLUMN:FORMAT }}     the number of the last row that fits
"""

from __future__ import annotations

import csv
import html
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.paper import ledger
from companion.paper.claims import EVIDENCE, SOURCES, Claim, all_claims, claim, computed_value
from companion.paper.discrepancies import Arm, all_discrepancies
from companion.plots.figures import cell_text
from llava_core.config import load_experiment, value_of
from llava_core.registry import unknown
from llava_core.runtime import ROOT, ConfigError, DataError

CLAIMS, DIFFERENCES = "claims", "differences"

# ------------------------------------------------------------------------------------------------ a page's own text


def chip(known: Claim) -> str:
    """Return a claim's label: the kind of evidence by its color, id and value, and a link to the claim's row."""
    title = html.escape(f"{known.text} ({known.place}): {known.why or EVIDENCE[known.evidence]}")
    return (
        f'<a class="chip {known.evidence}" href="{CLAIMS}.html#{known.id}" title="{title}">'
        f"<b>{known.evidence.replace('_', ' ')}</b> {known.id}: {html.escape(known.shown)}</a>"
    )


def with_chips(text: str) -> str:
    """Replace the ids in the paragraph that begins with `Claims` by chips; a text without one stays as it is."""
    found = re.search(r"^Claims\b[^\n:]*:.*?(?=\n\s*\n|\Z)", text, re.M | re.S)
    if not found:
        return text
    known = all_claims()
    chips = re.sub(r"`([\w-]+)`", lambda m: chip(known[m[1]]) if m[1] in known else m[0], found[0])
    return text[: found.start()] + re.sub(r"</a>,(?=\s+<a)", "</a>", chips) + text[found.end() :]


def _claim_value(name: str) -> str:
    return claim(name).number


def _config_value(experiment: str, field: str) -> str:
    return f"{value_of(load_experiment(experiment, 'a100x8').experiment, field)}"


def _constant(module: str, name: str) -> str:
    return f"{getattr(importlib.import_module(module), name)}"


def _record_value(file: str, where: str, column: str, shown: str = "") -> str:
    wanted = dict(part.partition("=")[::2] for part in where.split(","))
    with open(ROOT / file, encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if all(row.get(k) == v for k, v in wanted.items())]
    if not rows or not rows[-1].get(column):
        raise DataError(f"{file}: no row with {where} has a value of '{column}'; measure it, or correct the page")
    return format(float(rows[-1][column]), shown) if shown else rows[-1][column]


VALUES: dict[str, Callable[..., str]] = {
    "claim": _claim_value,
    "config": _config_value,
    "constant": _constant,
    "record": _record_value,
}


def with_values(text: str, page: str) -> str:
    """Put values in the place of `{{ kind:... }}`.

    Args:
        text: a page, or a cell of one.
        page: its name, for errors.

    Raises:
        ConfigError: an unknown kind, or a value that is not there; the message names the page.
    """

    def value(found: re.Match[str]) -> str:
        kind, _, rest = found[1].strip().partition(":")
        if kind not in VALUES:
            raise ConfigError(f"{page}: {found[0]}: {unknown('kind of value', kind, VALUES)}")
        try:
            return VALUES[kind](*rest.split(":"))
        except (ConfigError, DataError, AttributeError, ImportError, OSError, TypeError, ValueError) as error:
            raise ConfigError(f"{page}: {found[0]}: {error}") from error

    return re.sub(r"\{\{([^{}\n]+)\}\}", value, text)


def rendered(text: str, page: str, notebook: bool) -> str:
    """Return a page's source as Sphinx is to read it.

    Args:
        text: the file's content.
        page: its name, for errors.
        notebook: whether it is a notebook, whose first cell may name claims.
    """
    if not notebook:
        return with_values(text, page)
    content = json.loads(text)
    for number, cell in enumerate(cell for cell in content["cells"] if cell["cell_type"] == "markdown"):
        source = with_values("".join(cell["source"]), page)
        cell["source"] = with_chips(source) if number == 0 else source
    return json.dumps(content, ensure_ascii=False)


def setup(app: Any) -> dict[str, bool]:
    """Let Sphinx read every page as `rendered`."""

    def read(app: Any, name: str, source: list[str]) -> None:
        source[0] = rendered(source[0], name, Path(app.env.doc2path(name)).suffix == ".ipynb")

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# ------------------------------------------------------------------------------------------------ whole pages


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> list[str]:
    titles = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return [f'<table class="companion {kind}"><thead><tr>{titles}</tr></thead><tbody>', *rows, "</tbody></table>", ""]


def _plain_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = ["".join(f"<td>{html.escape(cell_text(cell))}</td>" for cell in row.values()) for row in rows]
    return _table(list(rows[0]), [f"<tr>{row}</tr>" for row in cells])


def _label(kind: str) -> str:
    return f'<span class="chip {kind}"><b>{kind.replace("_", " ")}</b></span>'


def _claim_row(known: Claim, here: ledger.Measured) -> str:
    small = [f"<code>{known.id}</code>", f"also {known.also}" if known.also else ""]
    small.append(SOURCES[known.source] if known.source != "verified" else "")
    if known.n:
        answers = "" if known.correct is None else f"{known.correct:,} of "
        small.append(f"{answers}{known.n:,} questions" + (f", {known.runs} runs" if known.runs else ""))
    if known.flag:
        value = computed_value(known.id)
        computed = "" if value is None else f" (computed: {value:.4g})"
        small.append(f"<b>flag: {html.escape(known.flag)}{computed}</b>")
    values = [cell_text(part) for part in (here.value, here.interval) if part is not None]
    text = f"{values[0]} [{values[1]}]" if len(values) == 2 else "".join(values)
    note = html.escape(here.note if known.why is None else known.why)
    reach = (
        "" if known.tolerance.value is None and not known.tolerance.answers else f"; tolerance: {known.tolerance.why}"
    )
    verdict = f'<span class="verdict {here.verdict.css_class}">{here.verdict}</span>'
    return (
        f'<tr id="{known.id}"><td>{html.escape(known.text)}<small>{"; ".join(filter(None, small))}</small></td>'
        f"<td>{html.escape(known.shown)}</td><td>{_label(known.evidence)}</td>"
        f"<td>{html.escape(text)}<small>{note}{reach}</small></td><td>{verdict}</td></tr>"
    )


def _grid(claims: Sequence[Claim], found: Mapping[str, ledger.Measured]) -> list[str]:
    """The paper's table as it is printed, below each number what was measured; nothing for a single column."""
    cells = {c.cell: c for c in claims if c.cell}
    names, columns = dict.fromkeys(row for row, _ in cells), dict.fromkeys(column for _, column in cells)
    if len(columns) < 2:
        return []
    rows = []
    for name in names:
        row = f"<td>{html.escape(name)}</td>"
        for column in columns:
            known = cells[name, column]
            value = found[known.id].value
            small = "" if value is None else f"<small>{cell_text(value)}</small>"
            row += f'<td class="{known.evidence}"><a href="#{known.id}">{known.number}</a>{small}</td>'
        rows.append(f"<tr>{row}</tr>")
    return _table(["", *(column.upper() for column in columns)], rows, "grid")


def claims_page(out: Path) -> str:
    """Return the overview of all claims, as Markdown with tables in HTML.

    Args:
        out: the folder of the chapters' numbers.
    """
    claims, released = list(all_claims().values()), ledger.released_result()
    found = {c.id: ledger.measured(c, out, released) for c in claims}
    kinds = [
        f"<tr><td>{_label(kind)}</td><td>{sum(c.evidence == kind for c in claims)}</td><td>{text}</td></tr>"
        for kind, text in EVIDENCE.items()
    ]
    flagged = [c for c in claims if c.flag]
    ablations, benches = ledger.significance_rows()
    lines = [
        "# Every number of the paper",
        "",
        '<p class="lead">What the paper says, what stands behind it here, and what was measured.</p>',
        "",
        "A measured direction agrees or disagrees with the paper when its interval excludes zero; otherwise it is not",
        "resolved. The miniature cannot reproduce absolute values: they are shown only. In the paper's tables the",
        "small number below a published one is the value measured here.",
        "",
        *_table(["Evidence", "Claims", "What it means"], kinds),
        f"Of {len(claims)} claims, {len(flagged)} are flagged:",
        "",
        *(f'- <a href="#{c.id}">{c.place}: {html.escape(c.text)}</a>, {c.shown}: {c.flag}' for c in flagged),
        "",
        "## How sure are the paper's own differences?",
        "",
        "Table 8 has one run per variant, all on the same questions. Here they are taken as independent draws; a",
        "paired test needs the answers of both models, and those of the ablated ones were not released.",
        "",
        *_plain_table(ablations),
        "Table 5 has means and deviations over three runs, compared by Welch's t test:",
        "",
        *_plain_table(benches),
    ]
    for place in dict.fromkeys(c.place for c in claims):
        own = [c for c in claims if c.place == place]
        lines += [f"## {place[0].upper()}{place[1:]}", "", *_grid(own, found)]
        heads = ["Claim", "Published", "Evidence", "Here", "Verdict"]
        lines += _table(heads, [_claim_row(c, found[c.id]) for c in own], "claims")
    return "\n".join(lines)


def differences_page() -> str:
    """Return the page of the points where paper, released code and this project differ, as Markdown."""

    def named(arm: Arm) -> str:
        return f"`{arm.experiment}`" + "".join(f" with `{key}={value}`" for key, value in arm.set.items())

    lines = ["# Where paper and code differ", ""]
    lines += ['<p class="lead">What the paper says, what its released code does, and what this project does.</p>', ""]
    lines += [
        "Every entry is shown by a test, or by two runs that differ in one field. Commits are those of the authors'"
    ]
    lines += ["repository, haotian-liu/LLaVA.", ""]
    for entry in all_discrepancies().values():
        pair = entry.pair
        by = f"`{entry.test}`"
        if pair is not None:
            by = f"{named(pair.first)} and {named(pair.second)}: only `{pair.field}` differs"
        rows = {"paper": entry.paper, "released": f"{entry.released} `{entry.at}`", "here": entry.here}
        rows |= {"the other way": entry.other, "shown by": by}
        lines += [f"## {entry.title}", "", *(f"**{head}**\n: {text}\n" for head, text in rows.items())]
    return "\n".join(lines)
