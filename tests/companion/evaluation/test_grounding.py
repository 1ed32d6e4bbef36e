"""Grounding accuracy of a model that uses the image and of one that ignores it; shuffled images."""

from __future__ import annotations

from typing import Any

import pytest

from companion.evaluation.grounding import (
    edited_accuracy,
    factual_accuracy,
    hallucination,
    normalize,
    shuffle_images,
    text_prior,
)
from llava_core.runtime import DataError


def row(number: int, image: str, text: str, answer: str, kind: str = "color") -> dict[str, Any]:
    return {"question_id": number, "image": image, "text": text, "answer": answer, "kind": kind}


ROWS = [
    row(1, "a.png", "What color is the car?", "Red."),
    row(2, "b.png", "What color is the car?", "Blue."),
    row(3, "b.png", "How many dogs?", "Two.", "count"),
    row(4, "c.png", "How many boats?", "One.", "count"),
]


def test_factual_accuracy() -> None:
    result = factual_accuracy(ROWS, {"1": " red", 2: "It is blue.", 3: "TWO!", 4: ""})
    assert (result["n"], result["correct"], result["accuracy"]) == (4, 2, 50)
    assert {kind: (r["correct"], r["n"]) for kind, r in result["by_kind"].items()} == {"color": (1, 2), "count": (1, 2)}
    assert result["interval"][0] < 50 < result["interval"][1]
    assert normalize("On the  left.") == "on the left" != normalize("On the right.")


def test_ids_must_fit() -> None:
    with pytest.raises(DataError, match="1 ids are on one side only, such as '4'"):
        factual_accuracy(ROWS, {1: "", 2: "", 3: ""})
    with pytest.raises(DataError, match="'9'"):
        factual_accuracy(ROWS, {1: "", 2: "", 3: "", 4: "", 9: ""})
    with pytest.raises(DataError, match="same question_id"):
        factual_accuracy([ROWS[0], ROWS[0]], {1: ""})


def test_text_prior() -> None:
    train = [row(i, "t", "what color is the car", a) for i, a in enumerate(("Blue.", "blue", "Red."))]
    train += [row(5, "t", "How many dogs?", "Three.", "count"), row(6, "t", "How many cats?", "One.", "count")]
    train += [row(7, "t", "How many cats?", "One.", "count")]
    result = text_prior(train, ROWS)  # car: blue (row 2); dogs: three; boats were never asked: count's favorite, one
    assert (result["correct"], result["by_kind"]["color"]["correct"], result["by_kind"]["count"]["correct"]) == (
        2,
        1,
        1,
    )
    unknown = text_prior([row(1, "t", "x", "Red.", "other")], ROWS)
    assert unknown["correct"] == 1  # the most frequent of all
    with pytest.raises(DataError, match="no training question"):
        text_prior([], ROWS)


def test_shuffled_images_never_stay() -> None:
    rows = [row(i, f"{i // 3}.png", "q", "a") for i in range(30)]
    for seed in range(50):
        shuffled = shuffle_images(rows, seed)
        assert all(new["image"] != old["image"] for new, old in zip(shuffled, rows, strict=True))
        assert sorted(new["image"] for new in shuffled) == sorted(old["image"] for old in rows)
        assert [new["question_id"] for new in shuffled] == list(range(30))
    assert shuffle_images(rows, 1) == shuffle_images(rows, 1) != shuffle_images(rows, 2)
    assert rows[0]["image"] == "0.png"
    with pytest.raises(DataError, match="at least two"):
        shuffle_images(rows[:3], 0)


def test_shuffled_images_lower_the_accuracy_of_a_grounded_model() -> None:
    truth = {f"{i}.png": ("Red.", "Blue.")[i % 2] for i in range(20)}
    rows = [row(i, image, "What color is the car?", answer) for i, (image, answer) in enumerate(truth.items())]
    shuffled = shuffle_images(rows, 0)

    def accuracy(asked: list[dict[str, Any]], looks: bool) -> float:
        return float(
            factual_accuracy(asked, {r["question_id"]: truth[r["image"]] if looks else "red" for r in asked})[
                "accuracy"
            ]
        )

    assert accuracy(rows, looks=True) == 100
    assert accuracy(shuffled, looks=True) < 80
    assert accuracy(rows, looks=False) == accuracy(shuffled, looks=False) == text_prior(rows, rows)["accuracy"] == 50


def test_hallucination_counts_objects_that_are_not_there() -> None:
    present = {1: ["car", "dog"], 2: ["cat"], 3: ["tree"]}
    result = hallucination({1: ["car", "zebra", "zebra"], 2: ["cat"], 3: []}, present)
    assert result["objects"]["n"] == 3
    assert result["objects"]["share"] == pytest.approx(100 / 3)
    assert result["descriptions"]["share"] == pytest.approx(100 / 3)
    assert result["descriptions"]["interval"][0] < 100 / 3 < result["descriptions"]["interval"][1]
    assert hallucination({3: []}, present)["objects"]["share"] is None
    with pytest.raises(DataError, match="image 4 has a description"):
        hallucination({4: ["car"]}, present)


def test_edited_images_are_followed_or_not() -> None:
    before, after = ["Red.", "Blue.", "White.", "Red."], ["Blue.", "Red.", "Black.", "White."]
    answers = ["blue", "Blue.", "Green.", "White."]
    counts = {kind: row["correct"] for kind, row in edited_accuracy(before, after, answers).items()}
    assert counts == {"follow": 2, "keep": 1, "other": 1}
    with pytest.raises(ValueError, match="shorter"):
        edited_accuracy(before, after, answers[:3])
