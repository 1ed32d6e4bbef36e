"""How far each reading of the CC3M recipe is from the published numbers; which one the authors took is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from typing import Any

from companion.data_tools.cc3m import Filtered, phrase_table, select


@dataclass(frozen=True)
class Reading:
    """A reading of the recipe: what it says, and the fields of `FilterSettings` that differ."""

    says: str
    changes: Mapping[str, Any] = field(default_factory=dict)


RAW = {"lowercase": False, "strip_determiners": False, "drop_pronouns": False}
READINGS = (
    Reading("as the settings say"),
    Reading("noun chunks as the parser gives them", RAW),
    Reading("capitals make another phrase", {"lowercase": False}),
    Reading("'a dog' and 'the dog' are two phrases", {"strip_determiners": False}),
    Reading("pronouns are phrases", {"drop_pronouns": False}),
    Reading("one word at most", {"max_words": 1}),
    Reading("two words at most", {"max_words": 2}),
    Reading("three words at most", {"max_words": 3}),
    Reading("every occurrence counts", {"count": "occurrences"}),
    Reading("more than 3 times, not 3 times or more", {"min_frequency": 4}),
    Reading("drawn from captions not yet in the pool", {"draw": "unpooled", "order": "static"}),
    Reading("the same, fewest remaining first", {"draw": "unpooled", "order": "remaining"}),
    Reading("filled up to the cap", {"draw": "top_up", "order": "static"}),
    Reading("the same, fewest remaining first", {"draw": "top_up", "order": "remaining"}),
    Reading("dead images leave after the selection", {"unavailable": "after"}),
    Reading("raw noun chunks, filled up to the cap", {**RAW, "draw": "top_up", "order": "remaining"}),
    Reading("two words at most, filled up to the cap", {"max_words": 2, "draw": "top_up", "order": "remaining"}),
)
_FORMS = ("lowercase", "strip_determiners", "drop_pronouns", "max_words")  # what changes the phrases themselves


def sensitivity(
    filtered: Filtered, published: Mapping[str, int], readings: Sequence[Reading] = READINGS
) -> list[dict[str, Any]]:
    """Select under each reading of the recipe; the phrases are found once.

    Args:
        filtered: a filtered TSV; its settings are what the readings change.
        published: the paper's `phrases`, `phrases_kept`, `pairs_kept`.
        readings: those to try.

    Returns:
        A row per reading: what it says, `changes` as text, the three numbers, and `times_off`: by what factor the
        number that is furthest from the published one is too large or too small.
    """
    rows: list[dict[str, Any]] = []
    table, form = filtered.selection.table, _form(filtered.settings)
    # readings that share their phrases one after the other: only one table is in memory
    wanted = {k: replace(filtered.settings, **reading.changes) for k, reading in enumerate(readings)}
    for k in sorted(wanted, key=lambda k: (str(_form(wanted[k])), k)):
        if _form(wanted[k]) != form:
            table, form = phrase_table(filtered.phrases, wanted[k]), _form(wanted[k])
        counts = select(table, wanted[k], filtered.available).counts()
        changes = ", ".join(f"{name} = {value}" for name, value in readings[k].changes.items())
        numbers = {name: counts[name] for name in published}
        rows.append(
            {"k": k, "reading": readings[k].says, "changes": changes, **numbers, "times_off": _off(numbers, published)}
        )
    return [{name: row[name] for name in row if name != "k"} for row in sorted(rows, key=lambda row: row["k"])]


def _form(settings: Any) -> tuple[Any, ...]:
    return tuple(getattr(settings, name) for name in _FORMS)


def _off(numbers: Mapping[str, int], published: Mapping[str, int]) -> float | None:
    """Return the largest factor between two numbers of the same name; None where one is zero."""
    pairs = [(numbers[name], published[name]) for name in published]
    return exp(max(abs(log(a / b)) for a, b in pairs)) if all(a and b for a, b in pairs) else None
