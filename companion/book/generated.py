"""Pages of the book that are generated: results, claims, differences between paper and code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.figures import cell_text, code_safe, html_safe, markdown_safe, markdown_table
from companion.paper import ledger
from companion.paper.claims import EVIDENCE, SOURCES, Claim, all_claims, claim, computed_value
from companion.paper.discrepancies import Arm, all_discrepancies
from companion.paper.verdict import Verdict
from llava_core.config import load_scale
from llava_core.runtime import read_json

UNMEASURED = ("not_attempted", "impossible")
NO_VALUE = "no value in this build"  # the chapter of a claim has not run, or the released files are absent
GROUPS = {
    "measured": "measured",
    "measured_gpu": "measured",
    "recomputed": "recomputed from released answers or the paper's other numbers",
    "configured": "settings of the experiments",
    "not_attempted": "not measured",
    "impossible": "not measured",
}
"""Kinds of evidence as the first page counts them."""


def _text(text: object) -> str:
    """Text inside of a block of HTML, which a blank line would end; it has no `{{ ... }}` of a page."""
    return html_safe(" ".join(str(text).split())).replace("{", "&#123;")


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> list[str]:
    titles = "".join(f"<th>{_text(head)}</th>" for head in heads)
    head = f'<table class="companion {kind}"><thead><tr>{titles}</tr></thead><tbody>'
    return ['<div class="wide" tabindex="0">', head, *rows, "</tbody></table></div>", ""]


def _row(cells: Sequence[str], key: str = "") -> str:
    anchor = f' id="{key}"' if key else ""
    return f"<tr{anchor}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _verdict(verdict: Verdict, text: str = "") -> str:
    return f'<span class="verdict {verdict.css_class}">{text or verdict}</span>'


def _plain_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return _table(list(rows[0]), [_row([_text(cell_text(cell)) for cell in row.values()]) for row in rows])


def _label(kind: str) -> str:
    return f'<span class="chip {kind}"><b>{kind.replace("_", " ")}</b></span>'


def _state(known: Claim, here: ledger.Measured) -> str:
    if known.evidence in UNMEASURED:
        return "not measured"
    return NO_VALUE if here.value is None and here.interval is None else _verdict(here.verdict)


def _claim_row(known: Claim, here: ledger.Measured) -> str:
    small = [f"<code>{known.id}</code>", f"also {known.also}" if known.also else ""]
    small.append(SOURCES[known.source] if known.source != "verified" else "")
    if known.n:
        answers = "" if known.correct is None else f"{known.correct:,} of "
        small.append(f"{answers}{known.n:,} questions" + (f", {known.runs} runs" if known.runs else ""))
    if known.flag:
        value = computed_value(known.id)
        computed = "" if value is None else f" (computed: {value:.4g})"
        small.append(f"<b>flag: {_text(known.flag)}{computed}</b>")
    values = [cell_text(part) for part in (here.value, here.interval) if part is not None]
    text = f"{values[0]} [{values[1]}]" if len(values) == 2 else "".join(values)
    note = _text(here.note if known.why is None else known.why)
    has_tolerance = known.tolerance.value is not None or known.tolerance.answers
    tolerance = f"; tolerance: {known.tolerance.why}" if has_tolerance else ""
    claim_cell = f"{_text(known.text)}<small>{'; '.join(filter(None, small))}</small>"
    here_cell = f"{_text(text)}<small>{note}{tolerance}</small>"
    here_cell += "".join(f"<small>bundle: {_text(line)}</small>" for line in here.elsewhere)
    cells = [claim_cell, _state(known, here), _text(known.value_text), _label(known.evidence), here_cell]
    return _row(cells, known.id)


def _grid(claims: Sequence[Claim], measured: Mapping[str, ledger.Measured]) -> list[str]:
    """Return the paper's table with the measured value below each number; nothing for a single column."""
    cells = {c.cell: c for c in claims if c.cell}
    names, columns = dict.fromkeys(row for row, _ in cells), dict.fromkeys(column for _, column in cells)
    if len(columns) < 2:
        return []
    rows = []
    for name in names:
        row = f"<td>{_text(name)}</td>"
        for column in columns:
            known = cells[name, column]
            value = measured[known.id].value
            small = "" if value is None else f"<small>{_text(cell_text(value))}</small>"
            row += f'<td class="{known.evidence}"><a href="#{known.id}">{known.number}</a>{small}</td>'
        rows.append(f"<tr>{row}</tr>")
    return _table(["", *(column.upper() for column in columns)], rows, "grid")


def _title(copy: Path) -> str:
    for cell in read_json(copy)["cells"]:
        if cell["cell_type"] == "markdown" and (match := re.search(r"^# +(.+)$", "".join(cell["source"]), re.M)):
            return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).strip()  # the text of a link, not the link
    return copy.stem


def _check_row(check: Mapping[str, Any]) -> str:
    verdict = Verdict(check["verdict"])
    notes = [str(check[key]) for key in ("place", "note") if check.get(key)]
    small = ". ".join(note[0].upper() + note[1:] for note in notes)
    note = f"<small>{_text(small)}</small>" if small else ""
    own = check["published"] is None and not check.get("place")  # a check of this project, no claim of the paper
    passed = {Verdict.AGREES: "passed", Verdict.DISAGREES: "failed"}.get(verdict, "") if own else ""
    values = [_text(cell_text(check[key])) for key in ("published", "measured")]
    planned = check.get("id") and claim(check["id"]).evidence in UNMEASURED  # a value, but no measurement of the claim
    return _row([_text(check["claim"]) + note, "not measured" if planned else _verdict(verdict, passed), *values])


def _check_rows(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row per check; those that have no number but `passed` or `failed` share one."""
    tests = [check for check in checks if check["measured"] in ("passed", "failed")]
    if len(tests) < 2:
        return [_check_row(check) for check in checks]
    failed = [check["claim"] for check in tests if check["measured"] == "failed"]
    row = {"claim": f"{len(tests) - len(failed)} of {len(tests)} checks passed", "published": None}
    row |= {"measured": "failed: " + "; ".join(failed) if failed else None}
    row |= {"verdict": Verdict.DISAGREES if failed else Verdict.AGREES, "note": tests[0].get("note")}
    return [*(_check_row(check) for check in checks if check not in tests), _check_row(row)]


def _bundle_row(row: Mapping[str, Any]) -> str:
    run = f"{row['experiment']} at {row['scale']}, {row['hardware']}, {row['date']}, {row['run']}"
    cells = [_text(row["bundle"]), _text(run)]
    if "failed" in row:
        return _row([*cells, f"not shown: it fails the checks {_text(', '.join(row['failed']))}", "", "", ""])
    values = [_text(cell_text(row[key])) for key in ("id", "value", "measured")]
    return _row([*cells, *values, _verdict(Verdict(row["verdict"]))])


def results_page(out: Path, present: Sequence[str], missing: Sequence[str], scale: str) -> str:
    """Return the page of measured and published numbers and of the scale's departures from the paper."""
    config = load_scale(scale)
    title = f"Measured at the scale {code_safe(scale)}: {markdown_safe(config.title)}."
    lines = ["# Results at a glance", "", title, ""]
    without, solutions = [], []
    for name in present:
        numbers, title = read_json(out / f"{name}.json"), markdown_safe(_title(out / f"{name}.ipynb"))
        link = f"[{title}]({name}.ipynb)"
        if own := [key.removeprefix("solution_") for key in numbers.get("solutions", {})]:
            solutions.append((link, ", ".join(own)))
        if not numbers.get("checks"):
            without.append(link)
            continue
        lines += [f"## {link}", ""]
        if numbers.get("scale") not in (None, scale) or numbers.get("fast"):
            run = "a shortened run" if numbers.get("fast") else "a run"
            lines += [f"*From {run} at the scale {code_safe(numbers.get('scale'))}.*", ""]
        heads = ["Claim", "Verdict", "Published", "Measured"]
        lines += _table(heads, _check_rows(numbers["checks"]), "results")
        if runs := numbers.get("runs"):
            more = f" and {len(runs) - 6} more" if len(runs) > 6 else ""
            lines += [f"Runs: {', '.join(map(code_safe, runs[:6]))}{more}.", ""]
    if bundles := ledger.bundle_rows():
        lines += [
            "## Runs at other scales",
            "",
            "From the evidence bundles in `evidence/`; `llava evidence check` checks",
        ]
        lines += ["each without network and weights.", ""]
        lines += _table(
            ["Bundle", "Run", "Claim", "Published", "Measured", "Verdict"], [_bundle_row(b) for b in bundles]
        )
    if without:
        lines += [f"These chapters measure no claim: {', '.join(without)}.", ""]
    if solutions:
        lines += ["## Solutions of the exercises", "", "A chapter's run computes its solutions and checks them.", ""]
        lines += markdown_table(["chapter", "exercises checked"], solutions)
    if config.stand_ins:
        lines += [f"## Stand-ins for the paper's data and models at {code_safe(scale)}", ""]
        stand_ins = ((code_safe(name), markdown_safe(why)) for name, why in config.stand_ins.items())
        lines += markdown_table(["in the paper", "here"], stand_ins)
    if config.departs:
        lines += [f"## Where {code_safe(scale)} departs from the paper", ""]
        lines += ["All other values are the paper's; `configs/` gives their sources.", ""]
        rows = list[tuple[str, ...]]()
        for experiment, departs in config.departs.items():
            which, why = "all" if experiment == "*" else code_safe(experiment), markdown_safe(departs.why)
            rows += [(which, code_safe(key), markdown_safe(value), why) for key, value in departs.set.items()]
        lines += markdown_table(["experiment", "field", "value here", "why"], rows)
    if missing:
        lines += ["## Not in this book yet", "", "These chapters have not run:", ""]
        lines += [f"- {code_safe(name)}" for name in missing] + [""]
    return "\n".join(lines)


def all_measured(out: Path) -> dict[str, ledger.Measured]:
    released, bundles = ledger.released_result(), ledger.bundle_rows()
    return {c.id: ledger.measured(c, out, released, bundles) for c in all_claims().values()}


def ledger_state(measured: Mapping[str, ledger.Measured], out: Path, present: Sequence[str]) -> str:
    """Return the claims and verdicts of each kind of evidence in one line, which the first page includes."""
    groups = {group: Counter[str]() for group in GROUPS.values()}
    for name, here in measured.items():
        known = all_claims()[name]
        groups[GROUPS[known.evidence]][_state(known, here)] += 1
    order = [*map(_verdict, Verdict), NO_VALUE]
    parts = []
    for group, counts in groups.items():
        states = [f"{counts[state]} {state}" for state in order if counts[state]]
        parts += [f"{counts.total()} {group}{': ' if states else ''}{', '.join(states)}"] if counts else []
    checks = [check for name in present for check in read_json(out / f"{name}.json").get("checks", [])]
    others = [c for c in checks if c["published"] is not None and not c.get("id") and c["verdict"] == Verdict.DISAGREES]
    more = f" Of the chapters' further comparisons, {len(others)} [disagree](notebooks/results)." if others else ""
    return f"[Every number of the paper](notebooks/claims), {len(measured)} claims: {'; '.join(parts)}.{more}\n"


def claims_page(measured: Mapping[str, ledger.Measured]) -> str:
    claims = list(all_claims().values())
    kinds = [
        f"<tr><td>{_label(kind)}</td><td>{sum(c.evidence == kind for c in claims)}</td><td>{text}</td></tr>"
        for kind, text in EVIDENCE.items()
    ]
    flagged = [c for c in claims if c.flag]
    ablations, benches = ledger.significance_rows()
    lines = [
        "# Every number of the paper",
        "",
        '<p class="lead">Each claim with its evidence and, where one exists, the measured value.</p>',
        "",
        "A direction agrees or disagrees when the interval of the measured difference excludes zero and, in an",
        "ablation, the difference is significant after Holm's correction; otherwise it is not resolved. The miniature",
        "cannot reproduce absolute values: they are shown only. In the paper's tables, the small number below a",
        "published one is the measured one.",
        "",
        *_table(["Evidence", "Claims", "What it means"], kinds),
        f"Of {len(claims)} claims, {len(flagged)} are flagged:",
        "",
        *(f'- <a href="#{c.id}">{c.place}: {_text(c.text)}</a>, {c.value_text}: {c.flag}' for c in flagged),
        "",
        "## How significant are the paper's own differences?",
        "",
        "Table 8 has one run per variant, all on the same questions. Here they are treated as independent samples; a",
        "paired test needs the answers of both models, and those of the ablated models were not released.",
        "",
        *_plain_table(ablations),
        "Table 5 has means and deviations over three runs, compared by Welch's t test:",
        "",
        *_plain_table(benches),
    ]
    for place in dict.fromkeys(c.place for c in claims):
        own = [c for c in claims if c.place == place]
        lines += [f"## {place[0].upper()}{place[1:]}", "", *_grid(own, measured)]
        heads = ["Claim", "Verdict", "Published", "Evidence", "Here"]
        lines += _table(heads, [_claim_row(c, measured[c.id]) for c in own], "claims")
    return "\n".join(lines)


def differences_page() -> str:

    def named(arm: Arm) -> str:
        return f"`{arm.experiment}`" + "".join(f" with `{key}={value}`" for key, value in arm.set.items())

    lines = ["# Where paper and code differ", ""]
    lines += ['<p class="lead">The paper, its released code, and this project.</p>', ""]
    lines += ["Every entry has a test, or two runs that differ in one field. Commits are those of the authors'"]
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
