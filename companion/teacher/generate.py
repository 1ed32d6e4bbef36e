"""Instruction data from a teacher model: requests per image and kind, records, failures and provenance."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from companion.data_tools.coco import AnnotatedImage
from companion.data_tools.repair import write_parquet
from companion.teacher.asking import Asked, ask_each, follow_up, tally
from companion.teacher.chat import MAX_TOKENS, ChatClient, ChatReply, ChatRequest, valid_unicode
from companion.teacher.parse import ReplyError, parse_detail, parse_dialogue, parse_reasoning
from companion.teacher.prompts import (
    DETAIL_QUESTIONS,
    KINDS,
    KINDS_WITH_BOXES,
    PROMPTS,
    Prompt,
    build_messages,
    context_text,
)
from llava_core.constants import IMAGE_MARKER
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, DataError, display_path, write_json, write_jsonl

MODEL = "gpt-4-0314"


Job = tuple[AnnotatedImage, str, ChatRequest]
"""Image, kind of data, and the first request."""


def requests_for(
    annotations: Iterable[AnnotatedImage],
    kinds: Sequence[str],
    prompts: Mapping[str, Prompt] | None = None,
    model: str = MODEL,
    max_tokens: int = MAX_TOKENS,
) -> Iterator[Job]:
    """Yield the first request per image and kind, image by image; ConfigError for an unknown kind."""
    prompts = PROMPTS if prompts is None else prompts
    for kind in kinds:
        if kind not in KINDS or kind not in prompts:
            raise ConfigError(unknown("kind of instruction data", kind, [k for k in KINDS if k in prompts]))
    for image in annotations:
        for kind in dict.fromkeys(kinds):
            boxes = image.boxes if kind in KINDS_WITH_BOXES else ()
            messages = build_messages(kind, context_text(image.captions, boxes), prompts)
            yield image, kind, ChatRequest(messages, model, max_tokens=max_tokens)


def retry_request(request: ChatRequest, reply: ChatReply, error: ReplyError) -> ChatRequest:
    wrong = f"This reply cannot be used ({type(error).__name__}): {error}."
    return follow_up(request, reply, f"{wrong}\nReply again, in the format of the examples.")


@dataclass(frozen=True)
class Outcome:
    """The result for one image and kind; `asked.value` holds the turns."""

    image: AnnotatedImage
    kind: str
    asked: Asked

    @property
    def failure(self) -> Exception | None:
        """Why there are no turns; None also if the budget ended before."""
        if self.asked.good or self.asked.unasked:
            return None
        return self.asked.refused or self.asked.replies[-1][2]


def ask(jobs: Sequence[Job], client: ChatClient) -> list[Outcome]:
    """Send the requests of `requests_for`, and one more per malformed reply; the results are in the jobs' order."""
    requests = [(request, partial(_turns, kind)) for _, kind, request in jobs]
    asked = ask_each(client, requests, retry_request, "teacher", unit="record")
    return [Outcome(image, kind, one) for (image, kind, _), one in zip(jobs, asked, strict=True)]


def write(
    outcomes: Sequence[Outcome],
    kinds: Sequence[str],
    out: str | Path,
    seed: int = 0,
    prompts: Mapping[str, Prompt] | None = None,
    detail_questions: Sequence[str] = DETAIL_QUESTIONS,
) -> dict[str, Any]:
    """Write the results of `ask` as instruction data.

    Args:
        out: folder; gets `<kind>_<N>.json` per kind and `llava_instruct.json` with all (LLaVA-Instruct records with
            `type` and `provenance` added), `llava_instruct.parquet` with the same if pyarrow is installed,
            `failures.jsonl` (malformed and missing replies) and `provenance.jsonl` (request, model, tokens, cost and
            date per reply). Files of these names from an earlier call are replaced.
        seed: draws, per record, whether the image comes first or last in the first turn, and the description's
            question from `detail_questions`.

    Returns:
        The counts of `asking.tally`, and: records; cost_usd (of all replies used, whenever they were paid); failures
        (images and kinds without a record by error class); models (all replies by snapshot); files.
    """
    prompts = PROMPTS if prompts is None else prompts
    records: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    provenance: list[dict[str, Any]] = []
    for outcome in outcomes:
        asked, image, kind = outcome.asked, outcome.image, outcome.kind
        row = {"id": image.id, "image": image.image, "type": kind}
        sources = [_source(request, reply, prompts[kind], seed) for request, reply, _ in asked.replies]
        for number, ((_, reply, error), source) in enumerate(zip(asked.replies, sources, strict=True), start=1):
            provenance.append(row | source | _bill(asked.request, reply))
            if error is not None:
                attempt = {"reply": reply.text, "attempt": number, "repaired": asked.good}
                failures.append(row | _error(error) | attempt | source)
        if asked.good:
            rng, turns = _rng(seed, image, kind), asked.value
            if kind == "detail":
                turns = [(rng.choice(detail_questions), text) for _, text in turns]
            records.append(row | {"conversations": _conversation(turns, rng), "provenance": sources[-1]})
        elif not asked.unasked and asked.refused is not None:
            failures.append(row | _error(asked.refused) | {"reply": None, "request": asked.request.key})
    counts = tally([outcome.asked for outcome in outcomes])
    failed = Counter(type(outcome.failure).__name__ for outcome in outcomes if outcome.failure)
    models = dict(Counter(row["model"] for row in provenance))
    if len(models) > 1:
        named = ", ".join(f"{model} ({n} replies)" for model, n in models.items())
        print(f"note: not one model answered but {len(models)}: {named}", file=sys.stderr)
    return {
        "records": len(records),
        "failed": counts["failed"],
        "spend_usd": counts["spend_usd"],
        "cost_usd": round(sum(row["cost_usd"] for row in provenance), 6),
        **{key: counts[key] for key in ("requests", "replayed", "retried", "repaired")},
        "failures": dict(sorted(failed.items())),
        "models": models,
        "stopped": counts["stopped"],
        "unasked": counts["unasked"],
        "files": _write(Path(out), records, failures, provenance, list(dict.fromkeys(kinds))),
    }


def _rng(seed: int, image: AnnotatedImage, kind: str) -> random.Random:
    # by id and kind, not by position: a record stays the same when other images are added or left out
    return random.Random(valid_unicode(f"{seed}-{image.id}-{kind}"))


def _source(request: ChatRequest, reply: ChatReply, prompt: Prompt, seed: int) -> dict[str, Any]:
    named = {"request": request.key, "model": reply.model, "date": reply.date or None, "client": reply.kind}
    return named | {"prompt": prompt.version, "seed": seed}


def _bill(request: ChatRequest, reply: ChatReply) -> dict[str, Any]:
    """Settings and cost of a reply; the context is the one of the first request."""
    return {
        "asked_model": request.model,
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "price": [reply.price_prompt, reply.price_completion],
        "cost_usd": reply.cost_usd,
        "finish_reason": reply.finish_reason,
        "context": request.messages[-1]["content"],
    }


def _error(error: Exception) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)}


def _turns(kind: str, reply: ChatReply) -> list[tuple[str, str]]:
    if kind == "detail":
        return [("", parse_detail(reply.text, reply.finish_reason))]
    return (parse_reasoning if kind == "complex" else parse_dialogue)(reply.text, reply.finish_reason)


def _conversation(turns: Sequence[tuple[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """The turns as LLaVA-Instruct has them; the image is first or last in the first one (paper, Equation 2)."""
    first = turns[0][0]
    first = f"{IMAGE_MARKER}\n{first}" if rng.random() < 0.5 else f"{first}\n{IMAGE_MARKER}"
    questions = [first, *(question for question, _ in turns[1:])]
    pairs = zip(questions, (answer for _, answer in turns), strict=True)
    return [turn for q, a in pairs for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]


def _write(
    out: Path,
    records: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    provenance: list[dict[str, Any]],
    kinds: list[str],
) -> list[str]:
    files = []
    for kind in kinds:
        for old in out.glob(f"{kind}_*.json"):  # of an earlier call with another number of records
            if old.stem.removeprefix(f"{kind}_").isdecimal():
                old.unlink()
        part = [record for record in records if record["type"] == kind]
        files.append(write_json(out / f"{kind}_{len(part)}.json", part))
    files.append(write_json(out / "llava_instruct.json", records))
    files += _write_parquet(out / "llava_instruct.parquet", records)
    files.append(write_jsonl(out / "failures.jsonl", failures))
    files.append(write_jsonl(out / "provenance.jsonl", provenance))
    return [display_path(file) for file in files]


def _write_parquet(path: Path, records: list[dict[str, Any]]) -> list[Path]:
    try:
        return [write_parquet(path, records)]
    except DataError as error:  # no pyarrow, or half of a character in a text
        print(f"note: no {path.name}: {error}", file=sys.stderr)
        path.unlink(missing_ok=True)  # of an earlier call
        return []
