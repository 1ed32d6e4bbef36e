"""Filter sensitivity: the CC3M recipe under other settings, compared with the published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import exp, log
from typing import Any

from companion.data_tools.cc3m import Filtered, phrase_table, select
from companion.data_tools.filter_settings import FilterSettings
from companion.figures import setting_text


@dataclass(frozen=True)
class Variant:
    """A variant of the recipe: its description, and the fields of `FilterSettings` that differ."""

    description: str
    changes: Mapping[str, Any] = field(default_factory=dict)


RAW = {"lowercase": False, "strip_determiners": False, "drop_pronouns": False}
VARIANTS = (
    Variant("as the settings say"),
    Variant("noun chunks as the parser gives them", RAW),
    Variant("capitals make another phrase", {"lowercase": False}),
    Variant("'a dog' and 'the dog' are two phrases", {"strip_determiners": False}),
    Variant("pronouns are phrases", {"drop_pronouns": False}),
    Variant("one word at most", {"max_words": 1}),
    Variant("two words at most", {"max_words": 2}),
    Variant("three words at most", {"max_words": 3}),
    Variant("every occurrence counts", {"count": "occurrences"}),
    Variant("more than 3 times, not 3 times or more", {"min_frequency": 4}),
    Variant("drawn from captions not yet in the pool", {"draw": "unpooled", "order": "static"}),
    Variant("the same, fewest remaining first", {"draw": "unpooled", "order": "remaining"}),
    Variant("filled up to the cap", {"draw": "top_up", "order": "static"}),
    Variant("the same, fewest remaining first", {"draw": "top_up", "order": "remaining"}),
    Variant("dead images leave after the selection", {"unavailable": "after"}),
    Variant("raw noun chunks, filled up to the cap", {**RAW, "draw": "top_up", "order": "remaining"}),
    Variant("two words at most, filled up to the cap", {"max_words": 2, "draw": "top_up", "order": "remaining"}),
)
_FORM_FIELDS = ("lowercase", "strip_determiners", "drop_pronouns", "max_words")  # these change the phrases


def filter_sensitivity(filtered: Filtered, published: Mapping[str, int]) -> list[dict[str, Any]]:
    """Select pairs under each of the `VARIANTS` of the recipe; phrases are not extracted again.

    `published` has the paper's `phrases`, `phrases_kept`, `pairs_kept`. Returns a row per variant: its description as
    `reading`, `changes` as text, the three numbers, and `times_off`: the largest factor between one of them and the
    published number (None if one is zero).
    """
    rows: dict[int, dict[str, Any]] = {}
    table, form = filtered.selection.table, _form(filtered.settings)
    settings = [replace(filtered.settings, **variant.changes) for variant in VARIANTS]
    # variants with the same phrases follow one another, so that only one table is in memory
    for k in sorted(range(len(VARIANTS)), key=lambda k: (str(_form(settings[k])), k)):
        if _form(settings[k]) != form:
            table, form = phrase_table(filtered.phrases, settings[k]), _form(settings[k])
        counts = select(table, settings[k], filtered.available).counts()
        numbers = {name: counts[name] for name in published}
        rows[k] = {
            "reading": VARIANTS[k].description,
            "changes": ", ".join(f"{name} = {setting_text(value)}" for name, value in VARIANTS[k].changes.items()),
            **numbers,
            "times_off": _times_off(numbers, published),
        }
    return [rows[k] for k in range(len(VARIANTS))]


def _form(settings: FilterSettings) -> tuple[Any, ...]:
    return tuple(getattr(settings, name) for name in _FORM_FIELDS)


def _times_off(numbers: Mapping[str, int], published: Mapping[str, int]) -> float | None:
    pairs = [(numbers[name], published[name]) for name in published]
    return exp(max(abs(log(a / b)) for a, b in pairs)) if all(a and b for a, b in pairs) else None
