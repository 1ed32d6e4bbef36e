from __future__ import annotations

import sqlite3
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llava_core.runtime import ConfigError, DataError
from llava_core.teacher.client import (
    CLIENTS,
    Cassette,
    ChatError,
    ChatReply,
    LiveClient,
    Message,
    OfflineClient,
    RecordClient,
    ReplayClient,
    client_from_name,
    request_key,
)

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, what is 2 + 2?"}]


class Server:
    """A paid model that counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def complete(
        self, messages: Sequence[Message], *, model: str, temperature: float = 0.7, max_tokens: int = 10
    ) -> ChatReply:
        self.asked.append(messages[-1]["content"])
        return ChatReply(f"{model} says {len(self.asked)}", f"{model}-0314", 7, 3, 0.25, "length")


def test_the_key_of_a_request_is_the_same_everywhere_and_tells_requests_apart() -> None:
    settings = {"model": "gpt-4", "temperature": 1, "max_tokens": 9}
    key = request_key(MESSAGES, **settings)
    assert key == "6313a2fa6f4f9a26df3b25aaff0487acdff331ba2d5478783d45168166e5c9bc"  # cassettes depend on it
    assert key == request_key([dict(reversed(m.items())) for m in MESSAGES], **settings | {"temperature": 1.0})
    changed = [{"model": "gpt-4-0314"}, {"temperature": 0.9}, {"max_tokens": 8}]
    others = {request_key(MESSAGES, **settings | change) for change in changed}
    others |= {request_key(MESSAGES[::-1], **settings), request_key(MESSAGES[1:], **settings)}
    assert len(others | {key}) == 6


def test_an_offline_reply_costs_nothing() -> None:
    client = OfflineClient(lambda messages: messages[-1]["content"].upper())
    reply = client.complete(MESSAGES, model="gpt-4")
    assert reply == ChatReply("GRÜSSE, WHAT IS 2 + 2?", "offline", 8, 6)
    assert (reply.cost_usd, reply.cached) == (0.0, False)


def test_a_recorded_request_is_never_paid_again(tmp_path: Path) -> None:
    tape, server = tmp_path / "new" / "tape.sqlite", Server()
    first = RecordClient(server, tape).complete(MESSAGES, model="gpt-4", max_tokens=5)
    again = RecordClient(server, tape).complete(MESSAGES, model="gpt-4", max_tokens=5)
    replayed = ReplayClient(tape).complete(MESSAGES, model="gpt-4", max_tokens=5)
    assert len(server.asked) == 1
    assert first == ChatReply("gpt-4 says 1", "gpt-4-0314", 7, 3, 0.25, "length", cached=False)
    assert again == replayed == ChatReply("gpt-4 says 1", "gpt-4-0314", 7, 3, 0.25, "length", cached=True)
    RecordClient(server, tape).complete(MESSAGES, model="gpt-4", max_tokens=6)
    assert len(server.asked) == 2
    assert len(Cassette(tape)) == 2
    assert Cassette(tape).spend() == 0.5
    row = sqlite3.connect(tape).execute("SELECT request, date FROM replies").fetchone()
    assert "Grüße" in row[0]
    assert row[1].endswith("+00:00")


def test_the_first_reply_to_a_request_stays(tmp_path: Path) -> None:
    tape = Cassette(tmp_path / "tape.sqlite")
    tape.put("request", ChatReply("one", "m", 1, 1))
    tape.put("request", ChatReply("two", "m", 1, 1))
    kept = tape.get("request")
    assert kept is not None
    assert kept.text == "one"
    assert tape.get("another") is None


def test_a_request_that_was_not_recorded_is_an_error_that_names_it(tmp_path: Path) -> None:
    tape = tmp_path / "tape.sqlite"
    with pytest.raises(DataError, match=r"tape.sqlite: no such cassette; record one"):
        ReplayClient(tape)
    RecordClient(Server(), tape).complete(MESSAGES, model="gpt-4")
    with pytest.raises(DataError, match=r"no reply to this request \(model 'gpt-3'.*what is 2"):
        ReplayClient(tape).complete(MESSAGES, model="gpt-3")


@pytest.mark.parametrize("content", [b"not a database, but long enough to look like one" * 40, b""])
def test_a_file_that_is_no_cassette_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"notes.txt: no cassette"):
        ReplayClient(path)
    assert path.read_bytes() == content


def test_clients_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", sdk())
    tape = tmp_path / "tape.sqlite"
    Cassette(tape)
    made = {name: client_from_name(name, responder=lambda m: "", cassette=tape) for name in CLIENTS if name != "live"}
    assert [type(c).__name__ for c in made.values()] == ["OfflineClient", "ReplayClient", "RecordClient"]
    assert isinstance(client_from_name("live"), LiveClient)
    with pytest.raises(ConfigError, match="unknown chat client 'offlin'; did you mean 'offline'"):
        client_from_name("offlin")
    with pytest.raises(ConfigError, match="needs a responder"):
        client_from_name("offline")
    for name in ("record", "replay"):
        with pytest.raises(ConfigError, match=f"'{name}' needs a cassette"):
            client_from_name(name)


# ------------------------------------------------------------------------------------------------ live


def sdk(answer: Any = None, error: str | None = None) -> Any:
    """A stand-in for the openai package."""
    module = types.ModuleType("openai")

    class OpenAIError(Exception):
        pass

    class OpenAI:
        def __init__(self, **options: Any) -> None:
            self.options = options
            self.chat = self.completions = self

        def create(self, **request: Any) -> Any:
            if error:
                raise OpenAIError(error)
            return answer

    module.OpenAIError, module.OpenAI = OpenAIError, OpenAI  # type: ignore[attr-defined]
    return module


def answer(text: str | None) -> Any:
    space = types.SimpleNamespace
    choice = space(message=space(content=text), finish_reason="length")
    return space(choices=[choice], model="gpt-4-0314", usage=space(prompt_tokens=1000, completion_tokens=500))


def test_a_live_reply_is_priced_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", sdk(answer("Four.")))
    reply = LiveClient().complete(MESSAGES, model="gpt-4")
    assert reply == ChatReply("Four.", "gpt-4-0314", 1000, 500, pytest.approx(0.06), "length")
    assert LiveClient(price=(1.0, 2.0)).complete(MESSAGES, model="mine").cost_usd == pytest.approx(0.002)
    with pytest.raises(ConfigError, match=r"unknown price of model 'mine'.*give price="):
        LiveClient().complete(MESSAGES, model="mine")


def test_a_live_reply_without_text_is_an_empty_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", sdk(answer(None)))
    assert LiveClient().complete(MESSAGES, model="gpt-4").text == ""


def test_what_the_server_says_against_a_request_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", sdk(error="429:\nslow  down"))
    with pytest.raises(ChatError, match=r"^model 'gpt-4': 429: slow down$"):
        LiveClient().complete(MESSAGES, model="gpt-4")


def test_without_the_sdk_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(
        ConfigError, match=r"^a live teacher needs the package openai: pip install 'llava-core\[live\]'$"
    ):
        client_from_name("live")
