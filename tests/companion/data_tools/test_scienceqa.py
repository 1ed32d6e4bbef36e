"""ScienceQA: the official files, the columns of Table 7, and the letters of the prompt formats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from companion.cli import main
from companion.data_tools.check import check_file
from companion.data_tools.scienceqa import (
    PROMPT_FORMATS,
    SUBSETS,
    Problem,
    answer_prompt,
    format_problem,
    load_problems,
    write_training_files,
)
from llava_core.data.instruct import load_instruct
from llava_core.runtime import ConfigError, DataError, write_json

MAGNET = {
    "question": "Will these magnets attract or repel  each other?",
    "choices": ["attract", "repel"],
    "answer": 1,
    "hint": "Two magnets lie on a table.\nQuestion: how do they act?",
    "image": "image.png",
    "grade": "grade6",
    "subject": "natural science",
    "lecture": "Like poles repel.",
    "solution": "Both ends are north poles.",
    "split": "test",
    "skill": "magnets",
}


def folder_of(root: Path, problems: dict[str, Any], draw: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps({"test": list(problems), "minitest": list(problems)[:1]}))
    for name, problem in problems.items():
        if draw and problem.get("image"):
            image = root / "images" / problem["split"] / name / problem["image"]
            image.parent.mkdir(parents=True)
            image.touch()
    return root


def magnet(tmp_path: Path, **changes: Any) -> Problem:
    return load_problems(folder_of(tmp_path / "sqa", {"7": MAGNET | changes}), "test")[0]


LECTURE, SOLUTION = MAGNET["lecture"], MAGNET["solution"]
REPLIES = {
    "A": "The answer is B.",
    "LA": f"{LECTURE} The answer is B.",
    "EA": f"{SOLUTION} The answer is B.",
    "LEA": f"{LECTURE} {SOLUTION} The answer is B.",
    "ELA": f"{SOLUTION} {LECTURE} The answer is B.",
    "AL": f"The answer is B. BECAUSE: {LECTURE}",
    "AE": f"The answer is B. BECAUSE: {SOLUTION}",
    "ALE": f"The answer is B. BECAUSE: {LECTURE} {SOLUTION}",
    "AEL": f"The answer is B. BECAUSE: {SOLUTION} {LECTURE}",
    "LEPA": f"LECTURE: {LECTURE}\nSOLUTION: {SOLUTION}\n###\nANSWER: B.",
}


def test_prompt_formats_follow_their_letters(tmp_path: Path) -> None:
    problem = magnet(tmp_path)
    asked, choices = "Will these magnets attract or repel each other?", "Options: (A) attract (B) repel"
    context = "Context: Two magnets lie on a table.\nQuestion: how do they act?"
    questions = {
        "QCM": [asked, context, choices],
        "CQM": [context, f"Question: {asked}", choices],
        "QCML": [asked, context, choices, f"BECAUSE: {LECTURE}"],
        "QCME": [asked, context, choices, f"BECAUSE: {SOLUTION}"],
        "QCMLE": [asked, context, choices, f"BECAUSE: {LECTURE} {SOLUTION}"],
        "QCLM": [asked, context, f"BECAUSE: {LECTURE}", choices],
        "QCEM": [asked, context, f"BECAUSE: {SOLUTION}", choices],
        "QCLEM": [asked, context, f"BECAUSE: {LECTURE} {SOLUTION}", choices],
    }
    names = {f"{order}-{reply}" for order in questions for reply in REPLIES}
    assert names == set(PROMPT_FORMATS)
    for name in names - {"CQM-A"}:
        order, _, reply = name.partition("-")
        sample = format_problem(problem, name)
        assert sample.turns == [("\n".join([*questions[order], "<image>"]), REPLIES[reply])], name
        assert sample.image == problem.image
        assert answer_prompt(name) == ("\n###\nANSWER:" if reply == "LEPA" else None)
    assert format_problem(problem, "CQM-A").turns == [(f"<image>\n{context}\n{asked}\nA. attract\nB. repel", "B")]
    assert format_problem(problem, "CQM-A", released=True).turns[0][1] == "The answer is B."


def test_released_converter_swaps_two_formats(tmp_path: Path) -> None:
    hint, lecture = "Look   here.\nQuestion: how do they act?", "One\\ntwo. Answer: none."
    problem = magnet(tmp_path, hint=hint, lecture=lecture)
    asked, replied = format_problem(problem, "QCM-AE", released=True).turns[0]
    # the word vanishes inside the hint too, of three spaces two remain, and AE tells the lecture
    assert asked.split("\n")[1:3] == ["Context: Look  here.", "how do they act?"]
    assert replied == "The answer is B. BECAUSE: One\ntwo. none."
    assert format_problem(problem, "QCM-AL", released=True).turns[0][1] == REPLIES["AE"]
    honest = format_problem(problem, "QCM-AL").turns[0]
    assert honest[0].split("\n")[1:3] == ["Context: Look here.", "Question: how do they act?"]
    assert honest[1] == "The answer is B. BECAUSE: One\\ntwo. Answer: none."
    assert format_problem(problem, "CQM-A", released=True).turns[0][0].split("\n")[0] == "Context: Look  here."
    assert answer_prompt("QCM-LEPA", released=True) == " ###\nANSWER:"
    bare = magnet(tmp_path / "bare", lecture="", solution="")
    assert format_problem(bare, "QCM-LEA", released=True).turns[0][1] == " The answer is B."
    assert format_problem(bare, "QCM-ALE", released=True).turns[0][1] == "The answer is B."
    assert format_problem(bare, "QCMLE-A", released=True).turns[0][0].endswith("repel\n<image>")
    assert "BECAUSE" not in format_problem(bare, "QCLM-A").turns[0][0]


def test_missing_parts_add_no_text(tmp_path: Path) -> None:
    problem = magnet(tmp_path, lecture="", solution=" ", hint="", image=None)
    asked, replied = format_problem(problem, "QCM-ALE").turns[0]
    assert asked.endswith("\nContext: N/A\nOptions: (A) attract (B) repel")
    assert replied == "The answer is B."
    assert format_problem(problem, "QCM-LEPA").turns[0][1] == "###\nANSWER: B."
    assert format_problem(problem, "QCM-LEA").turns[0][1] == "The answer is B."
    assert problem.subsets == ["NAT", "NO", "G1-6"]


def test_subsets_are_the_columns_of_table_7(tmp_path: Path) -> None:
    assert magnet(tmp_path).subsets == ["NAT", "TXT", "IMG", "G1-6"]
    late = magnet(tmp_path / "late", subject="language science", grade="grade7", image=None)
    assert late.subsets == ["LAN", "TXT", "G7-12"]
    assert set(late.subsets) < set(SUBSETS)


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    problem = magnet(tmp_path)
    with pytest.raises(ConfigError, match="unknown prompt format 'QCM-LEPAA'; did you mean 'QCM-LEPA'"):
        format_problem(problem, "QCM-LEPAA")
    with pytest.raises(DataError, match="unknown split 'tests'; did you mean 'test'"):
        load_problems(tmp_path / "sqa", "tests")
    assert (
        load_problems(tmp_path / "sqa", "minitest")[0].image == problem.image
    )  # images lie under the problem's own split


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, "problem 7: answer 2 of 2 choices"),
        ({"grade": "grade13"}, "grade 'grade13'"),
        ({"subject": "natural sciences"}, "did you mean 'natural science'"),
        ({"question": None}, "problem 7: question is missing"),
    ],
)
def test_malformed_problems_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        magnet(tmp_path, **changes)


def test_missing_images_and_problems_are_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "sqa", {"7": MAGNET, "8": MAGNET}, draw=False)
    with pytest.raises(DataError, match="problem 7; 2 images"):
        load_problems(folder, "test")
    assert len(load_problems(folder, "test", check_images=False)) == 2
    (folder / "problems.json").write_text(json.dumps({"7": MAGNET}))
    with pytest.raises(DataError, match="1 of 2 problems of split 'test' are missing, the first is 8"):
        load_problems(folder, "test")


def test_training_files_hold_the_formatted_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "sqa", {"7": MAGNET | {"split": "val"}, "8": MAGNET | {"image": None}})
    Image.new("RGB", (8, 8)).save(folder / "images" / "val" / "7" / "image.png")
    write_json(folder / "pid_splits.json", {"train": ["8", "7"], "val": ["7"]})
    assert main(["data", "scienceqa", str(folder), "--json"]) == 0
    names = [f"llava_{split}_{name}.json" for split in ("train", "val") for name in ("QCM-LEPA", "QCM-ALE")]
    written = json.loads(capsys.readouterr().out)["files"]
    assert list(written.items()) == [(str(folder / name), 2 if "train" in name else 1) for name in names]
    for name in names:
        _, split, prompt_format = name.removesuffix(".json").split("_")
        wanted = [format_problem(problem, prompt_format) for problem in load_problems(folder, split)]
        assert load_instruct(folder / name, folder / "images") == wanted
    with pytest.raises(ConfigError, match="did you mean 'QCM-LEA'"):
        write_training_files(folder, ["QCM-LEAA"])


@pytest.fixture
def real(reference: Path, tmp_path: Path) -> list[Problem]:
    problems = json.loads((reference / "scienceqa" / "problems_test_part.json").read_text())
    return load_problems(folder_of(tmp_path / "real", problems), "test")


def test_real_problems_make_valid_records_in_every_format(real: list[Problem], tmp_path: Path) -> None:
    assert len(real) == 361
    columns = Counter(name for problem in real for name in problem.subsets)
    assert columns["NAT"] + columns["SOC"] + columns["LAN"] == columns["G1-6"] + columns["G7-12"] == 361
    assert columns["IMG"] == sum(problem.image is not None for problem in real) == 167
    for name in PROMPT_FORMATS:
        records = []
        for sample in (format_problem(problem, name) for problem in real):
            texts = zip(("human", "gpt"), sample.turns[0], strict=True)
            turns = [{"from": role, "value": text} for role, text in texts]
            records.append({"id": sample.id, "conversations": turns} | ({"image": "x"} if sample.image else {}))
        file = write_json(tmp_path / "records.json", records)
        assert check_file(file, max_words=None)["problems"] == []


def test_cqm_a_is_the_layout_of_the_released_evaluation_file(real: list[Problem], reference: Path) -> None:
    released = json.loads((reference / "scienceqa" / "llava_test_CQM-A.json").read_text())
    texts = {record["id"]: tuple(turn["value"] for turn in record["conversations"]) for record in released}
    # the two public copies of four biology problems differ by a sentence in the hint
    other = [problem for problem in real if format_problem(problem, "CQM-A").turns[0] != texts[problem.id]]
    assert len(other) == 4
    assert all("Punnett square" in problem.hint for problem in other)
