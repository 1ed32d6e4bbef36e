"""Results of a run are cached until code or data change."""

from __future__ import annotations

from pathlib import Path

import pytest

from companion import results
from llava_core.config import load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import write_json


def test_result_is_cached_until_code_or_data_change(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, calls = RunRecord.open(load_experiment("pretrain", "mini")), []

    def compute() -> dict[str, int]:
        calls.append(1)
        return {"value": len(calls)}

    assert [results.cached_result(record, "x", compute)["value"] for _ in range(2)] == [1, 1]
    write_json(workspace / "data" / "mini" / "mini-coco" / "card.json", {})
    assert [results.cached_result(record, "x", compute)["value"] for _ in range(2)] == [2, 2]
    for version, expected in (("a", 3), ("a", 3), ("b", 4)):
        monkeypatch.setattr(results, "sha256_file", lambda path, version=version: f"{version}-{path}")
        assert results.cached_result(record, "x", compute)["value"] == expected
    assert results.cached_result(record, "y", compute)["value"] == 5  # another name is another result
