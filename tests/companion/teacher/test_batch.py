"""The batch client against a local server that keeps its own account."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cassette_processes import annotated_images, generate, locked_cassette, start_recording, write_annotations

from companion import cli
from companion.teacher.batch import BatchClient
from companion.teacher.cassette import Cassette
from companion.teacher.chat import PRICES, BudgetError, ChatError, ChatRequest, ServerError, cost_usd
from companion.teacher.client import RecordClient, ReplayClient, client_from_name
from llava_core.runtime import ConfigError, read_json, read_jsonl

pytest.importorskip("openai", reason="the batch client speaks through the openai SDK: pip install 'llava-core[live]'")

QUICK: dict[str, Any] = {"api_key": "none", "poll": 0.06, "timeout": 20.0}
EACH = cost_usd((1000, 500), PRICES["gpt-4-0314"]) / 2


def ask(*texts: str, model: str = "gpt-4-0314", **settings: Any) -> list[ChatRequest]:
    return [ChatRequest([{"role": "user", "content": text}], model, **settings) for text in texts]


class Running:
    """The server as a process."""

    def __init__(self, folder: Path, port: str) -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{port}/v1"

    def billed(self) -> Counter[str]:
        """How often each request was billed."""
        return Counter(row["key"] for row in self.read("billed.jsonl"))

    def events(self) -> Counter[str]:
        return Counter(self.read("events.jsonl"))

    def read(self, name: str) -> list[Any]:
        return read_jsonl(self.folder / name) if (self.folder / name).exists() else []


@contextlib.contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Running]:
    program = [sys.executable, str(Path(__file__).parents[2] / "batch_server.py"), str(folder), json.dumps(options)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Running(folder, process.stdout.readline().strip())
        finally:
            process.kill()


def batch_client(folder: Path, server: Running, **options: Any) -> BatchClient:
    return BatchClient(folder / "tape.sqlite", base_url=server.url, **QUICK | options)


# ------------------------------------------------------------------------------------------------ one batch


def test_batch_costs_half_and_keeps_the_order(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        client = batch_client(tmp_path, server)
        requests = ask(*(f"car {k}" for k in range(7)), "car 3")
        replies = client.prefetch(requests)
        assert [reply.text for reply in replies if reply] == [f"This is {r.messages[-1]['content']}" for r in requests]
        assert server.billed() == {request.key: 1 for request in requests}
        first, second = client.complete(requests[3]), client.complete(requests[3])
        assert (first.cached, second.cached) == (False, True)
        assert (first.kind, first.model, first.price_prompt, first.price_completion) == ("batch", "gpt-4-0314", 15, 30)
        assert first.cost_usd == pytest.approx(EACH)
        assert first.date.endswith("+00:00")
        assert Cassette(tmp_path / "tape.sqlite").spend() == pytest.approx(7 * EACH)
        # a request that nobody named before becomes a batch of its own
        assert client.complete(*ask("a bus")).text == "This is a bus"
        assert server.events()["create"] == 2


def test_limits_of_a_batch_file(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        cars, others = ask(*(f"car {k}" for k in range(5))), ask("a bus", "a van", model="gpt-4")
        assert all(batch_client(tmp_path, server, most_requests=4).prefetch([*cars, *others]))
        small = batch_client(tmp_path, server, most_bytes=800)
        assert all(small.prefetch(ask("bus 1", "bus 2", "bus 3", "bus 4", "bus " + 800 * "x", "bus 5")))
        result = [(row["requests"], row["model"]) for row in server.read("batches.jsonl")]
        assert result == [(n, "gpt-4-0314" if k != 2 else "gpt-4") for k, n in enumerate((4, 1, 2, 3, 1, 1, 1))]
        sizes = [row["bytes"] for row in server.read("batches.jsonl")][3:]
        assert [size <= 800 for size in sizes] == [True, True, False, True]  # the long request has its own batch
        assert set(server.billed().values()) == {1}


@pytest.mark.parametrize("end", ["expired", "cancelled"])
def test_unanswered_requests_go_into_at_most_three_batches(tmp_path: Path, end: str) -> None:
    requests = ask(*(f"car {k}" for k in range(8)))
    with serving(tmp_path, ends=[end] * 2) as server:
        assert all(batch_client(tmp_path, server).prefetch(requests))  # 4, 2, and the last 2
        assert server.events()["create"] == 3
    with serving(tmp_path, ends=[end] * 9) as server:
        client = batch_client(tmp_path, server)
        others = ask(*(f"bus {k}" for k in range(8)))
        assert client.prefetch(others)[-1] is None
        assert server.events()["create"] == 3 + 3
        with pytest.raises(ChatError, match=r"no reply in 3 batches; the last one: .*(too late|cancelled without it)"):
            client.complete(others[-1])
        assert max(server.billed().values()) == 1
        tape = Cassette(tmp_path / "tape.sqlite")
        assert tape.spend() == pytest.approx(EACH * server.billed().total())
        assert tape.doubtful() == 0
        assert (tape.open_batch(), tape.given_up(requests[0])) == (None, None)
        with pytest.raises(ChatError, match="no reply in 3 batches"):
            ReplayClient(tmp_path / "tape.sqlite").complete(others[-1])


def test_request_errors_are_fatal_or_retried(tmp_path: Path) -> None:
    requests = ask("car one", "car two", "car three")
    with serving(tmp_path, faults={"two": 400, "three": 500}) as server:
        client = batch_client(tmp_path, server)
        replies = client.prefetch(requests)
        assert [reply is not None for reply in replies] == [True, False, False]
        with pytest.raises(ChatError, match=r"model 'gpt-4-0314': status 400: not this one"):
            client.complete(requests[1])
        with pytest.raises(ChatError, match=r"no reply in 3 batches; the last one: status 500"):
            client.complete(requests[2])
        assert server.events()["create"] == 3
        assert server.billed() == {requests[0].key: 1}


def test_refused_file_costs_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, refuse="line 1 is not accepted") as server:
        wrong = r"batch_1: the server refused its file and billed nothing: line 1: line 1 is not accepted \(invalid"
        with pytest.raises(ServerError, match=wrong):
            batch_client(tmp_path, server).prefetch(ask("one"))
        assert Cassette(tmp_path / "tape.sqlite").open_batch() is None
    with serving(tmp_path) as server:
        assert all(batch_client(tmp_path, server).prefetch(ask("one")))


def test_file_with_a_refused_parameter_is_sent_again_without_it(tmp_path: Path) -> None:
    with serving(tmp_path, refuse="Unsupported parameter: temperature") as server:
        with pytest.raises(ServerError, match="refused its file"):
            batch_client(tmp_path, server).prefetch(ask("one"))
        assert server.events()["create"] == 2


def test_enqueued_token_limit_halves_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path, most=3) as server:
        assert all(batch_client(tmp_path, server).prefetch(ask(*(f"car {k}" for k in range(9)))))
        assert server.events()["create"] == 2 + 5  # 9 and 4 refused; then 2, 2, 2, 2, 1
        assert server.billed().total() == 9
    assert "next: 4 requests" in capsys.readouterr().err


def test_server_without_batches_names_the_other_client(tmp_path: Path) -> None:
    with serving(tmp_path, missing=True) as server:
        with pytest.raises(
            ServerError, match=r"^the server has no batch endpoint \(status 404\); use the client 'reco"
        ):
            batch_client(tmp_path, server).prefetch(ask("one"))
        # and that one is not kept from working
        client = client_from_name("record", cassette=tmp_path / "tape.sqlite", base_url=server.url, api_key="none")
        assert isinstance(client, RecordClient)


def test_cassette_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("companion.teacher.cassette.LOCK_TIMEOUT", 0.1)
    with serving(tmp_path) as server:
        another = "another process records to this cassette"
        with locked_cassette(tmp_path / "tape.sqlite"), pytest.raises(ConfigError, match=another):
            batch_client(tmp_path, server).prefetch(ask("one"))
        assert not server.events()
        assert all(batch_client(tmp_path, server).prefetch(ask("one")))


def test_budget_bounds_every_batch(tmp_path: Path) -> None:
    requests = ask(*(f"{1200 * 'x'} {k}" for k in range(40)), max_tokens=500)
    most = cost_usd(requests[-1].most_tokens(), PRICES["gpt-4-0314"]) / 2
    with serving(tmp_path) as server:
        client = batch_client(tmp_path, server, budget_usd=10 * most)
        replies = client.prefetch(requests)
        spent = Cassette(tmp_path / "tape.sqlite").spend()
        assert spent == pytest.approx(EACH * server.billed().total())
        assert 0 < sum(reply is not None for reply in replies) == server.billed().total() < 40
        assert spent <= 10 * most < spent + most
        with pytest.raises(BudgetError, match=r"budget of .* spent, and the next request may cost .*raise the budget"):
            client.complete(requests[-1])
        first = server.events()["create"]
        assert all(batch_client(tmp_path, server, budget_usd=9.0).prefetch(requests))
        assert server.events()["create"] == first + 1
        assert max(server.billed().values()) == 1
        with pytest.raises(ConfigError, match=r"unknown price of model 'mine'.*give --price PROMPT,REPLY"):
            client.prefetch(ask("one", model="mine"))
        own = batch_client(tmp_path, server, price=(2.0, 4.0)).complete(*ask("one", model="mine"))
        assert own.cost_usd == pytest.approx(0.002)


# ------------------------------------------------------------------------------------------------ hostile answers

CHOICES = '"choices": [{"finish_reason": "stop", "message": {"content": "A man."}}]'
BODIES = {
    "usage beyond 64 bits": f'{{{CHOICES}, "usage": {{"prompt_tokens": {2**70}}}}}',
    "negative usage": f'{{{CHOICES}, "usage": {{"prompt_tokens": -9, "completion_tokens": -Infinity}}}}',
    "half of a character": f'{{{CHOICES}, "model": "\\ud83d"}}',
    "levels": "LEVELS",
    "other types": '{"choices": 7, "usage": "no"}',
}


@pytest.mark.parametrize("name", BODIES)
def test_paid_line_is_recorded_once_whatever_it_is(tmp_path: Path, name: str) -> None:
    requests = ask("a car", "a bus", "two vans", max_tokens=50)
    line = f'{{"custom_id": "ID", "response": {{"status_code": 200, "body": {BODIES[name]}}}}}'
    with serving(tmp_path, lines={"bus": line, "vans": line}) as server:
        for _ in range(2):
            replies = [reply for reply in batch_client(tmp_path, server).prefetch(requests) if reply]
            assert [reply.text for reply in replies[1:]] == 2 * ["A man." if "A man." in line else ""]
        assert set(server.billed().values()) == {1}
    price = PRICES["gpt-4-0314"][0] / 2, PRICES["gpt-4-0314"][1] / 2
    assert all(reply.cost_usd >= cost_usd((requests[1].expected_tokens()[0], 2), price) for reply in replies)


def test_lines_without_a_request_are_left_out(tmp_path: Path) -> None:
    with serving(tmp_path, lines={"bus": "[7]", "van": '{"custom_id": ["ID"]}', "cab": ""}) as server:
        replies = batch_client(tmp_path, server).prefetch(ask("a car", "a bus", "a van", "a cab"))
        assert [reply is not None for reply in replies] == [True, False, False, False]
        assert server.events()["create"] == 3


@pytest.mark.parametrize("kind", ["upload", "poll", "list"])
@pytest.mark.parametrize(
    "answer", ['"no"', "[7]", "null", '{"id": [], "data": 7, "status": 1, "request_counts": "x"}', "{", "[" * 2000]
)
def test_answers_of_other_types_are_errors_of_the_server(tmp_path: Path, kind: str, answer: str) -> None:
    with serving(tmp_path, answers={kind: answer} | ({"create": answer} if kind == "list" else {})) as server:
        with pytest.raises(ServerError) as caught:
            batch_client(tmp_path, server).prefetch(ask("a car"))
        assert str(caught.value).isprintable()
        assert server.billed().total() <= 1


# ------------------------------------------------------------------------------------------------ generation


def test_malformed_replies_are_repaired_in_a_second_batch(tmp_path: Path) -> None:
    with serving(tmp_path, malformed=["2", "5"]) as server:
        result = generate(annotated_images(7), ["detail"], batch_client(tmp_path, server), tmp_path / "out")
        assert server.events()["create"] == 2
        assert (result["records"], result["retried"], result["repaired"], result["requests"]) == (7, 2, 2, 9)
        assert result["spend_usd"] == pytest.approx(EACH * server.billed().total()) == pytest.approx(9 * EACH)
        assert {r["provenance"]["client"] for r in read_json(tmp_path / "out" / "detail_7.json")} == {"batch"}
    second = generate(annotated_images(7), ["detail"], ReplayClient(tmp_path / "tape.sqlite"), tmp_path / "replayed")
    assert (second["requests"], second["replayed"], second["spend_usd"]) == (0, 9, 0)
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "replayed" / file.name).read_bytes() == file.read_bytes(), file.name


def test_command_line_prints_its_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    words = ["--annotations", write_annotations(tmp_path, 9), "--kinds", "detail", "--client", "batch", "--json"]
    tape = ["--cassette", str(tmp_path / "tape.sqlite")]
    assert cli.main(["plan", "generate", *words, *tape]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["requests"], report["cached"], report["hours"], report["client"]) == (9, 0, 24, "batch")
    with serving(tmp_path) as server:
        run = ["generate", *words, *tape, "--base-url", server.url, "--poll", "0.06", "--out", str(tmp_path / "out")]
        assert cli.main([*run, "--budget-usd", f"{1.6 * report['usd_most'] / 9}"]) == 0
        output = capsys.readouterr()
        assert (
            f"estimate: 9 requests, 0 of them in the cassette; for the others {report['tokens']['prompt']}"
            in output.err
        )
        result = json.loads(output.out)
        assert 0 < result["requests"] == result["records"] == server.billed().total() < 9
        assert result["stopped"].startswith("budget of ")
        assert cli.main(["plan", "generate", *words, *tape]) == 0
        assert json.loads(capsys.readouterr().out)["cached"] == result["records"]
        assert cli.main(run) == 0
        assert json.loads(capsys.readouterr().out)["records"] == 9 == server.billed().total()
    assert cli.main(["plan", "generate", *words, *tape]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["cached"], report["usd"], report["hours"], report["tokens"]["total"]) == (9, 0, 0, 0)


def batch_command(tmp_path: Path, server: Running) -> list[str]:
    words = ["generate", "--annotations", write_annotations(tmp_path, 9), "--kinds", "detail", "--client", "batch"]
    return [*words, "--base-url", server.url, "--poll", "0.06", "--json", "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("options", "reason", "failures"),
    [
        ({"choice": {"finish_reason": "content_filter"}}, "ended with 'content_filter'", {"UnfinishedReply": 9}),
        ({"choice": {"message": {"content": "<think>a car"}}}, "reasoning", {"OnlyReasoning": 9}),
        ({"error": [400, {"error": {"message": "the prompt was filtered"}}]}, "filtered", {"ChatError": 9}),
        ({"error": [404, {"error": {"message": "no such model", "code": "model_not_found"}}]}, "no such model", None),
        ({"refuses": ["max_tokens", "max_completion_tokens"]}, "'max_completion_tokens' is not", None),
    ],
)
def test_command_line_fails_when_nothing_came_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: dict[str, Any], reason: str, failures: Any
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serving(tmp_path, **options) as server:
        assert cli.main(batch_command(tmp_path, server)) == 1
        # of malformed replies the second request is a second batch; so is one with another parameter
        assert server.events()["create"] == 1 + ("error" not in options)
    output = capsys.readouterr()
    assert reason in output.err.splitlines()[-1]
    if failures is None:
        assert output.err.splitlines()[-1].startswith("error: model 'gpt-4-0314': status 40")
        assert not output.out
    else:
        result = json.loads(output.out)
        assert (result["records"], result["failures"]) == (0, failures)


def test_refused_parameters_are_left_out_of_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    thought = {"message": {"content": [{"type": "thinking", "thinking": "a car"}, {"type": "text", "text": "A car."}]}}
    with serving(tmp_path, refuses=["max_tokens", "temperature"], choice=thought) as server:
        assert cli.main(batch_command(tmp_path, server)) == 0
        assert server.events()["create"] == 3
        assert server.billed().total() == 9
    output = capsys.readouterr()
    assert json.loads(output.out)["records"] == 9
    assert output.err.count("does not take 'temperature' for model 'gpt-4-0314'") == 1
    records = read_json(tmp_path / "out" / "detail_9.json")
    assert {record["conversations"][1]["value"] for record in records} == {"A car."}
    assert {record["provenance"]["client"] for record in records} == {"batch, without temperature"}
    assert Cassette(tmp_path / "out" / "cassette.sqlite").doubtful() == 0


# ------------------------------------------------------------------------------------------------ kills

# when the process is killed, and the total number of batches on the server (one each for first and second requests)
STAGES = {"upload": 2, "create": 2, "poll": 2, "content": 2, "late create": 2}


@pytest.mark.parametrize("stage", STAGES)
def test_kill_at_any_stage_pays_each_request_once(tmp_path: Path, stage: str) -> None:
    with serving(tmp_path, stall=stage, malformed=["4"], ends=["expired"]) as server:
        killed = start_recording("batch", tmp_path, 12, base_url=server.url, **QUICK)
        while not server.events()[stage.removeprefix("late ")]:
            assert killed.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        killed.kill()
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        tape = Cassette(tmp_path / "tape.sqlite")
        assert len(tape) == 0
        assert (tape.open_batch() is None) == (stage == "upload")
        tape.close()
        if stage != "upload":  # one by one, the same requests would be paid twice
            with pytest.raises(ConfigError, match="a batch of 12 requests is under way; let the client 'batch'"):
                client_from_name("record", cassette=tmp_path / "tape.sqlite", base_url=server.url, api_key="none")
        with start_recording("batch", tmp_path, 12, base_url=server.url, **QUICK) as process:
            result = json.loads(process.communicate()[0])
        assert (result["records"], result["failed"], result["repaired"]) == (12, 0, 1)
        assert set(server.billed().values()) == {1}
        assert server.billed().total() == 13 == result["requests"] + result["replayed"]
        tape = Cassette(tmp_path / "tape.sqlite")
        assert tape.spend() == pytest.approx(13 * EACH) == pytest.approx(result["cost_usd"])
        assert tape.doubtful() == 0
        # the first one expires half-way and is followed by one more; one for the repair
        assert server.events()["create"] == (4 if stage == "late create" else 3)
        assert server.events()["delete"] == (stage == "late create")


def test_unconfirmed_batch_is_found_in_the_list(tmp_path: Path) -> None:
    with serving(tmp_path, lost=1) as server:
        assert all(batch_client(tmp_path, server).prefetch(ask("one", "two")))
        assert server.events()["create"] == 1
        assert set(server.billed().values()) == {1}


def test_unreadable_output_is_not_paid_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as server:
        client = batch_client(tmp_path, server)
        files = client._sdk.files
        content = files.content
        with monkeypatch.context() as broken:
            broken.setattr(files, "content", lambda file: type("Half", (), {"content": content(file).content[:-9]}))
            with pytest.raises(ServerError, match=r"tape.sqlite: batch batch_1, file file-output\S+, line 1: no JSON"):
                client.prefetch(ask("one"))
        assert client.complete(*ask("one")).text == "This is one"
        assert server.billed().total() == 1
