"""The batch endpoint: a file of requests, replies within a day, half the price.

One batch is under way at a time, so that it is known what is left of the budget before the next one begins. What it
asks is in the cassette before the server is told to begin, under a name that the server keeps beside the batch. Killed
at any moment and called again, the client finds the batch by that name and reads its replies instead of paying for
others.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from companion.teacher.cassette import Cassette, Failure, OpenBatch
from companion.teacher.chat import (
    BATCH_PRICE,
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
from companion.teacher.live import Again, may_pass, one_line, open_sdk, read_reply
from companion.teacher.recorder import hold
from llava_core.runtime import progress, shown

ENDPOINT, WINDOW_HOURS = "/v1/chat/completions", 24
MOST_REQUESTS, MOST_BYTES = 50_000, 200 * 10**6  # of one file, as OpenAI's API allows
TRIES = 3  # batches that a request may be in
ATTEMPTS = 5  # to create a batch
MOST_SILENT = 20  # looks at a batch in a row that fail
PATIENCE = 5.0  # seconds for which another process may hold the cassette
ENDED = ("completed", "failed", "expired", "cancelled")
FULL = "token_limit_exceeded"  # more tokens wait than the account may have waiting
NO_ENDPOINT = "the server has no batch endpoint (status {}); use the client 'record', which asks one by one"
AGAIN = "start again: what was asked is in the cassette and is not paid twice"


class BatchClient:
    """Answers from a cassette, and fills it through the server's batch endpoint; see the module's text.

    Args:
        cassette: SQLite file of the replies.
        base_url: another server with this endpoint; OpenAI's when None.
        api_key: taken from the environment (`OPENAI_API_KEY`) when None.
        price: the listed one of a model that `PRICES` does not list; half of it is paid.
        timeout: seconds for one call of the server.
        budget_usd: stop before more than this is spent, with what the cassette's replies have cost before; None for no
            limit. A batch is as large as what it could cost at most allows, so that a budget below the highest
            price of all requests means several batches, one after the other.
        poll: seconds between two looks at a batch; they grow from a sixtieth of it.
        most_requests: in one batch.
        most_bytes: of one file.

    Raises:
        ConfigError: the package openai is not installed, or there is no key.
        DataError: the file is no cassette.
    """

    def __init__(
        self,
        cassette: str | Path,
        base_url: str | None = None,
        api_key: str | None = None,
        price: Price | None = None,
        timeout: float = 120.0,
        budget_usd: float | None = None,
        poll: float = 60.0,
        most_requests: int = MOST_REQUESTS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._openai, self._sdk = open_sdk("OpenAI", base_url, api_key, timeout, max_retries=2)
        self._tape, self.price, self.budget_usd, self.poll = Cassette(cassette), price, budget_usd, poll
        self.most_requests, self.most_bytes = most_requests, most_bytes
        self._lock = threading.RLock()
        self._new: set[str] = set()  # replies that came now and were not handed out yet
        self._refused: dict[str, ChatError] = {}

    def complete(self, request: ChatRequest) -> ChatReply:
        """Reply as `ChatClient` says; a request that was not prefetched becomes a batch of its own.

        Raises:
            ConfigError: the model's price is not known, or another process holds the cassette.
            BudgetError: the request could pass the budget; it was not sent.
            ServerError: no batch can succeed.
            ChatError: the server refused this request, or did not answer it in so many batches.
        """
        with self._lock:
            [reply] = [self._tape.get(request)] if request.key in self._refused else self.prefetch([request])
            if reply is None:
                raise self._refused[request.key]
            paid_now = request.key in self._new
            self._new.discard(request.key)
            return replace(reply, cached=not paid_now)

    def prefetch(self, requests: Sequence[ChatRequest]) -> list[ChatReply | None]:
        """Ask all at once and wait for the replies.

        Args:
            requests: those that the cassette answers are not asked.

        Returns:
            A reply per request; None where `complete` will say why there is none.

        Raises:
            ConfigError, ServerError: as of `complete`.
        """
        with self._lock:
            if missing := self._missing(requests):
                tries: Counter[str] = Counter()
                with (
                    closing(hold(self._tape.path, PATIENCE)),
                    progress(len({r.key for r in missing}), "batch", unit="request") as bar,
                ):
                    while batch := self._tape.open_batch() or self._begin(self._missing(requests)):
                        self._collect(batch, self._wait(batch.id or self._recover(batch), bar), tries)
            return [self._tape.get(request) for request in requests]

    def _missing(self, requests: Iterable[ChatRequest]) -> list[ChatRequest]:
        return [r for r in requests if r.key not in self._refused and self._tape.get(r) is None]

    def _price(self, request: ChatRequest) -> Price:
        prompt, reply = price_of(request.model, PRICES, self.price)
        return prompt * BATCH_PRICE, reply * BATCH_PRICE

    def _most(self, request: ChatRequest) -> float:
        return cost_usd(request.most_tokens(), self._price(request))

    # -------------------------------------------------------------------------------------------- asking

    def _begin(self, missing: Sequence[ChatRequest]) -> OpenBatch | None:
        """Ask the server for a batch of the first of these, as many as limits and budget allow."""
        chosen = self._choose(missing)
        if not chosen:
            return None
        batch = OpenBatch(uuid.uuid4().hex, "", None, chosen)
        batch = replace(batch, file=self._upload(batch))
        self._tape.begin_batch(batch)  # from here on a killed process is followed by one that looks for it
        self._create(batch)
        return self._tape.open_batch()

    def _choose(self, missing: Sequence[ChatRequest]) -> list[ChatRequest]:
        spent = self._tape.spend() + self._tape.doubtful()
        left = float("inf") if self.budget_usd is None else self.budget_usd - spent + 1e-9
        chosen: dict[str, ChatRequest] = {}
        size = 0
        for request in missing:
            size += 0 if request.key in chosen else len(_line(request))
            full = len(chosen) >= self.most_requests or size > self.most_bytes
            # the endpoint takes one model per file
            if chosen and (full or request.model != missing[0].model):
                break
            if request.key not in chosen:
                left -= self._most(request)
                if left < 0:
                    break
                chosen[request.key] = request
        if missing and not chosen:
            why = f"budget of {self.budget_usd:g} USD: {spent:.4f} spent, and the next request may cost "
            why += f"{self._most(missing[0]):.4f}; raise the budget to go on"
            self._refused.update({request.key: BudgetError(why) for request in missing})
        return list(chosen.values())

    def _upload(self, batch: OpenBatch) -> str:
        file = (f"{batch.name}.jsonl", b"".join(_line(request) for request in batch.requests))
        with self._told("uploading a batch", endpoint=True):
            return str(self._sdk.files.create(file=file, purpose="batch").id)

    def _create(self, batch: OpenBatch) -> str:
        """Have the batch made of its file, and note its id.

        Raises:
            ServerError: the server did not want to, or did not answer in all attempts.
        """
        openai = self._openai
        for attempt in range(ATTEMPTS):
            try:
                # the SDK would repeat by itself, and pay twice where only the answer was lost
                made = self._sdk.with_options(max_retries=0).batches.create(
                    input_file_id=batch.file,
                    endpoint=ENDPOINT,
                    completion_window=f"{WINDOW_HOURS}h",
                    metadata={"llava_batch": batch.name},
                )
                return self._note(batch, made.id)
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                status, why = getattr(error, "status_code", 500), one_line(error)
                if not may_pass(status) or error.code == "insufficient_quota":
                    self._tape.end_batch(batch, "refused")
                    with self._told("creating a batch", endpoint=True):
                        raise
            time.sleep(min(self.poll, self.poll / 60 * 2**attempt))
            if found := self._found(batch):
                return found
            batch = self._anew(batch)
        raise ServerError(f"creating a batch failed {ATTEMPTS} times, the last time: {why}; {AGAIN}")

    def _recover(self, batch: OpenBatch) -> str:
        """The id of a batch whose creation was asked for by a process that did not see the answer."""
        return self._found(batch) or self._create(self._anew(batch))

    def _anew(self, batch: OpenBatch) -> OpenBatch:
        batch = replace(batch, file=self._upload(batch))
        self._tape.note_batch(batch)
        return batch

    def _found(self, batch: OpenBatch) -> str | None:
        """The id of a batch in the server's list; when None, it will not be there later either."""
        for last in (False, True):
            with self._told("listing the batches", endpoint=True):
                for known in self._sdk.batches.list(limit=100):
                    if (known.metadata or {}).get("llava_batch") == batch.name:
                        return self._note(batch, known.id)
            if not last:
                # a creation that is still on its way finds no file any more
                with self._told("deleting a file"), contextlib.suppress(self._openai.NotFoundError):
                    self._sdk.files.delete(batch.file)
                time.sleep(self.poll / 60)
        return None

    def _note(self, batch: OpenBatch, found: str) -> str:
        self._tape.note_batch(replace(batch, id=found))
        most = sum(self._most(request) for request in batch.requests)
        asked = f"batch {found}: {len(batch.requests)} requests, at most {most:.2f} USD, within {WINDOW_HOURS} hours"
        print(f"note: {asked}; it goes on at the server if this process is stopped", file=sys.stderr)
        return found

    def _wait(self, batch: str, bar: Any) -> Any:
        """Look at a batch until it has ended."""
        wait, silent, before, openai = self.poll / 60, 0, bar.n, self._openai
        while True:
            try:
                seen = self._sdk.batches.retrieve(batch)
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                silent += 1
                if silent >= MOST_SILENT:
                    raise ServerError(f"batch {batch}: {one_line(error)}; {AGAIN}") from error
            except self._openai.APIStatusError as error:
                raise ServerError(f"batch {batch}: status {error.status_code}: {one_line(error)}") from error
            else:
                silent, counts = 0, seen.request_counts
                done, failed = (counts.completed, counts.failed) if counts else (0, 0)
                bar.n = before + done
                bar.set_postfix_str(f"{seen.status}, {done} answered, {failed} failed", refresh=True)
                if seen.status in ENDED:
                    return seen
            time.sleep(wait)
            wait = min(1.5 * wait, self.poll)

    @contextlib.contextmanager
    def _told(self, what: str, endpoint: bool = False) -> Iterator[None]:
        try:
            yield
        except self._openai.APIStatusError as error:
            if endpoint and error.status_code in (404, 405, 501):
                raise ServerError(NO_ENDPOINT.format(error.status_code)) from error
            raise ServerError(f"{what}: status {error.status_code}: {one_line(error)}") from error
        except self._openai.OpenAIError as error:
            raise ServerError(f"{what}: {one_line(error)}; {AGAIN}") from error

    # -------------------------------------------------------------------------------------------- reading

    def _collect(self, batch: OpenBatch, ended: Any, tries: Counter[str]) -> None:
        """Keep what came of a batch; requests that it did not get to stay missing, at most `TRIES` times."""
        if ended.status == "failed":
            return self._failed(batch, ended)
        waiting = {request.key: request for request in batch.requests}
        replies: list[tuple[ChatRequest, ChatReply]] = []
        failures: list[Failure] = []
        for line in self._lines(ended):
            request = waiting.pop(str(line.get("custom_id")), None)
            if request is None:
                continue
            try:
                replies.append((request, _read_line(line, request, self._price(request))))
            except Again as error:
                failures.append(self._try_again(request, str(error), self._most(request) * error.doubtful, tries))
            except ChatError as error:
                failures.append((request, str(error), 0.0, True))
                self._refused[request.key] = error
        for request in waiting.values():
            # a batch that says it is complete may have billed what its files do not name
            doubtful = self._most(request) if ended.status == "completed" else 0.0
            why = f"batch {ended.id} ended as {ended.status} without it"
            failures.append(self._try_again(request, why, doubtful, tries))
        self._tape.end_batch(batch, ended.status, replies, failures)
        self._new |= {request.key for request, _ in replies}
        return None

    def _failed(self, batch: OpenBatch, ended: Any) -> None:
        """A file that the server refused as a whole, at no cost."""
        self._tape.end_batch(batch, ended.status)
        errors = (ended.errors.data if ended.errors else None) or []
        if any(error.code == FULL for error in errors) and len(batch.requests) > 1:
            self.most_requests = len(batch.requests) // 2
            note = f"more tokens wait than this account may have waiting; next: {self.most_requests} requests"
            print(f"note: batch {ended.id}: {note}", file=sys.stderr)
            return
        told = "; ".join(f"{f'line {e.line}: ' if e.line else ''}{e.message} ({e.code})" for e in errors[:3])
        raise ServerError(
            f"batch {ended.id}: the server refused its file and billed nothing: {told or 'it says not why'}"
        )

    def _try_again(self, request: ChatRequest, why: str, doubtful: float, tries: Counter[str]) -> Failure:
        tries[request.key] += 1
        last = tries[request.key] >= TRIES
        if last:
            why = f"model '{request.model}': no reply in {TRIES} batches; the last one: {why}"
            self._refused[request.key] = ChatError(why)
        return request, why, doubtful, last

    def _lines(self, ended: Any) -> Iterator[dict[str, Any]]:
        for file in filter(None, (ended.output_file_id, ended.error_file_id)):
            with self._told(f"batch {ended.id}: reading its file {file}"):
                content = self._sdk.files.content(file).content
            for number, line in enumerate(content.splitlines(), start=1):
                try:
                    yield dict(json.loads(line))
                except ValueError as error:  # it may be a paid reply: asking anew could pay twice
                    where = f"{shown(self._tape.path)}: batch {ended.id}, file {file}, line {number}"
                    raise ServerError(f"{where}: no JSON object; {AGAIN}") from error


def _line(request: ChatRequest) -> bytes:
    body = json.loads(request.canonical)
    line = {"custom_id": request.key, "method": "POST", "url": ENDPOINT, "body": body}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _read_line(line: dict[str, Any], request: ChatRequest, price: Price) -> ChatReply:
    """The reply in a line of the output or the error file.

    Raises:
        Again: another batch may bring it.
        ChatError: the server refuses this request.
    """
    response = line.get("response") or {}
    status, body = response.get("status_code"), response.get("body") or {}
    if status == 200:
        return replace(read_reply(json.dumps(body).encode(), request, price), kind="batch")
    error = line.get("error") or body.get("error") or {}
    why = f"{f'status {status}' if status else error.get('code')}: {error.get('message')}"
    if status is None or may_pass(status):
        raise Again(why)
    raise ChatError(f"model '{request.model}': {why}")
