"""Prediction files name their settings; answers with other settings are refused."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.evaluation.predictions import checkpoint_id, read_predictions, write_predictions
from companion.evaluation.science_qa import compare_files, evaluate_files, read_questions
from llava_core.runtime import DataError, write_json

SETTINGS: dict[str, Any] = {
    "prompt_format": "QCM-LEPA",
    "template": "v0",
    "checkpoint": "manifest:1",
    "n": 3,
    "temperature": 0.0,
}
PROBLEMS = {str(k): {"choices": ["x", "y"], "answer": 1, "split": "test"} for k in range(3)}


ROWS = [{"question_id": key, "text": f"Is it {key}?"} for key in PROBLEMS]


def write(path: Path, answers: dict[str, str], settings: dict[str, Any] = SETTINGS) -> list[str]:
    """Answer questions one by one until there is no answer, as a run that is killed; return what was asked for."""
    left: list[str] = []

    def answer(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
        left[:] = [row["question_id"] for row in rows]
        yield from ({key: answers[key]} for key in left)

    with contextlib.suppress(KeyError):
        write_predictions(path, ROWS, settings, answer)
    return left


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two of three answers, and the questions."""
    path = tmp_path / "answers.jsonl"
    assert write(path, {"0": "The answer is B.", "1": "The answer is A."}) == ["0", "1", "2"]
    return path, write_json(tmp_path / "problems.json", PROBLEMS)


def test_written_file_is_read_with_its_settings(files: tuple[Path, Path]) -> None:
    report = read_predictions(files[0])
    assert (report.answers, report.settings) == ({"0": "The answer is B.", "1": "The answer is A."}, SETTINGS)
    result = evaluate_files(*files, prompt_format="QCM-LEPA")
    assert (result["correct"], result["missing"], result["made_with"]) == (1, 1, SETTINGS)
    assert "holds 2 of 3 answers" in result["notes"][-1]


@pytest.mark.parametrize(("option", "value"), [("prompt_format", "QCM-LEA"), ("checkpoint", "other")])
def test_another_format_or_checkpoint_is_refused(files: tuple[Path, Path], option: str, value: str) -> None:
    if option == "checkpoint":
        value = str(write_json(files[0].parent / value / "manifest.json", {"base_hash": {}}).parent)
    with pytest.raises(DataError, match=rf"answers.jsonl: its answers have {option} .*leave out --{option[:6]}"):
        evaluate_files(*files, **{option: value})  # type: ignore[arg-type]


def test_incomplete_file_is_resumed_with_equal_settings_only(files: tuple[Path, Path]) -> None:
    path, questions = files
    with open(path, "a") as file:
        file.write('{"question_id": "2", "te')  # killed in the middle of a line
    before = path.read_bytes()
    for name, value in (("template", "v1"), ("checkpoint", "manifest:2"), ("temperature", 0.7)):
        with pytest.raises(DataError, match=f"record 1: question 0 .* other settings than now \\({name}: "):
            write(path, {}, SETTINGS | {name: value})
    assert path.read_bytes() == before[: before.rfind(b"\n") + 1]
    assert write(path, {"2": "The answer is B."}) == ["2"]
    result = evaluate_files(path, questions)
    assert (result["correct"], result["missing"], result["notes"]) == (2, 0, [])
    assert write(path, {}) == []


def test_file_is_resumed_after_a_kill_at_any_byte(tmp_path: Path) -> None:
    answers, full, path = dict.fromkeys(PROBLEMS, "Größe B."), tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    write(full, answers)
    content = full.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        lines = content.count(b"\n", 0, end) + (content[end:][:1] == b"\n")  # or only the end of a line is missing
        assert len(write(path, answers)) == 3 - lines
        assert path.read_bytes() == content
    path.write_bytes(content[:5])
    write(path, {})
    with pytest.raises(DataError, match="holds no prediction"):
        read_predictions(path)


PROGRAM = """
import sys
from companion.evaluation.predictions import write_predictions
from llava_core.runtime import DataError
rows = [{"question_id": str(k), "text": f"Is it {k}?"} for k in range(3)]
def answer(left):
    print("answering", flush=True)
    for row in left:
        sys.stdin.readline()
        yield {row["question_id"]: "A"}
try:
    print(len(write_predictions(sys.argv[1], rows, {"checkpoint": "manifest:1"}, answer)))
except DataError as error:
    print(error)
"""


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    words, out = [sys.executable, "-c", PROGRAM, str(tmp_path / "new" / "a.jsonl")], []
    for number in range(3):
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if number == 0:
            first, begun = process, process.stdout and process.stdout.readline()
        else:
            out.append(process.communicate(timeout=60)[0])
    assert begun == "answering\n"
    for text in out:
        assert text.endswith("a.jsonl: another process writes answers to it; wait for it or name another file\n")
    assert first.communicate("\n\n\n", timeout=60)[0] == "3\n"
    assert len(read_predictions(tmp_path / "new" / "a.jsonl").answers) == 3


def test_file_without_settings_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl"
    for content in ('{"question_id": "0", "text": "A"}', '{"question_id": "0", "text": "A", "metadata": {}}\n', "1\n"):
        path.write_text(content)
        with pytest.raises(DataError, match="record 1: not an answer with its settings in `metadata`"):
            write(path, {})
        assert path.read_text() == content
    with pytest.raises(DataError, match=r"name a file that ends in \.jsonl"):
        write(tmp_path / "a.json", {})
    with pytest.raises(DataError, match="two questions have the same question_id"):
        write_predictions(tmp_path / "b.jsonl", ROWS * 2, SETTINGS, lambda _: [])


def test_answers_of_several_runs_are_not_scored_as_one(files: tuple[Path, Path]) -> None:
    path, questions = files
    other = path.with_name("other.jsonl")
    write(other, dict.fromkeys(PROBLEMS, "The answer is B."), SETTINGS | {"template": "v1"})
    ours, theirs = path.read_text(), other.read_text().splitlines()[2]
    for more, message in (
        (theirs, r"record 3: other settings than record 1 \(template: 'v0' and 'v1'\)"),
        ('{"question_id": "2", "text": "B"}', r"record 3: .* \(one of them names none\)"),
        (ours, "record 3: question 0 is answered twice"),
    ):
        path.write_text(ours + more)
        with pytest.raises(DataError, match=message):
            evaluate_files(path, questions)
    with pytest.raises(DataError, match="record 3: question 0 is answered twice"):
        write(path, {})


def test_comparison_names_different_settings(files: tuple[Path, Path]) -> None:
    path, questions = files
    other = path.with_name("other.jsonl")
    write(other, {"0": "The answer is B.", "1": "The answer is B."}, SETTINGS | {"prompt_format": "QCM-ALE"})
    result = compare_files(path, other, questions)
    assert result["notes"][-1] == "Different settings: prompt_format: 'QCM-LEPA' and 'QCM-ALE'."


def test_identity_of_a_checkpoint_is_its_manifest(tmp_path: Path) -> None:
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
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["checkpoint", "value"]), inner),
    max_leaves=6,
)
ROW = {"question_id": "1", "text": "A", "model_id": "m", "metadata": {"checkpoint": "m"}}
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
    st.lists(damaged(ROW) | damaged(TURN) | ANYTHING, max_size=3),
    st.dictionaries(st.sampled_from("12"), damaged(PROBLEM) | ANYTHING),
    damaged({"outputs": {"1": "A"}, "results": {"1": 0}}),
)


@settings(max_examples=150, deadline=None)
@given(content=CONTENT)
def test_any_file_is_read_or_refused(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    for read in (read_predictions, read_questions):
        try:
            assert read(path)
        except DataError as error:
            assert "any.json" in str(error)  # noqa: PT017 - either it is read or the message names the file
