"""A file of answers says how they were made, and nothing that was made otherwise is mixed in or scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.evaluate.predictions import append, checkpoint_id, read_predictions, resume
from llava_core.evaluate.science_qa import compare_files, evaluate_files, read_questions
from llava_core.runtime import DataError, write_json

SETTINGS: dict[str, Any] = {
    "prompt_format": "QCM-LEPA",
    "template": "v0",
    "checkpoint": "manifest:1",
    "n": 3,
    "generation": {"temperature": 0.0},
}
PROBLEMS = {str(k): {"choices": ["x", "y"], "answer": 1, "split": "test"} for k in range(3)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two of three answers, and the questions."""
    path = tmp_path / "answers.jsonl"
    assert resume(path, SETTINGS) == {}
    append(path, {"0": "The answer is B.", "1": "The answer is A."}, SETTINGS)
    return path, write_json(tmp_path / "problems.json", PROBLEMS)


def test_what_is_written_is_read_with_its_settings(files: tuple[Path, Path]) -> None:
    found = read_predictions(files[0])
    assert (found.answers, found.made_with) == ({"0": "The answer is B.", "1": "The answer is A."}, SETTINGS)
    result = evaluate_files(*files, prompt_format="QCM-LEPA")
    assert (result["correct"], result["missing"], result["made_with"]) == (1, 1, SETTINGS)
    assert "holds 2 of 3 answers" in result["notes"][-1]


@pytest.mark.parametrize(("option", "value"), [("prompt_format", "QCM-LEA"), ("checkpoint", "other")])
def test_another_format_or_checkpoint_is_refused(files: tuple[Path, Path], option: str, value: str) -> None:
    if option == "checkpoint":
        value = str(write_json(files[0].parent / value / "manifest.json", {"base_hash": {}}).parent)
    with pytest.raises(DataError, match=rf"answers.jsonl: its answers were made with {option} .*leave --{option[:6]}"):
        evaluate_files(*files, **{option: value})  # type: ignore[arg-type]


def test_a_half_written_file_is_gone_on_with_by_the_same_settings_only(files: tuple[Path, Path]) -> None:
    path, questions = files
    with open(path, "a") as file:
        file.write('{"question_id": "2", "te')  # killed in the middle of a line
    before = path.read_bytes()
    for name, value in (("template", "v1"), ("checkpoint", "manifest:2"), ("generation", {"temperature": 0.7})):
        with pytest.raises(DataError, match=f"begun with other settings \\({name}: "):
            resume(path, SETTINGS | {name: value})
    assert path.read_bytes() == before[: before.rfind(b"\n") + 1]
    assert resume(path, SETTINGS).keys() == {"0", "1"}
    append(path, {"2": "The answer is B."}, SETTINGS)
    result = evaluate_files(path, questions)
    assert (result["correct"], result["missing"], result["notes"]) == (2, 0, [])


def test_a_file_killed_within_its_first_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"made_with": {"prom')
    assert resume(tmp_path / "a.jsonl", SETTINGS) == {}
    with pytest.raises(DataError, match="holds no prediction"):
        read_predictions(tmp_path / "a.jsonl")


def test_a_file_that_does_not_say_how_it_was_made_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_text('{"question_id": "0", "text": "A"}\n')
    with pytest.raises(DataError, match="it does not say which"):
        resume(path, SETTINGS)
    with pytest.raises(DataError, match=r"name a file that ends in \.jsonl"):
        resume(tmp_path / "a.json", SETTINGS)


def test_answers_of_several_runs_are_not_scored_as_one(files: tuple[Path, Path]) -> None:
    path, questions = files
    other, settings = path.with_name("other.jsonl"), SETTINGS | {"template": "v1"}
    resume(other, settings)
    append(other, {"2": "The answer is B."}, settings)
    ours, theirs = path.read_text(), other.read_text()
    path.write_text(ours + theirs)
    with pytest.raises(DataError, match=r"mixes answers made with different settings \(template: 'v0' and 'v1'\)"):
        evaluate_files(path, questions)
    path.write_text(ours + theirs.split("\n", 1)[1])
    with pytest.raises(DataError, match="record 3: made with the settings"):
        evaluate_files(path, questions)
    path.write_text(ours.split("\n", 1)[1])  # without its first line it is of no foreign layout either
    with pytest.raises(DataError, match="record 1: made with the settings"):
        evaluate_files(path, questions)
    path.write_text(ours + ours)
    with pytest.raises(DataError, match="question 0 is answered twice"):
        evaluate_files(path, questions)


def test_a_comparison_tells_what_else_differs(files: tuple[Path, Path]) -> None:
    path, questions = files
    other, settings = path.with_name("other.jsonl"), SETTINGS | {"prompt_format": "QCM-ALE"}
    resume(other, settings)
    append(other, {"0": "The answer is B.", "1": "The answer is B."}, settings)
    result = compare_files(path, other, questions)
    assert result["notes"][-1] == "Made with other prompt_format: 'QCM-LEPA' and 'QCM-ALE'."


def test_a_checkpoint_is_known_by_its_manifest_wherever_it_lies(tmp_path: Path) -> None:
    manifest = {"base_hash": {}, "files": {"model.safetensors": "0" * 64}}
    for name in ("a", "b"):
        write_json(tmp_path / name / "manifest.json", manifest)
    assert checkpoint_id(tmp_path / "a") == checkpoint_id(tmp_path / "b")
    write_json(tmp_path / "b" / "manifest.json", manifest | {"files": {"model.safetensors": "1" * 64}})
    assert checkpoint_id(tmp_path / "a") != checkpoint_id(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text()) == manifest


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from(["", "A", "test", "grade7", "<image>\nA. x\nB. y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["made_with", "value"]), inner),
    max_leaves=6,
)
ROW = {"question_id": "1", "text": "A", "model_id": "m"}
HEADER = {"made_with": {"n": 1}}
PROBLEM = {
    "choices": ["x", "y"], "answer": 1, "hint": "", "image": None, "subject": "natural science", "grade": "grade7",
    "split": "test",
}  # fmt: skip
TURN = {"id": "1", "conversations": [{"value": "Q?\nA. x\nB. y"}, {"value": "B"}]}


def damaged(record: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The record with one or two fields replaced by anything."""
    return st.dictionaries(st.sampled_from([*record, "extra"]), ANYTHING, max_size=2).map(lambda new: record | new)


CONTENT = st.one_of(
    ANYTHING,
    st.lists(damaged(ROW) | damaged(HEADER) | damaged(TURN) | ANYTHING, max_size=3),
    st.dictionaries(st.sampled_from("12"), damaged(PROBLEM) | ANYTHING),
    damaged({"outputs": {"1": "A"}, "results": {"1": 0}}),
)


@settings(max_examples=150, deadline=None)
@given(content=CONTENT)
def test_a_file_of_anything_is_read_or_named(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    for read in (read_predictions, read_questions):
        try:
            assert read(path)
        except DataError as error:
            assert "any.json" in str(error)  # noqa: PT017 - either it is read or the message names the file
