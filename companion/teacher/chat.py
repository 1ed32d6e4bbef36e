"""Records of a chat: request, reply, errors, prices, and the protocol of a client."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from llava_core.registry import unknown
from llava_core.runtime import CompanionError, ConfigError

Message = dict[str, str]
Price = tuple[float, float]
TEMPERATURE, MAX_TOKENS = 0.7, 2048  # the paper gives neither
PRICES: dict[str, Price] = {  # USD per million tokens of prompt and of completion, as OpenAI listed them
    "gpt-4": (30.0, 60.0),  # 2023
    "gpt-4-0314": (30.0, 60.0),
    "gpt-4-0613": (30.0, 60.0),
    "gpt-4-32k-0314": (60.0, 120.0),
    "gpt-3.5-turbo-0301": (2.0, 2.0),
    "gpt-4-turbo": (10.0, 30.0),  # 2024
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
}
BATCH_PRICE = 0.5  # of the listed one, for a reply of the batch endpoint
CHARACTERS_PER_TOKEN = 4.0  # English text; only estimates use it
REPLY_TOKENS = 300  # of an expected reply: a dialogue of four turns, a description, or an argued answer
TOKENS_PER_SECOND = 20.0  # decoding speed of one reply; our assumption for GPT-4 of 2023


class ChatError(CompanionError):
    """There is no reply to a request: the server refused it, or all attempts failed."""


class ServerError(ChatError):
    """No request can succeed: wrong key, unknown model, exhausted quota, or an unreachable server."""


class BudgetError(ChatError):
    """The request could exceed the budget; it was not sent."""


@dataclass(frozen=True)
class ChatRequest:
    """A chat request; messages are {role, content}, the last one a user's."""

    messages: Sequence[Message]
    model: str
    temperature: float = TEMPERATURE
    max_tokens: int = MAX_TOKENS

    @property
    def canonical(self) -> str:
        """The request as JSON, the same on every machine."""
        # not cached: at the paper's number of requests these texts fill a gigabyte
        fields = {
            "messages": [{"role": m["role"], "content": m["content"]} for m in self.messages],
            "model": self.model,
            "temperature": float(self.temperature),
            "max_tokens": int(self.max_tokens),
        }
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return valid_unicode(text)

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def most_tokens(self) -> tuple[int, int]:
        """Return upper bounds of prompt and reply tokens: a token is at least one byte of UTF-8."""
        return sum(len(m["content"].encode(errors="replace")) + 16 for m in self.messages) + 16, self.max_tokens

    def expected_tokens(self) -> tuple[int, int]:
        """Return estimated prompt and reply tokens, from the usual length of an English token."""
        characters = sum(len(m["content"]) for m in self.messages)
        return round(characters / CHARACTERS_PER_TOKEN) + 4 * len(self.messages), min(REPLY_TOKENS, self.max_tokens)


@dataclass(frozen=True)
class ChatReply:
    """A chat reply.

    Attributes:
        model: the snapshot that the server reports; may differ from the requested name.
        text: without a model's reasoning.
        finish_reason: `stop`, or why the text is not a whole reply, e.g. `length` (`protocol.is_finished`).
        price_prompt: USD per million tokens; so is `price_completion`.
        date: when it arrived (UTC); empty for an offline reply, which is the same on every day.
        kind: `live`, `batch`, or `offline` for a function's reply; also names parameters that the server did not take,
            e.g. `live, without temperature`.
        cached: from a cassette; nothing was paid now.
    """

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float = 0.0
    finish_reason: str = "stop"
    price_prompt: float = 0.0
    price_completion: float = 0.0
    date: str = ""
    kind: str = "live"
    cached: bool = False


class ChatClient(Protocol):
    """Completes chats; `complete` may be called from several threads.

    Optional attributes: `concurrency`, the number of requests under way at once; `stop()`, after which no further
    attempt begins; `prefetch(requests)`, called with many requests before the first `complete`, which returns a reply
    or None for each.
    """

    def complete(self, request: ChatRequest) -> ChatReply:
        """Reply, or raise a `ChatError`; its subclasses say when further requests need not be tried."""
        ...


def price_of(model: str, prices: Mapping[str, Price] = PRICES, price: Price | None = None) -> Price:
    """Return `price` or the listed one, USD per million tokens; ConfigError if there is neither, or no such number."""
    listed = price or prices.get(model)
    if listed is None:
        raise ConfigError(
            f"{unknown('price of model', model, prices)}; give --price PROMPT,REPLY, the USD per million tokens"
        )
    if not all(0 <= usd < math.inf for usd in listed):
        raise ConfigError(f"price {listed}: give two finite numbers of at least 0, the USD per million tokens")
    return listed


def valid_unicode(text: str) -> str:
    """Return a text with a question mark for each half of a character, which no file in UTF-8 can hold."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def cost_usd(tokens: tuple[int, int], price: Price) -> float:
    return (tokens[0] * price[0] + tokens[1] * price[1]) / 1e6
