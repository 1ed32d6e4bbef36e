from __future__ import annotations

import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from companion.teacher.cassette import Cassette
from companion.teacher.chat import ChatReply, ChatRequest, ServerError, cost_usd
from companion.teacher.client import CLIENTS, PAID_CLIENTS, OfflineClient, RecordClient, ReplayClient, client_from_name
from companion.teacher.plan import estimate, plan, plan_text
from llava_core.runtime import ConfigError, DataError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, what is 2 + 2?"}]
REQUEST = ChatRequest(MESSAGES, "gpt-4", max_tokens=5)


class Server:
    """A paid model that counts."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.asked: list[str] = []
        self.seconds = seconds

    def complete(self, request: ChatRequest) -> ChatReply:
        self.asked.append(request.messages[-1]["content"])
        time.sleep(self.seconds)
        return ChatReply(f"says {len(self.asked)}", f"{request.model}-0314", 7, 3, 0.25, "length", 30.0, 60.0)


def test_request_keys_are_stable_and_distinct() -> None:
    request = ChatRequest(MESSAGES, "gpt-4", temperature=1, max_tokens=9)
    # cassettes depend on it
    assert request.key == "6313a2fa6f4f9a26df3b25aaff0487acdff331ba2d5478783d45168166e5c9bc"
    second = replace(request, messages=[dict(reversed(m.items())) for m in MESSAGES], temperature=1.0)
    assert second.key == request.key
    changed = [{"model": "gpt-4-0314"}, {"temperature": 0.9}, {"max_tokens": 8}]
    others = {replace(request, **change).key for change in changed}
    others |= {replace(request, messages=messages).key for messages in (MESSAGES[::-1], MESSAGES[1:])}
    assert len(others | {request.key}) == 6


def test_offline_reply_costs_nothing_and_has_no_date() -> None:
    client = OfflineClient(lambda messages: messages[-1]["content"].upper())
    reply = client.complete(REQUEST)
    assert reply == ChatReply("GRÜSSE, WHAT IS 2 + 2?", "offline", 8, 6, kind="offline")
    assert (reply.cost_usd, reply.cached, reply.date) == (0.0, False, "")


def test_recorded_request_is_never_paid_again(tmp_path: Path) -> None:
    tape, server = tmp_path / "new" / "tape.sqlite", Server()
    first = RecordClient(server, tape).complete(REQUEST)
    second = RecordClient(server, tape).complete(REQUEST)
    replayed = ReplayClient(tape).complete(REQUEST)
    assert len(server.asked) == 1
    assert first.date.endswith("+00:00")
    assert first == ChatReply("says 1", "gpt-4-0314", 7, 3, 0.25, "length", 30.0, 60.0, first.date, cached=False)
    assert second == replayed == replace(first, cached=True)
    RecordClient(server, tape).complete(replace(REQUEST, max_tokens=6))
    assert len(server.asked) == 2
    assert len(Cassette(tape)) == 2
    assert Cassette(tape).spend() == 0.5
    file = sqlite3.connect(tape)
    assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    row = file.execute("SELECT request, date, price_prompt, price_completion FROM replies").fetchone()
    assert "Grüße" in row[0]
    assert row[1:] == (first.date, 30.0, 60.0)


def test_same_request_from_several_threads_is_paid_once(tmp_path: Path) -> None:
    server = Server(seconds=0.2)
    client = RecordClient(server, tmp_path / "tape.sqlite")
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: client.complete(REQUEST), range(8)))
    assert len(server.asked) == 1
    assert {reply.text for reply in replies} == {"says 1"}
    assert sum(not reply.cached for reply in replies) == 1


def test_error_reaches_all_waiting_threads(tmp_path: Path) -> None:
    class Broken:
        def complete(self, request: ChatRequest) -> ChatReply:
            time.sleep(0.1)
            raise ServerError("gone")

    client = RecordClient(Broken(), tmp_path / "tape.sqlite")
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(client.complete, REQUEST) for _ in range(3)]
    assert {str(future.exception()) for future in asked} == {"gone"}
    client.inner = Server()
    assert client.complete(REQUEST).text == "says 1"


def test_first_reply_to_a_request_stays(tmp_path: Path) -> None:
    tape = Cassette(tmp_path / "tape.sqlite")
    tape.put(REQUEST, ChatReply("one", "m", 1, 1))
    tape.put(REQUEST, ChatReply("two", "m", 1, 1))
    kept = tape.get(REQUEST)
    assert kept is not None
    assert kept.text == "one"
    assert tape.get(replace(REQUEST, model="another")) is None


def test_cassette_in_a_read_only_folder_replays(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    tape = Cassette(folder / "tape.sqlite")
    tape.put(REQUEST, ChatReply("one", "m", 1, 1))
    tape.close()
    folder.chmod(0o555)
    try:
        assert ReplayClient(folder / "tape.sqlite").complete(REQUEST).text == "one"
    finally:
        folder.chmod(0o755)


def test_missing_recording_is_an_error_with_its_request(tmp_path: Path) -> None:
    tape = tmp_path / "tape.sqlite"
    with pytest.raises(DataError, match=r"tape.sqlite: no such cassette; record one"):
        ReplayClient(tape)
    RecordClient(Server(), tape).complete(REQUEST)
    with pytest.raises(DataError, match=r"no reply to this request \(model 'gpt-3'.*what is 2"):
        ReplayClient(tape).complete(ChatRequest(MESSAGES, "gpt-3"))


@pytest.mark.parametrize("content", [b"not a database, but long enough to look like one" * 40, b""])
def test_file_that_is_no_cassette_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"notes.txt: no cassette"):
        ReplayClient(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "hostile",
    [
        "ALTER TABLE replies RENAME TO old; CREATE VIEW replies AS WITH RECURSIVE r(key) AS (VALUES (1) UNION ALL "
        "SELECT key FROM r) SELECT * FROM r, old",
        "CREATE TRIGGER t AFTER INSERT ON failures BEGIN DELETE FROM failures; END",
        "UPDATE replies SET text = zeroblob(900000000)",
        "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 9",
    ],
)
def test_hostile_cassettes_are_refused(tmp_path: Path, hostile: str) -> None:
    tape = Cassette(tmp_path / "tape.sqlite")
    tape.put(REQUEST, ChatReply("one", "m", 1, 1))
    tape.close()
    with sqlite3.connect(tmp_path / "tape.sqlite") as file:
        file.executescript(hostile)
    for read_only in (True, False):
        with pytest.raises(DataError, match=r"tape\.sqlite: "):
            Cassette(tmp_path / "tape.sqlite", read_only).get(REQUEST)


def test_clients_by_name(tmp_path: Path) -> None:
    tape = tmp_path / "tape.sqlite"
    Cassette(tape)
    clients = {name: client_from_name(name, responder=lambda m: "", cassette=tape) for name in ("offline", "replay")}
    assert [type(c).__name__ for c in clients.values()] == ["OfflineClient", "ReplayClient"]
    assert set(clients) < set(CLIENTS)
    with pytest.raises(ConfigError, match="unknown chat client 'offlin'; did you mean 'offline'"):
        client_from_name("offlin")
    with pytest.raises(ConfigError, match="needs a responder"):
        client_from_name("offline")
    assert set(PAID_CLIENTS) == set(CLIENTS) - set(clients)
    for name in ("record", "replay", "batch"):
        with pytest.raises(ConfigError, match=f"'{name}' needs a cassette"):
            client_from_name(name)


@pytest.mark.parametrize("name", PAID_CLIENTS)
def test_without_the_sdk_the_error_names_the_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(
        ConfigError, match=r"^a live teacher needs the package openai: pip install 'llava-core\[live\]'$"
    ):
        client_from_name(name, cassette=tmp_path / "tape.sqlite")


# ------------------------------------------------------------------------------------------------ estimate


def test_estimate_counts_each_request_once_and_bounds_it() -> None:
    long = ChatRequest([{"role": "user", "content": "word " * 800}], "gpt-4", max_tokens=1000)
    output = estimate([long, long, REQUEST], concurrency=2)
    assert output["requests"] == 2
    assert output["tokens"] == {"prompt": 1004 + 16, "completion": 305, "total": 1325}
    assert output["usd"] == pytest.approx(cost_usd((1020, 305), (30, 60)), abs=1e-4)
    assert output["usd_most"] > cost_usd((4000, 1005), (30, 60))
    assert output["hours"] == pytest.approx(305 / 20 / 2 / 3600, abs=1e-4)
    assert estimate([])["usd"] == 0
    with pytest.raises(ConfigError, match=r"unknown price of model 'mine'.*give --price PROMPT,REPLY"):
        estimate([ChatRequest(MESSAGES, "mine")])
    assert estimate([ChatRequest(MESSAGES, "mine")], {"mine": (0.0, 0.0)})["usd_most"] == 0


def test_plan_uses_cassette_and_batch_price(tmp_path: Path) -> None:
    tape = tmp_path / "tape.sqlite"
    requests = [replace(REQUEST, max_tokens=k) for k in (5, 6, 7)]
    all_of_them = plan([*requests, REQUEST], cassette=tape)
    assert (all_of_them["requests"], all_of_them["cached"], all_of_them["memory_gib"]) == (3, 0, 0)
    assert not tape.exists()
    RecordClient(Server(), tape).complete(REQUEST)
    rest = plan(requests, cassette=tape)
    assert (rest["requests"], rest["cached"]) == (3, 1)
    assert {key: rest[key] for key in ("tokens", "usd", "usd_most")} == {
        key: estimate(requests[1:])[key] for key in ("tokens", "usd", "usd_most")
    }
    half = plan(requests, "batch", tape)
    assert half["usd_most"] == pytest.approx(rest["usd_most"] / 2, abs=1e-4)
    assert (half["hours"], plan(requests[:1], "batch", tape)["hours"]) == (24, 0)
    own = plan([ChatRequest(MESSAGES, "mine")], price=(1e6, 0.0))
    assert own["usd"] == own["tokens"]["prompt"]
    with pytest.raises(ConfigError, match=r"unknown price of model 'mine'"):
        plan([ChatRequest(MESSAGES, "mine")])
    output = plan_text(half)
    assert output.startswith("estimate: 3 requests, 1 of them in the cassette; for the others ")
    assert output.endswith("up to 24.0 hours")
    assert "up to" not in plan_text(rest)
