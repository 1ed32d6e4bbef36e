"""No number in prose without a source: it is rendered, or in the ledger or the configs, or is no value.

A rule below says which digits are no values. What it matches is taken out of the text; a number that is left must be a
value of the ledger or of `configs/`, and long enough that this is no accident.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml

from companion.ablations import NORMAL_95
from companion.evaluation.statistics import CONFIDENCE
from companion.paper.claims import all_claims
from llava_core.runtime import ROOT

RULES = (  # pattern, why its digits are no value, an example
    (r"(?s)```.*?```", "a block of code", "```\nx = 17.5\n```"),
    (r"(?m)^(?:#.*|:{3,}.*|:\w+:.*)$", "a heading, or an option of a directive", "## 99 things\n::::{grid} 17"),
    (r"\{\{[^{}\n]+\}\}", "rendered when the book is built", "{{ claim:max-length }} {{ config:a.b:17 }}"),
    (r"`[^`\n]+`", "code in a line, and names of files", "`--max-words 17`"),
    (r"\]\([^)\n]*\)|https?://\S+", "the target of a link", "[x](17.html)"),
    (r"<[^<>\n]+>", "an element of HTML", '<p width="17">'),
    (r"\$[^$\n]+\$", "a formula", "$x^{17}$"),
    (r"(?m)^\s*\d+\.\s", "the number of a list's entry", "12. then"),
    (r"(?:\b(?:[Cc]hapters?|[Tt]ables?|[Ff]igures?|[Ss]ections?|[Ee]q\.|[Ss]tages?) |§)\d[\d.]*",
     "a reference", "chapter 21, Table 7, Figure 1, §4.2, stage 2"),
    (r"\b\d0s\b", "a group of chapters", "the 40s"),
    (r"\b(?:19|20)\d\d(?:-\d\d-\d\d)?\b", "a year or a date", "2023, 2023-04-17"),
    (r"\b(?:LLaVA|Python|License|Vicuna|transformers|v0)(?: v?\d+(?:\.\d+)*)?(?: to \d+(?:\.\d+)*)?", "a version",
     "Python 3.11, LLaVA 1.0 to 1.5, v0 to 1.5, transformers 4.31"),
    (r"\b[A-Za-z][A-Za-z0-9]*-?\d[\w.]*", "digits inside a name", "GPT-4, CC3M, UTF-8, v1.1, fp32, LLaMA-2"),
)  # fmt: skip
LONG = 3  # digits from which a value is no accident: nearly every shorter number is somewhere in the ledger


def values() -> set[str]:
    """Every number of the ledger, the configs and the statistics, as prose may write it."""

    def numbers(part: object) -> Iterator[float]:
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else [part]:
            if isinstance(value, dict | list):
                yield from numbers(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield value

    files = sorted((ROOT / "configs").rglob("*.yaml"))
    known = {n for path in files for n in numbers(yaml.safe_load(path.read_text()))}
    known |= {c.value for c in all_claims().values()}
    displayed = {
        text
        for n in known
        for text in (f"{n:g}", f"{n:.1f}", f"{n:.2f}", f"{n:,.0f}", f"{n:.0f}")
        if float(text.replace(",", "")) == n
    }
    long = {text for text in displayed if sum(c.isdigit() for c in text) >= LONG}
    sizes = {f"{all_claims()[name].value:g}B" for name in ("llm-large", "llm-small")}
    return long | sizes | {f"{NORMAL_95}", f"{100 * CONFIDENCE:g} %"}


def unexplained(text: str, known: set[str], rules: tuple[tuple[str, str, str], ...] = RULES) -> list[str]:
    """The numbers of a text that no rule and no value explains."""
    for pattern, _, _ in rules:
        text = re.sub(pattern, " ", text)
    result = re.findall(r"\d[\d.,]*(?: %|\w+)?", text)
    return [number for number in (n.rstrip(".,") for n in result) if number not in known]


def texts() -> dict[str, str]:
    """Prose by place: the book's pages, the README and the text cells of the notebooks."""
    pages = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
        pages |= {f"{path.stem}, text {n}": "".join(cell["source"]) for n, cell in enumerate(cells, start=1)}
    return pages


def test_every_number_in_prose_has_a_source() -> None:
    known = values()
    result = {place: numbers for place, text in texts().items() if (numbers := unexplained(text, known))}
    assert result == {}, "render it ({{ claim:... }}, {{ constant:... }}; companion/book/pages.py), or leave it out"


@pytest.mark.parametrize("rule", RULES, ids=[why for _, why, _ in RULES])
def test_each_rule_explains_only_its_example(rule: tuple[str, str, str]) -> None:
    known, example = values(), rule[2]
    assert unexplained(example, known) == []
    assert unexplained(example, known, tuple(other for other in RULES if other != rule)) != []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("It takes 17 minutes.", ["17"]),
        ("about 3 GB of packages", ["3"]),
        ("1.35 tokens per word", ["1.35"]),
        ("158K samples, 93.4 % right", ["158K", "93.4 %"]),
        ("3.4 times as fast", ["3.4"]),
        ("of 400 million images", ["400"]),
        ("an 8B model", ["8B"]),
        ("so 3856 of 4241", ["3856"]),
        ("2048 tokens, 595,375 pairs, 90.92, 7B and 13B, a 95 % interval, 1.96 standard errors", []),
        ("The text has 12 words.", ["12"]),
    ],
)
def test_numbers_without_a_source_are_detected(text: str, numbers: list[str]) -> None:
    assert unexplained(text, values()) == numbers


def test_quantile_matches_the_confidence() -> None:
    from scipy import stats

    assert round(float(stats.norm.ppf((1 + CONFIDENCE) / 2)), 2) == NORMAL_95
