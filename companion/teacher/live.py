"""The paid server: chat completions over HTTP through the openai SDK, with our own attempts, waits and budget."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

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
from llava_core.runtime import ConfigError

CONCURRENCY = 8
HOPELESS = (401, 403, 404)  # the next request would meet the same answer
MANY_LIMITED = 4  # answers 429 in a row, after which all requests wait and not only those that were refused
LONGEST_WAIT = 60.0  # seconds between two attempts where the server does not say how long
NO_SDK = "a live teacher needs the package openai: pip install 'llava-core[live]'"


class Again(Exception):  # noqa: N818 - not an error yet
    """An attempt failed in a way that another one may not; `doubtful` if the server may have billed it."""

    def __init__(self, why: str, wait: float | None = None, doubtful: bool = False, limited: bool = False) -> None:
        super().__init__(why)
        self.wait, self.doubtful, self.limited = wait, doubtful, limited


def open_sdk(
    client: str, base_url: str | None, api_key: str | None, timeout: float, max_retries: int
) -> tuple[Any, Any]:
    """Return the openai package and its client of that name.

    Raises:
        ConfigError: the package is not installed, or there is no key.
    """
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ConfigError(NO_SDK) from error
    settings = {"base_url": base_url, "api_key": api_key, "timeout": timeout, "max_retries": max_retries}
    try:
        return openai, getattr(openai, client)(**settings)
    except openai.OpenAIError as error:
        raise ConfigError(f"the openai SDK: {one_line(error)}") from error


class Budget:
    """USD that may be spent; what a request could cost at most is set aside before it is sent.

    Args:
        limit: USD; None for no limit.
        spent: USD that count from the start.
        doubtful: USD that may have been billed before for nothing; they count too.
    """

    def __init__(self, limit: float | None, spent: float = 0.0, doubtful: float = 0.0) -> None:
        self.limit, self.spent, self.doubtful, self.reserved = limit, spent, doubtful, 0.0
        self._changed = asyncio.Condition()

    async def reserve(self, most: float) -> None:
        """Set `most` USD aside; waits for requests under way while they may leave enough.

        Raises:
            BudgetError: there is not that much left, and nothing under way that could give some back.
        """
        async with self._changed:
            while self.limit is not None and self.spent + self.doubtful + self.reserved + most > self.limit + 1e-9:
                if self.reserved <= 1e-12:
                    doubt = f" and {self.doubtful:.4f} that may have been billed" if self.doubtful else ""
                    raise BudgetError(
                        f"budget of {self.limit:g} USD: {self.spent:.4f} spent{doubt}, and the next request may cost "
                        f"{most:.4f}; raise the budget to go on"
                    )
                await self._changed.wait()
            self.reserved += most

    async def settle(self, most: float, spent: float = 0.0, doubtful: float = 0.0) -> None:
        """Give back what was set aside, and count what it came to."""
        async with self._changed:
            self.reserved = max(self.reserved - most, 0.0)
            self.spent += spent
            self.doubtful += doubtful
            self._changed.notify_all()


class LiveClient:
    """Asks a server that speaks the chat-completions protocol, and pays.

    Repeated are: status 429 and 5xx, replies that do not come in time (also those that drip), closed connections,
    truncated and invalid JSON. The wait is the server's `Retry-After` (seconds or a date) or grows exponentially, with
    jitter; where several requests in a row are told 429, all wait.

    Args:
        base_url: another compatible server; OpenAI's when None.
        api_key: taken from the environment (`OPENAI_API_KEY`) when None.
        price: (USD per million prompt tokens, per million completion tokens) of a model that `PRICES` does not list.
        timeout: seconds for one attempt, from its start to the last byte.
        retries: how many more attempts follow a failed one.
        backoff: seconds before the second attempt; they double with each further one.
        budget_usd: stop before more than this is spent; None for no limit. An attempt without an answer, which the
            server may have billed, counts at its highest price.
        spent_usd: counted towards the budget from the start.
        doubtful_usd: as well.
        concurrency: how many requests a caller should have under way.
        seed: of the jitter.
        on_reply: called with each request and reply as soon as it is there.
        on_failure: called with each request that failed, why, what the server may have billed at most in USD, and
            whether it is given up.

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
        backoff: float = 1.0,
        budget_usd: float | None = None,
        spent_usd: float = 0.0,
        doubtful_usd: float = 0.0,
        concurrency: int = CONCURRENCY,
        seed: int = 0,
        on_reply: Callable[[ChatRequest, ChatReply], None] | None = None,
        on_failure: Callable[[ChatRequest, str, float, bool], None] | None = None,
    ) -> None:
        self._openai, self._sdk = open_sdk("AsyncOpenAI", base_url, api_key, timeout, max_retries=0)
        self.price, self.timeout, self.retries, self.backoff = price, timeout, retries, backoff
        self.concurrency, self.seed = concurrency, seed
        self.on_reply, self.on_failure = on_reply, on_failure
        self.budget = Budget(budget_usd, spent_usd, doubtful_usd)
        self._pause_until, self._limited = 0.0, 0
        self._stopped = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True).start()

    def complete(self, request: ChatRequest) -> ChatReply:
        """Reply as `ChatClient` says.

        Raises:
            ConfigError: the model's price is not known, so that its cost could not be told; nothing was sent.
            BudgetError: the request could pass the budget; nothing was sent.
            ServerError: no request can succeed.
            ChatError: the server refused this one, or did not answer it in all attempts.
        """
        price = price_of(request.model, PRICES, self.price)
        return asyncio.run_coroutine_threadsafe(self._complete(request, price), self._loop).result()

    def stop(self) -> None:
        """Begin no further attempt; those under way are finished."""
        self._loop.call_soon_threadsafe(self._stopped.set)

    async def _complete(self, request: ChatRequest, price: Price) -> ChatReply:
        rng = random.Random(f"{self.seed}-{request.key}")
        most = cost_usd(request.most_tokens(), price)
        for attempt in range(self.retries + 1):
            if (pause := self._pause_until - time.monotonic()) > 0:
                await self._sleep(pause)
            if self._stopped.is_set():
                raise ServerError("the teacher was told to stop")
            await self.budget.reserve(most)
            spent = doubtful = 0.0
            try:
                reply = await self._attempt(request, price)
                # before anything else is awaited, so that a killed process loses as little as can be
                if self.on_reply is not None:
                    self.on_reply(request, reply)
                spent, self._limited = reply.cost_usd, 0
                return reply
            except Again as error:
                doubtful = most if error.doubtful else 0.0
                wait = error.wait
                if wait is None:
                    wait = min(self.backoff * 2**attempt, LONGEST_WAIT) * rng.uniform(0.5, 1.0)
                else:
                    wait += self.backoff * rng.uniform(0.0, 0.25)  # not all at the same moment
                self._limited = self._limited + 1 if error.limited else self._limited
                if self._limited >= MANY_LIMITED:
                    self._pause_until = max(self._pause_until, time.monotonic() + wait)
                why = str(error)
                self._fail(request, why, doubtful)
            except ServerError:
                raise
            except ChatError as error:
                self._fail(request, str(error), last=True)
                raise
            finally:
                await self.budget.settle(most, spent, doubtful)
            if attempt < self.retries:
                await self._sleep(wait)
        why = f"model '{request.model}': no reply in {self.retries + 1} attempts; the last one: {why}"
        self._fail(request, why, last=True)
        raise ChatError(why)

    def _fail(self, request: ChatRequest, why: str, doubtful: float = 0.0, last: bool = False) -> None:
        if self.on_failure is not None:
            self.on_failure(request, why, doubtful, last)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    async def _attempt(self, request: ChatRequest, price: Price) -> ChatReply:
        openai = self._openai
        try:
            async with asyncio.timeout(
                self.timeout
            ):  # the SDK's own limit is one per read, which a slow drip never meets
                answer = await self._sdk.chat.completions.with_raw_response.create(
                    messages=list(request.messages),
                    model=request.model,
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                )
        except openai.APIStatusError as error:
            why = f"status {error.status_code}: {one_line(error)}"
            if error.status_code in HOPELESS or error.code == "insufficient_quota":
                raise ServerError(f"model '{request.model}': {why}") from error
            if may_pass(error.status_code):
                wait = retry_after(error.response.headers.get("retry-after"))
                raise Again(why, wait, limited=error.status_code == 429) from error
            raise ChatError(f"model '{request.model}': {why}") from error
        except (openai.APIConnectionError, TimeoutError, OSError) as error:
            silent = isinstance(error, (TimeoutError, openai.APITimeoutError))
            why = f"no reply in {self.timeout:g} s" if silent else one_line(error.__cause__ or error)
            raise Again(why, doubtful=True) from error
        except openai.OpenAIError as error:
            raise ChatError(f"model '{request.model}': {one_line(error)}") from error
        return read_reply(answer.content, request, price)


def may_pass(status: int) -> bool:
    """Whether another attempt may meet another answer than this status."""
    return status in (408, 409, 425, 429) or status >= 500


def read_reply(body: bytes, request: ChatRequest, price: Price) -> ChatReply:
    """Return the reply in the body of a response of status 200.

    Raises:
        Again: there is none; the server may have billed it.
    """
    try:
        answer: Any = json.loads(body)
        choice = answer["choices"][0]
        text, reason = choice["message"].get("content") or "", choice.get("finish_reason") or "stop"
        usage = answer.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError("the content is no text")
        if usage:
            tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        else:  # a server that does not count: about as many as there are
            tokens = request.expected_tokens()[0], round(len(text) / 4) + 1
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Again(f"not a chat completion: {body[:80]!r} ({type(error).__name__})", doubtful=True) from error
    date = datetime.now(UTC).isoformat(timespec="seconds")
    model = str(answer.get("model") or request.model)
    return ChatReply(text, model, *tokens, cost_usd(tokens, price), str(reason), *price, date)


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Return the seconds that a `Retry-After` header asks for.

    Args:
        value: of the header: seconds, or a date as HTTP writes it.
        now: counted from; the present when None.

    Returns:
        Seconds, not negative, or None if there is no header or it cannot be read.
    """
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(seconds, 0.0) if seconds < float("inf") else None
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max((date - (now or datetime.now(UTC))).total_seconds(), 0.0)


def one_line(error: BaseException) -> str:
    """Return what an error says, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
