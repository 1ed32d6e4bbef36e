"""The paper's claims: one typed record per number, looked up by id."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from llava_core.registry import unknown
from llava_core.runtime import ConfigError


@dataclass(frozen=True)
class Claim:
    """A number of the paper: where it stands, what it says, its value and unit, over how many items, its direction."""

    id: str
    place: str
    text: str
    value: float
    unit: str
    n: int | None = None
    direction: str | None = None

    @property
    def shown(self) -> str:
        """Value with unit, as a table shows it."""
        return f"{self.value:g}{'' if self.unit == '%' else ' '}{self.unit}"


@cache
def all_claims() -> dict[str, Claim]:
    """Every claim by id."""
    table = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))
    return {name: Claim(id=name, **fields) for name, fields in table.items()}


def claim(name: str) -> Claim:
    """One claim.

    Raises:
        ConfigError: there is no claim of that id; the message names the nearest.
    """
    if name not in all_claims():
        raise ConfigError(unknown("claim", name, all_claims()))
    return all_claims()[name]
