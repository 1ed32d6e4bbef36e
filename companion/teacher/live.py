"""Client of a paid server: chat completions through the openai SDK and its retries, and a budget."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

from companion.teacher.cassette import Cassette
from companion.teacher.chat import (
    PRICES,
    BudgetError,
    ChatError,
    ChatReply,
    ChatRequest,
    Price,
    ServerError,
    cost_usd,
    price_of,
)
from companion.teacher.connection import UnusableAnswerError, one_line, open_sdk
from companion.teacher.protocol import (
    Dialect,
    NoCompletionError,
    RetryableError,
    left_out,
    read_reply,
    retryable,
    same_for_all,
    unreadable_reply,
)

CONCURRENCY = 8


class _NotSent(BaseException):
    """Carries an error out of the SDK, which repeats a request after an `Exception`."""

    def __init__(self, error: ChatError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class _Call:
    """A request; one attempt costs at most `most` USD, and `open` is the cassette's number of the one under way."""

    request: ChatRequest
    most: float
    attempts: int = 0
    open: int | None = None
    kind: str = "live"


class LiveClient:
    """Client of a server with the chat-completions protocol; every reply is paid.

    The openai SDK repeats attempts that failed with status 408, 409, 429 or 5xx, with a timeout or with a broken
    connection, after the server's `Retry-After` of at most two minutes or with exponential backoff. A body that is no
    JSON is requested again, too. An attempt that the server may have billed counts with the most that it can cost. An
    answer that is no chat completion or too large is recorded with this cost and without text.

    The first request of a model is answered before others are sent: a parameter that the server does not take is
    learned once (`protocol.Dialect`), and a refusal that holds for all requests is met once.

    Args:
        base_url: another compatible server; OpenAI's when None.
        api_key: taken from the environment (`OPENAI_API_KEY`) when None.
        price: USD per million tokens of prompt and reply, for a model that `PRICES` does not list.
        timeout: seconds without a byte from the server, after which an attempt has failed; also after three times as
            long in all.
        budget_usd: send nothing that could exceed it, with all that the cassette holds; None for no limit.
        cassette: records replies and attempts; a temporary one when None.

    Raises:
        ConfigError: the package openai is not installed, or there is no key.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        price: Price | None = None,
        timeout: float = 120.0,
        retries: int = 8,
        budget_usd: float | None = None,
        concurrency: int = CONCURRENCY,
        cassette: Cassette | None = None,
    ) -> None:
        hooks = self._before_attempt, self._after_answer
        self._openai, self._sdk = open_sdk(base_url, api_key, timeout, retries, *hooks)
        self.price, self.timeout, self.retries, self.concurrency = price, timeout, retries, concurrency
        self.budget_usd, self.cassette = budget_usd, Cassette(None) if cassette is None else cassette
        self._stopped, self._changed, self._under_way = threading.Event(), threading.Condition(), 0
        self._dialect, self._first = Dialect(), threading.Lock()
        self._known: set[str] = set()  # models whose first request is answered
        self._refused: dict[str, str] = {}  # why no request of a model can succeed
        self._thread = threading.local()  # the call of each thread, for the hooks

    def complete(self, request: ChatRequest) -> ChatReply:
        """Complete a chat, as of `ChatClient`.

        Raises:
            ConfigError: the model's price is not known; nothing was sent.
            BudgetError, ServerError, ChatError: there is no reply, for the reason that the class names.
        """
        price = price_of(request.model, PRICES, self.price)
        if request.model not in self._known:
            with self._first:
                if request.model not in self._known:
                    try:
                        return self._complete(request, price)
                    finally:
                        self._known.add(request.model)
        return self._complete(request, price)

    def _complete(self, request: ChatRequest, price: Price) -> ChatReply:
        call = self._thread.call = _Call(request, cost_usd(request.most_tokens(), price))
        try:
            reply = self._send(call, price)
            self.cassette.put(request, reply, call.open)
            return reply
        except _NotSent as stopped:
            raise stopped.error from None
        except ServerError as error:
            self._refused[request.model] = str(error)
            raise
        except ChatError as error:
            self.cassette.fail(request, str(error), last=True)
            raise
        finally:
            self._close(call)

    def stop(self) -> None:
        """Begin no further attempt; those under way are finished."""
        self._stopped.set()

    def _send(self, call: _Call, price: Price) -> ChatReply:
        why = ""
        while call.attempts <= self.retries:
            try:
                return replace(read_reply(self._create(call), call.request, price), kind=call.kind)
            except (NoCompletionError, UnusableAnswerError) as error:
                return replace(unreadable_reply(call.request, price, str(error)), kind=call.kind)
            except RetryableError as error:
                why = str(error)
        raise self._no_reply(call, why)

    def _create(self, call: _Call) -> bytes:
        openai, request = self._openai, call.request
        sdk = self._sdk.with_options(max_retries=self.retries - call.attempts)
        sent = self._dialect.body(request)
        call.kind = f"live{left_out(sent)}"
        try:
            answer = sdk.chat.completions.with_raw_response.create(**sent)
            return bytes(answer.content)
        except openai.APIStatusError as error:
            if self._dialect.learn(request.model, sent, error.status_code, error.body):
                call.attempts -= 1
                return self._create(call)
            why = f"status {error.status_code}: {one_line(error)}"
            if same_for_all(error.status_code, error.body):
                raise ServerError(f"model '{request.model}': {why}") from error
            if retryable(error.status_code):
                raise self._no_reply(call, why) from error
            raise ChatError(f"model '{request.model}': {why}") from error
        except openai.APIConnectionError as error:
            silent = isinstance(error, openai.APITimeoutError)
            why = f"no reply in {self.timeout:g} s" if silent else one_line(error.__cause__ or error)
            raise self._no_reply(call, why) from error
        except openai.OpenAIError as error:
            raise ChatError(f"model '{request.model}': {one_line(error)}") from error

    def _no_reply(self, call: _Call, why: str) -> ChatError:
        return ChatError(f"model '{call.request.model}': no reply in {call.attempts} attempts; the last one: {why}")

    def _before_attempt(self, _: Any) -> None:
        """Record an attempt; wait while requests under way may still leave enough of the budget."""
        call: _Call = self._thread.call
        self._close(call)  # an attempt without an answer
        with self._changed:
            while call.open is None:
                try:
                    refused = self._refused.get(call.request.model)
                    if self._stopped.is_set() or refused:
                        raise _NotSent(ServerError(refused or "the client was stopped"))
                    call.open = self.cassette.begin(call.request, call.most, self.budget_usd)
                except BudgetError as error:
                    if not self._under_way:
                        raise _NotSent(error) from error
                    self._changed.wait()
            self._under_way += 1
        call.attempts += 1

    def _after_answer(self, response: Any) -> None:
        call: _Call = self._thread.call
        if response.status_code == 429 and b"insufficient_quota" in response.read():
            response.headers["x-should-retry"] = "false"  # otherwise the SDK waits and repeats it
        if response.status_code != 200 and call.open is not None:  # not billed
            self.cassette.cancel(call.open)
            self._close(call)

    def _close(self, call: _Call) -> None:
        """End the attempt under way; without a recorded reply it counts as billed."""
        if call.open is not None:
            call.open = None
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()
