"""The four verdicts, from an interval and from a direct check."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from companion.paper.verdict import Verdict, verdict_of, verdict_of_interval
from llava_core.runtime import ROOT, DataError


@pytest.mark.parametrize(
    ("interval", "direction", "expected"),
    [
        ([-3, -1], "below 0", "agrees"),
        ([1, 3], "below 0", "disagrees"),
        ([1, 3], "above 0", "agrees"),
        ([-1, 3], "below 0", "not resolved"),
        (None, "below 0", "not resolved"),
        ([-3, -1], None, "shown only"),
    ],
)
def test_verdict_on_a_sign(interval: Sequence[float] | None, direction: str | None, expected: str) -> None:
    assert verdict_of_interval(interval, direction) == expected


def test_verdict_on_a_direct_check() -> None:
    assert [verdict_of(holds) for holds in (True, np.bool_(False), None)] == ["agrees", "disagrees", "shown only"]
    assert json.dumps(verdict_of(True)) == '"agrees"'


def test_unknown_verdict_is_refused() -> None:
    with pytest.raises(DataError, match="unknown verdict 'holds'"):
        Verdict("holds")


def test_each_verdict_has_its_color() -> None:
    css = (ROOT / "book" / "assets" / "companion.css").read_text()
    assert all(f".{verdict.css_class}" in css for verdict in Verdict)
