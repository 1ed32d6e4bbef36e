"""What generating will cost and how long it takes, said before the first request."""

from __future__ import annotations

from collections.abc import Iterable
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
    estimate,
    price_of,
)

ASSUMED = {
    "prompt": f"{CHARACTERS_PER_TOKEN:g} characters per token; at most: one token per byte",
    "reply": f"{REPLY_TOKENS} tokens; at most: as many as the request allows",
    "hours": f"{TOKENS_PER_SECOND:g} tokens per second and reply, and no request that waits for a limit of the server",
    "batch": f"half the price; hours: the {WINDOW_HOURS} per batch that the server may take",
    "left out": "second requests after malformed replies",
}
"""In words; no server was asked, so the numbers are as good as these."""


def plan(
    requests: Iterable[ChatRequest],
    client: str = "record",
    cassette: str | Path | None = None,
    price: Price | None = None,
    concurrency: int = 8,
) -> dict[str, Any]:
    """Estimate what requests will cost.

    Args:
        requests: each counts once, however often it is named.
        client: `record` or `live`, or `batch` with its own price and time.
        cassette: what it holds is free; nothing where the file does not exist yet.
        price: USD per million tokens of prompt and reply, for a model that `PRICES` does not list.
        concurrency: requests under way at once; of no meaning for `batch`.

    Returns:
        requests; cached (those that the cassette answers); and for the others tokens (prompt, completion, total),
        usd (expected), usd_most, hours; memory_gib (0: the model runs elsewhere); client; assumed, in words.

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
    told = estimate(unknown, prices, concurrency)
    if client == "batch":
        size = sum(len(request.canonical.encode()) for request in unknown)
        told["hours"] = float(WINDOW_HOURS * ceil(max(len(unknown) / MOST_REQUESTS, size / MOST_BYTES)))
    counts = {"requests": len(wanted), "cached": len(wanted) - len(unknown)}
    return {**told, **counts, "memory_gib": 0.0, "client": client, "assumed": ASSUMED}


def in_words(told: dict[str, Any]) -> str:
    """Return an estimate of `plan` in one line."""
    tokens, longest = told["tokens"], "up to " if told["client"] == "batch" else ""
    return (
        f"estimate: {told['requests']} requests, {told['cached']} of them in the cassette; for the others "
        f"{tokens['prompt']} + {tokens['completion']} tokens, {told['usd']:.2f} USD (at most {told['usd_most']:.2f}), "
        f"{longest}{told['hours']:.1f} hours"
    )
