"""Chat clients by name: an offline function, a cassette of recorded replies, or a paid server.

`record` sends only the requests without a recorded reply (`teacher.cassette`), `batch` the same through the server's
batch endpoint, at half the price and within a day (`teacher.batch`). `replay` needs no server.
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
from companion.teacher.cassette import Cassette, WriterLock, lock_cassette
from companion.teacher.chat import ChatClient, ChatError, ChatReply, ChatRequest, Message, valid_unicode
from companion.teacher.live import LiveClient
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError, display_path

CLIENTS = ("offline", "replay", "record", "batch", "live")
PAID_CLIENTS = ("record", "batch", "live")


class OfflineClient:
    """Replies with a function of the messages; its tokens are words and cost nothing."""

    def __init__(self, responder: Callable[[list[Message]], str]) -> None:
        self.responder = responder

    def complete(self, request: ChatRequest) -> ChatReply:
        text = valid_unicode(self.responder(list(request.messages)))
        words = sum(len(m["content"].split()) for m in request.messages)
        return ChatReply(text, "offline", words, len(text.split()), kind="offline")


class ReplayClient:
    """Replies from a cassette only; DataError if the file does not exist or is no cassette."""

    def __init__(self, cassette: str | Path) -> None:
        if not Path(cassette).is_file():
            raise DataError(f"{display_path(cassette)}: no such cassette; record one with the client 'record'")
        self.cassette = Cassette(cassette, read_only=True)

    def complete(self, request: ChatRequest) -> ChatReply:
        """Complete a chat, as of `ChatClient`; DataError if it was never recorded."""
        reply = self.cassette.get(request)
        if reply is None and (why := self.cassette.given_up(request)):
            raise ChatError(why)
        if reply is None:
            last = request.messages[-1]["content"][:60]
            raise DataError(
                f"{display_path(self.cassette.path)}: holds no reply to this request (model '{request.model}', "
                f"temperature {request.temperature:g}, last message {last!r}); record it with the client 'record'"
            )
        return reply


class RecordClient:
    """Replies from a cassette; a request without a recorded reply goes to `inner` and is recorded."""

    def __init__(self, inner: ChatClient, cassette: str | Path | Cassette, lock: WriterLock | None = None) -> None:
        self.inner, self.lock = inner, lock
        self.cassette = cassette if isinstance(cassette, Cassette) else Cassette(cassette)
        self.concurrency: int = getattr(inner, "concurrency", 1)
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[ChatReply]] = {}

    def complete(self, request: ChatRequest) -> ChatReply:
        """Complete a chat, as of `ChatClient`; when this returns the reply is on disk."""
        with self._lock:
            if reply := self.cassette.get(request):
                return reply
            # two images may have the same captions: the second request waits for the first one's reply
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

    def stop(self) -> None:
        getattr(self.inner, "stop", lambda: None)()


def client_from_name(
    name: str,
    *,
    responder: Callable[[list[Message]], str] | None = None,
    cassette: str | Path | None = None,
    **live: Any,
) -> ChatClient:
    """Return a client by its name on the command line.

    Args:
        name: one of `CLIENTS`; `live` pays for every request, `record` and `batch` for each one once.
        responder: the offline model, e.g. `companion.miniature.offline_chat.respond` (not imported here).
        live: arguments of `LiveClient`, for `record` and `live`, or of `BatchClient`.

    Raises:
        ConfigError: unknown name, a missing argument, no package openai, no key, or a cassette in use.
        DataError: the file is no cassette.
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
    if name == "batch":
        return BatchClient(cassette, **live)
    tape = Cassette(cassette)
    client = RecordClient(LiveClient(cassette=tape, **live), tape, lock_cassette(tape.path))
    if batch := tape.open_batch():  # sent one by one, these requests would be paid twice
        client.lock = None  # otherwise a traceback would hold a reference to it
        open_batch = f"a batch of {len(batch.requests)} requests is under way"
        raise ConfigError(
            f"{display_path(cassette)}: {open_batch}; let the client 'batch' read it, or name another cassette"
        )
    return client
