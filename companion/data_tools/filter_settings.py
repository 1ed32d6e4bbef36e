"""Settings of the CC3M filter: the published numbers and the choices that the recipe leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from llava_core.runtime import ConfigError


@dataclass(frozen=True)
class FilterSettings:
    """The two numbers of the published recipe, and every choice that it leaves open.

    Attributes:
        phrases: `spacy` (noun chunks of a parser, as in the paper), `rules` (a chunker without a model), or `auto`:
            spaCy if it is installed.
        lowercase: count "Dog" and "dog" as one phrase; CC3M has no capitals.
        strip_determiners: count "the dog" and "a dog" as one phrase; otherwise there are eight times as many phrases as
            the paper reports.
        drop_pronouns: leave out "it", "who", "something", which name no concept.
        max_words: leave out longer phrases; the paper mentions no limit.
        count: frequency = number of `captions` that contain the phrase, or of all its `occurrences`.
        min_frequency: leave out rarer phrases (paper: 3).
        cap: draw so many captions of a phrase that has more (paper: 100).
        order: `static` goes by frequency in all captions, `remaining` by the number of captions not yet in the pool.
            Equal phrases come in the order of first appearance. With `draw` = `all` both give the same pool.
        draw: compared with the cap and drawn from: `all` captions of the phrase, pooled or not (the paper's words);
            `unpooled`: those not yet in the pool; `top_up`: as many as its captions in the pool fall short of the cap.
        unavailable: rows without a readable image are removed `before` the phrases are counted (every frequent concept
            is then in the pool), or `after` the selection.
        instructions: requests for the caption, as for `load_instructions`.

    Source: paper, appendix E and Figure 7.
    """

    phrases: Literal["auto", "spacy", "rules"] = "auto"
    lowercase: bool = True
    strip_determiners: bool = True
    drop_pronouns: bool = True
    max_words: int | None = None
    count: Literal["captions", "occurrences"] = "captions"
    min_frequency: int = 3
    cap: int = 100
    order: Literal["static", "remaining"] = "static"
    draw: Literal["all", "unpooled", "top_up"] = "all"
    unavailable: Literal["before", "after"] = "before"
    instructions: str = "brief"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(FilterSettings).items():
            value = getattr(self, name)
            if isinstance(value, str) and (known := get_args(kind)) and value not in known:
                raise ConfigError(f"filter setting {name} = '{value}'; choose one of {', '.join(known)}")
        for name, least in {"min_frequency": 0, "cap": 1, "max_words": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"filter setting {name} = {value}; write {least} or more")


def settings_from(values: Mapping[str, Any]) -> FilterSettings:
    """Settings from a command line; a ConfigError for an unknown name or a wrong type."""
    known = {entry.name: entry.default for entry in fields(FilterSettings)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"no filter setting '{name}'; choose one of {', '.join(known)}")
        wanted = int if name == "max_words" else type(known[name])
        if type(value) is not wanted and not (name == "max_words" and value is None):
            raise ConfigError(f"filter setting {name} = {value!r}: write {wanted.__name__}, e.g. {known[name]!r}")
    return FilterSettings(**values)
