"""Sensitivity of the CC3M filter: each variant has its own selection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from companion.data_tools.cc3m import filter_captions
from companion.data_tools.filter_sensitivity import VARIANTS, filter_sensitivity
from companion.data_tools.filter_settings import FilterSettings


def corpus(folder: Path, rows: int = 30) -> Path:
    path = folder / "train.tsv"
    path.write_text("".join(f"a dog near {'a cat' if k % 2 else 'the café'} .\thttp://x/{k}\n" for k in range(rows)))
    return path


def test_each_variant_has_its_own_selection(tmp_path: Path) -> None:
    filtered = filter_captions(corpus(tmp_path), None, FilterSettings("rules", cap=5))
    published = {"phrases": 3, "phrases_kept": 3, "pairs_kept": 15}
    rows = filter_sensitivity(filtered, published)
    assert [row["reading"] for row in rows] == [variant.description for variant in VARIANTS]
    assert rows[0] == {
        "reading": "as the settings say", "changes": "", **{k: filtered.selection.counts()[k] for k in published},
        "times_off": pytest.approx(15 / filtered.selection.counts()["pairs_kept"]),
    }  # fmt: skip
    by_changes = {row["changes"]: row for row in rows}
    assert by_changes["strip_determiners = no"]["phrases"] == 3
    for variant, row in zip(VARIANTS, rows, strict=True):
        single = filter_captions(filtered.source, None, replace(filtered.settings, **variant.changes))
        assert {key: row[key] for key in published} == {key: single.selection.counts()[key] for key in published}
    assert filter_sensitivity(filtered, {"pairs_kept": 0})[0]["times_off"] is None
