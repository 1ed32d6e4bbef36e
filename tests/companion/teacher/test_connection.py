"""Hostile answers of a server: none ends a run, costs twice, follows a redirect, or repeats the key in a file."""

from __future__ import annotations

import json
import sqlite3
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from cassette_processes import annotated_images, generate
from chat_server import serving

from companion.teacher.asking import follow_up
from companion.teacher.cassette import Cassette
from companion.teacher.chat import BudgetError, ChatError, ChatReply, ChatRequest, ServerError, cost_usd
from companion.teacher.client import ReplayClient, client_from_name
from companion.teacher.connection import asked_wait, secret_filter
from companion.teacher.live import LiveClient
from companion.teacher.protocol import read_reply
from companion.teacher.reasoning import without_reasoning
from llava_core.runtime import ConfigError, DataError

pytest.importorskip("openai", reason="the live teacher speaks through the openai SDK: pip install 'llava-core[live]'")

KEY = "sk-proj-0123456789abcdef"
REQUEST = ChatRequest([{"role": "user", "content": "What is in the image?"}], "gpt-4-0314", max_tokens=50)


def completion(content: Any = "A man stands next to a car.", **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return {"model": "gpt-4-0314", "choices": [choice | fields.pop("choice", {})], **fields}


def recording(tmp_path: Path, url: str, **options: Any) -> Any:
    options = {"base_url": url, "api_key": KEY, "timeout": 5.0, "retries": 1, "concurrency": 2} | options
    return client_from_name("record", cassette=tmp_path / "tape.sqlite", **options)


ANSWERS = {
    "half of a character in the text": completion("A man \ud83d"),
    "half of a character as bytes": '{"choices": [{"message": {"content": "A man \xed\xa0\xbd"}}]}',
    "half of a character elsewhere": completion(model="\udc00", choice={"finish_reason": "\ud83d"}),
    "usage of infinity": completion(usage={"prompt_tokens": float("inf"), "completion_tokens": float("nan")}),
    "usage beyond 64 bits": completion(usage={"prompt_tokens": 2**70, "completion_tokens": 2**70}),
    "number of 5000 digits": json.dumps(completion(usage=0)).replace(' 0}', f' {"9" * 5000}}}'),
    "levels in the body": "",
    "levels in the content": '{"choices": [{"message": {"content": ',
    "no list of choices": {"choices": 7, "usage": [1]},
    "no object": [7],
    "other types": completion({"a": [1]}, choice={"finish_reason": [7]}, usage="many", model={"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_paid_reply_is_recorded_once_whatever_it_is(tmp_path: Path, name: str) -> None:
    repeat = ["[", 200_000 if name.startswith("levels") else 0]
    with serving(tmp_path, raw={"body": ANSWERS[name], "repeat": repeat}) as server:
        results = []
        for _ in range(2):
            client = recording(tmp_path, server.url)
            results.append(generate(annotated_images(2), ["detail"], client, tmp_path / "out", max_tokens=50))
            del client
        requests = len(server.stop()["times"])
    assert results[0]["records"] + results[0]["failed"] == 2
    assert (results[0]["requests"], results[1]["requests"]) == (requests, 0)
    assert 0 < results[0]["spend_usd"] < 1
    assert results[0]["spend_usd"] == pytest.approx(Cassette(tmp_path / "tape.sqlite").spend())
    generate(annotated_images(2), ["detail"], ReplayClient(tmp_path / "tape.sqlite"), tmp_path / "again", max_tokens=50)


COUNTS = [-5, 0, -(2**70), 2**70, 1e400, float("nan"), "900", True, None, [9], 0.5, 1]


@pytest.mark.parametrize("count", COUNTS)
def test_impossible_usage_is_charged_as_estimated(count: Any) -> None:
    body = json.dumps(completion(usage={"prompt_tokens": count, "completion_tokens": count})).encode()
    request = ChatRequest([{"role": "user", "content": "word " * 80}], "gpt-4-0314")
    reply = read_reply(body, request, (30.0, 60.0))
    assert (reply.prompt_tokens, reply.completion_tokens) == (104, 8)
    assert reply.cost_usd == pytest.approx(cost_usd((104, 8), (30.0, 60.0)))


@pytest.mark.parametrize("usage", [{"prompt_tokens": -(10**6), "completion_tokens": -(10**6)}, [0, 0]])
def test_budget_ends_whatever_the_server_reports(tmp_path: Path, usage: Any) -> None:
    with serving(tmp_path, usage=usage) as server:
        client = recording(tmp_path, server.url, budget_usd=0.5)
        result = generate(annotated_images(40), ["detail"], client, tmp_path / "out", max_tokens=50)
        assert 3 < len(server.billed()) < 25
    assert 0 < result["spend_usd"] <= 0.5
    assert "budget of 0.5 USD" in result["stopped"]


@pytest.mark.parametrize(
    ("column", "value"),
    [("cost_usd", -270.0), ("cost_usd", "-9"), ("prompt_tokens", -3), ("text", b"\xff"), ("model", 7)],
)
def test_damaged_rows_of_a_cassette_add_nothing_to_the_budget(tmp_path: Path, column: str, value: Any) -> None:
    tape = Cassette(tmp_path / "tape.sqlite")
    tape.put(REQUEST, ChatReply("one", "m", 1, 1, 0.25))
    with sqlite3.connect(tmp_path / "tape.sqlite") as file:
        file.execute(f"UPDATE replies SET {column} = ?", (value,))
        file.execute("INSERT INTO failures VALUES ('k', '', '', -9.0, 0)")
    assert 0 <= tape.spend() <= 0.25
    assert tape.doubtful() == 0
    other = ChatRequest(REQUEST.messages, "gpt-4")
    for budget in (0.5, float("nan")):
        with pytest.raises(BudgetError):
            tape.begin(other, 0.6, budget)
    with pytest.raises(DataError, match=rf"tape.sqlite: the reply to request {REQUEST.key} has the {column}"):
        tape.get(REQUEST)


def test_reply_beyond_its_limit_is_not_sent_back_whole() -> None:
    for text in ("short", "x" * 4 * 2**20):
        second = follow_up(REQUEST, ChatReply(text, "m", 1, 1), "again")
        assert second.messages[1]["content"] == text[:1000]
        assert second.most_tokens()[0] < 1200


@pytest.mark.parametrize("price", [(-1.0, 60.0), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_impossible_price_is_refused(price: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="give two finite numbers of at least 0"):
        LiveClient("http://127.0.0.1:9/v1", KEY, price=price).complete(REQUEST)


# ------------------------------------------------------------------------------------------------ secrets

ESCAPED = "".join(f"\\u{ord(c):04x}" for c in KEY)
ECHOES: dict[str, dict[str, Any]] = {
    "text": {"body": completion("You sent Authorization: KEY to me.")},
    "model and reason": {"body": completion(model="KEY", choice={"finish_reason": "KEY"})},
    "no completion": {"body": "proxy error, headers: authorization=KEY"},
    "escaped": {"body": json.dumps(completion("It is X.")).replace("X", ESCAPED)},
    "upper case": {"status": 400, "body": {"error": {"message": f"no model for {KEY.upper()}"}}},
    "fatal": {"status": 401, "body": {"error": {"message": "Incorrect API key provided: KEY"}}},
    "redirect": {"status": 307, "headers": ["Location: http://127.0.0.1:9/?key=KEY"]},
    "invalid header": {"headers": ["You sent KEY"]},
}


@pytest.mark.parametrize("name", ECHOES)
def test_key_that_a_server_repeats_is_in_no_file_and_message(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ""
    with serving(tmp_path, raw=ECHOES[name]) as server:
        try:
            client = recording(tmp_path, server.url)
            generate(annotated_images(2), ["detail", "complex"], client, tmp_path / "out", max_tokens=50)
        except ChatError as error:
            said = "".join(traceback.format_exception(error))
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    said += capsys.readouterr().err
    assert any(b"[API key]" in content for content in [*files, said.encode()])
    for content in [*files, said.encode()]:
        assert KEY.encode() not in content
        assert KEY.upper().encode() not in content


@pytest.mark.parametrize("sent", ["dXNlcjpwL3NzOjE=", "p/ss:1", "P%2Fss%3a1", "p\\/ss:1", KEY, f"Bearer%20{KEY}"])
def test_password_of_an_address_is_replaced(sent: str) -> None:
    hide = secret_filter("https://user:p%2Fss%3A1@host/v1", KEY)
    assert hide(f"a {sent} b".encode()).replace(b"Bearer%20", b"") == b"a [API key] b"
    assert secret_filter(None, "none")(b"none of them") == b"none of them"


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nX-Other: 1", f"{KEY}\u00e9"])
def test_key_that_no_header_can_have_is_not_printed(key: str) -> None:
    with pytest.raises(ConfigError, match="the API key has a") as caught:
        LiveClient("http://127.0.0.1:9/v1", key)
    assert KEY not in str(caught.value)


# ------------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(tmp_path: Path, status: int) -> None:
    (tmp_path / "other").mkdir()
    with serving(tmp_path / "other") as other, serving(
        tmp_path, raw={"status": status, "headers": [f"Location: {other.url}/chat/completions?\x1b[2J"]}
    ) as server:  # fmt: skip
        with pytest.raises(
            ServerError, match=rf"status {status}: .*the server redirects to {other.url}/chat"
        ) as caught:
            recording(tmp_path, server.url).complete(REQUEST)
        assert str(caught.value).isprintable()
        assert len(server.stop()["times"]) == 1
        assert other.stop()["times"] == []


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"spaces": 2**28, "body": completion()}, "the answer is larger than 4 MiB"),
        ({"body": completion(), "repeat": [" ", 5 * 2**20]}, "the answer is larger than 4 MiB"),
        ({"drip": 0.0, "bytes": 2**16}, "the answer is larger than 4 MiB"),
        ({"headers": ["Content-Encoding: gzip, gzip"]}, "the answer has the encoding gzip, gzip"),
        ({"headers": ["Content-Encoding: gzip"], "body": "no"}, "the answer is not valid gzip"),
    ],
)  # fmt: skip
def test_unusable_body_is_recorded_without_text(tmp_path: Path, raw: dict[str, Any], why: str) -> None:
    with serving(tmp_path, raw=raw) as server:
        begin = time.monotonic()
        for cached in (False, True):
            reply = recording(tmp_path, server.url, timeout=20).complete(REQUEST)
            assert (reply.text, reply.cached) == ("", cached)
            assert reply.finish_reason.startswith(f"unreadable: {why}")
            assert reply.cost_usd == pytest.approx(cost_usd(REQUEST.most_tokens(), (30.0, 60.0)))
        assert time.monotonic() - begin < 30
        assert len(server.stop()["times"]) == 1


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"status": 400, "drip": 0.0, "bytes": 2**16}, "the answer is larger than 4 MiB"),
        ({"status": 400, "headers": ["Content-Encoding: br"]}, "the answer has the encoding br"),
        ({"status": 307, "drip": 0.1, "headers": ["Location: /a"]}, "the server redirects to /a"),
    ],
)
def test_unusable_body_of_a_refusal_costs_nothing(tmp_path: Path, raw: dict[str, Any], why: str) -> None:
    with serving(tmp_path, raw=raw) as server:
        with pytest.raises(ChatError, match=f"status {raw['status']}: .*{why}"):
            recording(tmp_path, server.url).complete(REQUEST)
        tape = Cassette(tmp_path / "tape.sqlite")
        assert (len(tape), tape.doubtful()) == (0, 0)


def test_small_compressed_body_is_read(tmp_path: Path) -> None:
    with serving(tmp_path, raw={"spaces": 1000, "body": completion()}) as server:
        assert recording(tmp_path, server.url).complete(REQUEST).text == "A man stands next to a car."


@pytest.mark.parametrize("part", ["head", "body"])
def test_endless_answer_ends_after_three_timeouts(tmp_path: Path, part: str) -> None:
    with serving(tmp_path, raw={"drip": 0.1, "part": part}) as server:
        begin = time.monotonic()
        with pytest.raises(ChatError, match=r"no whole answer in 1\.5 s"):
            recording(tmp_path, server.url, timeout=0.5).complete(REQUEST)
        assert 1.5 <= time.monotonic() - begin < 5
        assert Cassette(tmp_path / "tape.sqlite").doubtful() > 0


LONG = "note: status 429: the server asks for a wait of {} s; more than 120 s are not waited"


@pytest.mark.parametrize(
    ("value", "attempts", "note"),
    [
        ("31536000", 1, LONG.format("3.154e+07")),
        ("1e400", 1, LONG.format("inf")),
        ("Fri, 31 Dec 2999 23:59:59 GMT", 1, "are not waited"),
        ("-5", 2, ""),
        ("nan", 2, ""),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 2, ""),
        ("5.5", 2, "note: status 429: the server asks for a wait of 5.5 s\n"),
    ],
)
def test_waits_are_bounded_and_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, attempts: int, note: str
) -> None:
    with serving(tmp_path, raw={"status": 429, "headers": [f"Retry-After: {value}"]}) as server:
        begin = time.monotonic()
        with pytest.raises(ChatError, match="status 429"):
            recording(tmp_path, server.url).complete(REQUEST)
        assert time.monotonic() - begin < 15
        assert len(server.stop()["times"]) == attempts
    error = capsys.readouterr().err
    assert note in error
    assert bool(note) == bool(error)


def test_wait_in_milliseconds() -> None:
    assert asked_wait({"retry-after-ms": "1500", "retry-after": "2"}) == 1.5
    assert asked_wait({}) is None


ENDLESS = [
    "<" + "think" * 20_000,
    "```" + "think" * 20_000,
    "thoughts:" + "\n" * 100_000,
    "<details " + "reasoning" * 9_000,
]


@pytest.mark.parametrize("text", ENDLESS)
def test_reasoning_is_searched_in_linear_time(text: str) -> None:
    begin = time.monotonic()
    without_reasoning(text)
    assert time.monotonic() - begin < 5
