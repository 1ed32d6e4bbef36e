"""Scores out of reviews, the published reviews to the digit, and a judge that may fail."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.evaluate.llava_bench import judge, parse_scores, score_reviews, summarize_repeats
from llava_core.runtime import DataError
from llava_core.teacher.chat import ChatRequest

PUBLISHED = [(72.8, 82.8, 74.7, 52.6), (72.7, 83.7, 74.7, 51.1), (72.1, 83.5, 72.5, 51.1)]  # all, complex, conv, detail


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("8 7.5\nbecause of 3 things", (8, 7.5)),
        ("8, 9", (8, 9)),
        ("8,9", (8, 9)),
        ("8/10 9/10", (8, 9)),
        ("8 out of 10, 9.5 out of 10", (8, 9.5)),
        ("Scores: 8 and 9", (8, 9)),
        ("**8 9**", (8, 9)),
        ("[8, 9]", (8, 9)),
        ("10 10.0", (10, 10)),
        ("Here is my judgement.\n\n8 9\nbecause", (8, 9)),
        ("Assistant 1: 8, Assistant 2: 9", (8, 9)),
        ("Assistant 1: 8\nAssistant 2: 9", (8, 9)),
        ("Assistant 1 - 8/10\nAssistant 2 - 9/10", (8, 9)),
        ("Assistant 2: 9\nAssistant 1: 8", None),  # the wrong way round
        ("", None),
        ("I cannot judge this.", None),
        ("8", None),
        ("8 9 7", None),
        ("-1 -1", None),
        ("85 90", None),
        ("8/100 9/100", None),
        ("11 9", None),
        ("7,5 8,5", None),
        ("8-9", None),
        ("1. 8\n2. 9", None),  # numbers of a list are not scores
        ("1) 8\n2) 9", None),
        ("1: 8\n2: 9", None),
        ("I see 3 dogs and 2 cats\n8 9", None),
        ("nan nan", None),
    ],
)
def test_parse_scores(review: str, scores: Any) -> None:
    assert parse_scores(review) == scores


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("0123456789 .,/-:\n()Assistant*"), st.characters()), max_size=60))
def test_parsing_never_fails_nor_leaves_the_scale(review: str) -> None:
    scores = parse_scores(review)
    assert scores is None or all(0 <= score <= 10 for score in scores)


def test_published_reviews(reference: Path) -> None:
    folder = reference / "llava_bench_wild" / "reviews"
    results = [score_reviews(folder / f"llava-v1.5-13b-eval{i}.jsonl") for i in (1, 2, 3)]
    for result, published in zip(results, PUBLISHED, strict=True):
        assert (result["n"], result["failed"]) == (60, 0)
        categories = result["categories"]
        assert list(categories) == ["complex", "conv", "detail"]
        assert [round(x, 1) for x in (result["all"], *categories.values())] == list(published)
    assert {name: row["n"] for name, row in results[0]["counts"].items()} == {"complex": 28, "conv": 17, "detail": 15}
    repeats = summarize_repeats(results)["all"]
    assert (round(repeats["mean"], 2), round(repeats["std"], 2)) == (72.55, 0.41)
    for line in (folder / "llava-v1.5-13b-eval1.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert list(parse_scores(row["content"]) or ()) == row["tuple"]


def test_ratio_of_means_not_mean_of_ratios() -> None:
    result = score_reviews(
        [{"content": "10 5", "category": "llava_bench_conv"}, {"content": "2 2", "category": "conv"}]
    )
    assert result["all"] == result["categories"]["conv"] == pytest.approx(100 * 7 / 12, abs=0.01)
    assert result["all"] != pytest.approx(75)
    assert (result["reference"], result["candidate"]) == (60, 35)


def test_failed_reviews_leave_the_mean_and_are_counted() -> None:
    rows = [{"question_id": i, "content": "8 4"} for i in range(7)]
    rows += [{"question_id": i, "content": "sorry"} for i in (7, 8, 9)]
    result = score_reviews(rows)
    assert (result["n"], result["failed"], result["failed_ids"], result["all"]) == (7, 3, [7, 8, 9], 50)
    released = score_reviews(rows, released=True)
    assert (released["n"], released["failed"]) == (10, 0)
    assert released["all"] == pytest.approx(100 * 25 / 53)
    nothing = score_reviews(rows[7:])
    assert (nothing["n"], nothing["all"], nothing["reference"]) == (0, None, None)


def test_rows_without_text_use_the_stored_scores() -> None:
    assert score_reviews([{"tuple": [8, 4]}, {"tuple": [-1, -1]}, {"tuple": None}])["failed"] == 2


class Judge:
    """Prefers what stands first, by one point."""

    def __init__(self) -> None:
        self.calls: list[ChatRequest] = []

    def complete(self, request: ChatRequest) -> Any:
        self.calls.append(request)
        return SimpleNamespace(text="8 7\nthe first is better")


def test_judging_and_position_swap() -> None:
    questions = [{"question_id": 3, "image": "a.jpg", "text": "What is it?", "category": "conv"}]
    client: Any = Judge()
    context, ours = {"a.jpg": "a red car"}, [{"question_id": 3, "text": "A boat."}]
    reviews = judge(questions, context, {3: "A car."}, ours, client, model="m", swap=True)
    assert [r["tuple"] for r in reviews] == [[8, 7], [7, 8]]  # always reference, candidate
    assert score_reviews(reviews)["all"] == 100
    assert score_reviews(reviews[:1])["all"] == 87.5
    first, swapped = client.calls
    assert (first.model, first.temperature, first.max_tokens) == ("m", 0.2, 1024)
    prompt = first.messages[1]["content"]
    marks = ["[Context]", "a red car", "[Question]", "What is it?", "[Assistant 1]", "A car.", "[End of Assistant 1]",
             "[Assistant 2]", "A boat.", "[End of Assistant 2]", "[System]"]  # fmt: skip
    assert [prompt.index(mark) for mark in marks] == sorted(prompt.index(mark) for mark in marks)
    assert swapped.messages[1]["content"].index("A boat.") < swapped.messages[1]["content"].index("A car.")
    with pytest.raises(DataError, match="question 3: no candidate answer"):
        judge(questions, context, {3: "A car."}, {}, client)
    with pytest.raises(DataError, match=r"no context for image 'a.jpg'"):
        judge(questions, {}, {3: "A car."}, ours, client)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"reviews\.jsonl: holds no review"):
        score_reviews(path)
    path.write_text('{"content": "8 9"}\n{"text": "8 9"}\n')
    with pytest.raises(DataError, match=r"reviews\.jsonl, line 2: not a review"):
        score_reviews(path)
    with pytest.raises(DataError):
        score_reviews(tmp_path / "none.jsonl")
