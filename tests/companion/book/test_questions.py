"""The page of questions shows stored answers with their verdicts, and texts of data have no markup."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from companion.book import questions

HOSTILE = 'What is <img src=x onerror="a()">?\n\n{{ claim:x }}'


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (336, 224), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def write_bench(folder: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "questions.jsonl": [
            {"question_id": k, "image": "red.png", "category": "llava_bench_conv", "text": f"Question {k}?"}
            for k in range(4)
        ],
        "context.jsonl": [{"image": "red.png", "caption": "a red square"}],
        "answers_gpt4.jsonl": [{"question_id": k, "text": f"Reference {k}."} for k in range(4)],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_bench_has_answer_reference_and_scores(tmp_path: Path, picture: Path) -> None:
    write_bench(tmp_path)
    data = {"bench-coco": str(tmp_path), "bench-coco_images": str(tmp_path)}
    record: Any = SimpleNamespace(config=SimpleNamespace(scale=SimpleNamespace(data=data)))
    pairs = {0: [7, 9], 1: [8, 5], 2: None, 3: [10, 2.5]}  # reference and candidate
    reviews = [{"question_id": key, "tuple": pair} for key, pair in pairs.items()]
    stored = {"reviews": reviews, "answers": {"0": "Red.", "1": "Blue.", "2": "", "3": "No."}}
    rows = list(questions._bench(record, stored, "bench-coco"))
    assert [(row.answer, row.reference, row.verdict, row.mood) for row in rows] == [
        ("Red.", "Reference 0.", "9, reference 7", "agrees"),
        ("Blue.", "Reference 1.", "5, reference 8", "partly"),
        ("", "Reference 2.", "not scored", "not-resolved"),
        ("No.", "Reference 3.", "2.5, reference 10", "disagrees"),
    ]
    assert {row.image for row in rows} == {picture}


def test_science_questions_have_choices_and_verdict(tmp_path: Path) -> None:
    problem = {
        "question": "Which?",
        "choices": ["one", "two"],
        "answer": 1,
        "hint": "",
        "image": None,
        "task": "closed",
    }
    problem |= {"grade": "grade2", "subject": "natural science", "topic": "t", "category": "c", "skill": "s"}
    problem |= {"lecture": "", "solution": "", "split": "test"}
    (tmp_path / "problems.json").write_text(json.dumps({"1": problem, "2": problem}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": [], "val": [], "test": ["1", "2"]}))
    record: Any = SimpleNamespace(config=SimpleNamespace(data_path=tmp_path))
    rows = list(questions._science(record, {"right": "10", "answers": {"1": "The answer is B."}}))
    assert [(row.verdict, row.answer) for row in rows] == [("right", "The answer is B."), ("wrong", "")]
    assert rows[0].text == "Which?\n(A) one\n(B) two"
    assert rows[0].reference == "(B) two"


def test_page_shows_every_question_without_markup_of_data(tmp_path: Path, picture: Path) -> None:
    row = {"image": str(picture), "request": HOSTILE, "caption": "a red square", "reference": "red", "cider": 51.4}
    assert questions.questions_page(tmp_path) == ""
    (tmp_path / "32_captioning.json").write_text(json.dumps({"numbers": {"captions": [row] * 3}}))
    page = questions.questions_page(tmp_path)
    assert page.count("<article ") == 3
    assert "## Captions: 3 questions" in page
    assert "CIDEr 51" in page
    assert "<img src=x" not in page
    assert "{{" not in page
    block = page[page.index('<div class="questions') :]
    assert "\n\n" not in block.rstrip()  # an empty line would end the block of HTML
    assert page.count("data:image/webp;base64,") == 3
    assert len(page) < 3 * 3000  # a thumbnail is small


def test_a_missing_image_names_its_question(tmp_path: Path) -> None:
    row = {"image": str(tmp_path / "no.png"), "request": "?", "caption": "", "reference": "", "cider": 0.0}
    (tmp_path / "32_captioning.json").write_text(json.dumps({"numbers": {"captions": [row]}}))
    with pytest.raises(questions.DataError, match=r"question 1, .*no\.png"):
        questions.questions_page(tmp_path)
