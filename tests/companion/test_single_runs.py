"""What one run per arm would have said: every pair of stored runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from benchmarks import single_runs as bench
from benchmarks.common import append_rows
from companion.ablation_records import analyse, at_seeds, read_record
from companion.single_runs import RECORD, single_runs, single_runs_figure
from llava_core.config import RunConfig
from llava_core.runtime import DataError

ARMS = ("with stage 1", "without stage 1")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of the benchmark with scripted results: a true effect of -10 points, and a scatter of as much."""
    right = {ARMS[0]: [500, 600, 700], ARMS[1]: [400, 500, 600]}
    seen: list[RunConfig] = []

    def launch(config: RunConfig) -> Any:
        seen.append(config)
        label = ARMS[config.experiment.name == "no_pretraining"]
        return SimpleNamespace(run_id=str(len(seen)), correct=right[label][config.experiment.train.seed])

    monkeypatch.setattr(bench, "launch", launch)
    monkeypatch.setattr(bench, "science_result", lambda run, limit: {"n": limit, "correct": run.correct})
    result = bench.bench_single_runs(seeds=3)
    assert {(c.experiment.data.limit, c.experiment.train.epochs, c.experiment.train.snapshots) for c in seen} == {
        (1200, 1, 0)
    }
    assert (result[ARMS[0]], result[ARMS[1]]) == (60, 50)
    return append_rows(tmp_path / "single_runs.csv", result["cases"])


def test_every_pair_is_compared(record: Path) -> None:
    result = single_runs(record=record)
    assert result["effect"] == pytest.approx(-10)
    assert result["arms"] == {ARMS[0]: [50, 60, 70], ARMS[1]: [40, 50, 60]}
    assert len(result["differences"]) == len(result["z"]) == 9
    # 50 against 50 and 60, and 60 against 60: three of nine pairs have no or the wrong sign
    assert result["wrong_sign"] == pytest.approx(100 / 3)
    assert result["budget"] == {"problems": 1200, "epochs": 1, "questions": 1000}
    assert result["papers"]["ablation-last-layer"] == pytest.approx(-1.514, abs=1e-3)
    assert len(result["papers"]) == 4
    assert max(result["z"]) > 4 > -4 > min(result["z"])


def test_repeated_rows_count_once_and_the_last_budget_is_taken(record: Path) -> None:
    rows = pd.read_csv(record)
    before = single_runs(record=record)
    append_rows(record, rows.to_dict("records"))
    assert single_runs(record=record) == before
    append_rows(record, rows.assign(problems=600, correct=300).head(2).to_dict("records"))
    other = single_runs(record=record)
    assert (other["budget"]["problems"], other["effect"], other["wrong_sign"]) == (600, 0, 100)


def test_figure_names_the_share_of_wrong_signs(record: Path) -> None:
    figure = single_runs_figure(single_runs(record=record))
    (ax,) = figure.axes
    assert "33 % of the pairs" in ax.get_title() + ax.get_title(loc="left")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(labels) == 4
    assert labels[0] == "paper: no pretraining"
    plt.close(figure)


def test_missing_runs_are_named(record: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: no stored runs; make them with `python -m benchmarks.run"):
        single_runs(record=tmp_path / "none.csv")
    with pytest.raises(DataError, match="no run of cot_order; add `--ablation cot_order`"):
        single_runs("cot_order", record)
    rows = pd.read_csv(record)
    rows[rows["run"] != 6].to_csv(record, index=False)
    with pytest.raises(DataError, match="have different seeds"):
        single_runs(record=record)


def test_stored_runs_are_of_twenty_seeds() -> None:
    if not RECORD.is_file():
        pytest.skip("no stored runs")
    result = single_runs()
    assert [len(values) for values in result["arms"].values()] == [20, 20]


def test_record_of_first_seeds_is_analysed_as_a_run_with_these_seeds() -> None:
    stored = read_record("pretraining")
    assert stored is not None
    whole, part = analyse(stored), analyse(at_seeds(stored, range(2)))
    assert part["seeds"] == stored["seeds"][:2]
    for arm, own in zip(whole["arms"], part["arms"], strict=True):
        assert own["values"] == arm["values"][:2]
    assert len(stored["arms"][ARMS[0]]["right"]) == len(stored["seeds"])  # the record itself is as it was
