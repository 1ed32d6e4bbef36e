"""Cost and time of chat requests, estimated before the first one is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

from companion.teacher.batch import MOST_BYTES, MOST_REQUESTS, WINDOW_HOURS
from companion.teacher.cassette import Cassette
from companion.teacher.chat import (
    BATCH_PRICE,
    CHARACTERS_PER_TOKEN,
    PRICES,
    REPLY_TOKENS,
    TOKENS_PER_SECOND,
    ChatRequest,
    Price,
    cost_usd,
    price_of,
)

ASSUMED = {
    "prompt": f"{CHARACTERS_PER_TOKEN:g} characters per token; at most: one token per byte",
    "reply": f"{REPLY_TOKENS} tokens; at most: as many as the request allows",
    "hours": f"{TOKENS_PER_SECOND:g} tokens per second and reply, and no request that waits for a limit of the server",
    "batch": f"half the price; hours: the {WINDOW_HOURS} per batch that the server may take",
    "repeated requests": "sent and paid once",
    "left out": "second requests after malformed replies",
}
"""The assumptions of an estimate; no server is asked."""


def plan(
    requests: Iterable[ChatRequest],
    client: str = "record",
    cassette: str | Path | None = None,
    price: Price | None = None,
    concurrency: int = 8,
) -> dict[str, Any]:
    """Estimate the cost of requests for a client: `record`, `live`, or `batch` with its own price and time.

    Args:
        requests: repeated ones count once.
        cassette: its replies are free; the file need not exist.
        price: USD per million tokens of prompt and reply, for a model that `PRICES` does not list.

    Returns:
        requests; cached (those that the cassette answers); `estimate` of the others; memory_gib; client; assumed.

    Raises:
        ConfigError: the price of a model is not known.
        DataError: the file is no cassette.
    """
    wanted = {request.key: request for request in requests}
    tape = Cassette(cassette, read_only=True) if cassette is not None and Path(cassette).is_file() else None
    unknown = [request for request in wanted.values() if tape is None or tape.get(request) is None]
    if tape is not None:
        tape.close()
    part = BATCH_PRICE if client == "batch" else 1.0
    listed = {model: price_of(model, PRICES, price) for model in {request.model for request in unknown}}
    prices = {model: (prompt * part, reply * part) for model, (prompt, reply) in listed.items()}
    result = estimate(unknown, prices, concurrency)
    if client == "batch":
        size = sum(len(request.canonical.encode()) for request in unknown)
        result["hours"] = float(WINDOW_HOURS * ceil(max(len(unknown) / MOST_REQUESTS, size / MOST_BYTES)))
    counts = {"requests": len(wanted), "cached": len(wanted) - len(unknown)}
    return {**result, **counts, "memory_gib": 0.0, "client": client, "assumed": ASSUMED}


def estimate(
    requests: Iterable[ChatRequest], prices: Mapping[str, Price] = PRICES, concurrency: int = 8
) -> dict[str, Any]:
    """Estimate the cost of requests, repeated ones once, without retries of malformed replies.

    Returns:
        requests; tokens (prompt, completion, total; expected); usd (expected); usd_most (every reply as long as
        allowed, every prompt one token per byte); hours.
    """
    wanted = list({request.key: request for request in requests}.values())
    price = {model: price_of(model, prices) for model in {request.model for request in wanted}}
    expected = [request.expected_tokens() for request in wanted]
    prompt, reply = (sum(tokens[k] for tokens in expected) for k in (0, 1))
    usd = sum(cost_usd(tokens, price[request.model]) for request, tokens in zip(wanted, expected, strict=True))
    usd_most = sum(cost_usd(request.most_tokens(), price[request.model]) for request in wanted)
    return {
        "requests": len(wanted),
        "tokens": {"prompt": prompt, "completion": reply, "total": prompt + reply},
        "usd": round(usd, 4),
        "usd_most": round(usd_most, 4),
        "hours": round(reply / TOKENS_PER_SECOND / max(concurrency, 1) / 3600, 4),
    }


def plan_text(planned: dict[str, Any]) -> str:
    tokens, longest = planned["tokens"], "up to " if planned["client"] == "batch" else ""
    return (
        f"estimate: {planned['requests']} requests, {planned['cached']} of them in the cassette; for the others "
        f"{tokens['prompt']} + {tokens['completion']} tokens, {planned['usd']:.2f} USD "
        f"(at most {planned['usd_most']:.2f}), {longest}{planned['hours']:.1f} hours"
    )
