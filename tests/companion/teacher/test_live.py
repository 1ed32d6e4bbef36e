"""The live client against a local server with injected faults."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cassette_processes import annotated_images, generate, locked_cassette, start_recording, write_annotations
from chat_server import Running, serving

from companion import cli
from companion.teacher.cassette import Cassette
from companion.teacher.chat import PRICES, BudgetError, ChatError, ChatRequest, ServerError, cost_usd
from companion.teacher.client import ReplayClient, client_from_name
from companion.teacher.live import LiveClient
from llava_core.runtime import ConfigError, read_json, read_jsonl, write_jsonl

pytest.importorskip("openai", reason="the live teacher speaks through the openai SDK: pip install 'llava-core[live]'")

PRICE = PRICES["gpt-4-0314"]
QUICK: dict[str, Any] = {"api_key": "none", "timeout": 5.0}


def ask(text: str = "one", **settings: Any) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], "gpt-4-0314", **settings)


def usd(rows: list[dict[str, Any]]) -> float:
    return sum(cost_usd(tuple(row["tokens"]), PRICE) for row in rows)


# ------------------------------------------------------------------------------------------------ one client


def test_reply_has_its_cost_and_model_snapshot(tmp_path: Path) -> None:
    with serving(tmp_path, rename_after=1) as server:
        client = LiveClient(server.url, **QUICK)
        replies = [client.complete(ask(text)) for text in ("one", "two")]
        assert [(r.text, r.model) for r in replies] == [("This is one", "gpt-4-0314"), ("This is two", "gpt-4-0613")]
        assert (replies[0].prompt_tokens, replies[0].completion_tokens) == (1000, 500)
        assert replies[0].cost_usd == pytest.approx(0.06)
        assert (replies[0].price_prompt, replies[0].price_completion, replies[0].kind) == (30.0, 60.0, "live")
        assert abs((datetime.now(UTC) - datetime.fromisoformat(replies[0].date)).total_seconds()) < 60
        own = LiveClient(server.url, price=(1.0, 2.0), **QUICK)
        assert own.complete(ChatRequest(ask().messages, "mine")).cost_usd == pytest.approx(0.002)
        with pytest.raises(ConfigError, match=r"unknown price of model 'mine'.*give --price PROMPT,REPLY"):
            client.complete(ChatRequest(ask().messages, "mine"))
        assert len(server.billed()) == 3


@pytest.mark.parametrize("fault", ["429", "500", "stalled", "truncated", "invalid", "closed"])
def test_failing_server_ends_with_its_reason(tmp_path: Path, fault: str) -> None:
    with serving(tmp_path, faulty=1.0, faults=[fault]) as server:
        client = LiveClient(server.url, retries=2, **QUICK | {"timeout": 0.4})
        output = {"429": "status 429", "500": "status 500", "stalled": "no reply in 0.4 s"}
        output["invalid"] = "not a chat completion"
        with pytest.raises(ChatError, match=f"no reply in 3 attempts; the last one: .*{output.get(fault, '')}"):
            client.complete(ask())
        assert len(server.stop()["times"]) == 3
        assert not server.billed()


@pytest.mark.parametrize("fault", ["429 seconds", "429 date"])
def test_wait_follows_retry_after(tmp_path: Path, fault: str) -> None:
    with serving(tmp_path, faulty=1.0, faults=[fault]) as server:
        with pytest.raises(ChatError):
            LiveClient(server.url, retries=1, **QUICK).complete(ask())
        first, second = server.stop()["times"]
        # a date has a resolution of one second, so that it may be almost one second sooner
        assert (0.95 if fault == "429 seconds" else 0.0) <= second - first < 2


@pytest.mark.parametrize(("fault", "error"), [("401", ServerError), ("400", ChatError)])
def test_fatal_and_invalid_requests_are_not_repeated(tmp_path: Path, fault: str, error: type[ChatError]) -> None:
    with serving(tmp_path, faulty=1.0, faults=[fault]) as server:
        with pytest.raises(ChatError, match=rf"^model 'gpt-4-0314': status {fault}: .*not now") as caught:
            LiveClient(server.url, **QUICK).complete(ask())
        assert type(caught.value) is error
        assert len(server.stop()["times"]) == 1


def test_missing_key_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("live", "record"):
        with pytest.raises(ConfigError, match=r"(?i)the openai SDK: .*OPENAI_API_KEY"):
            client_from_name(name, cassette=tmp_path / "tape.sqlite")


# ------------------------------------------------------------------------------------------------ many requests


def test_concurrency_is_the_number_of_requests_under_way(tmp_path: Path) -> None:
    with serving(tmp_path, seconds=0.1) as server:
        client = client_from_name("record", cassette=tmp_path / "t.sqlite", base_url=server.url, concurrency=6, **QUICK)
        generate(annotated_images(40), ["detail"], client, tmp_path / "out")
        assert server.stop()["most_under_way"] == 6


@pytest.mark.parametrize("faulty", [0.0, 0.3])
def test_budget_is_not_exceeded(tmp_path: Path, faulty: float) -> None:
    options: dict[str, Any] = {"faulty": faulty, "faults": ["429", "500", "truncated"], "usage": [1000, 100]}
    with serving(tmp_path, **options) as server:
        settings = QUICK | {"base_url": server.url, "concurrency": 5, "budget_usd": 1.5}
        client = client_from_name("record", cassette=tmp_path / "tape.sqlite", **settings)
        result = generate(annotated_images(100), ["detail"], client, tmp_path / "out", max_tokens=100)
        assert "budget of 1.5 USD" in result["stopped"]
        assert result["records"] + result["unasked"] == 100
        assert result["spend_usd"] == pytest.approx(usd(server.billed()))
        assert result["spend_usd"] <= 1.5
        if not faulty:  # the next one could have passed it
            assert result["spend_usd"] + cost_usd(ask(max_tokens=100).most_tokens(), (30, 60)) + 0.3 > 1.5
        second = client_from_name("record", cassette=tmp_path / "tape.sqlite", **settings | {"budget_usd": 0.2})
        with pytest.raises(BudgetError, match=r"raise the budget to go on"):
            second.complete(ask("another"))


def test_replay_repeats_failed_requests(tmp_path: Path) -> None:
    tape = tmp_path / "tape.sqlite"
    with serving(tmp_path, faulty=0.4, faults=["400", "truncated"]) as server:
        client = client_from_name("record", cassette=tape, base_url=server.url, retries=1, **QUICK)
        result = generate(annotated_images(30), ["detail"], client, tmp_path / "out")
    assert 0 < result["failed"] < 30
    assert result["failures"] == {"ChatError": result["failed"]}
    assert result["records"] == len(server.billed())
    generate(annotated_images(30), ["detail"], ReplayClient(tape), tmp_path / "replayed")
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "replayed" / file.name).read_bytes() == file.read_bytes(), file.name
    assert Cassette(tape).doubtful() > 0  # truncated replies, which the server may have billed


def test_command_line_records_until_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    words = [
        "generate",
        "--annotations",
        write_annotations(tmp_path, 9),
        "--kinds",
        "detail",
        "--client",
        "record",
        "--json",
    ]
    with serving(tmp_path) as server:
        words += ["--base-url", server.url, "--model", "mine", "--price", "30,60", "--concurrency", "2", "--seed", "3"]
        assert cli.main([*words, "--budget-usd", "0.5", "--out", str(tmp_path / "out")]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["requests"] == result["records"] == len(server.billed()) < 9
        assert result["spend_usd"] <= 0.5
        assert result["stopped"].startswith("budget of 0.5 USD")
        assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
        assert json.loads(capsys.readouterr().out)["records"] == 9 == len(server.billed())
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--price", "cheap", "--out", str(tmp_path / "out")])
    assert left.value.code == 2


THOUGHT = "<think>\nThe captions mention a car.\n</think>\n\nA man stands next to a blue car."
PARTS = [{"type": "thinking", "thinking": "a car"}, {"type": "text", "text": THOUGHT[-32:]}]


def live_command(tmp_path: Path, server: Running, *words: str, count: int = 9, client: str = "record") -> list[str]:
    paid = ["--client", client, "--base-url", server.url, "--price", "30,60", "--model", "mine", "--json"]
    file = write_annotations(tmp_path, count)
    return ["generate", "--annotations", file, "--kinds", "detail", "--out", str(tmp_path / "out"), *paid, *words]


@pytest.mark.parametrize("client", ["live", "record"])
@pytest.mark.parametrize(
    ("choice", "usage"),
    [
        ({"message": {"content": THOUGHT}}, {"prompt_tokens": None, "completion_tokens": None}),
        ({"message": {"content": PARTS}, "finish_reason": None}, None),
        ({"message": {"content": PARTS[1:], "reasoning_content": "a car"}, "finish_reason": "eos"}, {"total": 9}),
    ],
)
def test_command_line_keeps_the_text_of_other_servers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    client: str,
    choice: Any,
    usage: Any,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serving(tmp_path, choice=choice, usage=usage) as server:
        assert cli.main(live_command(tmp_path, server, client=client)) == 0
        output = capsys.readouterr()
        assert len(server.stop()["times"]) == 9  # no attempt is repeated
    assert json.loads(output.out)["spend_usd"] > 0
    records = read_json(tmp_path / "out" / "detail_9.json")
    assert {record["conversations"][1]["value"] for record in records} == {"A man stands next to a blue car."}
    assert ("9 of 9 replies have no finish_reason" in output.err) == (choice.get("finish_reason", "") is None)


@pytest.mark.parametrize("client", ["live", "record"])
@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ({"finish_reason": "content_filter", "message": {"content": "A man stands next to a"}}, "UnfinishedReply"),
        ({"finish_reason": "length", "message": {"content": "", "reasoning_content": "a car"}}, "CutOffReply"),
        ({"finish_reason": "error"}, "UnfinishedReply"),
        ({"message": {"content": THOUGHT[:40]}}, "OnlyReasoning"),
        ({"message": {"content": None, "refusal": "That is private."}}, "Refusal"),
    ],
)
def test_command_line_fails_without_a_whole_reply(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    client: str,
    choice: Any,
    error: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serving(tmp_path, choice=choice) as server:
        assert cli.main(live_command(tmp_path, server, "--max-tokens", "70", client=client, count=3)) == 1
    assert {row["max_tokens"] for row in read_jsonl(tmp_path / "out" / "provenance.jsonl")} == {70}
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert (result["records"], result["failed"], result["failures"]) == (0, 3, {error: 3})
    assert "note: 3 of 3 requests failed, 3 of them: " in output.err
    assert read_json(tmp_path / "out" / "llava_instruct.json") == []


@pytest.mark.parametrize("client", ["live", "record"])
def test_refused_parameters_are_learned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], client: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serving(tmp_path, refuses=["max_tokens", "temperature"], seconds=0.05) as server:
        assert cli.main(live_command(tmp_path, server, client=client)) == 0
        sent = server.stop()["sent"]
    assert [names for names in sent if names != ["max_completion_tokens"]] == [
        ["max_tokens", "temperature"],
        ["max_completion_tokens", "temperature"],
    ]
    assert len(sent) == 9 + 2
    output = capsys.readouterr()
    assert json.loads(output.out)["records"] == 9
    assert output.err.count("the server does not take 'max_tokens' for model 'mine'; 'max_completion_tokens'") == 1
    assert output.err.count("the server does not take 'temperature' for model 'mine'; it is left out") == 1
    [client_of_all] = {row["client"] for row in read_jsonl(tmp_path / "out" / "provenance.jsonl")}
    assert client_of_all == "live, without temperature"


REFUSED = {"message": "Unsupported value: 'messages[0].role' does not support 'system'", "code": "unsupported_value"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"error": [401, {"error": {"message": "Incorrect API key provided"}}]}, "Incorrect API key"),
        ({"error": [400, {"error": {"message": "The model `mine` does not exist"}}]}, "`mine` does not exist"),
        ({"error": [400, {"error": REFUSED}]}, "does not support 'system'"),
        ({"error": [429, {"error": {"message": "exceeded", "code": "insufficient_quota"}}]}, "exceeded"),
        ({"refuses": ["max_tokens", "max_completion_tokens"]}, "'max_completion_tokens' is not supported"),
    ],
)
def test_refusal_of_all_requests_is_met_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: Any, reason: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serving(tmp_path, **options) as server:
        assert cli.main(live_command(tmp_path, server)) == 1
        assert len(server.stop()["times"]) == 1 + ("refuses" in options)
    assert re.search(rf"^error: model 'mine': status 4..: .*{reason}", capsys.readouterr().err, re.MULTILINE)


def test_other_refusals_end_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serving(tmp_path, error=[400, {"error": {"message": "the prompt was filtered"}}]) as server:
        assert cli.main(live_command(tmp_path, server, count=3)) == 1
        assert len(server.stop()["times"]) == 3
        assert cli.main(live_command(tmp_path, server, "--budget-usd", "0")) == 1
    assert re.search("3 of 3 requests failed, 3 of them: .*the prompt was filtered", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("choice", "written"),
    [
        ({"message": {"content": "<think>5 5\n</think>8 7\nBoth saw it."}}, 5),
        ({"message": {"content": "8 7\nBoth"}, "finish_reason": "content_filter"}, 0),
        ({"message": {"content": "<think>8 7\nBoth"}}, 0),
    ],
)
def test_reference_and_judge_read_replies_as_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], choice: Any, written: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    bench = tmp_path / "bench"
    questions = [{"question_id": k, "image": "a.jpg", "text": f"What is {k}?", "category": "conv"} for k in range(5)]
    write_jsonl(bench / "questions.jsonl", questions)
    write_jsonl(bench / "context.jsonl", [{"image": "a.jpg", "caption": "A car."}])
    answers = write_jsonl(tmp_path / "a.jsonl", [{"question_id": k, "text": "A car."} for k in range(5)])
    with serving(tmp_path, choice=choice) as server:
        paid = ["--bench", str(bench), "--client", "record", "--base-url", server.url, "--json"]
        out = str(tmp_path / "reference.jsonl")
        assert cli.main(["evaluate", "bench", "reference", *paid, "--out", out]) == (written == 0)
        assert json.loads(capsys.readouterr().out)["answers"] == written
        assert {row["text"] for row in read_jsonl(tmp_path / "reference.jsonl")} <= {"8 7\nBoth saw it."}
        files = ["--answers", str(answers), "--reference", str(answers), "--out", str(tmp_path / "reviews.jsonl")]
        assert cli.main(["evaluate", "bench", "judge", *paid, *files]) == (written == 0)
        result = json.loads(capsys.readouterr().out)
    assert (result["n"], result["failed"]) == (written, 5 - written)
    assert result["all"] == (87.5 if written else None)


def test_two_processes_do_not_share_a_cassette(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tape, timeout = tmp_path / "tape.sqlite", "companion.teacher.cassette.LOCK_TIMEOUT"
    monkeypatch.setattr(timeout, 0.1)
    with serving(tmp_path) as server:
        with locked_cassette(tape), pytest.raises(ConfigError, match="another process records to this cassette"):
            client_from_name("record", cassette=tape, base_url=server.url, **QUICK)
        first = client_from_name("record", cassette=tape, base_url=server.url, **QUICK)
        first.complete(ask())
        # the same process, e.g. a repeated notebook cell, gets another client
        second = client_from_name("record", cassette=tape, base_url=server.url, **QUICK)
        assert second.complete(ask()).cached
        with pytest.raises(AssertionError, match="another process"), locked_cassette(tape):
            pass
        del first, second
        with locked_cassette(tape):
            pass


def kill_at(process: subprocess.Popen[str], server: Running, billed: int, later: float = 0.0) -> None:
    while len(server.log.read_bytes().splitlines() if server.log.exists() else []) < billed:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.003)
    time.sleep(later)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_process_repeats_only_requests_under_way(tmp_path: Path) -> None:
    with serving(tmp_path, seconds=0.4) as server:
        options = QUICK | {"base_url": server.url, "concurrency": 10}
        kill_at(start_recording("record", tmp_path, 60, **options), server, 10, later=0.2)
        with start_recording("record", tmp_path, 60, **options) as process:
            result = json.loads(process.communicate()[0])
        paid = Counter(row["text"] for row in server.billed())
    assert (result["records"], result["requests"] + result["replayed"]) == (60, 60)
    assert result["replayed"] >= 10  # the replies that had arrived
    # the ten requests that the server was answering are the only ones sent and paid twice
    assert len(paid) == 60
    assert max(paid.values()) == 2
    assert 0 < paid.total() - 60 <= 10
    # the budget counts them
    tape = Cassette(tmp_path / "tape.sqlite")
    assert tape.spend() + tape.doubtful() >= usd(server.billed())


def test_budget_holds_over_kills(tmp_path: Path) -> None:
    with serving(tmp_path, seconds=0.3, usage=[1000, 2000]) as server:
        options = QUICK | {"base_url": server.url, "concurrency": 5, "budget_usd": 8.0}
        for billed in (5, 10):
            kill_at(start_recording("record", tmp_path, 80, **options), server, billed, later=0.1)
        with start_recording("record", tmp_path, 80, **options) as process:
            result = json.loads(process.communicate()[0])
        assert "budget of 8 USD" in result["stopped"]
        assert 0 < usd(server.billed()) <= 8.0


def test_interrupt_records_requests_under_way(tmp_path: Path) -> None:
    with serving(tmp_path, seconds=0.3, faulty=0.5, faults=["429"]) as server:
        options = QUICK | {"base_url": server.url, "concurrency": 10}
        process = start_recording("record", tmp_path, 60, **options)
        while not server.billed():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode not in (0, -signal.SIGKILL)
        assert len(Cassette(tmp_path / "tape.sqlite")) == len(server.billed()) > 0


@pytest.mark.slow
def test_two_thousand_requests_with_faults_and_three_kills(tmp_path: Path) -> None:
    count, settings = 2000, QUICK | {"timeout": 2.0, "retries": 10, "concurrency": 48}
    with serving(tmp_path, faulty=0.2, malformed=0.02, seconds=0.01, rename_after=1200) as server:
        options = settings | {"base_url": server.url}
        for billed in (300, 900, 1500):
            kill_at(start_recording("record", tmp_path, count, **options), server, billed)
            assert not (tmp_path / "out").exists()
        with start_recording("record", tmp_path, count, **options) as process:
            result = json.loads(process.communicate()[0])
        paid, met = server.billed(), server.stop()["met"]
    assert all(count >= 10 for count in met.values()), met
    assert len(met) == 9
    assert 0.17 < 1 - met[""] / sum(met.values()) < 0.23
    # every record exactly once; each kill repeats at most the requests under way
    records = read_json(tmp_path / "out" / "llava_instruct.json")
    assert [record["id"] for record in records] == [image.id for image in annotated_images(count)]
    assert (result["records"], result["failed"], result["retried"]) == (count, 0, result["repaired"])
    assert 10 < result["repaired"] < 100
    tape = Cassette(tmp_path / "tape.sqlite")
    times = Counter(row["text"] for row in paid)
    assert len(times) == count + result["repaired"] == len(tape)
    assert len(paid) - len(times) <= 3 * settings["concurrency"]
    # replies and doubtful attempts together are at least what the server billed
    assert tape.spend() == pytest.approx(result["cost_usd"]) == pytest.approx(usd(paid) * len(times) / len(paid))
    assert tape.spend() + tape.doubtful() >= usd(paid)
    assert result["requests"] + result["replayed"] == len(times)
    assert sum(result["models"].values()) == len(times)
    assert sorted(result["models"]) == ["gpt-4-0314", "gpt-4-0613"]
    # and a replay, which needs no server, writes the same files
    second = generate(
        annotated_images(count), ["detail"], ReplayClient(tmp_path / "tape.sqlite"), tmp_path / "replayed"
    )
    assert (second["requests"], second["spend_usd"], second["cost_usd"]) == (0, 0.0, result["cost_usd"])
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "replayed" / file.name).read_bytes() == file.read_bytes(), file.name
