"""Generated pages: every claim and every discrepancy is listed, and values come from their named sources."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from companion.book import generated, pages
from companion.cli import _parser
from companion.paper.claims import all_claims, claim
from companion.paper.discrepancies import all_discrepancies
from llava_core.runtime import ROOT, ConfigError


def test_every_claim_is_a_row_of_the_overview(tmp_path: Path) -> None:
    page = generated.claims_page(generated.all_measured(tmp_path))
    rows = re.findall(r'<tr id="([\w-]+)">', page)
    assert rows.count("sqa-accuracy") == 1
    assert sorted(rows) == sorted(all_claims())
    assert "(computed: -6.9)" in page
    assert f"Of {len(all_claims())} claims, 6 are flagged" in page
    for place in ("Table 4", "Table 5", "Table 7"):
        assert f'## {place}\n\n<div class="wide" tabindex="0">\n<table class="companion grid">' in page
    assert "\n\n<tr" not in page  # an empty line would end the table


def test_overview_shows_measured_and_published_values(tmp_path: Path) -> None:
    saved = {"scale": "mini", "fast": False, "numbers": {"effect": -2.25}}
    saved["checks"] = [{"id": "ablation-7b", "measured": [-3.5, -1.5]}]
    (tmp_path / "43_ablation_model_size.json").write_text(json.dumps(saved))
    row = next(
        line
        for line in generated.claims_page(generated.all_measured(tmp_path)).splitlines()
        if 'tr id="ablation-7b"' in line
    )
    for text in ("-1.08 points", "-2.25 [-3.5 to -1.5]", "chapter 43, mini", 'verdict agrees">agrees'):
        assert text in row


def test_first_page_counts_claims_by_evidence(tmp_path: Path) -> None:
    measured = generated.all_measured(tmp_path)
    text = generated.ledger_state(measured, tmp_path, [])
    claims = all_claims().values()
    unmeasured = sum(c.evidence in generated.UNMEASURED for c in claims)
    assert text.endswith(f"; {unmeasured} not measured.\n")
    assert "settings of the experiments" in text
    chapters = sum(c.evidence == "measured" for c in claims)
    assert f"{chapters} measured: {chapters} no value in this build" in text
    derived = sum(c.derived for c in claims)
    assert f'{derived} <span class="verdict shown-only">' in text  # nothing to compare them with
    checks = [{"published": published, "verdict": "disagrees"} for published in (2.0, None)]
    checks.append({"published": 2.0, "verdict": "disagrees", "id": "ablation-7b"})
    (tmp_path / "44.json").write_text(json.dumps({"checks": checks}))
    text = generated.ledger_state(measured, tmp_path, ["44"])
    assert text.endswith("Of the chapters' further comparisons, 1 [disagree](notebooks/results).\n")


def test_planned_value_is_no_measurement() -> None:
    check = {"claim": "hours", "published": 4, "measured": [3, 5], "verdict": "shown only", "id": "stage1-hours"}
    assert "<td>not measured</td>" in generated._check_row(check)


def test_own_checks_pass_and_share_a_row() -> None:
    def row(claim: str, measured: object, verdict: str, **more: str) -> dict[str, object]:
        return {"claim": claim, "published": None, "measured": measured, "verdict": verdict, "note": "a note", **more}

    rows = generated._check_rows([
        row("probe", "passed", "agrees"), row("blind", "failed", "disagrees"), row("falls", 1.5, "agrees"),
        row("rises", 2.5, "agrees", place="Table 8"),
    ])  # fmt: skip
    assert len(rows) == 3
    assert 'verdict agrees">passed' in rows[0]
    assert 'verdict agrees">agrees' in rows[1]
    assert "Table 8. A note" in rows[1]
    assert "1 of 2 checks passed" in rows[2]
    assert "failed: blind" in rows[2]


def test_every_discrepancy_has_a_heading() -> None:
    page = generated.differences_page()
    assert re.findall(r"^## (.+)$", page, re.M) == [entry.title for entry in all_discrepancies().values()]
    assert "`finetune` and `finetune` with `train.global_batch=128`: only `train.global_batch` differs" in page


def test_claims_of_a_chapter_become_chips() -> None:
    text = "# T\n\nWords, `ablation-7b`.\n\nClaims of the ledger: `sqa-accuracy`,\n`ablation-7b`; see `x`.\n\n| a |"
    result = pages.with_chips(text)
    assert result.count('class="chip') == 2
    assert 'class="chip recomputed" href="claims.html#sqa-accuracy"' in result
    assert "ablation-7b: -1.08 points in the paper; <b>measured on the miniature</b>" in result
    assert "Words, `ablation-7b`." in result
    assert "see `x`." in result
    assert pages.with_chips("# T\n\nNo line of that kind.") == "# T\n\nNo line of that kind."


def test_book_changes_only_the_first_text_of_a_notebook(tmp_path: Path) -> None:
    def cell(kind: str, source: str) -> dict[str, object]:
        return {"cell_type": kind, "source": [source]}

    cells = [cell("markdown", "# T\n\nClaims: `ablation-7b`."), cell("code", "d = {1: {2}}"),
             cell("markdown", "Claims: `ablation-7b`. {{ claim:max-length }}")]  # fmt: skip
    result = json.loads(pages.rendered(json.dumps({"cells": cells}), "x", notebook=True))["cells"]
    assert "chip measured" in result[0]["source"]
    assert result[1]["source"] == ["d = {1: {2}}"]
    assert result[2]["source"] == "Claims: `ablation-7b`. 2048"


def test_values_of_a_page() -> None:
    assert pages.with_values("{{ claim:sqa-nat }} {{ config:pretrain:model.feature_layer }}", "p") == "90.36 -2"
    assert pages.with_values("{{ constant:llava_core.constants:IGNORE_INDEX }}", "p") == "-100"
    assert pages.with_values("{% x %} {y}", "p") == "{% x %} {y}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ claims:x }}", "kind of value 'claims'; did you mean 'claim'"),
        ("{{ claim:sqa-nut }}", "did you mean 'sqa-nat'"),
        ("{{ constant:llava_core.constants:NONE }}", "NONE"),
        ("{{ constant:os:environ }}", "'os:environ' is not a constant of llava_core"),
        ("{{ constant:companion_evil.x:NAME }}", "is not a constant of"),
        ("{{ constant:companion.figures:os }}", "is not a constant of"),
        ("{{ constant:companion.figures:__file__ }}", "is not a constant of"),
        ("{{ constant:llava_core.runtime:ROOT }}", "'ROOT' is a PosixPath, not a number or a text"),
        ("{{ config:pretrain:__init__.__globals__ }}", "is a dict, not a number or a text"),
        ("{{ config:pretrain }}", "missing 1 required"),
    ],
)
def test_missing_value_names_page_and_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"page\.md: \{\{ " + r"(?s:.*)" + re.escape(message)):
        pages.with_values(text, "page.md")


def test_every_kind_of_evidence_has_a_color() -> None:
    css = (ROOT / "book" / "assets" / "companion.css").read_text()
    for kind in ("recomputed", "measured", "measured_gpu", "impossible"):
        assert f".chip.{kind} {{" in css
    assert "takes eight A100" in pages.chip(claim("stage1-hours"))  # the reason for the missing evidence


def test_page_has_every_evaluation_command() -> None:
    page = (ROOT / "book" / "score_your_own_files.md").read_text()
    evaluate = next(a for a in _parser()._actions if a.choices).choices["evaluate"]  # type: ignore[index]
    commands = next(action for action in evaluate._actions if action.choices).choices
    for name, parser in commands.items():
        steps = next((action.choices for action in parser._actions if action.metavar == "COMMAND"), None)
        for command in [f"evaluate {name} {step}" for step in steps] if steps else [f"evaluate {name}"]:
            assert f"llava {command} " in page
        if not steps:
            assert f"`{name}`" in page
    examples = re.findall(r"^llava (evaluate .+)$", page.replace("\\\n", ""), re.M)
    assert len(examples) >= 12
    for example in examples:
        _parser().parse_args(example.split())  # exits for an option that does not exist
    for block in re.findall(r"```json\n(.*?)```", page, re.S):
        json.loads(block)
