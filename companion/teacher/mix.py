"""Mixes of instruction data: each kind of request for a share of the images."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.teacher.chat import BATCH_PRICE, PRICES, ChatClient, ChatRequest
from companion.teacher.generate import Job, ask, requests_for, write
from companion.teacher.plan import estimate
from llava_core.runtime import DataError


def mix_jobs(images: Sequence[Any], shares: Mapping[str, float], model: str, seed: int = 0) -> list[Job]:
    """Return the requests of `generate_mix`, image by image; DataError if a share is not from 0 to 1."""
    order = random.Random(f"mix-{seed}").sample(range(len(images)), len(images))
    kinds: list[list[str]] = [[] for _ in images]
    for kind, share in shares.items():
        if not 0 <= share <= 1:
            raise DataError(f"the share of '{kind}' is {share}; give a number from 0 to 1")
        for k in order[: round(share * len(images))]:
            kinds[k].append(kind)
    return [job for image, own in zip(images, kinds, strict=True) for job in requests_for([image], own, model=model)]


def estimate_mix(
    images: Sequence[Any], shares: Mapping[str, float], models: Iterable[str], counts: Mapping[str, int], seed: int = 0
) -> list[dict[str, Any]]:
    """Estimate the cost of a mix with several teachers, and the cost of other numbers of records.

    Args:
        images, shares, seed: as of `generate_mix`.
        models: listed in `teacher.chat.PRICES`.
        counts: kind -> number of records of another mix; requests of a kind are assumed to be as long as in this mix.
    """
    rows = []
    for model in models:
        requests: dict[str, list[ChatRequest]] = {kind: [] for kind in shares}
        for _, kind, request in mix_jobs(images, shares, model, seed):
            requests[kind].append(request)
        costs = {kind: estimate(of_kind) for kind, of_kind in requests.items() if of_kind}
        other = sum(t["usd"] / t["requests"] * counts.get(kind, 0) for kind, t in costs.items())
        total = {key: sum(t[key] for t in costs.values()) for key in ("requests", "usd", "usd_most")}
        row = {"teacher": model, "USD per million tokens": "{:g} + {:g}".format(*PRICES[model])}
        row |= {"different requests": total["requests"], "USD": total["usd"], "USD at most": total["usd_most"]}
        rows.append(row | {f"{sum(counts.values()):,} records (USD)": other, "in batches (USD)": other * BATCH_PRICE})
    return rows


def generate_mix(
    images: Sequence[Any],
    shares: Mapping[str, float],
    client: ChatClient,
    out: Path,
    seed: int = 0,
    model: str = "gpt-4-0314",
) -> dict[str, Any]:
    """Generate a mix and write it to one folder; return per kind the result of `teacher.generate.write`.

    All kinds are requested for an image before the next image, so a spent budget leaves records of every kind.

    Args:
        shares: kind -> share of the images, 0 to 1; the images of a smaller share are among those of a larger one.
        out: gets what `teacher.generate.write` writes for the mix, in the order of `images`, and for each kind in a
            folder of the kind's name.
        seed: of the shares and of everything that is drawn per record.
    """
    outcomes = ask(mix_jobs(images, shares, model, seed), client)
    write(outcomes, list(shares), out, seed)
    results = {}
    for kind in shares:
        results[kind] = write([o for o in outcomes if o.kind == kind], [kind], out / kind, seed)
    return results
