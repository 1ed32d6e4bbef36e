"""Scores under every reporting rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from companion.cli import main
from companion.evaluation.captions import score
from companion.evaluation.llava_bench import score_reviews
from companion.evaluation.reporting import (
    RULES,
    accuracy_rules,
    caption_report,
    caption_rules,
    format_rules,
    relative_score_rules,
    review_report,
)


def by_rule(rows: list[dict[str, object]], key: str) -> dict[object, object]:
    return {row["rule"]: row[key] for row in rows}


def test_accuracy_under_every_rule() -> None:
    rows = accuracy_rules(6, 10, [0.5, 0.25, 0.0])  # the last failure is not drawn
    assert by_rule(rows, "accuracy") == {
        "as wrong": 60, "excluded": pytest.approx(100 * 6 / 7), "at expected luck": 67.5,
    }  # fmt: skip
    assert by_rule(rows, "n") == {"as wrong": 10, "excluded": 7, "at expected luck": 10}
    for row in rows:
        assert row["failed"] == 3
        assert row["interval"][0] < row["accuracy"] < row["interval"][1]
    assert len({row["accuracy"] for row in accuracy_rules(6, 10, [])}) == 1  # without a failure the rules agree


def test_nothing_scored_has_no_accuracy() -> None:
    rows = accuracy_rules(0, 2, [0.5, 0.5])
    assert by_rule(rows, "accuracy") == {"as wrong": 0, "excluded": None, "at expected luck": 50}
    assert by_rule(accuracy_rules(0, 0, []), "accuracy") == dict.fromkeys(RULES)
    assert "none" in format_rules(rows)


REVIEWS = [{"question_id": k, "content": text} for k, text in enumerate(["8 6", "9 3", "10 9", "none", "7 8 9"])]


def test_relative_score_under_every_rule() -> None:
    rows = relative_score_rules(REVIEWS)
    assert by_rule(rows, "score") == pytest.approx(
        {
            "as wrong": 100 * (18 + 2 * 1) / (27 + 2 * 9),
            "excluded": 100 * 18 / 27,
            "at expected luck": 100 * (18 + 11) / (27 + 11),
            "as released": 100 * (18 - 2) / (27 - 2),
        }
    )
    assert by_rule(rows, "n") == {"as wrong": 5, "excluded": 3, "at expected luck": 5, "as released": 5}
    assert by_rule(rows, "score")["excluded"] == pytest.approx(score_reviews(REVIEWS)["all"])
    assert by_rule(rows, "score")["as released"] == pytest.approx(score_reviews(REVIEWS, released=True)["all"])
    assert all(row["interval"][0] < row["score"] < row["interval"][1] for row in rows[:3])


def test_all_reviews_failed() -> None:
    rows = by_rule(relative_score_rules(REVIEWS[3:]), "score")
    assert rows == {"as wrong": 10, "excluded": None, "at expected luck": 100, "as released": None}


def test_released_reviews_agree_under_every_rule(reference: Path) -> None:
    """The published reviews have no failure but those of the released script's own reading."""
    paths = sorted((reference / "llava_bench_wild" / "reviews").glob("llava-v1.5*eval*.jsonl"))
    assert len(paths) == 3
    for path in paths:
        report = review_report(path)
        rows = by_rule(report["reporting"], "score")
        assert rows["excluded"] == pytest.approx(report["all"], abs=0.05)  # its means are rounded
        if not report["failed"]:
            assert rows["as wrong"] == rows["excluded"] == rows["at expected luck"]
        assert rows["as released"] == pytest.approx(score_reviews(path, released=True)["all"], abs=0.05)


REFERENCES = {
    1: ["a red car on a beach", "a car on the sand"],
    2: ["two dogs in a room", "dogs in a room"],
    3: ["a clock on a table", "one clock"],
    4: ["a blue house", "a house by a lake"],
}


def test_captions_under_every_rule() -> None:
    captions = {1: "a red car on a beach", 2: "two dogs in a room", 3: "a clock on a table"}
    rows = caption_rules(REFERENCES, captions)
    wrong, excluded, luck = (row["cider"] for row in rows)
    assert [row["rule"] for row in rows] == list(RULES)
    assert excluded == pytest.approx(score(REFERENCES, captions)["cider"])
    assert wrong == pytest.approx(score(REFERENCES, {**captions, 4: ""})["cider"])
    assert luck == pytest.approx(score(REFERENCES, {**captions, 4: captions[1]})["cider"])
    assert excluded > luck >= wrong
    assert [row["n"] for row in rows] == [4, 3, 4]
    assert {row["failed"] for row in rows} == {1}
    complete = caption_rules(REFERENCES, {**captions, 4: "a blue house"})
    assert len({row["bleu4"] for row in complete}) == 1


def test_caption_files_are_reported_only_with_failures(tmp_path: Path) -> None:
    rows = [{"image_id": key, "caption": text} for key, texts in REFERENCES.items() for text in texts]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    said = [{"image_id": key, "caption": texts[0]} for key, texts in REFERENCES.items()]
    (tmp_path / "all.json").write_text(json.dumps(said))
    (tmp_path / "some.json").write_text(json.dumps(said[:3]))
    assert caption_report(tmp_path / "captions.json", tmp_path / "all.json")["reporting"] is None
    report = caption_report(tmp_path / "captions.json", tmp_path / "some.json")
    assert [row["rule"] for row in report["reporting"]] == list(RULES)
    lines = format_rules(report["reporting"], 100).split("\n")
    assert lines[0] == "1 failed answers, counted"
    assert f"{100 * report['reporting'][0]['cider']:.2f}" in lines[1]


@pytest.mark.parametrize("listed", [True, False])
def test_limit_scores_the_first_images(listed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image_id": key, "caption": text} for key, texts in REFERENCES.items() for text in texts]
    content: dict[str, Any] = {"annotations": rows}
    if listed:
        content["images"] = [{"id": key} for key in reversed(REFERENCES)]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    captions = [{"image_id": key, "caption": texts[0]} for key, texts in REFERENCES.items()]
    (tmp_path / "all.json").write_text(json.dumps(captions))
    words = ["evaluate", "captions", "--references", str(tmp_path / "captions.json")]
    words += ["--predictions", str(tmp_path / "all.json"), "--limit", "2", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    chosen = list(REFERENCES)[-2:] if listed else list(REFERENCES)[:2]
    alone = score({key: REFERENCES[key] for key in chosen}, {key: REFERENCES[key][0] for key in chosen})
    assert (result["n"], result["missing"]) == (2, 0)
    assert result["cider"] == pytest.approx(alone["cider"])
