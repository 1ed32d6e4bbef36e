"""Answers to ScienceQA: settings in the file, one or two passes, resumed by batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from companion import cli
from companion.data_tools.scienceqa import load_problems
from companion.evaluation import predict
from companion.evaluation.predict import predict_science_qa, science_answers
from companion.evaluation.predictions import read_predictions
from companion.evaluation.science_qa import evaluate_files
from llava_core.checkpoints.load import Loaded, build, load, save_checkpoint
from llava_core.runtime import DataError

SHORT = {"max_new_tokens": 4, "answer_tokens": 3}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, saved with either prompt format."""
    root = tmp_path_factory.mktemp("models")
    loaded_model = build(*tiny.base_models(root), torch.float32)
    torch.nn.init.normal_(loaded_model.model.language_model.get_output_embeddings().weight, std=0.5)
    usage = {"template": "v0", "image_position": "data", "run_id": "1"}
    return {
        name: save_checkpoint(root / name, loaded_model, "full", prompt_format=name, **usage)
        for name in ("QCM-LEPA", "QCM-ALE")
    }


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, Loaded]:
    return {name: load(path) for name, path in checkpoints.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    problems: dict[str, dict[str, Any]] = {}
    for k in range(5):
        problems[str(k)] = {
            "question": "what is " + "the color " * k, "choices": ["red", "blue"], "answer": 0, "split": "test",
            "subject": "natural science", "grade": "grade1", "image": "image.png" if k % 2 else None,
        }  # fmt: skip
        if k % 2:
            (tmp_path / "images" / "test" / str(k)).mkdir(parents=True)
            Image.new("RGB", (32, 32), (60 * k, 0, 90)).save(tmp_path / "images" / "test" / str(k) / "image.png")
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems), "train": []}))
    return tmp_path


def test_file_with_other_settings_is_refused(
    checkpoints: dict[str, Path], models: dict[str, Loaded], folder: Path
) -> None:
    out, questions = folder / "answers.jsonl", folder / "problems.json"
    answers = predict_science_qa(models["QCM-LEPA"], checkpoints["QCM-LEPA"], folder, out, **SHORT)
    report = read_predictions(out)
    assert report.answers == answers
    output = report.settings or {}
    assert (output["prompt_format"], output["template"], output["n"], output["split"]) == ("QCM-LEPA", "v0", 5, "test")
    assert (output["max_new_tokens"], output["answer_tokens"], output["temperature"], output["seed"]) == (4, 3, 0.0, 0)
    result = evaluate_files(out, questions, prompt_format="QCM-LEPA", checkpoint=checkpoints["QCM-LEPA"])
    assert (result["n"], result["missing"]) == (5, 0)
    with pytest.raises(DataError, match="have prompt_format 'QCM-LEPA', not 'QCM-ALE'"):
        evaluate_files(out, questions, prompt_format="QCM-ALE")
    with pytest.raises(DataError, match="answers have checkpoint"):
        evaluate_files(out, questions, checkpoint=checkpoints["QCM-ALE"])


def test_resumed_run_equals_an_uninterrupted_one(
    checkpoints: dict[str, Path], models: dict[str, Loaded], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, checkpoint, out = models["QCM-LEPA"], checkpoints["QCM-LEPA"], folder / "answers.jsonl"
    full = science_answers(loaded, load_problems(folder, "test"), **SHORT)
    asked: list[int] = []
    original = predict.answer_questions

    def dies(*args: Any, **options: Any) -> dict[str, str]:
        asked.append(len(args[1]))
        if len(asked) == 4:  # within the second batch, between its two passes
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(predict, "answer_questions", dies)
    with pytest.raises(KeyboardInterrupt):
        predict_science_qa(loaded, checkpoint, folder, out, batch=2, **SHORT)
    assert len(read_predictions(out).answers) == 2
    assert "holds 2 of 5 answers" in evaluate_files(out, folder / "problems.json")["notes"][-1]
    for other in ({"temperature": 0.5}, {"max_new_tokens": 5}, {"images": False}, {"released": True}, {"limit": 3}):
        with pytest.raises(DataError, match=r"answers\.jsonl, record 1: question \d was answered with other settings"):
            predict_science_qa(loaded, checkpoint, folder, out, **(SHORT | other))
    with pytest.raises(DataError, match=r"other settings than now \(.*checkpoint: .*; prompt_format"):
        predict_science_qa(models["QCM-ALE"], checkpoints["QCM-ALE"], folder, out, **SHORT)
    asked[:] = [0] * 4
    assert predict_science_qa(loaded, checkpoint, folder, out, batch=2, **SHORT) == full
    assert asked[4:] == [2, 2, 1, 1]  # two passes over the three that were left


def test_second_pass_depends_on_the_prompt_format(models: dict[str, Loaded], folder: Path) -> None:
    problems = load_problems(folder, "test")
    second, one = (science_answers(models[name], problems, **SHORT) for name in ("QCM-LEPA", "QCM-ALE"))
    assert all("\n The answer is " in text for text in second.values())
    assert not any("The answer is" in text for text in one.values())
    assert {key: text.split("\n The answer is ")[0] for key, text in second.items()} == one


def test_answer_prompt_follows_the_reasoning(
    models: dict[str, Loaded], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, str]] = []

    def scripted(loaded: Any, rows: Any, answer_prefixes: Any = None, **_: Any) -> dict[str, str]:
        begun.append(answer_prefixes or {})
        return {row["question_id"]: " B." if answer_prefixes else "SOLUTION: blue." for row in rows}

    monkeypatch.setattr(predict, "answer_questions", scripted)
    answers = science_answers(models["QCM-LEPA"], load_problems(folder, "test"))
    assert set(answers.values()) == {"SOLUTION: blue.\n The answer is B."}
    assert set(begun[1].values()) == {"SOLUTION: blue.\n###\nANSWER:"}
    science_answers(models["QCM-LEPA"], load_problems(folder, "test"), released=True)
    assert set(begun[3].values()) == {"SOLUTION: blue. ###\nANSWER:"}


def test_answers_do_not_depend_on_the_batch_size(models: dict[str, Loaded], folder: Path) -> None:
    problems = load_problems(folder, "test")
    options = {"max_new_tokens": 1000, "answer_tokens": 2}  # the tiny model has 256 positions
    together = science_answers(models["QCM-LEPA"], problems, **options)
    assert together == science_answers(models["QCM-LEPA"], problems, batch=2, **options)
    assert list(together) == ["0", "1", "2", "3", "4"]
    blind = science_answers(models["QCM-ALE"], problems, images=False, **SHORT)
    seeing = science_answers(models["QCM-ALE"], problems, **SHORT)
    assert all((blind[p.id] == seeing[p.id]) or p.image for p in problems)


def test_checkpoint_without_a_prompt_format_is_refused(models: dict[str, Loaded], folder: Path) -> None:
    bare = Loaded(models["QCM-ALE"].model, models["QCM-ALE"].tokenizer, models["QCM-ALE"].processor, {})
    with pytest.raises(DataError, match="names no prompt format"):
        science_answers(bare, load_problems(folder, "test"))


def test_command_line(checkpoints: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = checkpoints["QCM-ALE"], folder / "answers.jsonl"
    words = [
        "predict",
        "science-qa",
        "--model",
        str(model),
        "--data",
        str(folder),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    assert cli.main([*words, "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == 5
    assert cli.main([*words, "--max-new-tokens", "4"]) == 1
    assert "other settings than now (max_new_tokens: 3 and 4)" in capsys.readouterr().err
    words = ["evaluate", "science-qa", "--predictions", str(out), "--questions", str(folder / "problems.json")]
    assert cli.main([*words, "--prompt-format", "QCM-ALE", "--checkpoint", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 5
    assert cli.main([*words, "--prompt-format", "QCM-LEPA"]) == 1
    assert "have prompt_format 'QCM-ALE', not 'QCM-LEPA'" in capsys.readouterr().err
    words = ["evaluate", "compare", str(out), str(out), "--questions", str(folder / "problems.json"), "--json"]
    assert cli.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n"], result["difference"], result["p"]) == (5, 0, 1)
