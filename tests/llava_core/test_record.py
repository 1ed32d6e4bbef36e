from __future__ import annotations

import io
from pathlib import Path

import pytest

from llava_core.config import load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import DataError


def test_record_path_has_experiment_scale_and_run(workspace: Path) -> None:
    config = load_experiment("pretrain", "mini")
    record = RunRecord.open(config)
    assert record.path == workspace / "runs" / "pretrain" / "mini" / config.run_id
    assert record.config == config
    assert record.environment["run"] == record.run_id
    assert not record.finished
    assert record.metrics() == []


def test_same_run_is_reopened_and_another_is_refused(workspace: Path) -> None:
    config = load_experiment("pretrain", "mini")
    record = RunRecord.open(config, {"data": "abc"})
    record.log({"step": 1})
    assert RunRecord.open(config, {"data": "abc"}).metrics() == [{"step": 1}]
    assert RunRecord.open(config, {"data": "changed"}).metrics() == []
    assert RunRecord.open(load_experiment("pretrain", "mini", {"train.seed": 7}), {"data": "abc"}).metrics() == []


def test_renamed_experiment_continues_the_same_run(workspace: Path) -> None:
    RunRecord.open(load_experiment("science_qa", "a100x8")).log({"step": 1})
    assert RunRecord.open(load_experiment("science_qa_13b", "a100x8")).metrics() == [{"step": 1}]
    assert RunRecord.open(load_experiment("science_qa_7b", "a100x8")).metrics() == []


def test_summary_exists_only_for_a_finished_run(workspace: Path) -> None:
    record = RunRecord.open(load_experiment("pretrain", "mini"))
    with pytest.raises(DataError, match="has not finished"):
        _ = record.summary
    record.finish({"final_loss": 1.5})
    assert record.finished
    assert RunRecord.open(record.config).summary == {"final_loss": 1.5}


def test_numbers_that_are_not_finite_do_not_lose_a_run(workspace: Path) -> None:
    record = RunRecord.open(load_experiment("pretrain", "mini"))
    record.log({"step": 1, "loss": 2.0, "heldout_loss": float("nan")})
    record.rewind(1)  # writes the rows again
    record.finish({"final_loss": 2.0, "heldout_loss": float("inf")})
    assert record.metrics() == [{"step": 1, "loss": 2.0, "heldout_loss": None}]
    assert record.summary == {"final_loss": 2.0, "heldout_loss": None}


def test_rewind_drops_rows_after_the_checkpoint(workspace: Path) -> None:
    record = RunRecord.open(load_experiment("pretrain", "mini"))
    for step in range(1, 6):
        record.log({"step": step, "loss": 1 / step})
    record.rewind(3)
    assert [row["step"] for row in record.metrics()] == [1, 2, 3]
    record.log({"step": 4, "loss": 0.0})
    assert record.metrics()[-1] == {"step": 4, "loss": 0.0}


def test_damaged_row_is_left_out_with_a_warning(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = RunRecord.open(load_experiment("pretrain", "mini"))
    record.log({"step": 1})
    path = record.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert record.metrics() == [{"step": 1}]
    assert capsys.readouterr().err == ""  # as a killed writer leaves it, or one that is writing
    path.write_bytes(path.read_bytes() + b'{"step": 3}\n\xff\0\n{"step": 4}\n')
    assert record.metrics() == [{"step": 1}, {"step": 4}]
    assert "metrics.jsonl: damaged, left out: line 2, 3" in capsys.readouterr().err
    record.rewind(1)
    record.log({"step": 2})
    assert record.metrics() == [{"step": 1}, {"step": 2}]
    assert capsys.readouterr().err.count("damaged") == 1  # rewinding has repaired the file
    record.rewind(None)
    assert record.metrics() == []


def test_short_write_of_a_row_is_completed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[:5])

    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Short(path, mode))
    record = RunRecord(workspace)
    for step in (1, 2):
        record.log({"step": step, "loss": 0.5})
    assert record.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
