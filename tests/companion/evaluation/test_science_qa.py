"""Choices extracted from answers, the released result file to the digit, and failures counted separately."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.cli import main
from companion.evaluation import science_qa
from companion.evaluation.ensemble import complement, evaluate, judged
from companion.evaluation.science_qa import (
    INVALID,
    UNPARSED,
    answer_letter,
    compare_files,
    evaluate_files,
    format_comparison,
    format_report,
    parse_answer,
    score,
)
from companion.paper.claims import claim
from llava_core.runtime import DataError

PROBLEMS: dict[str, Any] = {
    "1": {"choices": ["x", "y"], "answer": 1, "hint": "h", "image": "image.png", "subject": "natural science",
          "grade": "grade6", "split": "test"},
    "2": {"choices": ["x", "y", "z", "w"], "answer": 0, "hint": "", "image": None, "subject": "social science",
          "grade": "grade7", "split": "test"},
    "3": {"choices": ["x", "y"], "answer": 0, "hint": "", "image": "image.png", "subject": "language science",
          "grade": "grade12", "split": "test"},
    "4": {"choices": ["x", "y"], "answer": 0, "hint": "", "image": None, "subject": "language science",
          "grade": "grade1", "split": "train"},
}  # fmt: skip
TEST = {key: problem for key, problem in PROBLEMS.items() if problem["split"] == "test"}


@pytest.mark.parametrize(
    ("text", "era", "expected"),
    [
        ("Assistant: because.\n The answer is B.", "v0", 1),
        ("The answer is B", "v0", UNPARSED),  # the released pattern wants one more character
        ("The answer is B\n", "v0", UNPARSED),
        ("The answer is B!", "v0", 1),
        ("The answer is B. The answer is B.", "v0", UNPARSED),
        ("The answer is b.", "v0", UNPARSED),
        ("The answer is D.", "v0", INVALID),
        ("B", "v0", UNPARSED),
        ("B", "1.0", UNPARSED),
        ("B", "1.5", 1),
        (" B\n", "1.5", UNPARSED),  # the released evaluation strips a text before it is stored
        (" B\n", "ours", 1),
        ("The answer is B", "ours", UNPARSED),
        ("The answer is Belgium.", "v0", 1),
        ("The answer is Belgium.", "ours", UNPARSED),
        ("A. The answer is B.", "1.5", 0),
        ("A. The answer is B.", "ours", UNPARSED),
        ("A\nThe answer is B.", "ours", UNPARSED),
        ("B. The answer is B.", "ours", 1),
        ("B\nbecause of it", "ours", UNPARSED),
        ("B. the second", "1.5", 1),
        ("D. the fourth", "1.5", INVALID),
        ("Banana", "1.5", UNPARSED),
        ("A and B", "1.5", UNPARSED),
        ("", "1.5", UNPARSED),
    ],
)
def test_parse_answer(text: str, era: str, expected: Any) -> None:
    assert parse_answer(text, 2, era) == expected


def test_unknown_era() -> None:
    with pytest.raises(ValueError, match="known: ours, v0"):
        parse_answer("B", 2, "v9")


PIECES = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["The answer is ", "A", "B.", "C. ", "\n", ".", " ", "the answer is ", "(D)", "Z", "Answer: "]),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(PIECES, st.integers(2, 5), st.sampled_from(science_qa.ERAS))
def test_parsed_letters_are_among_the_choices(text: str, n: int, era: str) -> None:
    for t in (text, f"The answer is {text}.", text[:1] + ". "):
        answer = parse_answer(t, n, era)
        assert answer in (UNPARSED, INVALID) or answer in range(n)


@settings(max_examples=400, deadline=None)
@given(PIECES, st.sampled_from("ABCDE"))
def test_two_different_letters_are_a_failure(text: str, other: str) -> None:
    for t in (text, f"{text} The answer is {other}."):
        letter = answer_letter(t)
        if letter is None:
            continue
        opens = t.strip() == letter or t.lstrip().startswith(f"{letter}. ")
        assert opens or f"The answer is {letter}" in t
        for second in {*"ABCDE"} - {letter}:
            assert answer_letter(f"{t}\nThe answer is {second}.") is None
            assert answer_letter(f"{second}. {t}") in (None, second)  # an opening "X. " may hide what opened before it


def test_subject_and_grade_columns(reference: Path) -> None:
    """The published columns need ScienceQA's whole problems.json; without it, of the problems that are there."""
    folder = reference / "scienceqa"
    released = folder / "test_sqa_llava_13b_v0.json"
    outputs = json.loads(released.read_text())["outputs"]
    problems = json.loads((folder / "problems_test_part.json").read_text())
    result = evaluate_files(released, folder / "problems_test_part.json", subset=True)["subsets"]
    columns: dict[str, tuple[str, ...]] = {"NAT": ("natural science",), "SOC": ("social science",)}
    columns |= {"LAN": ("language science",), "G1-6": tuple(f"grade{k}" for k in range(1, 7))}
    columns |= {"G7-12": tuple(f"grade{k}" for k in range(7, 13))}
    for name, members in columns.items():
        own = [key for key, p in problems.items() if p["subject"] in members or p["grade"] in members]
        right = [f"The answer is {'ABCDE'[problems[key]['answer']]}." in outputs[key] for key in own]
        assert (result[name]["n"], result[name]["correct"]) == (len(own), sum(right))
    if (folder / "problems.json").is_file():
        whole = evaluate_files(released, folder / "problems.json")["subsets"]
        for name in columns:
            known = claim(f"sqa-{name.lower()}")
            assert abs(whole[name]["correct"] - (known.correct or 0)) <= 1


def test_released_file(reference: Path) -> None:
    folder = reference / "scienceqa"
    files = folder / "test_sqa_llava_13b_v0.json", folder / "llava_test_CQM-A.json"
    result = evaluate_files(*files)
    assert (result["n"], result["correct"]) == (4241, 3855)
    assert round(result["accuracy"], 2) == 90.90
    reported = {row["rule"]: row["accuracy"] for row in result["reporting"]}
    assert reported == pytest.approx(
        {"as wrong": 100 * 3855 / 4241, "excluded": 100 * 3855 / 4240, "at expected luck": 100 * 3855.5 / 4241}
    )
    assert (result["unparsed"], result["invalid_ids"], result["missing"]) == (0, ["3247"], 0)
    counts = {name: (row["correct"], row["n"]) for name, row in result["subsets"].items()}
    assert counts == {"IMG": (1775, 2017), "TXT": (1831, 2046), "NO": (1300, 1435)}
    notes = " ".join(result["notes"])
    assert "question 3247 names option D of 2 choices" in notes
    assert "3856 right (90.92 %)" in notes
    assert "paper's 90.92" in notes
    assert all(text in format_report(result) for text in ("90.90", "1775", "3247"))
    assert evaluate_files(*files, era="v0")["correct"] == 3855
    assert "on average 90.91 %" in notes
    assert "scored without this check" in notes
    released = evaluate_files(*files, released=True)
    assert (released["correct"], round(released["accuracy"], 2)) == (3856, 90.92)
    assert {name: round(row["accuracy"], 2) for name, row in released["subsets"].items()} == {
        "TXT": 89.49, "IMG": 88.00, "NO": 90.66,
    }  # fmt: skip
    assert (released["header"]["correct"], released["header"]["count"]) == (3855, 4241)
    with pytest.raises(DataError, match="does not name the settings of its answers"):
        evaluate_files(*files, prompt_format="QCM-LEPA")


def test_both_question_layouts_agree(reference: Path) -> None:
    folder = reference / "scienceqa"
    lettered = {q.id: q for q in science_qa.read_questions(folder / "llava_test_CQM-A.json")}
    problems = science_qa.read_questions(folder / "problems_test_part.json")
    assert len(problems) == 361
    for q in problems:
        other = lettered[q.id]
        assert (q.n_choices, q.answer, q.has_text, q.has_image) == (
            other.n_choices, other.answer, other.has_text, other.has_image,
        )  # fmt: skip
    predictions = folder / "test_sqa_llava_13b_v0.json"
    with pytest.raises(DataError, match="3880 of 4241 predictions belong to no question"):
        evaluate_files(predictions, folder / "problems_test_part.json")
    part = evaluate_files(predictions, folder / "problems_test_part.json", subset=True)
    assert (part["n"], part["correct"]) == (361, 320)
    assert sum(part["subsets"][name]["n"] for name in ("NAT", "SOC", "LAN")) == 361
    assert sum(part["subsets"][name]["correct"] for name in ("G1-6", "G7-12")) == 320


def test_failures_are_counted_and_never_guessed() -> None:
    result = score(TEST, {1: "The answer is B.", "2": "I do not know."})
    assert (result["n"], result["correct"], result["unparsed"], result["invalid"], result["missing"]) == (3, 1, 1, 0, 1)
    assert result["accuracy"] == pytest.approx(100 / 3)
    reported = {row["rule"]: row["accuracy"] for row in result["reporting"]}
    assert reported == pytest.approx(  # a missing answer is not drawn
        {"as wrong": 100 / 3, "excluded": 100, "at expected luck": 100 * 1.25 / 3}
    )
    assert (result["unparsed_ids"], result["missing_ids"]) == (["2"], ["3"])
    assert {name: row["n"] for name, row in result["subsets"].items()} == {
        "NAT": 1, "SOC": 1, "LAN": 1, "TXT": 1, "IMG": 2, "NO": 1, "G1-6": 1, "G7-12": 2,
    }  # fmt: skip
    low, high = result["interval"]
    assert 0 < low < result["accuracy"] < high < 100


def test_objects_with_the_same_fields_score_alike() -> None:
    objects = [SimpleNamespace(id=key, **p | {"grade": int(p["grade"][5:])}) for key, p in TEST.items()]
    answers = {"1": "B", "2": "C", "3": "A"}
    assert score(objects, answers) == score(TEST, answers)
    assert score(TEST, answers)["correct"] == 2


def test_guessing_scorer_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"1": "Q", "2": "The answer is E.", "3": "A"}
    honest = score(TEST, answers)
    monkeypatch.setattr(science_qa, "parse_answer", lambda text, n, era: max("ABCDE".find(text[-2:-1]), 0) % n)
    assert score(TEST, answers)["correct"] > honest["correct"] == 1


def test_split_and_jsonl(tmp_path: Path) -> None:
    questions, predictions = tmp_path / "problems.json", tmp_path / "answers.jsonl"
    questions.write_text(json.dumps(PROBLEMS))
    rows = [{"question_id": key, "text": "A"} for key in TEST]
    predictions.write_text("\n".join(map(json.dumps, rows)))
    assert (evaluate_files(predictions, questions)["n"], evaluate_files(predictions, questions)["correct"]) == (3, 2)
    with pytest.raises(DataError, match=r"no problem of split 'val'; the file has test, train"):
        evaluate_files(predictions, questions, split="val")
    with pytest.raises(DataError, match="none of its 3 question ids"):
        evaluate_files(predictions, questions, split="train")


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([], "no prediction"),
        ({"outputs": {}}, "no prediction"),
        ({"answers": 3}, "not a prediction file"),
        ([{"question_id": 1}], "record 1: needs"),
        ([{"question_id": "1", "text": None}], "record 1: needs"),
        (
            [{"question_id": 1, "text": "A"}, {"question_id": "1", "text": "B"}],
            "record 2: question 1 is answered twice",
        ),
        ([{"question_id": "1", "text": "A"}, {"question_id": "99", "text": "A"}], "first: '99'"),
    ],
)
def test_bad_predictions_name_file_and_record(tmp_path: Path, predictions: Any, message: str) -> None:
    (tmp_path / "q.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "answers.json").write_text(json.dumps(predictions))
    with pytest.raises(DataError, match=message) as caught:
        evaluate_files(tmp_path / "answers.json", tmp_path / "q.json")
    assert "answers.json" in str(caught.value)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "empty"),
        (3, "neither"),
        ([{"id": "1"}], "record 0: needs"),
        ([{"id": "1", "conversations": [{"value": "Q?\nA. x\nB. y"}, {"value": "C"}]}], "question 1.*none of its 2"),
        ({"1": {"choices": ["x"], "answer": 1}}, "problem 1: needs"),
        ({"1": {"choices": ["x"], "answer": 0, "subject": "alchemy"}}, "subject 'alchemy'"),
    ],
)
def test_bad_questions_name_file_and_record(tmp_path: Path, questions: Any, message: str) -> None:
    (tmp_path / "q.json").write_text(json.dumps(questions))
    with pytest.raises(DataError, match=message) as caught:
        science_qa.read_questions(tmp_path / "q.json")
    assert "q.json" in str(caught.value)


def test_choices_may_run_over_lines() -> None:
    text = "<image>\nContext: c\nWhich poem?\nA. one line\nanother\nB. two\nlines\nC. three"
    question = science_qa._from_conversation(
        {"id": 7, "image": "7/image.png", "conversations": [{"value": text}, {"value": "C"}]}, "here"
    )
    assert (question.id, question.n_choices, question.answer, question.subsets) == ("7", 3, 2, ["TXT", "IMG"])


def test_later_result_files_store_failures_as_minus_one(tmp_path: Path) -> None:
    outputs = {"1": "Poles repel. The answer is B.", "2": "It cannot be told.", "3": "It is A. The answer is C."}
    content = {"acc": 33.3, "correct": 1, "count": 3, "results": {"1": 1, "2": -1, "3": -1}, "outputs": outputs}
    (tmp_path / "later.json").write_text(json.dumps(content))
    (tmp_path / "q.json").write_text(json.dumps(PROBLEMS))
    for released in (False, True):
        result = evaluate_files(tmp_path / "later.json", tmp_path / "q.json", released=released)
        assert (result["correct"], result["unparsed_ids"], result["invalid_ids"]) == (1, ["2"], ["3"])
        assert "result map" not in " ".join(result["notes"])
    rows = [
        {"question_id": key, "prompt": "p", "text": t, "model_id": "m", "metadata": {}} for key, t in outputs.items()
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert evaluate_files(tmp_path / "rows.jsonl", tmp_path / "q.json")["unparsed"] == 1
    with pytest.raises(DataError, match="leave --released away"):
        evaluate_files(tmp_path / "rows.jsonl", tmp_path / "q.json", released=True)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows[:2], rows[2] | {"model_id": "other"}])))
    with pytest.raises(DataError, match=r"record 3: answers of several models \(m, other\)"):
        evaluate_files(tmp_path / "rows.jsonl", tmp_path / "q.json")


def result_file(path: Path, texts: dict[str, str], stored: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"outputs": texts, "results": stored}))
    return path


MANY = {str(k): {"choices": ["x", "y", "z", "w"], "answer": k % 4} for k in range(80)}


def notes_on(tmp_path: Path, texts: dict[str, str], stored: dict[str, Any], era: str = "ours") -> tuple[Any, str]:
    """The comparison of a result file's map with its texts, and the notes."""
    (tmp_path / "many.json").write_text(json.dumps(MANY))
    file = result_file(tmp_path / "file.json", texts, stored)
    result = evaluate_files(file, tmp_path / "many.json", era=era)
    return result["map"], " ".join(result["notes"])


@pytest.mark.parametrize(
    ("form", "era", "suggested"),
    [("{}", "v0", "--era ours"), ("{}. text", "v0", "--era ours"), ("The answer is {}elgium.", "ours", "--era v0")],
)
def test_map_of_another_rule_is_no_luck(form: str, era: str, suggested: str, tmp_path: Path) -> None:
    texts = {key: form.format("ABCD"[p["answer"]]) for key, p in MANY.items()}
    compared, notes = notes_on(tmp_path, texts, {key: p["answer"] for key, p in MANY.items()}, era)
    assert (compared["right"], len(compared["drawn_ids"]), compared["expected_right"]) == (80, 80, 20)
    assert suggested in notes
    assert "luck" not in notes.replace("random draws would", "")


@pytest.mark.parametrize("form", ["Final answer: {}", "({})", "Answer {}", "{}\nbecause", "{}:"])
@pytest.mark.parametrize("n", [3, 80])
def test_map_of_an_unknown_rule_is_no_luck(form: str, n: int, tmp_path: Path) -> None:
    texts = {key: form.format("ABCD"[p["answer"]]) for key, p in list(MANY.items())[:n]}
    _, notes = notes_on(tmp_path, texts, {key: MANY[key]["answer"] for key in texts})
    assert "written with another rule, and none of ours, v0, 1.0, 1.5 is it" in notes
    assert "by luck" not in notes


def test_random_draws_are_compared_with_their_expectation(tmp_path: Path) -> None:
    texts = dict.fromkeys(MANY, "I cannot tell.")
    compared, notes = notes_on(tmp_path, texts, dict.fromkeys(MANY, 2))
    assert (compared["drawn_right"], compared["expected_right"]) == (20, 20)
    assert compared["deviation"] == pytest.approx((80 * 0.25 * 0.75) ** 0.5)
    assert "20 by luck right" in notes
    far = {key: p["answer"] if int(key) < 40 else 0 for key, p in MANY.items()}
    assert "by luck" not in notes_on(tmp_path, texts, far)[1]
    assert "20.0 right, give or take 3.9" in notes_on(tmp_path, texts, far)[1]
    none = notes_on(tmp_path, texts, dict.fromkeys(MANY, -1))
    assert none[0]["drawn_ids"] == []
    assert "result map" not in none[1]


def test_swapped_entries_of_a_map_are_told(reference: Path, tmp_path: Path) -> None:
    folder = reference / "scienceqa"
    content = json.loads((folder / "test_sqa_llava_13b_v0.json").read_text())
    clean = evaluate_files(folder / "test_sqa_llava_13b_v0.json", folder / "llava_test_CQM-A.json")["map"]
    assert (clean["right"], clean["differ_ids"], clean["drawn_ids"]) == (3856, [], ["3247"])
    questions = science_qa.read_questions(folder / "llava_test_CQM-A.json")
    right = [q for q in questions if content["results"][q.id] == q.answer and q.id != "3247"]
    wrong = [q for q in questions if content["results"][q.id] != q.answer]
    for q in right[:21]:
        content["results"][q.id] = (q.answer + 1) % q.n_choices
    for q in wrong[:21]:
        content["results"][q.id] = q.answer
    (tmp_path / "swapped.json").write_text(json.dumps(content))
    for released in (False, True):
        result = evaluate_files(tmp_path / "swapped.json", folder / "llava_test_CQM-A.json", released=released)
        assert (result["map"]["right"], len(result["map"]["differ_ids"])) == (3856, 42)
        assert "another choice than the text, or none, in 42 questions" in " ".join(result["notes"])
        assert "paper's 90.92" not in " ".join(result["notes"])


@pytest.mark.parametrize("value", ["A", 1.0, None, True, -2])
def test_map_without_indices_is_refused(value: Any, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps(PROBLEMS))
    file = result_file(tmp_path / "a.json", dict.fromkeys(TEST, "A"), {"1": value})
    with pytest.raises(DataError, match=r"question 1: .* is neither a choice's index nor -1"):
        evaluate_files(file, tmp_path / "q.json", released=True)
    assert evaluate_files(file, tmp_path / "q.json")["map"]["differ_ids"]


@pytest.mark.parametrize(
    "text", ["B.", "(B)", "The answer is B", "Final answer: B", "B\nbecause", "Option B", "**B**", "answer: (B) y"]
)
def test_note_on_unparsed_answers_is_true(text: str) -> None:
    result = score(TEST, {"1": text, "2": "A", "3": "A"})
    assert (result["unparsed"], result["correct"]) == (1, 2)
    note = next(note for note in result["notes"] if "unparsed" in note)
    assert "not in a known form: the rule 'ours' reads `The answer is B.`, `B` and `B. text`" in note
    assert f"question 1: {' '.join(text.split())!r}" in note
    assert "1 of them name one letter in another form" in note
    assert "exactly one" not in note


def test_note_on_unparsed_answers_suggests_a_rule() -> None:
    note = " ".join(score(TEST, {"1": "B", "2": "A", "3": "The answer is a dog"}, era="v0")["notes"])
    assert "The rule 'ours' (--era ours) reads a choice in 2 of them" in note
    (note,) = (n for n in score(TEST, {"1": "The answer is a dog", "2": "A", "3": "A"})["notes"] if "unparsed (" in n)
    assert note.endswith("'The answer is a dog'.")
    long = " ".join(score(TEST, {"1": "x" * 5000, "2": "A", "3": "A"})["notes"])
    assert len(long) < 600


def answer_file(path: Path, answers: dict[str, str]) -> Path:
    path.write_text(json.dumps({"outputs": answers}))
    return path


def test_two_files_are_compared_question_by_question(tmp_path: Path) -> None:
    problems = {str(k): PROBLEMS["2"] for k in range(40)}
    (tmp_path / "q.json").write_text(json.dumps(problems))
    good = answer_file(tmp_path / "good.json", {str(k): "A" if k < 30 else "B" for k in range(40)})
    bad = answer_file(tmp_path / "bad.json", {str(k): "A" if k < 20 or k >= 38 else "B" for k in range(40)})
    result = compare_files(good, bad, tmp_path / "q.json")
    assert (result["n"], result["first"]["correct"], result["second"]["correct"]) == (40, 30, 22)
    assert (result["only_first"], result["only_second"]) == (10, 2)
    assert result["difference"] == pytest.approx(-20)
    assert result["interval"][0] < -20 < result["interval"][1] < 0
    assert result["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert "-20.00 points" in format_comparison(result)
    less = answer_file(tmp_path / "less.json", {str(k): "A" for k in range(39)})
    with pytest.raises(DataError, match=r"good.json answers 1 questions that .*less.json does not \(39\)"):
        compare_files(less, good, tmp_path / "q.json")
    part = answer_file(tmp_path / "part.json", {str(k): "B" for k in range(39)})
    assert compare_files(less, part, tmp_path / "q.json")["notes"][0] == "39 of 40 questions are answered."


def test_comparison_tells_unparsed_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps({str(k): PROBLEMS["2"] for k in range(2000)}))
    good = answer_file(tmp_path / "good.json", {str(k): "A" for k in range(2000)})
    other = answer_file(tmp_path / "other.json", {str(k): "Final answer: A" if k else "E" for k in range(2000)})
    result = compare_files(good, other, questions)
    assert (result["first"]["unparsed"], result["second"]["unparsed"], result["second"]["invalid"]) == (0, 1999, 1)
    text = format_comparison(result)
    assert "unparsed 1999, invalid 1" in text
    assert "exact p: < 0.001" in text
    assert "e.g. question 1: 'Final answer: A'" in text
    short = {str(k): PROBLEMS["2"] for k in range(10)}
    questions.write_text(json.dumps(short))
    with pytest.raises(DataError, match=r"1990 questions are not in .*--subset"):
        compare_files(good, other, questions)
    words = ["evaluate", "compare", str(good), str(other), "--questions", str(questions), "--json"]
    assert main([*words, "--subset"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 10


def test_comparison_of_stored_choices(tmp_path: Path) -> None:
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps({str(k): PROBLEMS["2"] for k in range(4)}))
    texts = {str(k): "no idea" for k in range(4)}
    files = [result_file(tmp_path / f"{n}.json", texts, {str(k): int(k >= n) for k in range(4)}) for n in (1, 3)]
    result = compare_files(*files, questions, released=True)
    assert (result["first"]["correct"], result["second"]["correct"], result["second"]["unparsed"]) == (1, 3, 0)
    assert compare_files(*files, questions)["second"]["correct"] == 0
    with pytest.raises(DataError, match="stores no choices"):
        compare_files(files[0], answer_file(tmp_path / "texts.json", texts), questions, released=True)


def test_ensemble_rules() -> None:
    assert complement(0, UNPARSED) == complement(0, INVALID) == 0
    assert complement(0, 1) == 1
    assert judged(0, 0, 1) == 0  # agreement needs no second request
    assert judged(0, 1, UNPARSED) == 0
    assert judged(0, 1, 2) == 2
    llava, gpt4 = {"1": "A", "2": "A", "3": "B"}, {"1": "B", "2": "no image", "3": "B"}
    result = evaluate(TEST, llava, gpt4, requery={"1": "B"})
    assert {name: row["correct"] for name, row in result.items()} == {
        "llava": 1, "gpt4": 1, "complement": 2, "upper_bound": 2, "judge": 2,
    }  # fmt: skip
    assert "judge" not in evaluate(TEST, llava, gpt4)


def test_evaluate_does_not_import_torch() -> None:
    names = "captions, ensemble, grounding, llava_bench, predict, predictions, science_qa, statistics"
    code = f"import sys; from companion.evaluation import {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
