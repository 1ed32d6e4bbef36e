"""Who answers a prompt: one protocol, and behind it an offline model, a cassette of past replies, or a paid server.

`record` asks the server only what its cassette does not know yet and commits each reply on arrival, in a process of its
own that outlives a killed caller (`teacher.recorder`): the same request is never paid twice. `batch` does so through
the server's batch endpoint, at half the price and within a day (`teacher.batch`). `replay` needs no server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from companion.teacher.batch import BatchClient
from companion.teacher.cassette import Cassette
from companion.teacher.chat import (
    MAX_TOKENS,
    PRICES,
    TEMPERATURE,
    BudgetError,
    ChatClient,
    ChatError,
    ChatReply,
    ChatRequest,
    Message,
    ServerError,
    estimate,
)
from companion.teacher.live import LiveClient
from companion.teacher.recorder import RecorderProcess
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError, shown

__all__ = [
    "CLIENTS",
    "MAX_TOKENS",
    "PAYING",
    "PRICES",
    "TEMPERATURE",
    "BatchClient",
    "BudgetError",
    "Cassette",
    "ChatClient",
    "ChatError",
    "ChatReply",
    "ChatRequest",
    "LiveClient",
    "Message",
    "OfflineClient",
    "RecordClient",
    "RecorderProcess",
    "ReplayClient",
    "ServerError",
    "client_from_name",
    "estimate",
]
CLIENTS = ("offline", "replay", "record", "batch", "live")
PAYING = ("record", "batch", "live")


class OfflineClient:
    """Answers with a function of the messages; its tokens are words and cost nothing."""

    def __init__(self, responder: Callable[[list[Message]], str]) -> None:
        self.responder = responder

    def complete(self, request: ChatRequest) -> ChatReply:
        """Reply as `ChatClient` says; the model's name is reported as `offline`."""
        text = self.responder(list(request.messages))
        words = sum(len(m["content"].split()) for m in request.messages)
        return ChatReply(text, "offline", words, len(text.split()), kind="offline")


class ReplayClient:
    """Answers from a cassette only.

    Raises:
        DataError: the cassette does not exist or is none.
    """

    def __init__(self, cassette: str | Path) -> None:
        if not Path(cassette).is_file():
            raise DataError(f"{shown(cassette)}: no such cassette; record one with the client 'record'")
        self.cassette = Cassette(cassette, read_only=True)

    def complete(self, request: ChatRequest) -> ChatReply:
        """Reply as `ChatClient` says.

        Raises:
            DataError: this request was never recorded.
            ChatError: it was given up when it was recorded.
        """
        reply = self.cassette.get(request)
        if reply is None and (why := self.cassette.given_up(request)):
            raise ChatError(why)
        if reply is None:
            last = request.messages[-1]["content"][:60]
            raise DataError(
                f"{shown(self.cassette.path)}: holds no reply to this request (model '{request.model}', temperature "
                f"{request.temperature:g}, last message {last!r}); record it with the client 'record'"
            )
        return reply


class RecordClient:
    """Answers from a cassette, and from another client where that has no reply yet, which is then kept.

    This one works inside the caller's process: a kill between a reply's arrival and its commit, about a millisecond,
    loses the reply. `client_from_name("record")` gives the one that does not (`teacher.recorder`).
    """

    def __init__(self, inner: ChatClient, cassette: str | Path | Cassette) -> None:
        self.inner = inner
        self.cassette = cassette if isinstance(cassette, Cassette) else Cassette(cassette)
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[ChatReply]] = {}
        if isinstance(inner, LiveClient):
            inner.on_reply, inner.on_failure = self.cassette.put, self.cassette.fail

    def complete(self, request: ChatRequest) -> ChatReply:
        """Reply as `ChatClient` says; when this returns the reply is on disk."""
        with self._lock:
            if reply := self.cassette.get(request):
                return reply
            # two images may have the same captions: the second one waits for the first one's reply
            shared = self._under_way.get(request.key)
            mine = self._under_way.setdefault(request.key, Future())
        if shared is not None:
            return replace(shared.result(), cached=True)
        try:
            reply = self.inner.complete(request)
            reply = replace(reply, date=reply.date or datetime.now(UTC).isoformat(timespec="seconds"))
            self.cassette.put(request, reply)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(reply)
            return reply
        finally:
            with self._lock:
                del self._under_way[request.key]


def client_from_name(
    name: str,
    *,
    responder: Callable[[list[Message]], str] | None = None,
    cassette: str | Path | None = None,
    **live: Any,
) -> ChatClient:
    """Make a client by its name on the command line.

    Args:
        name: one of `CLIENTS`; `live` pays for every request, `record` and `batch` for each one once.
        responder: the offline model, e.g. `companion.miniature.offline_chat.respond` (this room may not import it).
        cassette: SQLite file of `replay`, `record` and `batch`.
        live: arguments of `LiveClient`, for `record` and `live`, or of `BatchClient`.

    Raises:
        ConfigError: unknown name, or the argument that the client needs is missing.
    """
    if name not in CLIENTS:
        raise ConfigError(unknown("chat client", name, CLIENTS))
    if name == "offline":
        if responder is None:
            raise ConfigError("the offline client needs a responder: a function from messages to a reply")
        return OfflineClient(responder)
    if name == "live":
        return LiveClient(**live)
    if cassette is None:
        raise ConfigError(f"the client '{name}' needs a cassette: the SQLite file that holds the replies")
    if name == "replay":
        return ReplayClient(cassette)
    return BatchClient(cassette, **live) if name == "batch" else RecorderProcess(cassette, **live)
