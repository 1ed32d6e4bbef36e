"""BLEU and CIDEr-D against cases small enough to compute by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llava_core.evaluate.captions import bleu, cider, evaluate_files, score, tokenize
from llava_core.runtime import DataError


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog doesn't bark.", "a man 's dog does n't bark"),
        ('Two (2) cats -- "asleep", on a black-and-white sofa...', "two 2 cats asleep on a black-and-white sofa"),
        (
            "They’re 3.5 m from the U.S. border; it costs $1,000!",
            "they 're 3.5 m from the u.s. border it costs $ 1,000",
        ),
        ("can't", "ca n't"),
        (" . ", ""),
    ],
)
def test_tokenize(caption: str, tokens: str) -> None:
    assert " ".join(tokenize(caption)) == tokens


def words(text: str) -> list[str]:
    return text.split()


def test_bleu_clips_repeated_words() -> None:
    refs = [[words("the cat is on the mat"), words("there is a cat on the mat")]]
    scores = bleu(refs, [["the"] * 7])
    assert scores[0] == pytest.approx(2 / 7)  # without clipping it would be 1
    assert scores[1] < 1e-6


def test_bleu_counts_over_the_corpus_and_punishes_brevity() -> None:
    refs = [[words("a cat sleeps here")], [words("a red car drives by")]]
    scores = bleu(refs, [words("a cat"), words("a red car drives by")])
    brevity = math.exp(1 - 9 / 7)
    assert scores[0] == pytest.approx(brevity)
    assert scores[3] == pytest.approx(brevity)
    half = bleu(refs, [words("a dog sleeps there"), words("a red car drives by")])
    assert half[0] == pytest.approx(7 / 9)
    assert half[1] == pytest.approx(math.sqrt(7 / 9 * 4 / 7))
    assert half[3] == pytest.approx((7 / 9 * 4 / 7 * 3 / 5 * 2 / 3) ** 0.25)


def test_bleu_takes_the_shorter_of_two_equally_close_references() -> None:
    refs = [[words("a b c d"), words("a b c d e f")]]
    assert bleu(refs, [words("a b c d e")])[0] == pytest.approx(1)  # 4, not 6: no brevity penalty


def test_cider_by_hand() -> None:
    refs = [[words("red car")], [words("blue boat")]]
    assert cider(refs, [words("red car"), words("red boat")]) == pytest.approx([5.0, 1.25])
    # repeated words: clipped to the reference's weight, and a length penalty for 3 bigrams against 1
    repeated = cider(refs, [words("red car red car"), words("blue boat")])[0]
    assert repeated == pytest.approx(10 * (1 / 2 + 1 / math.sqrt(5)) / 4 * math.exp(-4 / 72))


def test_cider_ignores_what_every_image_has() -> None:
    refs = [[words("the red car")], [words("the blue boat")]]
    assert cider(refs, [["the"], ["the"]]) == [0, 0]


def test_empty_captions_score_zero() -> None:
    result = score({1: ["a cat"], 2: ["a dog"]}, {1: "", 2: "."})
    assert result["bleu4"] == result["cider"] == 0


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_files(tmp_path: Path) -> None:
    texts = {1: "A red car drives by the house.", 2: "Two dogs play on a beach.", 3: "A clock on a table."}
    rows = [{"id": i, "image_id": i, "caption": text} for i, text in texts.items()]
    refs = write(tmp_path / "captions.json", {"images": [], "annotations": rows})
    perfect = evaluate_files(refs, write(tmp_path / "results.json", rows))
    assert (perfect["n"], perfect["missing"]) == (3, 0)
    assert perfect["bleu4"] == pytest.approx(1)
    assert perfect["cider"] == pytest.approx(10)
    wrong = [{"image_id": str(i), "caption": texts[i % 3 + 1]} for i in texts]
    shifted = evaluate_files(refs, write(tmp_path / "wrong.json", wrong))
    assert shifted["bleu4"] < 0.1
    assert shifted["cider"] < 1
    assert evaluate_files(refs, write(tmp_path / "part.json", rows[:2]))["missing"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "not a list of captions"),
        ({"image_id": 1}, "not a list of captions"),
        ([{"image_id": 1}], "record 0: needs"),
        ([{"image_id": 1, "caption": "x"}] * 2, "record 1: image 1 has a second caption"),
        ([{"image_id": 9, "caption": "x"}], "record 0: image 9 is not in"),
    ],
)
def test_bad_files_name_file_and_record(tmp_path: Path, rows: Any, message: str) -> None:
    refs = write(tmp_path / "captions.json", {"annotations": [{"image_id": 1, "caption": "a cat"}]})
    with pytest.raises(DataError, match=message) as caught:
        evaluate_files(refs, write(tmp_path / "results.json", rows))
    assert "results.json" in str(caught.value)
    with pytest.raises(DataError, match="no `annotations`"):
        evaluate_files(write(tmp_path / "empty.json", {"annotations": []}), tmp_path / "results.json")
