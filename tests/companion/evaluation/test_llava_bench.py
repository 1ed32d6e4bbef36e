"""Scores from reviews, the published reviews to the digit, and failed reviews."""

from __future__ import annotations

import json
import random
import re
import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.cli import main
from companion.evaluation.judges import agreement
from companion.evaluation.llava_bench import judge, parse_scores, score_reviews, summarize_repeats
from companion.evaluation.reporting import relative_score_rules, repeats
from companion.teacher.asking import ask_all
from companion.teacher.chat import BudgetError, ChatError, ChatReply, ChatRequest, ServerError
from llava_core.runtime import DataError

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
def test_parsed_scores_stay_on_the_scale(review: str) -> None:
    scores = parse_scores(review)
    assert scores is None or all(1 <= score <= 10 for score in scores)


def test_published_reviews(reference: Path) -> None:
    folder = reference / "llava_bench_wild" / "reviews"
    results = [score_reviews(folder / f"llava-v1.5-13b-eval{i}.jsonl") for i in (1, 2, 3)]
    for result, published in zip(results, PUBLISHED, strict=True):
        assert (result["n"], result["failed"]) == (60, 0)
        categories = result["categories"]
        assert list(categories) == ["complex", "conv", "detail"]
        assert [round(x, 1) for x in (result["all"], *categories.values())] == list(published)
    assert {name: row["n"] for name, row in results[0]["counts"].items()} == {"complex": 28, "conv": 17, "detail": 15}
    assert round(results[0]["mean_of_ratios"], 1) == 74.2
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
    assert result["mean_of_ratios"] == 75  # offered under its own name only
    assert (result["reference"], result["candidate"]) == (60, 35)


def test_failed_reviews_leave_the_mean_and_are_counted() -> None:
    rows = [{"question_id": i, "content": "8 4"} for i in range(7)]
    rows += [{"question_id": i, "content": "sorry"} for i in (7, 8, 9)]
    result = score_reviews(rows)
    assert (result["n"], result["failed"], result["failed_ids"], result["all"]) == (7, 3, [7, 8, 9], 50)
    released = score_reviews(rows, released=True)
    assert (released["n"], released["failed"], released["failed_ids"]) == (10, 3, [7, 8, 9])
    assert released["all"] == pytest.approx(100 * 25 / 53)
    empty = score_reviews(rows[7:])
    assert (empty["n"], empty["all"], empty["reference"]) == (0, None, None)


def test_rows_without_text_use_the_stored_scores() -> None:
    assert score_reviews([{"tuple": [8, 4]}, {"tuple": [-1, -1]}, {"tuple": None}])["failed"] == 2


QUESTIONS = [{"question_id": k, "image": "a.jpg", "text": f"What is {k}?", "category": "conv"} for k in range(3)]
CONTEXT = {"a.jpg": "a red car"}
REFERENCE = {k: f"It is {k}." for k in range(3)}


class Judge:
    """Replies with scripted texts, by the question and how often it was asked; then with `8 7`."""

    concurrency = 3

    def __init__(self, replies: Mapping[int, Sequence[str | Exception]] | None = None) -> None:
        self.calls: list[ChatRequest] = []
        self.replies = {k: iter(texts) for k, texts in (replies or {}).items()}
        self.lock = threading.Lock()

    def complete(self, request: ChatRequest) -> ChatReply:
        result = re.search(r"What is (\d)\?", request.messages[1]["content"])
        assert result
        with self.lock:
            self.calls.append(request)
            text = next(self.replies.get(int(result[1]), iter(())), "8 7\nthe first is better")
        if isinstance(text, Exception):
            raise text
        return ChatReply(text, "judge-2", 9, 3, cost_usd=0.25)


def judged(client: Judge, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return judge(QUESTIONS, CONTEXT, REFERENCE, dict.fromkeys(range(3), "A boat."), client, model="m", **options)


def test_judging_and_position_swap() -> None:
    client = Judge()
    reviews, tally = judged(client, swap=True)
    assert [r["tuple"] for r in reviews] == [[8, 7], [7, 8]] * 3  # always reference, candidate
    assert [(r["id"], r["question_id"]) for r in reviews] == [(k + 1, k // 2) for k in range(6)]
    full = score_reviews(reviews)
    assert full["all"] == 100
    assert {order: round(value, 1) for order, value in full["orders"].items()} == {
        "reference_first": 87.5, "candidate_first": 114.3
    }  # fmt: skip
    assert score_reviews(reviews[:1])["all"] == 87.5
    assert "orders" not in score_reviews(reviews[:1])
    assert tally["models"] == {"judge-2": 6}
    assert (tally["requests"], tally["spend_usd"], tally["retried"], tally["stopped"]) == (6, 1.5, 0, None)
    assert {(r["asked_model"], r["model"], r["cost_usd"]) for r in reviews} == {("m", "judge-2", 0.25)}
    asked = sorted(client.calls, key=lambda r: (r.messages[1]["content"].index("It is"), r.messages[1]["content"]))
    first, swapped = asked[0], asked[3]
    assert (first.model, first.temperature, first.max_tokens) == ("m", 0.2, 1024)
    prompt = first.messages[1]["content"]
    marks = ["[Context]", "a red car", "[Question]", "What is 0?", "[Assistant 1]", "It is 0.", "[End of Assistant 1]",
             "[Assistant 2]", "A boat.", "[End of Assistant 2]", "[System]"]  # fmt: skip
    assert [prompt.index(mark) for mark in marks] == sorted(prompt.index(mark) for mark in marks)
    assert swapped.messages[1]["content"].index("A boat.") < swapped.messages[1]["content"].index("It is 0.")
    with pytest.raises(DataError, match="question 0: no candidate answer"):
        judge(QUESTIONS, CONTEXT, REFERENCE, {}, client)
    with pytest.raises(DataError, match=r"no context for image 'a.jpg'"):
        judge(QUESTIONS, {}, REFERENCE, {}, client)
    with pytest.raises(DataError, match="question 1 has two candidate answers"):
        judge(QUESTIONS, CONTEXT, REFERENCE, [{"question_id": 1, "text": "a"}] * 2, client)


def test_malformed_review_is_retried_once_and_kept() -> None:
    client = Judge({0: ["I like both.", "6 9"], 2: ["no", "again no", "8 8"]})
    reviews, tally = judged(client)
    assert [r["tuple"] for r in reviews] == [[6, 9], [8, 7], None]
    assert [r["content"] for r in reviews] == ["6 9", "8 7\nthe first is better", "again no"]
    assert [r.get("first", {}).get("content") for r in reviews] == ["I like both.", None, "no"]
    assert (tally["requests"], tally["retried"], tally["repaired"], tally["failed"]) == (5, 2, 1, 1)
    assert (tally["spend_usd"], reviews[0]["cost_usd"]) == (1.25, 0.5)
    (second,) = (c for c in client.calls if len(c.messages) == 4 and "What is 0?" in c.messages[1]["content"])
    assert second.messages[2] == {"role": "assistant", "content": "I like both."}
    assert "does not hold two scores" in second.messages[3]["content"]
    result = score_reviews(reviews)
    assert (result["n"], result["failed"], result["failed_ids"]) == (2, 1, [2])


def test_failed_request_is_a_failed_review() -> None:
    reviews, tally = judged(Judge({1: [ChatError("status 400")]}))
    assert (reviews[1]["content"], reviews[1]["tuple"], reviews[1]["refused"]) == (None, None, "status 400")
    assert (score_reviews(reviews)["n"], score_reviews(reviews)["failed"], tally["failed"]) == (2, 1, 1)
    reviews, tally = judged(Judge({2: [BudgetError("budget of 1 USD")]}))
    assert [r["question_id"] for r in reviews] == [0, 1]
    assert (tally["unasked"], tally["stopped"], tally["failed"]) == (1, "budget of 1 USD", 0)
    with pytest.raises(ServerError, match="key"):
        judged(Judge({0: [ServerError("key refused")]}))


def test_server_without_replies_is_an_error() -> None:
    requests = [ChatRequest([{"role": "system", "content": "x"}, {"role": "user", "content": "What is 0?"}], "m")] * 40
    client = Judge({0: [ChatError(f"no reply {k}") for k in range(40)]})
    with pytest.raises(ServerError, match="in a row had no reply"):
        ask_all(client, requests, lambda reply: None, "test")


def test_failed_reviews_change_n_and_not_the_score() -> None:
    rng = random.Random(3)
    rows = [{"question_id": k, "content": f"{rng.randint(6, 10)} {rng.randint(1, 10)}"} for k in range(300)]
    full = score_reviews(rows)
    scores, released = [], []
    for _ in range(40):
        broken = set(rng.sample(range(300), 90))
        draw = [row | {"content": "I am sorry."} if k in broken else row for k, row in enumerate(rows)]
        result = score_reviews(draw)
        rest = score_reviews([row for k, row in enumerate(rows) if k not in broken])
        assert (result["n"], result["failed"], set(result["failed_ids"])) == (210, 90, broken)
        assert (result["all"], result["candidate"]) == (rest["all"], rest["candidate"])
        scores.append(result["all"])
        released.append(score_reviews(draw, released=True)["all"])
    error = statistics.stdev(scores) / 40**0.5
    assert abs(statistics.mean(scores) - full["all"]) < 4 * error  # no bias
    assert abs(statistics.mean(released) - full["all"]) > 4 * error  # which averaging failures as -1 has


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "content": st.one_of(st.none(), st.text(alphabet="0123456789 .naif\n", max_size=8), st.integers()),
                "tuple": st.one_of(
                    st.none(),
                    st.text(max_size=3),
                    st.lists(st.one_of(st.floats(), st.integers(), st.text()), max_size=3),
                ),
                "category": st.one_of(st.none(), st.text(max_size=3)),
                "order": st.sampled_from(["candidate_first", "reference_first", None]),
                "question_id": st.one_of(st.integers(), st.text(max_size=2), st.lists(st.integers(), max_size=1)),
            },
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_any_rows_are_scored_or_refused(rows: list[dict[str, Any]], released: bool) -> None:
    try:
        result = score_reviews(rows, released=released)
    except DataError:
        return
    assert result["n"] + (0 if released else result["failed"]) == len(rows)
    json.dumps(result, allow_nan=False)
    if not released and result["n"]:
        assert 10 <= result["candidate"] <= 100


@pytest.mark.parametrize(
    "stored", ["89", [8, "9"], [8, float("nan")], [True, 9], [8, 9, 7], [-1, -1], [0, 9], [8, 0.5], 89, None]
)
def test_invalid_stored_scores_are_refused(stored: Any) -> None:
    assert score_reviews([{"tuple": stored}])["failed"] == 1


def test_parser_reads_no_number_from_other_text() -> None:
    assert score_reviews([{"content": "nan inf"}, {"content": "8 4"}], released=True)["reference"] == 35


@pytest.mark.parametrize("review", ["I cannot judge.\n8 6", "8/10 6/10", "Scores: 8 and 6", "", "8  6"])
def test_failures_of_the_released_rule_are_counted(review: str) -> None:
    rows = [{"question_id": 1, "content": review}, {"question_id": 2, "content": "8 4"}]
    result = score_reviews(rows, released=True)
    assert (result["n"], result["failed"], result["failed_ids"], result["reference"]) == (2, 1, [1], 35)
    rules = {row["rule"]: row for row in relative_score_rules(rows, samples=10)}
    assert rules["as released"]["failed"] == 1
    assert rules["excluded"]["failed"] == score_reviews(rows)["failed"] == (not review)


@pytest.mark.parametrize("review", ["0 9", "9 0", "0.5 9", "Scores: 0 and 9", "0/10 9/10", "11 9"])
def test_scores_off_the_scale_are_no_review(review: str) -> None:
    assert parse_scores(review) is None
    assert parse_scores("1 9.5") == (1, 9.5)


def test_question_counts_once(tmp_path: Path) -> None:
    rows = [{"question_id": k, "content": "8 4"} for k in (1, 2)]
    with pytest.raises(DataError, match=r"line 3: question 1 has a review in line 1 already"):
        score_reviews([*rows, {"question_id": "1", "content": "8 8"}])
    swapped = [row | {"order": order} for row in rows for order in ("reference_first", "candidate_first")]
    assert score_reviews(swapped)["n"] == 4
    with pytest.raises(DataError, match="line 5: question 2 has a review in line 4 already"):
        score_reviews([*swapped, swapped[-1]])


def review_file(path: Path, questions: Iterable[int], content: str = "8 4") -> Path:
    rows = [{"question_id": k, "content": content, "category": "conv"} for k in questions]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_repeats_have_the_same_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (
        review_file(tmp_path / name, ids) for name, ids in (("a", range(4)), ("b", range(6)), ("c", range(2, 6)))
    )
    for other, different in ((b, 2), (c, 4)):
        with pytest.raises(DataError, match=f"{different} are in one of the two only"):
            repeats([a, other])
    with pytest.raises(DataError, match="given twice"):
        repeats([a, a])
    other = tmp_path / "categories"
    other.write_text(a.read_text().replace('"conv"', '"detail"', 1))
    with pytest.raises(DataError, match=r"question 0 is 'detail', in .*a 'conv'"):
        repeats([a, other])
    assert main(["evaluate", "llava-bench", "--reviews", str(a), str(b)]) == 1
    capsys.readouterr()
    again = review_file(tmp_path / "again", range(4), "9 7")
    assert main(["evaluate", "llava-bench", "--reviews", str(a), str(again)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"mean +63\.89 +63\.89", text)
    assert not re.search(r"\d\.\d{5}", text)
    assert "no repeat" not in text
    assert "it is a copy, and no repeat" in repeats([a, review_file(tmp_path / "copy", range(4))])["notes"][0]


def test_every_command_gives_the_same_score(reference: Path) -> None:
    files = [reference / f"llava_bench_wild/reviews/llava-v1.5-13b-eval{i}.jsonl" for i in (1, 2)]
    scores = [score_reviews(file)["all"] for file in files]
    both = agreement(*files, samples=10)["relative_score"]
    assert [both["first"]["value"], both["second"]["value"]] == pytest.approx(scores, abs=1e-9)
    rules = {row["rule"]: row["score"] for row in relative_score_rules(files[0], samples=10)}
    assert rules["excluded"] == rules["as released"] == pytest.approx(scores[0], abs=1e-9)


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
