"""The ledger: every number of the paper as a typed record, checked as far as arithmetic can check it.

claims.yaml holds the records in groups and tables; `all_claims` expands, validates and checks them. What was measured
here is not in the ledger: a record says where it stands, and companion/paper/ledger.py reads it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from llava_core.config import _read_yaml, _Strict, _validated
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, shown

LEDGER = Path(__file__).with_name("claims.yaml")
Evidence = Literal["recomputed", "measured", "measured_gpu", "not_attempted", "impossible"]
EVIDENCE: dict[str, str] = {
    "recomputed": "computed again from released outputs, or from the paper's own other numbers",
    "measured": "measured on the miniature: its direction can be compared, its height cannot",
    "measured_gpu": "measured on a GPU; the bundle of evidence is in the repository",
    "not_attempted": "not attempted, with the reason",
    "impossible": "impossible for anyone outside, with the reason",
}
SOURCES = {
    "verified": "read in the primary source, or computed from it",
    "secondary": "read in copies by others only",
    "inferred": "concluded from other facts",
    "unpublished": "never published",
}


class Tolerance(_Strict):
    """How far a number may lie from another that should equal it, and why; no value: nothing is compared."""

    value: float | None = None
    answers: int | None = None
    """So many answers of the claim's `n` instead of a value, in percent of them."""
    why: str

    def within(self, n: int | None) -> float | None:
        """Return the largest difference allowed."""
        return 100 * self.answers / n if self.answers is not None and n else self.value


class Against(_Strict):
    """What a claim is compared with: a chapter's numbers, an experiment's field, a test, a bundle of evidence."""

    chapter: str | None = None
    rows: str | None = None
    """Dotted key of the chapter's numbers; without it, the chapter's check that carries the claim's id."""
    where: dict[str, str] = Field(default_factory=dict)
    """Which of several rows."""
    value: str | None = None
    interval: str | None = None
    experiment: str | None = None
    field: str | None = None
    test: str | None = Field(default=None, pattern=r"^tests/[\w/]+\.py::test_\w+$")
    bundle: str | None = None


class Computed(_Strict):
    """How the claim follows from others; exactly one way, over their ids."""

    sum: tuple[str, ...] = ()
    difference: tuple[str, ...] = ()
    product: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    """Records, batch, epochs: an epoch ends with a smaller batch."""
    share: tuple[str, ...] = ()
    """Steps and the share of them, rounded up."""
    within: Tolerance

    @property
    def way(self) -> tuple[str, tuple[str, ...]]:
        """The operation and the ids that it takes."""
        return next((name, ids) for name in WAYS if (ids := getattr(self, name)))

    @model_validator(mode="after")
    def _one_way(self) -> Computed:
        if sum(bool(getattr(self, name)) for name in WAYS) != 1:
            raise ValueError(f"give exactly one of {', '.join(WAYS)}")
        return self


WAYS: dict[str, Callable[..., float]] = {
    "sum": lambda *values: math.fsum(values),
    "difference": lambda first, second: first - second,
    "product": lambda *values: math.prod(values),
    "steps": lambda n, batch, epochs: math.ceil(n / batch) * epochs,
    "share": lambda steps, share: math.ceil(steps * share),
}


class Claim(_Strict):
    """A number of the paper."""

    id: str
    place: str
    also: str | None = None
    """Where else it stands."""
    text: str
    """What it says, in our words."""
    value: float
    unit: str
    digits: int | None = None
    """Decimals as printed."""
    relation: Literal["equals", "about", "more than"] = "equals"
    n: int | None = None
    """Questions behind it."""
    correct: int | None = None
    """Right answers, where it is a share of `n`."""
    spread: float | None = None
    """Sample standard deviation that the paper gives, over `runs`."""
    runs: int | None = None
    direction: Literal["below 0", "above 0"] | None = None
    """What the claim says beyond its digits, where it is a difference."""
    evidence: Evidence
    why: str | None = None
    """Why there is no evidence."""
    against: Against = Against()
    computed: Computed | None = None
    tolerance: Tolerance
    source: Literal["verified", "secondary", "inferred", "unpublished"]
    flag: str | None = None
    """What is wrong with the printed number."""
    cell: tuple[str, str] | None = None
    """Row and column in a table of the paper."""

    @model_validator(mode="after")
    def _evidence_has_its_record(self) -> Claim:
        needs = {
            "recomputed": self.against.test or self.computed,
            "measured": self.against.chapter,
            "measured_gpu": self.against.bundle,
            "not_attempted": self.why,
            "impossible": self.why,
        }
        missing = {"recomputed": "a test or `computed`", "measured": "a chapter", "measured_gpu": "a bundle"}
        if not needs[self.evidence]:
            raise ValueError(f"evidence '{self.evidence}' needs {missing.get(self.evidence, '`why`')}")
        if self.why and self.evidence not in ("not_attempted", "impossible"):
            raise ValueError(f"`why` explains missing evidence, but the evidence is '{self.evidence}'")
        return self

    @property
    def number(self) -> str:
        """The value as it is printed, with its spread."""
        text = f"{self.value:g}" if self.digits is None else f"{self.value:.{self.digits}f}"
        text = f"{self.value:,.0f}" if self.digits is None and self.value >= 10_000 else text
        return text if self.spread is None else f"{text} ± {self.spread:.{self.digits or 0}f}"

    @property
    def shown(self) -> str:
        """Number with unit, as a table shows it."""
        relation = "" if self.relation == "equals" else f"{self.relation} "
        return f"{relation}{self.number}{'' if self.unit == '%' else ' '}{self.unit}"


# ------------------------------------------------------------------------------------------------ reading


def _joined(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Lay fields over each other; what a claim is compared with is laid over field by field."""
    result: dict[str, Any] = {}
    for part in parts:
        against = {**(result.get("against") or {}), **(part.get("against") or {})}
        if where := part.get("where"):
            against["where"] = {**against.get("where", {}), **where}
        result |= part
        result |= {"against": against} if against else {}
    result.pop("where", None)
    return result


def _cells(group: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a table: id -> fields."""
    table = {key: group.pop(key, None) for key in ("columns", "rows", "cells", "whole", "counts", "minus")}
    columns, cells, text = table["columns"], dict(table["cells"] or {}), group.get("text", "{row}{column}")
    for name, row in table["rows"].items():
        row = dict(row)
        values, spreads = row.pop("values"), row.pop("spreads", [None] * len(columns))
        own, of, uncounted = row.pop("id", name), row.pop("of", None), row.pop("uncounted", False)
        if len(values) != len(columns) or len(spreads) != len(columns):
            raise ConfigError(f"{where}, row '{name}': {len(values)} values for {len(columns)} columns")
        made: dict[str, dict[str, Any]] = {}
        for (column, facts), value, spread in zip(columns.items(), values, spreads, strict=True):
            whole = column == table["whole"]
            key, suffix = own if whole else f"{name}-{column}", "" if whole else f"-{column}"
            fields = _joined(group, facts, row, cells.pop(key, {}))
            fields |= {"value": value, "text": text.format(row=row["text"], column=facts["text"])}
            fields |= {"cell": (row["text"], column), "spread": spread}
            if table["minus"]:
                ids = [f"{of}{suffix}", f"{table['minus']['row']}{suffix}"]
                fields["computed"] = {"difference": ids, "within": table["minus"]["within"]}
            if table["counts"] is not None and not uncounted:
                fields["correct"] = _count(key, value, fields["n"], fields["digits"], where)
            made[column] = {"id": key, **fields}
        for parts in (table["counts"] or []) if not uncounted else []:
            counted = sum(made[column]["correct"] for column in parts)
            if counted != made[table["whole"]]["correct"]:
                raise ConfigError(
                    f"{where}, row '{name}': {' + '.join(parts)} are {counted} right answers, "
                    f"'{table['whole']}' is {made[table['whole']]['correct']}; correct a value"
                )
        yield from ((fields.pop("id"), fields) for fields in made.values())
    if cells:
        raise ConfigError(f"{where}: `cells` names '{min(cells)}', which is no cell of the table")


def _count(name: str, value: float, n: int, digits: int, where: str) -> int:
    """Right answers behind a percentage."""
    correct = round(value * n / 100)
    if round(100 * correct / n, digits) != value:
        raise ConfigError(f"{where}, {name}: no whole number of {n} answers is {value:.{digits}f} %; correct the value")
    return correct


def read_ledger(path: Path = LEDGER) -> dict[str, Claim]:
    """Read a file of claims.

    Args:
        path: YAML of `tolerances`, `whys` and `groups`.

    Returns:
        The claims by id, in the order of the file.

    Raises:
        ConfigError: an unknown key (with the nearest), a missing or wrong field, an id that occurs twice, a reference
            to a claim that does not exist, or a percentage that no count of answers gives; with file and record.
    """
    file, content = shown(path), _read_yaml(path)
    tolerances = {name: _validated(Tolerance, given, lambda _: file) for name, given in content["tolerances"].items()}
    claims: dict[str, Claim] = {}
    for number, group in enumerate(content["groups"], start=1):
        where = f"{file}, group {number} ({group.get('place')})"
        group = dict(group)
        rows = _cells(group, where) if "columns" in group else (
            (name, _joined(group, fields)) for name, fields in group.pop("records").items()
        )  # fmt: skip
        for name, fields in rows:
            if name in claims:
                raise ConfigError(f"{where}: claim '{name}' occurs twice; give one of them another id")
            claims[name] = _claim(name, fields, tolerances, content["whys"], f"{where}, claim '{name}'")
    for claim in claims.values():
        for needed in claim.computed.way[1] if claim.computed else []:
            if needed not in claims:
                raise ConfigError(f"{file}, claim '{claim.id}', computed: {unknown('claim', needed, claims)}")
    return claims


def _claim(
    name: str, fields: Mapping[str, Any], tolerances: Mapping[str, Tolerance], whys: Mapping[str, str], where: str
) -> Claim:
    def named(kind: str, known: Mapping[str, Any], key: str) -> Any:
        if key not in known:
            raise ConfigError(f"{where}: {unknown(kind, key, known)}")
        return known[key]

    made = {"id": name, **fields}
    usual = "direction" if made.get("evidence") in ("measured", "measured_gpu") else "nothing"
    if computed := made.get("computed"):
        usual = computed["within"] if made.get("evidence") == "recomputed" else usual
        made["computed"] = {**computed, "within": named("tolerance", tolerances, computed["within"])}
    made["tolerance"] = named("tolerance", tolerances, made.get("tolerance", usual))
    if made.get("why"):
        made["why"] = named("reason in `whys`", whys, made["why"])
    return _validated(Claim, made, lambda _: where)


@cache
def all_claims() -> dict[str, Claim]:
    """Every claim by id."""
    return read_ledger()


def claim(name: str) -> Claim:
    """One claim.

    Args:
        name: its id.

    Raises:
        ConfigError: there is no claim of that id; the message names the nearest.
    """
    if name not in all_claims():
        raise ConfigError(unknown("claim", name, all_claims()))
    return all_claims()[name]


# ------------------------------------------------------------------------------------------------ what must agree


def computed_value(name: str, claims: Mapping[str, Claim] | None = None) -> float | None:
    """Compute a claim from the others that it follows from.

    Args:
        name: the claim's id.
        claims: all claims; the paper's when None.

    Returns:
        The value, or None where the claim follows from no other.
    """
    claims = all_claims() if claims is None else claims
    rule = claims[name].computed
    if rule is None:
        return None
    way, ids = rule.way
    return float(WAYS[way](*(claims[i].value for i in ids)))


def inconsistent(claims: Mapping[str, Claim] | None = None) -> dict[str, float]:
    """Find the claims that do not follow from the others as they should.

    Args:
        claims: all claims; the paper's when None.

    Returns:
        Id -> the value that the others give, for each claim off by more than its tolerance.
    """
    claims = all_claims() if claims is None else claims
    found = {}
    for name, known in claims.items():
        value = computed_value(name, claims)
        if value is None or known.computed is None:
            continue
        reach = (known.computed.within.within(known.n) or 0) + 1e-9
        short = known.relation == "more than" and value > known.value
        if not short and abs(value - known.value) > reach:
            found[name] = value
    return found
