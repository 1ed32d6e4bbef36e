"""BLEU and CIDEr-D against cases small enough to compute by hand."""

from __future__ import annotations

import contextlib
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from companion.evaluation.captions import (
    bleu,
    cider,
    compare,
    format_report,
    leave_one_out,
    of_another_image,
    score,
    score_with_bounds,
    tokenize,
    write_captions,
)
from companion.evaluation.reporting import caption_report
from llava_core.checkpoints.load import build, save_checkpoint
from llava_core.runtime import DataError


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog doesn't bark.", "a man 's dog does n't bark"),
        (
            'Two (2) cats -- "asleep", on a black-and-white sofa...',
            "two -lrb- 2 -rrb- cats asleep on a black-and-white sofa",
        ),
        (
            "They’re 3.5 m from the U.S. border; it costs $1,000!",
            "they 're 3.5 m from the u.s. border it costs $ 1,000",
        ),
        ("can't", "ca n't"),
        ("He cannot, he's gonna wait [sic].", "he can not he 's gon na wait -lsb- sic -rsb-"),
        ("First Ave. and Main st. at 5 p.m.", "first ave. and main st. at 5 p.m."),
        ("50% of it: black/white t-shirts & 2nd-hand", "50 % of it black/white t-shirts & 2nd-hand"),
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


def test_bleu_is_a_corpus_score_with_brevity_penalty() -> None:
    refs = [[words("a cat sleeps here")], [words("a red car drives by")]]
    scores = bleu(refs, [words("a cat"), words("a red car drives by")])
    brevity = math.exp(1 - 9 / 7)
    assert scores[0] == pytest.approx(brevity)
    assert scores[3] == pytest.approx(brevity)
    half = bleu(refs, [words("a dog sleeps there"), words("a red car drives by")])
    assert half[0] == pytest.approx(7 / 9)
    assert half[1] == pytest.approx(math.sqrt(7 / 9 * 4 / 7))
    assert half[3] == pytest.approx((7 / 9 * 4 / 7 * 3 / 5 * 2 / 3) ** 0.25)


def test_bleu_prefers_the_shorter_of_two_close_references() -> None:
    refs = [[words("a b c d"), words("a b c d e f")]]
    assert bleu(refs, [words("a b c d e")])[0] == pytest.approx(1)  # 4, not 6: no brevity penalty


def test_cider_by_hand() -> None:
    refs = [[words("red car")], [words("blue boat")]]
    assert cider(refs, [words("red car"), words("red boat")]) == pytest.approx([5.0, 1.25])
    # repeated words: clipped to the reference's weight, and a length penalty for 3 bigrams against 1
    repeated = cider(refs, [words("red car red car"), words("blue boat")])[0]
    assert repeated == pytest.approx(10 * (1 / 2 + 1 / math.sqrt(5)) / 4 * math.exp(-4 / 72))


def test_cider_ignores_words_of_every_image() -> None:
    refs = [[words("the red car")], [words("the blue boat")]]
    assert cider(refs, [["the"], ["the"]]) == [0, 0]


def test_empty_captions_score_zero() -> None:
    result = score({1: ["a cat"], 2: ["a dog"]}, {1: "", 2: "."})
    assert result["bleu4"] == result["cider"] == 0


STORED = [  # candidate, then references, already tokens
    ["a red car drives by the house", "a red car drives past a house", "the car is red", "a house and a car"],
    ["two dogs play on the beach", "two dogs are on a beach", "dogs play on the beach on a sunny day"],
    ["a clock on a table", "the table has a clock on it", "a small clock stands on a wooden table", "a clock"],
    ["a man rides a horse", "somebody sits on a horse", "a rider and a horse"],
    ["", "nothing to see here"],
]


def test_caption_intervals_are_paired_by_image() -> None:
    rng = random.Random(0)
    vocabulary = [
        "a",
        "red",
        "blue",
        "car",
        "dog",
        "house",
        "drives",
        "plays",
        "by",
        "on",
        "the",
        "road",
        "small",
        "large",
        "two",
    ]
    references = {k: [" ".join(rng.choices(vocabulary, k=8)) for _ in range(5)] for k in range(50)}
    first = {k: " ".join(rng.choices(vocabulary, k=7)) for k in references}
    second = {k: texts[0] if k % 2 else first[k] for k, texts in references.items()}
    full, compared = score(references, first), compare(references, first)
    assert compared["bleu4"]["value"] == pytest.approx(full["bleu4"])
    assert compared["cider"]["value"] == pytest.approx(full["cider"])
    better = compare(references, first, second)
    for name in ("bleu4", "cider"):
        low, high = compared[name]["interval"]
        assert low < full[name] < high
        assert better[name]["value"] == pytest.approx(score(references, second)[name] - full[name])
        assert 0 < better[name]["interval"][0] < better[name]["value"] < better[name]["interval"][1]
    assert compare(references, first, first)["cider"] == {"value": 0, "interval": [0, 0]}
    with pytest.raises(DataError, match="of the same images"):
        compare(references, first, {0: "a car"})


def test_annotators_are_the_ceiling_and_another_image_the_floor(reference: Path) -> None:
    rows = [json.loads(line) for line in (reference / "coco" / "caps_boxes_coco2014_val_80.jsonl").open()]
    references = {row["image"]: row["captions"][:5] for row in rows}
    people = leave_one_out(references)
    by_hand = [
        score({k: [t for i, t in enumerate(texts) if i != left] for k, texts in references.items()},
              {k: texts[left] for k, texts in references.items()})["cider"]
        for left in range(5)
    ]  # fmt: skip
    assert people["by_annotator"] == pytest.approx(by_hand)
    assert people["cider"] == pytest.approx(sum(by_hand) / 5)
    assert (people["n"], people["annotators"]) == (80, 5)
    said = {key: texts[0] for key, texts in references.items()}
    exchanged = of_another_image(said)
    assert sorted(exchanged.values()) == sorted(said.values())
    assert not any(exchanged[key] == said[key] for key in said)
    result = score_with_bounds(references, exchanged)
    assert result["cider"] < 0.3 < 0.5 < result["ceiling"]["cider"] < 1.5
    assert result["ceiling"]["cider"] == pytest.approx(people["cider"])
    assert leave_one_out(references, exchanged)["cider"] == pytest.approx(result["cider"], abs=0.02)


def test_report_is_in_the_units_of_papers() -> None:
    references = {1: ["a red car", "a red car drives"], 2: ["two dogs", "two dogs play"], 3: ["a clock", "one clock"]}
    result = score_with_bounds(references, {1: "a red car drives", 2: "two dogs play"})
    lines = format_report(result).split("\n")
    assert lines[1].split() == ["captions", f"{100 * result['bleu4']:.1f}", f"{100 * result['cider']:.1f}"]
    assert [line.split()[0] for line in lines[2:4]] == ["one", "another"]
    assert "2 images, 1 without" in lines[4]
    alone = score_with_bounds({1: ["a red car"], 2: ["a dog"]}, {1: "a red car"})
    assert alone["ceiling"] is alone["floor"] is None
    assert "annotator  " not in format_report(alone)
    with pytest.raises(DataError, match="at least one other"):
        leave_one_out({1: ["a red car"]})
    with pytest.raises(DataError, match="exchange"):
        of_another_image({1: "a red car"})


def halves(lines: list[list[str]]) -> tuple[list[list[list[str]]], list[list[str]]]:
    return [[words(text) for text in line[1:]] for line in lines], [words(line[0]) for line in lines]


def test_stored_numbers_of_the_coco_scorer() -> None:
    """pycocoevalcap 1.2, its classes Bleu(4) and Cider, on these very tokens."""
    references, candidates = halves(STORED)
    assert bleu(references, candidates) == pytest.approx([0.669896867, 0.570913996, 0.464838816, 0.381140745], abs=1e-6)
    assert cider(references, candidates) == pytest.approx(
        [2.464467131, 3.849825268, 2.535020802, 1.604183667, 0.0], abs=1e-6
    )


def test_scores_equal_pycocoevalcap() -> None:
    reason = "pycocoevalcap is not installed; benchmarks/results/captions.csv has what was measured with it"
    peer_bleu = pytest.importorskip("pycocoevalcap.bleu.bleu", reason=reason).Bleu
    peer_cider = pytest.importorskip("pycocoevalcap.cider.cider", reason=reason).Cider
    rng = random.Random(0)
    vocabulary = [f"w{int(rng.paretovariate(0.7))}" for _ in range(40)]
    drawn = [
        [" ".join(rng.choices(vocabulary, k=rng.randrange(12))) for _ in range(rng.randint(2, 6))] for _ in range(60)
    ]
    for lines in (STORED, drawn):
        references, candidates = halves(lines)
        given = {k: line[1:] for k, line in enumerate(lines)}, {k: line[:1] for k, line in enumerate(lines)}
        assert bleu(references, candidates) == pytest.approx(peer_bleu(4).compute_score(*given, verbose=0)[0], abs=1e-6)
        assert cider(references, candidates) == pytest.approx(list(peer_cider().compute_score(*given)[1]), abs=1e-6)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_tokens_have_no_white_space(text: str) -> None:
    tokens = tokenize(text)
    assert all(token and token == token.strip() and len(token.split()) == 1 for token in tokens)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["annotations", "images", "image_id", "caption", "x"]), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(JSON, JSON)
def test_any_files_are_scored_or_refused(references: Any, predictions: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder) / name, value) for name, value in (("r.json", references), ("p.json", predictions))]
        with contextlib.suppress(DataError):
            assert caption_report(*paths)["n"] > 0


def test_checkpoint_captions_the_images_of_a_file(tmp_path: Path) -> None:
    loaded_model = build(*tiny.base_models(tmp_path / "bases"), torch.float32)
    loaded_model.model.eval()
    model = save_checkpoint(tmp_path / "model", loaded_model, "full")
    for k in range(3):
        Image.new("RGB", (40, 32), (80 * k, 30, 30)).save(tmp_path / f"{k}.png")
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(3)]
    annotations = [{"image_id": k, "caption": "a red car"} for k in range(3)]
    refs = write(tmp_path / "captions.json", {"images": images, "annotations": annotations})
    out = tmp_path / "said.json"
    result = write_captions(loaded_model, model, refs, tmp_path, out, limit=2, max_new_tokens=4)
    assert (result["answers"], result["new"]) == (2, 2)
    assert [row["image_id"] for row in json.loads(out.read_text())] == [0, 1]
    assert caption_report(refs, out)["missing"] == 1
    assert write_captions(loaded_model, model, refs, tmp_path, out, max_new_tokens=4)["answers"] == 3
    with pytest.raises(DataError, match=r"said\.jsonl, record 1: question 0 was answered .*max_new_tokens: 4 and 5"):
        write_captions(loaded_model, model, refs, tmp_path, out, max_new_tokens=5)
    with pytest.raises(DataError, match=r"ends in \.json"):
        write_captions(loaded_model, model, refs, tmp_path, tmp_path / "said.txt")
    with pytest.raises(DataError, match=r"image 0: .*0\.png does not exist"):
        write_captions(loaded_model, model, refs, tmp_path / "bases", out)
    with pytest.raises(DataError, match="no `images`"):
        write_captions(loaded_model, model, write(tmp_path / "none.json", {"annotations": annotations}), tmp_path, out)


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_files(tmp_path: Path) -> None:
    texts = {1: "A red car drives by the house.", 2: "Two dogs play on a beach.", 3: "A clock on a table."}
    rows = [{"id": i, "image_id": i, "caption": text} for i, text in texts.items()]
    refs = write(tmp_path / "captions.json", {"images": [], "annotations": rows})
    perfect = caption_report(refs, write(tmp_path / "results.json", rows))
    assert (perfect["n"], perfect["missing"]) == (3, 0)
    assert perfect["bleu4"] == pytest.approx(1)
    assert perfect["cider"] == pytest.approx(10)
    wrong = [{"image_id": str(i), "caption": texts[i % 3 + 1]} for i in texts]
    shifted = caption_report(refs, write(tmp_path / "wrong.json", wrong))
    assert shifted["bleu4"] < 0.1
    assert shifted["cider"] < 1
    assert caption_report(refs, write(tmp_path / "part.json", rows[:2]))["missing"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "not a list of captions"),
        ({"image_id": 1}, "not a list of captions"),
        ([{"image_id": 1}], "record 0: needs"),
        ([{"image_id": 1, "caption": "x"}] * 2, "record 1: image 1 has two captions"),
        ([{"image_id": 9, "caption": "x"}], "record 0: image 9 is not in"),
    ],
)
def test_bad_files_name_file_and_record(tmp_path: Path, rows: Any, message: str) -> None:
    refs = write(tmp_path / "captions.json", {"annotations": [{"image_id": 1, "caption": "a cat"}]})
    with pytest.raises(DataError, match=message) as caught:
        caption_report(refs, write(tmp_path / "results.json", rows))
    assert "results.json" in str(caught.value)
    with pytest.raises(DataError, match="no `annotations`"):
        caption_report(write(tmp_path / "empty.json", {"annotations": []}), tmp_path / "results.json")
