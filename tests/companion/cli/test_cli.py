from __future__ import annotations

import argparse
import errno
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest
import tiny
import torch

from benchmarks import run
from companion import cli
from companion.cli import weights
from companion.cli.arguments import table
from llava_core.runtime import ROOT, DataError


def leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with the words that call it, groups and the entry point included."""
    yield " ".join(words), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from leaves(inner, (*words, name))


COMMANDS = dict(leaves(cli._parser()))
WORKING = {name: parser for name, parser in COMMANDS.items() if parser.get_default("run")}


def example_of(parser: argparse.ArgumentParser) -> list[str]:
    assert parser.epilog is not None
    return shlex.split(parser.epilog.splitlines()[-1])[1:]


def test_convert_targets_are_the_writable_formats() -> None:
    from companion.checkpoints.writers import WRITERS

    assert set(weights.FORMATS) == set(WRITERS)


# ------------------------------------------------------------------------------------------------ every command


@pytest.mark.parametrize("name", COMMANDS)
def test_help_exits_0_and_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    assert end.value.code == 0
    assert "example:\n  llava" in capsys.readouterr().out


@pytest.mark.parametrize("name", WORKING)
def test_help_examples_are_valid_calls(name: str) -> None:
    words = example_of(WORKING[name])
    args = cli._parser(words).parse_args(words)
    assert args.run is WORKING[name].get_default("run")
    assert args.interactive or args.json is False


@pytest.mark.parametrize(
    ("name", "target", "answer"),
    [
        ("reproduce", "companion.book.pipeline.reproduce", {"notebooks": [], "failed": [], "book": None}),
        ("filter", "companion.data_tools.cc3m.filter_file", {"pairs_kept": 1}),
        ("data check", "companion.data_tools.check.check_file", {"records": 1, "errors": 0, "problems": []}),
        ("miniature", "companion.miniature.write", {"mini-coco": {"counts": {"images": 1}}}),
        ("base-models", "companion.miniature.base_models.train_base_models", {"passed": {"a gate": True}}),
        (
            "evaluate captions",
            "companion.evaluation.reporting.caption_report",
            {"n": 1, "missing": 0, "bleu4": 0.5, "cider": 1.5},
        ),
        ("convert", "companion.checkpoints.convert.convert", {"to": "hf"}),
        ("delta make", "companion.checkpoints.delta.make", {"added": 1}),
        ("delta apply", "companion.checkpoints.delta.apply", {"added": 1}),
        ("evaluate llava-bench", "companion.evaluation.reporting.review_report", {"n": 1}),
        ("evaluate bench score", "companion.evaluation.reporting.review_report", {"n": 1}),
    ],
)
def test_commands_call_functions_with_valid_arguments(
    name: str, target: str, answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, function = target.rpartition(".")
    stub = create_autospec(getattr(importlib.import_module(module), function), return_value=answer)
    monkeypatch.setattr(target, stub)
    assert cli.main([*example_of(WORKING[name]), "--json"]) == 0
    stub.assert_called_once()
    assert json.loads(capsys.readouterr().out) == answer
    assert cli.main(example_of(WORKING[name])) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", ["attention", "generate", "loss", "train-step"])
def test_benchmark_prints_its_headline(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function, calls = run.load(name), []
    answer = {"ratio": 1.1, "ours": 1.0, "peer": 1.1, "device": "cpu", "peak_memory_ratio": 0.5, "cases": [{"a": 1}]}

    @functools.wraps(function)
    def stub(**arguments: Any) -> dict[str, Any]:
        calls.append(inspect.signature(function).bind(**arguments).arguments)
        return answer

    monkeypatch.setattr(sys.modules[function.__module__], function.__name__, stub)
    assert cli.main(["bench", name, "--rounds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**answer, "cases": [{"a": 1, "code": run.code_of(name)}]}
    assert calls[0]["rounds"] == 2
    assert calls[0]["device"] == "cpu"
    assert cli.main(["bench", name]) == 0
    assert "cases" not in capsys.readouterr().out
    answer["same_tokens"] = False
    assert cli.main(["bench", name]) == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", name, "--device", "gpu"])


def test_bench_step_by_step_from_files_to_a_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question_id": k, "image": "a.jpg", "text": "Describe this image.", "category": "detail"} for k in (1, 2)]
    context = [{"image": "a.jpg", "caption": "A red car on a road."}]
    for name, content in (("questions", rows), ("context", context), ("answers", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("reference", "answers", "a", "b")}

    def call(*words: str) -> dict[str, Any]:
        code = cli.main(["evaluate", *words, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        result: dict[str, Any] = json.loads(out)
        return result

    bench = ["--bench", str(tmp_path)]
    assert call("bench", "reference", *bench, "--out", files["reference"])["answers"] == 2
    judging = ["bench", "judge", *bench, "--answers", files["answers"], "--reference", files["reference"]]
    assert call(*judging, "--out", files["a"], "--swap")["n"] == 4
    assert call(*judging, "--out", files["b"])["n"] == 2
    score = call("bench", "score", "--reviews", files["b"])
    assert score["all"] < 100  # the request itself is no answer
    repeats = call("bench", "score", "--reviews", files["a"], files["b"], "--released")
    assert repeats["repeats"]["all"]["n"] == len(repeats["files"]) == 2
    assert call("judges", files["a"], files["b"])["n"] == 2
    assert cli.main(["evaluate", "judges", files["a"], files["b"]]) == 0
    assert "relative score, shift" in capsys.readouterr().out
    assert cli.main([*["evaluate"], *judging, "--out", files["b"], "--client", "replay"]) == 1
    assert "b.sqlite: no such cassette" in capsys.readouterr().err


def test_captions_of_a_model_need_an_output_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "refs.json").write_text("{}")
    assert cli.main(["evaluate", "captions", "--model", "a", "--references", str(tmp_path / "refs.json")]) == 1
    assert "--out FILE" in capsys.readouterr().err


def test_train_reports_the_finished_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llava_core.config import RunConfig
    from llava_core.record import RunRecord
    from llava_core.train import launch

    def finished(config: RunConfig, **_: object) -> RunRecord:
        record = RunRecord.open(config)
        record.finish({"final_loss": 1.5, "samples_per_s": 20.0})
        return record

    stub = create_autospec(launch.launch, side_effect=finished)
    monkeypatch.setattr(launch, "launch", stub)
    words = ["train", "finetune", "--set", "train.seed=1", "--set", "train.learning_rate=2e-3", "--json"]
    assert cli.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["final_loss"], result["samples_per_s"]) == (1.5, 20.0)
    assert result["checkpoint"] == f"{result['run']}/checkpoint"
    assert stub.call_args.kwargs == {"resume": True}
    train = stub.call_args.args[0].experiment.train
    assert (train.seed, train.learning_rate) == (1, 0.002)
    assert not stub.call_args.args[0].fast
    assert cli.main(["train", "pretrain", "--fast", "--resume", "never"]) == 0
    assert stub.call_args.args[0].fast
    assert stub.call_args.kwargs == {"resume": False}


def test_stopped_training_exits_75(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from llava_core.train import launch, signals

    stopped = create_autospec(launch.launch, side_effect=signals.Interrupted("stopped at step 3"))
    monkeypatch.setattr(launch, "launch", stopped)
    assert cli.main(["train", "pretrain"]) == 75
    assert capsys.readouterr().err == "error: stopped at step 3\n"


def test_failed_notebook_exits_1_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from companion.book import pipeline

    answer = {"notebooks": [{"name": "20_x", "status": "failed", "seconds": 1.0}], "failed": ["20_x"], "book": None}
    stub = create_autospec(pipeline.reproduce, return_value=answer)
    monkeypatch.setattr(pipeline, "reproduce", stub)
    assert cli.main(["reproduce", "--only", "20", "-p", "epochs=2", "-p", "path=a/b", "--from", "20", "--fast"]) == 1
    assert "failed      20_x" in capsys.readouterr().out
    options = stub.call_args.kwargs
    assert options["parameters"] == {"epochs": 2, "path": "a/b"}
    assert (options["only"], options["start"], options["fast"], options["scale"]) == (["20"], "20", True, "mini")


def test_rejected_base_models_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from companion.miniature import base_models

    answer = {"passed": {"one gate": True, "another": False}}
    monkeypatch.setattr(
        base_models, "train_base_models", create_autospec(base_models.train_base_models, return_value=answer)
    )
    assert cli.main(["base-models", "--only", "clip"]) == 1


def test_chat_writes_to_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from companion import terminal_chat
    from llava_core import chat

    stub = create_autospec(terminal_chat.chat_in_terminal, side_effect=lambda *_: print("A dog."))  # noqa: T201
    monkeypatch.setattr(terminal_chat, "chat_in_terminal", stub)
    monkeypatch.setattr(chat, "open_assistant", create_autospec(chat.open_assistant))
    assert cli.main(example_of(WORKING["chat"])) == 0
    assert capsys.readouterr().out == "A dog.\n"
    stub.side_effect = DataError("photo.jpg: not an image")
    assert cli.main(example_of(WORKING["chat"])) == 1
    assert capsys.readouterr().err == "error: photo.jpg: not an image\n"


def test_demo_serves_a_checkpoint_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from companion import demo_server
    from llava_core.checkpoints.load import build, save_checkpoint

    checkpoint = save_checkpoint(tmp_path / "own", build(*tiny.base_models(tmp_path), torch.float32), "full", base={})
    serve = create_autospec(demo_server.serve)
    monkeypatch.setattr(demo_server, "serve", serve)
    words = ["demo", "--model", str(checkpoint), "--images", str(tmp_path), "--no-browser", "--guard", "text,image"]
    assert cli.main([*words, "--assume", "template=v1"]) == 0
    settings, port = serve.call_args.args
    assert (settings["model"], settings["guard"], settings["usage"]) == (
        str(checkpoint), ["text", "image"], {"template": "v1"},
    )  # fmt: skip
    assert (port, serve.call_args.kwargs) == (None, {"browser": False})
    assert cli.main(["demo", "--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "--guard", "images"])
    assert serve.call_count == 1


# ------------------------------------------------------------------------------------------------ exits and streams


def answer_with(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("companion.evaluation.reporting.review_report", MagicMock(side_effect=work))


CALL = ["evaluate", "llava-bench", "--reviews", "reviews.jsonl"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("reviews.jsonl, line 3: not JSON"), "error: reviews.jsonl, line 3: not JSON\n"),
        (PermissionError(13, "Permission denied", "/x"), "error: /: may not be written (Permission denied); "),
        (
            ModuleNotFoundError("No module named 'openai'", name="openai"),
            "error: the package 'openai' is not installed",
        ),
        (KeyboardInterrupt(), "error: interrupted\n"),
        (DataError("a\nerror: b\x1b[2J"), "error: a\\nerror: b\\u001b[2J\n"),
        (PermissionError(13, "\x9b2J", "/x\nerror: y/z"), "error: /: may not be written (\\u009b2J); "),
    ],
)
def test_failed_work_is_one_line_and_exit_1(
    error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(error, monkeypatch)
    assert cli.main([*CALL, "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_texts_of_others_have_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "a\nerror: b\x1b[2J\x9b\u202e\ud800"
    shown = "a\\nerror: b\\u001b[2J\\u009b\\u202e\\ud800"

    def work(*_: object, **__: object) -> dict[str, Any]:
        sys.stderr.write(f"{hostile}\n")
        return {"name": hostile, hostile: [hostile, Path(hostile)], "n": 1}

    answer_with(work, monkeypatch)
    for words, lines in (([], 3), (["--json"], 1)):
        assert cli.main([*CALL, *words]) == 0
        out, err = capsys.readouterr()
        assert out.count("\n") == lines
        assert shown in out.replace("\\\\", "\\")
        assert not set("\x1b\x9b\u202e\ud800") & set(out + err)
    assert json.loads(out)["name"] == hostile
    with pytest.raises(SystemExit):
        cli.main(["miniature", hostile])
    assert f"unrecognized arguments: {shown}" in capsys.readouterr().err


def test_programming_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        cli.main(CALL)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "nonsense",
        "ablate",
        "ablate cot_order --all",
        "evaluate",
        "evaluate captions",
        "evaluate captions --model a --predictions b",
        "evaluate bench",
        "evaluate bench judge --bench a --answers b --out c --client psychic",
        "generate --annotations a --out b --kinds detail,poem",
        "generate --annotations a --out b --client psychic",
        "base-models --only vicuna",
        "chat --model a --image b --json",
        "train finetune --set train.seed",
        "train finetune --set train.seed=[1",
        "train finetune --resume maybe",
        "reproduce --scales mini",
        "reproduce --only 20 --sc mini",
    ],
)
def test_wrong_usage_exits_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(shlex.split(words))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: llava")


def test_json_is_the_only_output_on_stdout(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def noisy(_: object, **__: object) -> dict[str, Any]:
        print("from Python")  # noqa: T201
        subprocess.run([sys.executable, "-c", "print('from a child process')"], check=True)
        return {"n": 1, "path": Path("a/b"), "text": "é"}

    answer_with(noisy, monkeypatch)
    assert cli.main([*CALL, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"n": 1, "path": "a/b", "text": "é"}
    assert out.count("\n") == 1
    assert "from Python" in err
    assert "from a child process" in err


def test_python_m_companion_is_the_command() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "companion", "--version"], capture_output=True, text=True, check=True
    )
    assert answer.stdout.startswith("llava-core ")
    wrong = subprocess.run(
        [sys.executable, "-m", "companion", "train", "finetun"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: unknown experiment 'finetun'; did you mean 'finetune'?")
    assert "Traceback" not in wrong.stderr


# ------------------------------------------------------------------------------------------------ real files


def test_released_answers_have_their_known_scores(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = reference / "scienceqa"
    words = ["--predictions", str(folder / "test_sqa_llava_13b_v0.json"), "--questions"]
    words = ["evaluate", "science-qa", *words, str(folder / "llava_test_CQM-A.json")]
    assert cli.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n"], result["correct"], result["invalid"], result["unparsed"]) == (4241, 3855, 1, 0)
    counts = {name: (row["correct"], row["n"]) for name, row in result["subsets"].items()}
    assert (counts["IMG"], counts["TXT"], counts["NO"]) == ((1775, 2017), (1831, 2046), (1300, 1435))
    assert cli.main(words) == 0
    assert "3247" in capsys.readouterr().out


def test_generated_instruction_data_passes_the_check(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = str(reference / "coco" / "caps_boxes_coco2014_val_80.jsonl")
    words = ["generate", "--annotations", annotations, "--limit", "3", "--out", str(tmp_path), "--json"]
    assert cli.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["records"], result["failed"], result["spend_usd"]) == (9, 0, 0)
    assert cli.main(["data", "check", str(tmp_path / "llava_instruct.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 9
    assert cli.main([*words[:-1], "--client", "replay"]) == 1
    assert "no such cassette" in capsys.readouterr().err


def test_data_check_exits_1_and_lists_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    good = {"id": "1", "image": "1.jpg", "conversations": turns}
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([good]))
    assert cli.main(["data", "check", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    path.write_text(json.dumps([good, {**good, "id": "2", "conversations": turns[::-1]}]))
    assert cli.main(["data", "check", str(path), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["records"] == 2
    assert {"line", "record", "kind", "message"} <= result["problems"][0].keys()


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        (
            errno.EACCES,
            "runs/finetune/.record.json.x1.tmp",
            "may not be written .*; copy the project to a folder of yours",
        ),
        (errno.EROFS, "data/checks", "may not be written .*; copy the project"),
        (errno.EPERM, None, "may not be written .*; copy the project"),
        (errno.EACCES, "/srv/out.json", "^error: /(srv)?: may not be written .*another place for the output"),
        (errno.ENOSPC, "/srv/out.json", "No space left"),
    ],
)
def test_a_folder_that_may_not_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, name: str | None, message: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), None if name is None else str(ROOT / name))

    monkeypatch.setattr("companion.data_tools.check.check_file", refuse)
    assert cli.main(["data", "check", "a.json"]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error.strip())
    assert "Errno" not in error or code == errno.ENOSPC
    assert ".tmp" not in error


def test_a_file_that_may_not_be_read_or_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("companion.data_tools.check.check_file", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    assert cli.main(["data", "check", str(path)]) == 1
    assert f"error: {path}: may not be read; change its permissions" in capsys.readouterr().err
    path.unlink()
    path = Path("a.json")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "check", "a.json"]) == 1
    assert f"error: {tmp_path}: may not be written (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--help", "inspect nowhere --json", "demo"])
def test_closed_pipe_is_quiet(words: str) -> None:
    code = "from companion import cli; cli.lab._demo = lambda args: print('x'); raise SystemExit(cli.main())"
    command = subprocess.Popen(
        [sys.executable, "-c", code, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout
    command.stdout.close()  # as `head -1` does
    _, errors = command.communicate()
    assert errors == ""
    # argparse of later Pythons ignores the error
    assert command.returncode == 141 or (words == "--help" and command.returncode == 0)


def test_tables_have_four_digits() -> None:
    text = table({"score": 72.83216512345, "categories": {"conv": 74.66115322765909, "all": [1 / 3, {"n": 60}]}})
    assert text.splitlines() == [
        "score            72.83",
        'categories       {"conv": 74.66, "all": [0.3333, {"n": 60}]}',
    ]


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1.5"])
def test_limit_is_a_count(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "captions", "--predictions", "a.json", "--limit", limit])
    assert "give a whole number above 0" in capsys.readouterr().err
