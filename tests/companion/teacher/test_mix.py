"""Mixes of instruction data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from companion.data_tools.coco import AnnotatedImage
from companion.miniature.offline_chat import respond
from companion.teacher.chat import BudgetError, ChatReply, ChatRequest
from companion.teacher.client import OfflineClient
from companion.teacher.mix import estimate_mix, generate_mix, mix_jobs
from companion.teacher.plan import estimate
from llava_core.data.instruct import load_instruct
from llava_core.runtime import DataError, read_jsonl


def annotated(count: int) -> list[AnnotatedImage]:
    captions = ["A red car on a street.", "A red car on the left."]
    return [AnnotatedImage(f"{k:012d}", f"{k}.jpg", captions, [("car", (0.1, 0.5, 0.4, 0.8))]) for k in range(count)]


def test_mix_has_the_share_of_each_kind_in_image_order(tmp_path: Path) -> None:
    images = annotated(10)
    shares = {"conversation": 1.0, "detail": 0.4, "complex": 0.7}
    results = generate_mix(images, shares, OfflineClient(respond), tmp_path / "a")
    assert {kind: r["records"] for kind, r in results.items()} == {"conversation": 10, "detail": 4, "complex": 7}
    samples = load_instruct(tmp_path / "a" / "llava_instruct.json")
    assert [s.id for s in samples] == sorted(s.id for s in samples)
    assert len(read_jsonl(tmp_path / "a" / "provenance.jsonl")) == 21
    described = {s.id for s in samples if s.kind == "detail"}
    assert described < {s.id for s in samples if s.kind == "complex"}  # a smaller share is part of a larger one
    generate_mix(images, shares, OfflineClient(respond), tmp_path / "b")
    name = "llava_instruct.json"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(DataError, match=r"detail.*1\.5"):
        generate_mix(images, {"detail": 1.5}, OfflineClient(respond), tmp_path / "c")


def test_spent_budget_leaves_records_of_all_kinds(tmp_path: Path) -> None:
    class LimitedClient(OfflineClient):
        def complete(self, request: ChatRequest) -> ChatReply:
            asked.append(request.model)
            if len(asked) > 11:
                raise BudgetError("budget of 5 USD: spent")
            return super().complete(request)

    asked: list[str] = []
    shares = {"conversation": 1.0, "detail": 0.5, "complex": 1.0}
    results = generate_mix(annotated(10), shares, LimitedClient(respond), tmp_path, model="gpt-4o")
    assert set(asked) == {"gpt-4o"}
    assert all(result["records"] >= 1 and result["stopped"] == "budget of 5 USD: spent" for result in results.values())
    assert sum(result["records"] for result in results.values()) == 11
    assert sum(result["unasked"] for result in results.values()) == 14
    assert len(load_instruct(tmp_path / "llava_instruct.json")) == 11


def test_estimate_for_several_teachers() -> None:
    shares, counts = {"conversation": 1.0, "detail": 0.4}, {"conversation": 58_000, "detail": 23_000}
    images = [replace(image, captions=[f"Car {image.id}."]) for image in annotated(10)]
    rows = estimate_mix(images, shares, ["gpt-4", "gpt-4o"], counts)
    assert [row["teacher"] for row in rows] == ["gpt-4", "gpt-4o"]
    assert [row["different requests"] for row in rows] == [14, 14]
    assert rows[0]["USD per million tokens"] == "30 + 60"
    other = "81,000 records (USD)"
    assert rows[0]["USD"] < rows[0]["USD at most"] < rows[0][other]
    assert rows[0]["in batches (USD)"] == pytest.approx(rows[0][other] / 2)
    expected = estimate(request for _, _, request in mix_jobs(images, shares, "gpt-4"))
    assert rows[0]["USD"] == pytest.approx(expected["usd"], abs=1e-3)
    [one] = estimate_mix(annotated(1), {"conversation": 1.0}, ["gpt-4"], {"conversation": 1000})
    assert one["1,000 records (USD)"] == pytest.approx(1000 * one["USD"])


def test_refused_replies_are_written(tmp_path: Path) -> None:
    client = OfflineClient(lambda messages: "no format at all")
    results = generate_mix(annotated(3), {"conversation": 1.0}, client, tmp_path)
    assert results["conversation"]["failed"] == 3
    failures = read_jsonl(tmp_path / "failures.jsonl")
    assert [(row["error"], row["attempt"]) for row in failures] == [("MissingLabel", 1), ("MissingLabel", 2)] * 3
