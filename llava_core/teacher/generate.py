"""Ask the teacher about every image and write what it says as instruction data, with failures and provenance."""

from __future__ import annotations

import io
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llava_core.constants import IMAGE_MARKER
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, atomic_write, progress, shown, write_json, write_jsonl
from llava_core.teacher.chat import (
    MAX_TOKENS,
    TEMPERATURE,
    BudgetError,
    ChatClient,
    ChatError,
    ChatReply,
    ChatRequest,
    ServerError,
)
from llava_core.teacher.parse import ReplyError, parse_detail, parse_dialogue, parse_reasoning
from llava_core.teacher.prompts import (
    DETAIL_QUESTIONS,
    KINDS,
    KINDS_WITH_BOXES,
    PROMPTS,
    Prompt,
    build_messages,
    context_text,
)

MODEL = "gpt-4-0314"
MOST_SILENT = 20  # requests in a row without a reply, after which the server counts as gone
_T = TypeVar("_T")
_R = TypeVar("_R")


class Annotation(Protocol):
    """An image by what people wrote and drew about it; `llava_core.data.coco.AnnotatedImage` is one."""

    @property
    def id(self) -> str: ...
    @property
    def image(self) -> str: ...
    @property
    def captions(self) -> Sequence[str]: ...
    @property
    def boxes(self) -> Sequence[tuple[str, Sequence[float]]]: ...


Job = tuple[Annotation, str, ChatRequest]
"""Image, kind of data, and what is asked first."""


def requests_for(
    annotations: Iterable[Annotation],
    kinds: Sequence[str],
    prompts: Mapping[str, Prompt] | None = None,
    model: str = MODEL,
    temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS,
) -> Iterator[Job]:
    """Yield what `generate` will ask first about each image, e.g. for `llava_core.teacher.chat.estimate`.

    Args:
        annotations: the images.
        kinds: of `llava_core.teacher.prompts.KINDS`.
        prompts: by kind; ours when None.
        model: asked for by this name.
        temperature: of the model.
        max_tokens: of one reply.

    Returns:
        Image, kind and request, image by image.

    Raises:
        ConfigError: unknown kind.
    """
    prompts = PROMPTS if prompts is None else prompts
    for kind in kinds:
        if kind not in KINDS or kind not in prompts:
            raise ConfigError(unknown("kind of instruction data", kind, [k for k in KINDS if k in prompts]))
    for image in annotations:
        for kind in dict.fromkeys(kinds):
            boxes = image.boxes if kind in KINDS_WITH_BOXES else ()
            messages = build_messages(kind, context_text(image.captions, boxes), prompts)
            yield image, kind, ChatRequest(messages, model, temperature, max_tokens)


def retry_request(request: ChatRequest, reply: ChatReply, error: ReplyError) -> ChatRequest:
    """Return the request that follows a malformed reply: what was said, and what is wrong with it."""
    said = [{"role": "assistant", "content": reply.text}] if reply.text.strip() else []
    reason = (
        f"This reply cannot be used ({type(error).__name__}): {error}.\nReply again, in the format of the examples."
    )
    return replace(request, messages=[*request.messages, *said, {"role": "user", "content": reason}])


@dataclass
class Outcome:
    """What asking about one image came to: every reply, with what was wrong with it."""

    image: Annotation
    kind: str
    request: ChatRequest
    turns: list[tuple[str, str]] | None = None
    replies: list[tuple[ChatRequest, ChatReply, ReplyError | None]] = field(default_factory=list)
    refused: ChatError | None = None  # no reply to the last request

    @property
    def asked(self) -> bool:
        """The budget allowed all its requests."""
        return not isinstance(self.refused, BudgetError)

    @property
    def failure(self) -> Exception | None:
        """Why there are no turns; None also where the budget ended."""
        if self.turns is not None or not self.asked:
            return None
        return self.refused or self.replies[-1][2]

    @property
    def paid(self) -> float:
        """USD paid now."""
        return sum(reply.cost_usd for _, reply, _ in self.replies if not reply.cached)


def generate(
    annotations: Sequence[Annotation],
    kinds: Sequence[str],
    client: ChatClient,
    out: str | Path,
    limit: int | None = None,
    seed: int = 0,
    prompts: Mapping[str, Prompt] | None = None,
    model: str = MODEL,
    temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS,
    detail_questions: Sequence[str] = DETAIL_QUESTIONS,
) -> dict[str, Any]:
    """Write instruction data about annotated images: `requests_for`, `ask` and `write` in one.

    Killed and called again with a recording client it goes on where it was: replies that the cassette holds are not
    asked for again, and the files come out as of an undisturbed run. Where the budget ends, what was answered until
    then is written.

    Args:
        annotations: the images; captions for every kind, boxes for `detail` and `complex`.
        kinds: of `llava_core.teacher.prompts.KINDS`; every image is asked about once per kind.
        client: who answers.
        out: folder; what `write` says.
        limit: only the first so many images.
        seed: draws where the image stands in the first turn and how a description is asked for, per record.
        prompts: by kind, e.g. of `load_prompts`; ours when None.
        model: asked for by this name.
        temperature: of the model.
        max_tokens: of one reply.
        detail_questions: how a description is asked for; drawn per record.

    Returns:
        What `write` says.

    Raises:
        ConfigError: unknown kind.
        ServerError, DataError: the client's; what was answered until then is in its cassette.
    """
    jobs = list(requests_for(annotations[:limit], kinds, prompts, model, temperature, max_tokens))
    return write(ask(jobs, client), kinds, out, seed, prompts, detail_questions)


def ask(jobs: Sequence[Job], client: ChatClient) -> list[Outcome]:
    """Ask what `requests_for` says, with as many requests under way at once as the client's `concurrency`.

    A malformed reply is kept, and asked for once more with the reason (`retry_request`). A client with `prefetch` gets
    all first requests together, and then all second ones.

    Args:
        jobs: image, kind and request.
        client: who answers.

    Returns:
        What came of each job, in their order.

    Raises:
        ServerError, DataError: the client's; what was answered until then is in its cassette.
    """
    _prefetch(jobs, client)
    outcomes: list[Outcome] = []
    spend, failed, silent = 0.0, 0, 0
    with progress(len(jobs), "teacher", unit="record") as bar:
        stop = getattr(client, "stop", lambda: None)
        for outcome in concurrently(lambda job: _ask(client, *job), jobs, getattr(client, "concurrency", 1), stop):
            outcomes.append(outcome)
            silent = silent + 1 if outcome.refused and outcome.asked else 0
            if silent >= MOST_SILENT:
                raise ServerError(f"{silent} requests in a row had no reply; the last one: {outcome.refused}")
            spend += outcome.paid
            failed += outcome.failure is not None
            bar.set_postfix_str(f"{spend:.2f} USD, {failed} failed", refresh=False)
            bar.update()
    return outcomes


def write(
    outcomes: Sequence[Outcome],
    kinds: Sequence[str],
    out: str | Path,
    seed: int = 0,
    prompts: Mapping[str, Prompt] | None = None,
    detail_questions: Sequence[str] = DETAIL_QUESTIONS,
) -> dict[str, Any]:
    """Write what `ask` brought as instruction data.

    Args:
        outcomes: of `ask`.
        kinds: that were asked for.
        out: folder; gets `<kind>_<N>.json` per kind and `llava_instruct.json` with all (LLaVA-Instruct records with
            `type` and `provenance` added), `llava_instruct.parquet` with the same where pyarrow is installed,
            `failures.jsonl` (malformed and missing replies) and `provenance.jsonl` (request, model, tokens, cost and
            date per reply). Files of these names from an earlier call are replaced.
        seed: draws where the image stands in the first turn and how a description is asked for, per record.
        prompts: by kind, that were asked with; ours when None.
        detail_questions: how a description is asked for.

    Returns:
        records; failed (images and kinds that no record came from); requests (sent now) and replayed (from a cassette);
        spend_usd (paid now) and cost_usd (of all replies used, whenever they were paid); failures (the failed by error
        class); retried (malformed first replies) and repaired (those whose second one is good); models (replies by
        snapshot); stopped (why not all was asked, or None) and unasked; files.
    """
    prompts = PROMPTS if prompts is None else prompts
    records: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    provenance: list[dict[str, Any]] = []
    tally = {"requests": 0, "replayed": 0, "retried": 0, "repaired": 0}
    for outcome in outcomes:
        row = {"id": outcome.image.id, "image": outcome.image.image, "type": outcome.kind}
        rows = [_source(request, reply, prompts[outcome.kind], seed) for request, reply, _ in outcome.replies]
        for number, ((_, reply, error), source) in enumerate(zip(outcome.replies, rows, strict=True)):
            tally["replayed" if reply.cached else "requests"] += 1
            provenance.append(row | source | _bill(outcome.request, reply))
            if error is not None:
                kept = {"reply": reply.text, "attempt": number + 1, "repaired": outcome.turns is not None}
                failures.append(row | _told(error) | kept | source)
        tally["retried"] += bool(outcome.replies and outcome.replies[0][2])
        if outcome.turns is not None:
            tally["repaired"] += len(outcome.replies) > 1
            rng, turns = _rng(seed, outcome.image, outcome.kind), outcome.turns
            if outcome.kind == "detail":
                turns = [(rng.choice(detail_questions), text) for _, text in turns]
            records.append(row | {"conversations": _conversation(turns, rng), "provenance": rows[-1]})
        elif outcome.asked and outcome.refused is not None:
            failures.append(row | _told(outcome.refused) | {"reply": None, "request": outcome.request.key})
    failed = Counter(type(outcome.failure).__name__ for outcome in outcomes if outcome.failure)
    models = dict(Counter(row["model"] for row in provenance))
    if len(models) > 1:
        named = ", ".join(f"{model} ({n} replies)" for model, n in models.items())
        print(f"note: not one model answered but {len(models)}: {named}", file=sys.stderr)  # noqa: T201
    return {
        "records": len(records),
        "failed": failed.total(),
        "spend_usd": round(sum(outcome.paid for outcome in outcomes), 6),
        "cost_usd": round(sum(row["cost_usd"] for row in provenance), 6),
        **tally,
        "failures": dict(sorted(failed.items())),
        "models": models,
        "stopped": next((str(outcome.refused) for outcome in outcomes if not outcome.asked), None),
        "unasked": sum(not outcome.asked for outcome in outcomes),
        "files": _write(Path(out), records, failures, provenance, list(dict.fromkeys(kinds))),
    }


def _prefetch(jobs: Sequence[Job], client: ChatClient) -> None:
    """Have a client that wants to know them beforehand answer all first requests, then those that follow from them."""
    prefetch = getattr(client, "prefetch", None)
    if prefetch is None:
        return
    repairs = []
    replies = prefetch([request for _, _, request in jobs])
    for (_, kind, request), reply in zip(jobs, replies, strict=True):
        try:
            if reply is not None:
                _turns(kind, reply.text, reply.finish_reason)
        except ReplyError as error:
            repairs.append(retry_request(request, reply, error))
    prefetch(repairs)


def _ask(client: ChatClient, image: Annotation, kind: str, request: ChatRequest) -> Outcome:
    """Ask, and once more where the reply is malformed."""
    outcome = Outcome(image, kind, request)
    for _ in range(2):
        try:
            reply = client.complete(request)
        except ServerError:
            raise
        except ChatError as error:
            outcome.refused = error
            return outcome
        try:
            outcome.turns = _turns(kind, reply.text, reply.finish_reason)
        except ReplyError as error:
            outcome.replies.append((request, reply, error))
            request = retry_request(request, reply, error)
        else:
            outcome.replies.append((request, reply, None))
            break
    return outcome


def concurrently(work: Callable[[_T], _R], items: Iterable[_T], workers: int, stop: Callable[[], None]) -> Iterator[_R]:
    """Yield the results in the order of the items, with at most `workers` items under way.

    Args:
        work: done with each item, in a thread of its own where there are several workers.
        items: what there is to do.
        workers: how many items are under way at once.
        stop: called when the user interrupts, before what is under way is waited for.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    under_way: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="ask") as pool:
        try:
            for item in items:
                under_way.append(pool.submit(work, item))
                while len(under_way) > 16 * workers:  # a slow one at the head does not keep the others from starting
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except KeyboardInterrupt:
            stop()  # else leaving the pool would wait for all further attempts
            raise
        finally:
            for future in under_way:
                future.cancel()


def _rng(seed: int, image: Annotation, kind: str) -> random.Random:
    # by id and kind, not by position: a record stays the same when other images are added or left out
    return random.Random(f"{seed}-{image.id}-{kind}")


def _source(request: ChatRequest, reply: ChatReply, prompt: Prompt, seed: int) -> dict[str, Any]:
    """Where a record comes from."""
    named = {"request": request.key, "model": reply.model, "date": reply.date or None, "client": reply.kind}
    return named | {"prompt": prompt.version, "seed": seed}


def _bill(request: ChatRequest, reply: ChatReply) -> dict[str, Any]:
    """What was asked for and what it cost; the context is the one of the first request."""
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


def _told(error: Exception) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)}


def _turns(kind: str, text: str, finish_reason: str) -> list[tuple[str, str]]:
    """The turns of a reply; a description has no question yet."""
    if kind == "detail":
        return [("", parse_detail(text, finish_reason))]
    return (parse_reasoning if kind == "complex" else parse_dialogue)(text, finish_reason)


def _conversation(turns: Sequence[tuple[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """The turns as LLaVA-Instruct has them; the image stands first or last in the first one (paper, Equation 2)."""
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
    return [shown(file) for file in files]


def _write_parquet(path: Path, records: list[dict[str, Any]]) -> list[Path]:
    """Write the records as columns; nothing where pyarrow is missing, which is said."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        print(f"note: no {path.name}: the package pyarrow is not installed", file=sys.stderr)  # noqa: T201
        path.unlink(missing_ok=True)  # of an earlier call
        return []
    text = pa.string()
    source = [("request", text), ("model", text), ("date", text), ("client", text), ("prompt", text)]
    columns = {
        "id": text,
        "image": text,
        "type": text,
        "conversations": pa.list_(pa.struct([("from", text), ("value", text)])),
        "provenance": pa.struct([*source, ("seed", pa.int64())]),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=pa.schema(columns)), buffer, compression="zstd")
    return [atomic_write(path, buffer.getvalue())]
