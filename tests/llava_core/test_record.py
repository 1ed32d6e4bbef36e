from __future__ import annotations

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


def test_rewind_drops_rows_after_the_checkpoint(workspace: Path) -> None:
    record = RunRecord.open(load_experiment("pretrain", "mini"))
    for step in range(1, 6):
        record.log({"step": step, "loss": 1 / step})
    record.rewind(3)
    assert [row["step"] for row in record.metrics()] == [1, 2, 3]
    record.log({"step": 4, "loss": 0.0})
    assert record.metrics()[-1] == {"step": 4, "loss": 0.0}


def test_truncated_last_row_is_dropped_broken_row_is_an_error(workspace: Path) -> None:
    record = RunRecord.open(load_experiment("pretrain", "mini"))
    record.log({"step": 1})
    path = record.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert record.metrics() == [{"step": 1}]
    record.rewind(1)
    record.log({"step": 2})
    assert record.metrics() == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\nnot json\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        record.metrics()
