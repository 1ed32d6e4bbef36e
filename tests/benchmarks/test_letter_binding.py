"""Letter binding: rows of each initialisation, seed and step; what is read and what is measured."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from benchmarks import letter_binding as bench
from llava_core.constants import IGNORE_INDEX


def test_rows_of_a_short_run() -> None:
    result = bench.bench_letter_binding(steps=4, every=2, seeds=1, problems=8, batch=2)
    rows = result["cases"]
    assert [(row["initialisation"], row["step"]) for row in rows] == [
        (name, step) for name in ("look-up", "plain") for step in (0, 2, 4)
    ]
    assert all(0 <= row["right"] <= 100 and row["seed"] == 0 and row["problems"] == 8 for row in rows)
    assert result["look-up"] == rows[2]["right"]
    assert result["plain"] == rows[5]["right"]
    again = bench.bench_letter_binding(steps=4, every=4, seeds=1, problems=8, batch=2, start="look-up")
    assert [row["right"] for row in again["cases"]] == [rows[0]["right"], rows[2]["right"]]


def test_documents_supervise_the_letter_after_the_reason() -> None:
    documents, chance = bench.letter_documents(20)
    for document in documents:
        assert re.fullmatch(" [A-D]", "".join(part.text for part in document if part.supervised))
        assert "SOLUTION: " in document[-3].text
    assert 25 <= chance <= 50


def test_measurement_counts_the_updates_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights at step 0 are the initial ones, those at the end have had every update."""
    seen: list[torch.Tensor] = []

    def watch(model: Any, *_: Any) -> list[bool]:
        seen.append(model.lm_head.weight.detach().clone())
        return [True]

    def step(model: Any, batches: Any, loss_of: Any, steps: int, *_: Any) -> None:
        for _ in range(steps):
            ids, labels, _ = next(batches)
            assert ((labels != IGNORE_INDEX).sum(1) == 1).all()
            assert ids.shape == labels.shape
            model.lm_head.weight.data += 1

    monkeypatch.setattr(bench, "exact_answers", watch)
    monkeypatch.setattr(bench, "fit", step)
    points = bench.letters_right("plain", 0, [], steps=5, every=2, batch=3)
    assert [step for step, _ in points] == [0, 2, 4, 5]
    assert [round(float((weight - seen[0]).mean())) for weight in seen] == [0, 2, 4, 5]
