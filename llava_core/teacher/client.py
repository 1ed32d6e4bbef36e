"""Who answers a prompt: one protocol, and behind it an offline model, a cassette of past replies, or a paid server.

`record` asks the server only what its cassette does not know yet and commits each reply before the next request: the
same request is never paid twice, however the process ended. `replay` needs no server at all.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from llava_core.registry import unknown
from llava_core.runtime import CompanionError, ConfigError, DataError, shown

Message = dict[str, str]
CLIENTS = ("offline", "replay", "record", "live")
TEMPERATURE, MAX_TOKENS = 0.7, 2048  # ours: the paper gives neither
PRICES = {  # USD per million tokens of prompt and of completion, as OpenAI listed them in 2023
    "gpt-4": (30.0, 60.0),
    "gpt-4-0314": (30.0, 60.0),
    "gpt-4-0613": (30.0, 60.0),
    "gpt-4-32k-0314": (60.0, 120.0),
    "gpt-3.5-turbo-0301": (2.0, 2.0),
}


class ChatError(CompanionError):
    """The server of a paid model refused a request or could not be reached."""


@dataclass(frozen=True)
class ChatReply:
    """What came back.

    Attributes:
        text: the reply.
        model: the snapshot that says it answered; may be another name than the one asked for.
        prompt_tokens: length of the request.
        completion_tokens: length of the reply.
        cost_usd: what this reply cost when it was made.
        finish_reason: `stop`, or `length` for a reply that was cut off.
        cached: it comes from a cassette, so that nothing was paid now.
    """

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float = 0.0
    finish_reason: str = "stop"
    cached: bool = False


class ChatClient(Protocol):
    """Anything that completes a chat."""

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        temperature: float = TEMPERATURE,
        max_tokens: int = MAX_TOKENS,
    ) -> ChatReply:
        """Reply to messages of {role, content}, the last of them a user's."""
        ...


def request_key(messages: Sequence[Message], *, model: str, temperature: float, max_tokens: int) -> str:
    """Return the name of a request: SHA-256 of its canonical JSON, the same on every machine."""
    return _digest(_canonical(messages, model, temperature, max_tokens))


def _canonical(messages: Sequence[Message], model: str, temperature: float, max_tokens: int) -> str:
    request = {
        "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
        "model": model,
        "temperature": float(temperature),
        "max_tokens": int(max_tokens),
    }
    return json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


# ------------------------------------------------------------------------------------------------ clients


class OfflineClient:
    """Answers with a function of the messages; its tokens are words and cost nothing."""

    def __init__(self, responder: Callable[[list[Message]], str]) -> None:
        self.responder = responder

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        temperature: float = TEMPERATURE,
        max_tokens: int = MAX_TOKENS,
    ) -> ChatReply:
        """Reply as `ChatClient` says; the model's name is reported as `offline`."""
        text = self.responder(list(messages))
        return ChatReply(text, "offline", sum(len(m["content"].split()) for m in messages), len(text.split()))


class LiveClient:
    """Asks a server that speaks the chat-completions protocol, through the openai SDK, and pays.

    Args:
        base_url: another compatible server; OpenAI's when None.
        api_key: taken from the environment (`OPENAI_API_KEY`) when None.
        price: (USD per million prompt tokens, per million completion tokens) of a model that `PRICES` does not list.
        timeout: seconds for one request.
        retries: how often the SDK repeats a request that met a full, broken or silent server.

    Raises:
        ConfigError: the package openai is not installed, or there is no key.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        price: tuple[float, float] | None = None,
        timeout: float = 120.0,
        retries: int = 6,
    ) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ConfigError("a live teacher needs the package openai: pip install 'llava-core[live]'") from error
        self.price, self._errors = price, openai.OpenAIError
        try:
            self._sdk = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=retries)
        except openai.OpenAIError as error:
            raise ConfigError(f"the openai SDK: {_one_line(error)}") from error

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        temperature: float = TEMPERATURE,
        max_tokens: int = MAX_TOKENS,
    ) -> ChatReply:
        """Reply as `ChatClient` says.

        Raises:
            ConfigError: the model's price is not known, so that its cost could not be told; nothing was sent.
            ChatError: the server refused or could not be reached.
        """
        price = self.price or PRICES.get(model)
        if price is None:
            raise ConfigError(f"{unknown('price of model', model, PRICES)}; give price=(prompt, completion)")
        try:
            answer = self._sdk.chat.completions.create(
                messages=list(messages), model=model, temperature=temperature, max_tokens=max_tokens
            )
        except self._errors as error:
            raise ChatError(f"model '{model}': {_one_line(error)}") from error
        asked, written = (answer.usage.prompt_tokens, answer.usage.completion_tokens) if answer.usage else (0, 0)
        choice = answer.choices[0] if answer.choices else None
        return ChatReply(
            text=(choice.message.content if choice else None) or "",  # fails in the parser, and is kept
            model=answer.model,
            prompt_tokens=asked,
            completion_tokens=written,
            cost_usd=(asked * price[0] + written * price[1]) / 1e6,
            finish_reason=(choice.finish_reason if choice else None) or "stop",
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ReplayClient:
    """Answers from a cassette only.

    Raises:
        DataError: the cassette does not exist or is none.
    """

    def __init__(self, cassette: str | Path) -> None:
        if not Path(cassette).is_file():
            raise DataError(f"{shown(cassette)}: no such cassette; record one with the client 'record'")
        self.cassette = Cassette(cassette, read_only=True)

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        temperature: float = TEMPERATURE,
        max_tokens: int = MAX_TOKENS,
    ) -> ChatReply:
        """Reply as `ChatClient` says.

        Raises:
            DataError: this request was never recorded.
        """
        reply = self.cassette.get(_canonical(messages, model, temperature, max_tokens))
        if reply is None:
            raise DataError(
                f"{shown(self.cassette.path)}: holds no reply to this request (model '{model}', temperature "
                f"{temperature:g}, last message {messages[-1]['content'][:60]!r}); record it with the client 'record'"
            )
        return reply


class RecordClient:
    """Answers from a cassette, and from another client where that has no reply yet, which is then kept."""

    def __init__(self, inner: ChatClient, cassette: str | Path) -> None:
        self.inner, self.cassette = inner, Cassette(cassette)

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        temperature: float = TEMPERATURE,
        max_tokens: int = MAX_TOKENS,
    ) -> ChatReply:
        """Reply as `ChatClient` says; when this returns the reply is on disk."""
        request = _canonical(messages, model, temperature, max_tokens)
        reply = self.cassette.get(request)
        if reply is None:
            reply = self.inner.complete(messages, model=model, temperature=temperature, max_tokens=max_tokens)
            self.cassette.put(request, reply)
        return reply


def client_from_name(
    name: str,
    *,
    responder: Callable[[list[Message]], str] | None = None,
    cassette: str | Path | None = None,
    **live: Any,
) -> ChatClient:
    """Make a client by its name on the command line.

    Args:
        name: one of `CLIENTS`; `live` pays for every request, `record` for each one once.
        responder: the offline model, e.g. `llava_core.miniature.offline_chat.respond` (this room may not import it).
        cassette: SQLite file of `replay` and `record`.
        live: arguments of `LiveClient`, for `record` and `live`.

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
    return ReplayClient(cassette) if name == "replay" else RecordClient(LiveClient(**live), cassette)


# ------------------------------------------------------------------------------------------------ cassette

_COLUMNS = "text, model, prompt_tokens, completion_tokens, cost_usd, finish_reason"
_TABLE = f"replies (key TEXT PRIMARY KEY, request TEXT NOT NULL, date TEXT NOT NULL, {_COLUMNS})"


class Cassette:
    """Requests and replies in one SQLite file, by the request's key; each reply is committed before `put` returns."""

    def __init__(self, path: str | Path, read_only: bool = False) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        if not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        address = f"{self.path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        try:
            self._file = sqlite3.connect(address, uri=True, timeout=60, check_same_thread=False)
            if not read_only:
                with self._file:
                    self._file.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE}")
            self._file.execute(f"SELECT key, request, date, {_COLUMNS} FROM replies LIMIT 1")
        except sqlite3.Error as error:
            raise DataError(f"{shown(self.path)}: no cassette of replies ({error}); name another file") from error

    def get(self, request: str) -> ChatReply | None:
        """Return the reply to a canonical request, or None."""
        with self._lock:
            row = self._file.execute(f"SELECT {_COLUMNS} FROM replies WHERE key = ?", (_digest(request),)).fetchone()
        return replace(ChatReply(*row), cached=True) if row else None

    def put(self, request: str, reply: ChatReply) -> None:
        """Keep a reply; the first one to a request stays."""
        fields = asdict(replace(reply, cached=False))
        values = [fields[name] for name in _COLUMNS.split(", ")]
        date = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock, self._file:
            self._file.execute(
                f"INSERT OR IGNORE INTO replies (key, request, date, {_COLUMNS}) VALUES (?, ?, ?{', ?' * len(values)})",
                (_digest(request), request, date, *values),
            )

    def __len__(self) -> int:
        with self._lock:
            return int(self._file.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def spend(self) -> float:
        """Return what all replies together cost, in USD."""
        with self._lock:
            return float(self._file.execute("SELECT TOTAL(cost_usd) FROM replies").fetchone()[0])

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _digest(request: str) -> str:
    return hashlib.sha256(request.encode()).hexdigest()
