"""The ledger of claims: every number of the paper as a typed record, with arithmetic checks.

claims.yaml has the records in groups and tables; `all_claims` expands and validates them. A record
names the chapter, experiment or test with the measured value, which companion/paper/ledger.py reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from llava_core.config_files import StrictModel, read_yaml, validated
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, display_path

LEDGER = Path(__file__).with_name("claims.yaml")
Evidence = Literal["recomputed", "measured", "measured_gpu", "configured", "not_attempted", "impossible"]
EVIDENCE: dict[str, str] = {
    "recomputed": "recomputed from released outputs, or from the paper's own other numbers",
    "measured": "measured on the miniature: its direction can be compared, its absolute value cannot",
    "measured_gpu": "measured on a GPU; the bundle of evidence is in the repository",
    "configured": "a setting of the authors, compared with the experiment that has it; no result",
    "not_attempted": "not attempted, with the reason",
    "impossible": "impossible for anyone outside, with the reason",
}
SOURCES = {
    "verified": "read in the primary source, or computed from it",
    "secondary": "read in copies by others only",
    "inferred": "concluded from other sources",
    "unpublished": "never published",
}


class Tolerance(StrictModel):
    """Largest difference to a number that should be equal, and why; without a value nothing is compared."""

    value: float | None = None
    answers: int | None = None  # of the claim's `n`, instead of a value in percent
    why: str

    def within(self, n: int | None) -> float | None:
        return 100 * self.answers / n if self.answers is not None and n else self.value


class Against(StrictModel):
    """What a claim is compared with: numbers of a chapter, field of an experiment, test, or bundle of evidence."""

    chapter: str | None = None
    rows: str | None = None  # dotted key of the chapter's numbers; None: its check with the claim's id
    where: dict[str, str] = Field(default_factory=dict)  # selects one of several rows
    value: str | None = None
    interval: str | None = None
    experiment: str | None = None
    field: str | None = None
    test: str | None = Field(default=None, pattern=r"^tests/[\w/]+\.py::test_\w+$")
    bundle: str | None = Field(default=None, pattern=r"^\w+/[\w-]+$")  # experiment and its stored result; `where`: part


class Computed(StrictModel):
    """How a claim follows from others, in YAML `{OPERATION: [ids], within: TOLERANCE}`."""

    operation: Literal["sum", "difference", "product", "steps", "share"]
    ids: tuple[str, ...]
    within: Tolerance

    @model_validator(mode="before")
    @classmethod
    def _one_operation(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        given = [name for name in OPERATIONS if fields.get(name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(OPERATIONS)}")
        rest = {key: value for key, value in fields.items() if key != given[0]}
        return {"operation": given[0], "ids": fields[given[0]], **rest}


OPERATIONS: dict[str, Callable[..., float]] = {
    "sum": lambda *values: math.fsum(values),
    "difference": lambda first, second: first - second,
    "product": lambda *values: math.prod(values),
    "steps": lambda n, batch, epochs: math.ceil(n / batch) * epochs,  # the last batch of an epoch is smaller
    "share": lambda steps, share: math.ceil(steps * share),
}


class Claim(StrictModel):
    """A number of the paper."""

    id: str
    place: str
    also: str | None = None  # other places of the paper
    text: str  # in our words
    value: float
    unit: str
    digits: int | None = None  # decimals as printed
    relation: Literal["equals", "about", "more than", "at most"] = "equals"
    n: int | None = None  # questions behind it
    correct: int | None = None  # right answers, where it is a share of `n`
    spread: float | None = None  # the paper's sample standard deviation over `runs`
    runs: int | None = None
    direction: Literal["below 0", "above 0"] | None = None  # claimed sign of a difference
    evidence: Evidence
    why: str | None = None  # why there is no evidence
    against: Against = Against()
    computed: Computed | None = None
    tolerance: Tolerance
    source: Literal["verified", "secondary", "inferred", "unpublished"]
    flag: str | None = None  # error in the printed number
    cell: tuple[str, str] | None = None  # row and column in a table of the paper

    @model_validator(mode="after")
    def _evidence_has_its_record(self) -> Claim:
        needs = {
            "recomputed": self.against.test or self.computed,
            "measured": self.against.chapter,
            "measured_gpu": self.against.bundle,
            "configured": self.against.experiment and self.against.field,
            "not_attempted": self.why,
            "impossible": self.why,
        }
        missing = {"recomputed": "a test or `computed`", "measured": "a chapter", "measured_gpu": "a bundle"}
        missing["configured"] = "an experiment and its field"
        if not needs[self.evidence]:
            raise ValueError(f"evidence '{self.evidence}' needs {missing.get(self.evidence, '`why`')}")
        if self.why and self.evidence not in ("not_attempted", "impossible"):
            raise ValueError(f"`why` explains missing evidence, but the evidence is '{self.evidence}'")
        return self

    @property
    def derived(self) -> bool:
        """Whether the paper does not print the number; there is nothing to compare it with."""
        return self.place.startswith("follows from")

    @property
    def number(self) -> str:
        text = f"{self.value:g}" if self.digits is None else f"{self.value:.{self.digits}f}"
        text = f"{self.value:,.0f}" if self.digits is None and self.value >= 10_000 else text
        return text if self.spread is None else f"{text} ± {self.spread:.{self.digits or 0}f}"

    @property
    def value_text(self) -> str:
        relation = "" if self.relation == "equals" else f"{self.relation} "
        return f"{relation}{self.number}{'' if self.unit == '%' else ' '}{self.unit}"


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Later fields win; `against` is merged field by field."""
    result: dict[str, Any] = {}
    for part in parts:
        against = {**(result.get("against") or {}), **(part.get("against") or {})}
        if where := part.get("where"):
            against["where"] = {**against.get("where", {}), **where}
        result |= part
        result |= {"against": against} if against else {}
    result.pop("where", None)
    return result


def _table_records(group: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    table = {key: group.pop(key, None) for key in ("columns", "rows", "cells", "total", "counts", "minus")}
    columns, cells, text = table["columns"], dict(table["cells"] or {}), group.get("text", "{row}{column}")
    for name, row in table["rows"].items():
        row = dict(row)
        values, spreads = row.pop("values"), row.pop("spreads", [None] * len(columns))
        own, of, uncounted = row.pop("id", name), row.pop("of", None), row.pop("uncounted", False)
        if len(values) != len(columns) or len(spreads) != len(columns):
            raise ConfigError(f"{where}, row '{name}': {len(values)} values for {len(columns)} columns")
        records: dict[str, dict[str, Any]] = {}
        for (column, column_fields), value, spread in zip(columns.items(), values, spreads, strict=True):
            is_total = column == table["total"]
            key, suffix = own if is_total else f"{name}-{column}", "" if is_total else f"-{column}"
            fields = _merged(group, column_fields, row, cells.pop(key, {}))
            fields |= {"value": value, "text": text.format(row=row["text"], column=column_fields["text"])}
            fields |= {"cell": (row["text"], column), "spread": spread}
            if table["minus"]:
                ids = [f"{of}{suffix}", f"{table['minus']['row']}{suffix}"]
                fields["computed"] = {"difference": ids, "within": table["minus"]["within"]}
            if table["counts"] is not None and not uncounted:
                fields["correct"] = _count(key, value, fields["n"], fields["digits"], where)
            records[column] = {"id": key, **fields}
        for parts in (table["counts"] or []) if not uncounted else []:
            counted = sum(records[column]["correct"] for column in parts)
            if counted != records[table["total"]]["correct"]:
                raise ConfigError(
                    f"{where}, row '{name}': {' + '.join(parts)} are {counted} right answers, "
                    f"'{table['total']}' is {records[table['total']]['correct']}; correct a value"
                )
        yield from ((fields.pop("id"), fields) for fields in records.values())
    if cells:
        raise ConfigError(f"{where}: `cells` names '{min(cells)}', which is no cell of the table")


def _count(name: str, value: float, n: int, digits: int, where: str) -> int:
    correct = round(value * n / 100)
    if round(100 * correct / n, digits) != value:
        raise ConfigError(f"{where}, {name}: no count of {n} answers gives {value:.{digits}f} %; correct the value")
    return correct


def read_ledger(path: Path = LEDGER) -> dict[str, Claim]:
    """Read a file of claims (YAML of `tolerances`, `whys` and `groups`) by id, in the order of the file.

    Raises:
        ConfigError: an unknown key (with the nearest), a missing or wrong field, a duplicate id, a reference to an
            unknown claim, or a percentage that no count of answers gives; with file and record.
    """
    file, content = display_path(path), read_yaml(path)
    tolerances = {name: validated(Tolerance, given, file) for name, given in content["tolerances"].items()}
    claims: dict[str, Claim] = {}
    for number, group in enumerate(content["groups"], start=1):
        where = f"{file}, group {number} ({group.get('place')})"
        group = dict(group)
        rows = _table_records(group, where) if "columns" in group else (
            (name, _merged(group, fields)) for name, fields in group.pop("records").items()
        )  # fmt: skip
        for name, fields in rows:
            if name in claims:
                raise ConfigError(f"{where}: claim '{name}' occurs twice; give one of them another id")
            claims[name] = _claim(name, fields, tolerances, content["whys"], f"{where}, claim '{name}'")
    for claim in claims.values():
        for needed in claim.computed.ids if claim.computed else []:
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

    record = {"id": name, **fields}
    default = "direction" if record.get("evidence") in ("measured", "measured_gpu") else "nothing"
    if computed := record.get("computed"):
        default = computed["within"] if record.get("evidence") == "recomputed" else default
        record["computed"] = {**computed, "within": named("tolerance", tolerances, computed["within"])}
    record["tolerance"] = named("tolerance", tolerances, record.get("tolerance", default))
    if record.get("why"):
        record["why"] = named("reason in `whys`", whys, record["why"])
    return validated(Claim, record, where)


@cache
def all_claims() -> dict[str, Claim]:
    return read_ledger()


def claim(name: str) -> Claim:
    """One claim; a ConfigError names the nearest id."""
    if name not in all_claims():
        raise ConfigError(f"{unknown('claim', name, all_claims())}; `llava claims` lists them")
    return all_claims()[name]


def computed_value(name: str, claims: Mapping[str, Claim] | None = None) -> float | None:
    """Compute a claim from the others (default: the paper's) that it follows from; None if it follows from none."""
    claims = all_claims() if claims is None else claims
    rule = claims[name].computed
    return None if rule is None else float(OPERATIONS[rule.operation](*(claims[i].value for i in rule.ids)))


def inconsistent(claims: Mapping[str, Claim] | None = None) -> dict[str, float]:
    """Return the claims that differ from their computed value by more than the tolerance: id -> computed value."""
    claims = all_claims() if claims is None else claims
    result = {}
    for name, known in claims.items():
        value = computed_value(name, claims)
        if value is None or known.computed is None:
            continue
        reach = (known.computed.within.within(known.n) or 0) + 1e-9
        exceeded = known.relation == "more than" and value > known.value
        if not exceeded and abs(value - known.value) > reach:
            result[name] = value
    return result
