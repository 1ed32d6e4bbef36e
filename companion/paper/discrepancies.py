"""Differences between the paper, the released code and this project, each shown by a test or by a pair of runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from llava_core.config_files import StrictModel, read_yaml, validated
from llava_core.runtime import display_path

REGISTER = Path(__file__).with_name("discrepancies.yaml")


class Arm(StrictModel):
    experiment: str
    set: dict[str, Any] = Field(default_factory=dict)  # values by dotted field


class Pair(StrictModel):
    """Two runs that differ in one field; the first is the paper's."""

    first: Arm
    second: Arm
    field: str


class Discrepancy(StrictModel):
    id: str
    title: str
    paper: str
    released: str
    at: str  # place in the released code, file@commit, or its documentation
    here: str
    other: str  # how to get the other behaviour, or why it is not available
    test: str | None = Field(default=None, pattern=r"^tests/[\w/]+\.py::test_\w+$")
    pair: Pair | None = None

    @model_validator(mode="after")
    def _has_evidence(self) -> Discrepancy:
        if self.test is None and self.pair is None:
            raise ValueError("an entry needs a `test` or a `pair` of runs that shows it")
        return self


def read_register(path: Path = REGISTER) -> dict[str, Discrepancy]:
    """Read the entries of a YAML file by id, in the order of the file."""
    entries = read_yaml(path).items()
    return {
        name: validated(Discrepancy, {"id": name, **fields}, f"{display_path(path)}, '{name}'")
        for name, fields in entries
    }


@cache
def all_discrepancies() -> dict[str, Discrepancy]:
    return read_register()
