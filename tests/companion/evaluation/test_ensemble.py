"""Requests, repeated requests, costs and rules of the ScienceQA ensemble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from companion import cli
from companion.data_tools.scienceqa import Problem
from companion.evaluation import ensemble
from companion.evaluation.predictions import write_predictions
from companion.teacher.chat import ChatError, ChatReply, ChatRequest, ServerError
from companion.teacher.client import OfflineClient, RecordClient, ReplayClient
from llava_core.runtime import DataError


def problem(key: str, answer: int = 0, image: bool = False) -> Problem:
    choices = ["sun", "moon", "mars"]
    path = Path("image.png") if image else None
    return Problem(key, f"Which is {key}?", choices, answer, "", path, "L.", "E.", "natural science", 1, "test")


PROBLEMS = [problem("1", 0), problem("2", 1, image=True), problem("3", 2, image=True), problem("4", 0)]
SHOTS = [problem("8", 1), problem("9", 2)]
LLAVA = {"1": "Warm. The answer is A.", "2": "Round. The answer is B.", "3": "The answer is A.", "4": "No idea."}
FIRST = {
    "1": "The answer is A. BECAUSE: heat.",
    "2": "I cannot see it.",
    "3": "The answer is B.",
    "4": "The answer is A.",
}
AGAIN = {"2": "Assistant 1 saw it. The answer is B.", "3": "Neither. The answer is C.", "4": "Undecided."}


class Scripted:
    """Replies by what is asked, for a price, and keeps the requests."""

    def __init__(self, broken: type[Exception] | None = None) -> None:
        self.requests: list[ChatRequest] = []
        self.broken = broken

    def complete(self, request: ChatRequest) -> ChatReply:
        self.requests.append(request)
        text = request.messages[-1]["content"]
        key = text.split("Which is ")[1][0]
        if self.broken is not None and key == "4":
            raise self.broken("no reply")
        return ChatReply((AGAIN if "Assistant 2:" in text else FIRST)[key], "gpt-4-snapshot", 100, 10, cost_usd=0.5)


def test_only_disagreements_are_asked_again(tmp_path: Path) -> None:
    client = Scripted()
    recording = RecordClient(client, tmp_path / "tape.sqlite")
    result = ensemble.run(PROBLEMS, LLAVA, recording, shots=SHOTS)
    assert (result["n"], result["asked_again"], len(client.requests)) == (4, 3, 7)
    assert set(result["texts"]["requery"]) == {"2", "3", "4"}
    right = {name: row["correct"] for name, row in result["systems"].items()}
    assert right == {"llava": 2, "gpt4": 2, "complement": 3, "upper_bound": 3, "judge": 3}
    assert (result["spend_usd"], result["cost_usd"]) == (3.5, 3.5)
    assert result["bills"]["requery"]["tokens"] == [300, 30]
    assert (result["listed"]["requests"], ensemble.run(PROBLEMS, LLAVA, Scripted(), model="mine")["listed"]) == (
        7,
        None,
    )
    second = ensemble.run(PROBLEMS, LLAVA, ReplayClient(tmp_path / "tape.sqlite"), shots=SHOTS)
    assert (second["spend_usd"], second["cost_usd"], second["bills"]["gpt4"]["replayed"]) == (0, 3.5, 4)
    assert second["systems"] == result["systems"]
    with pytest.raises(DataError, match="holds no reply"):  # other examples are another request
        ensemble.run(PROBLEMS, LLAVA, ReplayClient(tmp_path / "tape.sqlite"), shots=SHOTS[::-1])
    assert "3 of 4 questions were asked again" in ensemble.format_report(result)
    assert "paid now 3.50 USD" in ensemble.format_report(result)


def test_every_difference_has_its_interval() -> None:
    systems = ensemble.run(PROBLEMS, LLAVA, Scripted())["systems"]
    against = systems["complement"]["against_llava"]
    assert against["difference"] == pytest.approx(25)
    assert against["interval"][0] <= 25 <= against["interval"][1]
    assert systems.keys() - {name for name, row in systems.items() if "against_llava" in row} == {"llava"}


def test_first_query_has_two_examples_and_no_image() -> None:
    roles = [m["role"] for m in ensemble.solver_messages(PROBLEMS[1], SHOTS)]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    texts = [m["content"] for m in ensemble.solver_messages(PROBLEMS[1], SHOTS)]
    assert not any("<image>" in text for text in texts)
    assert texts[2] == "The answer is B. BECAUSE: L. E."
    assert texts[-1].startswith("Which is 2?\nContext: N/A\nOptions: (A) sun")


def test_second_query_shows_both_answers_in_paper_order() -> None:
    system, user = (m["content"] for m in ensemble.requery_messages(PROBLEMS[1], LLAVA["2"], FIRST["2"]))
    assert f"Assistant 1:\n{LLAVA['2']}\n\nAssistant 2:\n{FIRST['2']}" in user
    assert "<image>" not in user
    assert system.endswith("The answer is X.")


def test_requests_without_reply_are_counted() -> None:
    result = ensemble.run(PROBLEMS, LLAVA, Scripted(ChatError))
    assert result["bills"]["gpt4"]["unanswered"] == 1
    assert result["systems"]["gpt4"]["unparsed_ids"] == ["2", "4"]
    with pytest.raises(ServerError):
        ensemble.run(PROBLEMS, LLAVA, Scripted(ServerError))


def test_unanswered_problems_are_refused_early() -> None:
    client = Scripted()
    with pytest.raises(DataError, match=r"not answered 1 of 4 problems \(first: 3\)"):
        ensemble.run(PROBLEMS, {k: v for k, v in LLAVA.items() if k != "3"}, client)
    assert client.requests == []


def test_examples_have_no_image_and_are_always_the_same() -> None:
    train = [problem(str(k), image=k % 2 == 0) for k in range(40)]
    shots = ensemble.pick_shots(train)
    assert len(shots) == 2
    assert not any(shot.image for shot in shots)
    assert shots == ensemble.pick_shots(train)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raw(p: Problem, split: str) -> dict[str, Any]:
        fields = {"question": p.question, "choices": p.choices, "answer": p.answer, "grade": "grade1", "split": split}
        return fields | {"subject": p.subject, "image": p.image and p.image.name}

    problems = {p.id: raw(p, "test") for p in PROBLEMS} | {p.id: raw(p, "train") for p in SHOTS}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    splits = {"test": [p.id for p in PROBLEMS], "train": [p.id for p in SHOTS]}
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    rows = [{"question_id": key, "text": "Which?"} for key in LLAVA]
    write_predictions(tmp_path / "llava.jsonl", rows, {"checkpoint": "manifest:1"}, lambda _: [LLAVA])
    client = OfflineClient(lambda messages: Scripted().complete(ChatRequest(messages, "m")).text)
    monkeypatch.setattr("companion.teacher.client.client_from_name", lambda *_, **__: client)
    words = ["evaluate", "science-qa-ensemble", "--predictions", str(tmp_path / "llava.jsonl"), "--data", str(tmp_path)]
    assert cli.main([*words, "--shots", "8,9", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["systems"]["judge"]["correct"], result["shots"], result["spend_usd"]) == (3, ["8", "9"], 0)
    assert cli.main(words) == 0
    assert "judge" in capsys.readouterr().out
    assert cli.main([*words, "--shots", "8,1"]) == 1
    assert "not all are problems of the train split" in capsys.readouterr().err


def data_folder(tmp_path: Path, problems: list[Problem]) -> list[str]:
    """Write the problems as ScienceQA's files, and LLaVA's answers; return the command."""
    fields = ("question", "choices", "answer", "subject")
    raw = {p.id: {name: getattr(p, name) for name in fields} | {"grade": "grade1", "split": "test"} for p in problems}
    for p in problems:
        raw[p.id]["image"] = p.image and p.image.name
    raw |= {p.id: {name: getattr(p, name) for name in fields} | {"grade": "grade1", "split": "train"} for p in SHOTS}
    (tmp_path / "problems.json").write_text(json.dumps(raw))
    splits = {"test": [p.id for p in problems], "train": [p.id for p in SHOTS]}
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    (tmp_path / "llava.json").write_text(json.dumps({"outputs": {p.id: LLAVA.get(p.id, "A") for p in problems}}))
    command = [
        "evaluate",
        "science-qa-ensemble",
        "--predictions",
        str(tmp_path / "llava.json"),
        "--data",
        str(tmp_path),
    ]
    return [*command, "--shots", "8,9"]


def test_answers_of_gpt4_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = data_folder(tmp_path, PROBLEMS)
    (tmp_path / "gpt4.json").write_text(json.dumps({"outputs": FIRST}))
    rows = [{"question_id": key, "text": text} for key, text in AGAIN.items()]
    (tmp_path / "again.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--gpt4", str(tmp_path / "gpt4.json"), "--requery", str(tmp_path / "again.jsonl")]
    assert cli.main([*words, *files, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    asked = ensemble.run(PROBLEMS, LLAVA, Scripted())
    assert {k: v["correct"] for k, v in result["systems"].items()} == {
        k: v["correct"] for k, v in asked["systems"].items()
    }
    assert result["asked_again"] == asked["asked_again"] == 3
    assert cli.main([*words, *files[:2]]) == 0
    text = capsys.readouterr().out
    assert "judge" not in text
    assert "1 of GPT-4's 4 answers name no choice (first: 2)" in text
    assert cli.main([*words, *files[2:]]) == 1
    assert "give those to the first with --gpt4 FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outputs", "message"),
    [({"77": "The answer is A."}, "gpt4.json: answers none of the 4 problems"), ({}, "holds no prediction")],
)
def test_files_of_other_questions_are_refused(
    outputs: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = data_folder(tmp_path, PROBLEMS)
    (tmp_path / "gpt4.json").write_text(json.dumps({"outputs": outputs}))
    assert cli.main([*words, "--gpt4", str(tmp_path / "gpt4.json")]) == 1
    assert message in capsys.readouterr().err


def test_absent_answers_of_gpt4_are_told(tmp_path: Path) -> None:
    (tmp_path / "gpt4.json").write_text(json.dumps({"outputs": {"1": "The answer is A."}}))
    result = ensemble.run_files(PROBLEMS, LLAVA, tmp_path / "gpt4.json")
    assert "GPT-4 has no answer to 3 problems (first: 2); they count as unparsed." in result["notes"]


@pytest.mark.parametrize("images", [False, True])
def test_offline_client_says_that_it_cannot_answer(
    images: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = data_folder(tmp_path, [problem(str(k), image=images) for k in range(1, 5)])
    assert cli.main([*words, "--client", "offline"]) == 1
    error = capsys.readouterr().err
    assert "the client 'offline' cannot answer these problems" in error
    assert "--gpt4 FILE" in error


def test_offline_client_answers_problems_of_the_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked, choices = "Which word takes es in its plural?", ["brush", "dog"]
    known = Problem("5", asked, choices, 0, "", None, "", "", "language science", 1, "test")
    words = data_folder(tmp_path, [*PROBLEMS, known])  # the first two are not about the miniature
    assert cli.main([*words, "--limit", "2"]) == 0
    assert "gpt4" in capsys.readouterr().out
