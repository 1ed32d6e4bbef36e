"""Results of a run are cached until code or data change; grounding by right, exchanged, blank and edited images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion import miniature, results
from companion.evaluation.reasons import first_pass
from llava_core.config import load_experiment
from llava_core.data.images import load_image
from llava_core.record import RunRecord
from llava_core.runtime import read_jsonl, write_json


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


def test_grounding_tells_a_model_that_looks_from_one_that_does_not(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for the model: it knows the file names of the scenes, and the mean color of an image."""
    folder = miniature.ensure(only=["mini-coco"], sizes=miniature.Sizes(12, 60, 30, 8, 8, 8, 2, 6)) / "mini-coco"
    monkeypatch.setattr(miniature, "ensure", lambda only: folder.parent)
    answered = {row["text"] + row["image"]: row["answer"] for row in read_jsonl(folder / "questions_val.jsonl")}
    means: dict[str, Any] = {}

    def mean(path: Path) -> np.ndarray:
        return np.asarray(load_image(path)).mean((0, 1))

    def looks(loaded: Any, rows: Any, images: Path, **_: Any) -> dict[str, str]:
        result = {}
        for row in rows:
            seen, name = mean(images / row["image"]), row["image"]
            same = next((k for k in answered if k.startswith(row["text"]) and k.endswith(name)), "")
            means.setdefault(name, seen)
            changed = not np.allclose(means[name], seen, atol=0.02)
            result[str(row["question_id"])] = "changed" if changed else answered.get(same, "blank")
        return result

    monkeypatch.setattr(results, "load_run", lambda record: None)
    monkeypatch.setattr(results, "answer_questions", looks)
    record = RunRecord.open(load_experiment("finetune", "mini"))
    assert results.grounding_result(record, 5)["right"]["n"] == 5
    result = results.grounding_result(record)
    assert result["right"]["n"] > 5, "a result of the first questions stands for that of all"
    assert results.grounding_result(record, 5)["right"]["n"] == 5
    assert result["right"]["accuracy"] == 100
    assert result["shuffled"]["accuracy"] < 60
    assert result["blank"]["accuracy"] == 0
    assert result["edited"]["edited"]["other"]["correct"] == 30, "each edited image differs from its original"
    assert result["edited"]["as it is"]["keep"]["n"] == 30


def test_anatomy_is_measured_at_each_snapshot(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the model: the reasons of the first snapshot are empty, later ones are right."""
    sizes = miniature.Sizes(12, 8, 4, 40, 40, 8, 2, 6)
    miniature.ensure(workspace / "data" / "mini", only=["mini-scienceqa"], sizes=sizes)
    record = RunRecord.open(load_experiment("science_qa", "mini"))
    for step in ("10", "2"):
        (record.path / "snapshots" / step).mkdir(parents=True)
    write_json(record.path / "summary.json", {"steps": 12})
    monkeypatch.setattr(results, "load", lambda folder, *_: folder)

    def answers(folder: Path, problems: list[Any], **options: Any) -> dict[str, str]:
        assert options == {"max_new_tokens": 96, "answer_tokens": 6}
        text = "" if folder.name == "2" else None
        return {p.id: f"{first_pass(p) if text is None else text}\n The answer is {p.letter}." for p in problems}

    monkeypatch.setattr(results, "science_answers", answers)
    curve = results.anatomy_curve(record, 30)
    assert curve["steps"] == [2, 10, 12]
    first, *later = curve["anatomy"]
    assert {row["correct"] for row in first.values()} == {0}
    assert all(row["correct"] == row["n"] for rows in later for row in rows.values())
    assert first["see"]["n"] == later[0]["see"]["n"] > 0
