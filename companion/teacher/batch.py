"""Client of OpenAI's batch endpoint: a file of requests, replies within a day, half the price.

One batch is under way at a time, so that the budget left is known before the next one begins. The cassette holds its
requests and its name, which the server stores as metadata: after `kill -9` the next client finds the batch by it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from companion.teacher.cassette import Cassette, Failure, OpenBatch, lock_cassette, over_budget
from companion.teacher.chat import (
    BATCH_PRICE,
    PRICES,
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
    INVALID_REQUEST,
    TOO_DEEP,
    Dialect,
    NoCompletionError,
    RetryableError,
    error_text,
    left_out,
    parse_json,
    read_reply,
    retryable,
    same_for_all,
    unreadable_reply,
)
from llava_core.runtime import display_path, progress

ENDPOINT, WINDOW_HOURS = "/v1/chat/completions", 24
MOST_REQUESTS, MOST_BYTES = 50_000, 200 * 10**6  # of one file, as OpenAI's API allows
TRIES = 3  # batches per request
CREATIONS = 5  # unconfirmed creations in a row, after which the client gives up
RETRIES = 2  # of one call of the server
POLL_RETRIES = 100  # of reading a batch's status: about a quarter of an hour without a connection
LONGEST_HOURS = 2 * WINDOW_HOURS  # of waiting for a batch
MOST_LISTED = 10_000  # batches of the server's list, the newest first
_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*"([0-9a-f]{64})"')
_WRONG_FIELDS = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)  # of an answer
ENDED = ("completed", "failed", "expired", "cancelled")
ENQUEUED_LIMIT = "token_limit_exceeded"  # the account may not have so many tokens enqueued
NO_ENDPOINT = "the server has no batch endpoint (status {}); use the client 'record', which asks one by one"
RESTART = "start again: the requests are in the cassette and are not paid twice"


class BatchClient:
    """Replies from a cassette; missing replies come from the server's batch endpoint.

    Args:
        base_url, api_key: as of `LiveClient`.
        price: the full one, of a model that `PRICES` does not list; half of it is paid.
        timeout: seconds for one call of the server.
        budget_usd: send nothing that could exceed it; includes the cost of all recorded replies; None for no limit.
            A budget below the highest price of all requests means several batches, one after the other.
        poll: seconds between two status requests; they grow from a sixtieth of it.

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
        self._openai, self._sdk = open_sdk(base_url, api_key, timeout, RETRIES)
        self._tape, self.price, self.budget_usd, self.poll = Cassette(cassette), price, budget_usd, poll
        self.most_requests, self.most_bytes = most_requests, most_bytes
        self._lock = threading.RLock()
        self._new: set[str] = set()  # requests whose replies were paid now and not returned yet
        self._refused: dict[str, ChatError] = {}
        self._dialect = Dialect()

    def complete(self, request: ChatRequest) -> ChatReply:
        """Complete a chat, as of `ChatClient`; a request that was not prefetched becomes a batch of its own.

        Raises:
            ConfigError: the model's price is not known, or another process holds the cassette.
            BudgetError, ServerError, ChatError: as of `LiveClient`; also after `TRIES` batches without a reply.
        """
        with self._lock:
            [reply] = [self._tape.get(request)] if request.key in self._refused else self.prefetch([request])
            if reply is None:
                raise self._refused[request.key]
            paid_now = request.key in self._new
            self._new.discard(request.key)
            return replace(reply, cached=not paid_now)

    def prefetch(self, requests: Sequence[ChatRequest]) -> list[ChatReply | None]:
        """Send the requests without a recorded reply in batches; a reply is None where `complete` raises."""
        with self._lock:
            if missing := self._missing(requests):
                lock = lock_cassette(self._tape.path)
                try:
                    with progress(len({r.key for r in missing}), "batch", unit="request") as bar:
                        self._run(requests, bar)
                finally:
                    del lock  # otherwise a traceback would hold a reference to it
            return [self._tape.get(request) for request in requests]

    def _run(self, requests: Sequence[ChatRequest], bar: Any) -> None:
        """Create and read batches until no request is missing; the first one may be of a killed process."""
        tries: Counter[str] = Counter()
        unconfirmed = 0
        while batch := self._tape.open_batch() or self._begin(self._missing(requests)):
            batch_id = batch.id or self._find(batch)
            if batch_id:
                unconfirmed = 0
                self._collect(batch, self._wait(batch_id, bar), tries)
                continue
            self._tape.end_batch(batch, "not created")
            unconfirmed += 1
            if unconfirmed >= CREATIONS:
                raise ServerError(f"creating a batch failed {CREATIONS} times; {RESTART}")

    def _missing(self, requests: Iterable[ChatRequest]) -> list[ChatRequest]:
        return [r for r in requests if r.key not in self._refused and self._tape.get(r) is None]

    def _price(self, request: ChatRequest) -> Price:
        prompt, reply = price_of(request.model, PRICES, self.price)
        return prompt * BATCH_PRICE, reply * BATCH_PRICE

    def _most(self, request: ChatRequest) -> float:
        return cost_usd(request.most_tokens(), self._price(request))

    def _line(self, request: ChatRequest) -> bytes:
        line = {"custom_id": request.key, "method": "POST", "url": ENDPOINT, "body": self._dialect.body(request)}
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"

    def _begin(self, missing: Sequence[ChatRequest]) -> OpenBatch | None:
        """Upload as many of the first missing requests as limits and budget allow, and create their batch."""
        chosen = self._choose(missing)
        if not chosen:
            return None
        name = uuid.uuid4().hex
        with self._errors("uploading a batch", endpoint=True):
            content = b"".join(self._line(request) for request in chosen)
            file = str(self._sdk.files.create(file=(f"{name}.jsonl", content), purpose="batch").id)
        batch = OpenBatch(name, file, None, chosen)
        self._tape.begin_batch(batch)  # from here on a process that follows a killed one looks for the batch
        return self._create(batch)

    def _choose(self, missing: Sequence[ChatRequest]) -> list[ChatRequest]:
        spent = self._tape.spend() + self._tape.doubtful()
        left = float("inf") if self.budget_usd is None else self.budget_usd - spent + 1e-9
        chosen: dict[str, ChatRequest] = {}
        size = 0
        for request in missing:
            if request.key in chosen:
                continue
            size += len(self._line(request))
            full = len(chosen) >= self.most_requests or size > self.most_bytes
            if chosen and (full or request.model != missing[0].model):  # the endpoint takes one model per file
                break
            left -= self._most(request)
            if not left >= 0:  # nor if the budget is NaN
                break
            chosen[request.key] = request
        if missing and not chosen:
            why = over_budget(self.budget_usd or 0.0, self._tape.spend(), self._tape.doubtful(), self._most(missing[0]))
            self._refused.update({request.key: why for request in missing})
        return list(chosen.values())

    def _create(self, batch: OpenBatch) -> OpenBatch:
        """Create a batch of its file; its id is None where the server may have created it without confirming."""
        openai = self._openai
        try:
            # no retries: a second creation would be paid, too, if only the first answer was lost
            created = self._sdk.with_options(max_retries=0).batches.create(
                input_file_id=batch.file,
                endpoint=ENDPOINT,
                completion_window=f"{WINDOW_HOURS}h",
                metadata={"llava_batch": batch.name, "kind": f"batch{left_out(self._dialect.body(batch.requests[0]))}"},
            )
            return replace(batch, id=self._note(batch, created.id))
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            if not retryable(getattr(error, "status_code", 500)) or error.code == "insufficient_quota":
                self._tape.end_batch(batch, "refused")
                with self._errors("creating a batch", endpoint=True):
                    raise
        except (*_WRONG_FIELDS, UnusableAnswerError):
            pass
        time.sleep(self.poll / 60)
        return batch

    def _find(self, batch: OpenBatch) -> str | None:
        """The id of an unconfirmed batch in the server's list; after None the server cannot create it any more."""
        for last in (False, True):
            with self._errors("listing the batches", endpoint=True):
                for known in itertools.islice(self._sdk.batches.list(limit=100), MOST_LISTED):
                    if _metadata(known).get("llava_batch") == batch.name:
                        return self._note(batch, known.id)
            if not last:
                # a creation that the server has not handled yet fails without its file
                with self._errors("deleting a file"), contextlib.suppress(self._openai.NotFoundError):
                    self._sdk.files.delete(batch.file)
                time.sleep(self.poll / 60)
        return None

    def _note(self, batch: OpenBatch, batch_id: Any) -> str:
        if not isinstance(batch_id, str) or not batch_id.isprintable():
            raise ServerError(f"the server gives the batch the id {one_line(batch_id)}, which is no name; {RESTART}")
        self._tape.note_batch(replace(batch, id=batch_id))
        most = sum(self._most(request) for request in batch.requests)
        text = f"batch {batch_id}: {len(batch.requests)} requests, at most {most:.2f} USD, within {WINDOW_HOURS} hours"
        print(f"note: {text}; it goes on at the server if this process is stopped", file=sys.stderr)
        return batch_id

    def _wait(self, batch_id: str, bar: Any) -> Any:
        wait, before, end = self.poll / 60, bar.n, time.monotonic() + LONGEST_HOURS * 3600
        while time.monotonic() < end:
            with self._errors(f"batch {batch_id}"):
                batch = self._sdk.with_options(max_retries=POLL_RETRIES).batches.retrieve(batch_id)
                counts = batch.request_counts
                done, failed = (int(counts.completed), int(counts.failed)) if counts else (0, 0)
                bar.n = before + done
                bar.set_postfix_str(f"{one_line(batch.status)}, {done} answered, {failed} failed", refresh=True)
            if batch.status in ENDED:
                return batch
            time.sleep(wait)
            wait = min(1.5 * wait, self.poll)
        raise ServerError(f"batch {batch_id} has not ended in {LONGEST_HOURS} hours; {RESTART}")

    @contextlib.contextmanager
    def _errors(self, what: str, endpoint: bool = False) -> Iterator[None]:
        what = one_line(what)
        try:
            yield
        except self._openai.APIStatusError as error:
            if endpoint and error.status_code in (404, 405, 501):
                raise ServerError(NO_ENDPOINT.format(error.status_code)) from error
            raise ServerError(f"{what}: status {error.status_code}: {one_line(error)}") from error
        except (self._openai.OpenAIError, UnusableAnswerError) as error:
            raise ServerError(f"{what}: {one_line(error)}; {RESTART}") from error
        except _WRONG_FIELDS as error:
            raise ServerError(
                f"{what}: the answer is not one of OpenAI's API ({one_line(error)}); {RESTART}"
            ) from error

    def _collect(self, batch: OpenBatch, ended: Any, tries: Counter[str]) -> None:
        """Record the results of a batch; requests without one stay missing, in at most `TRIES` batches.

        A request with a parameter that the server does not take is sent again without it.
        """
        if ended.status == "failed":
            return self._failed(batch, ended)
        sent, kind = self._dialect.body(batch.requests[0]), one_line(_metadata(ended).get("kind", "batch"))
        useless: ChatError | None = None
        waiting = {request.key: request for request in batch.requests}
        replies: list[tuple[ChatRequest, ChatReply]] = []
        failures: list[Failure] = []
        for line in self._lines(ended):
            request = waiting.pop(str(line.get("custom_id")), None)
            if request is None:
                continue
            status, refused = _refusal(line)
            if self._dialect.learn(request.model, sent, status, refused):
                failures.append((request, f"status {status}: {one_line(error_text(refused))}", 0.0, False))
                continue
            try:
                reply = _read_line(line, request, self._price(request))
                replies.append((request, replace(reply, kind=kind)))
            except RetryableError as error:
                doubtful = self._most(request) if status == 200 else 0.0
                failures.append(self._try_again(request, str(error), doubtful, tries))
            except ChatError as error:
                failures.append((request, str(error), 0.0, True))
                self._refused[request.key] = error
                useless = error if same_for_all(status, refused) else useless
        for request in waiting.values():
            # a completed batch may have billed requests that its files do not list
            doubtful = self._most(request) if ended.status == "completed" else 0.0
            why = f"batch {one_line(ended.id)} ended as {ended.status} without it"
            failures.append(self._try_again(request, why, doubtful, tries))
        self._tape.end_batch(batch, ended.status, replies, failures)
        self._new |= {request.key for request, _ in replies}
        if useless and not replies:
            raise ServerError(str(useless))
        return None

    def _failed(self, batch: OpenBatch, ended: Any) -> None:
        self._tape.end_batch(batch, ended.status)
        names = ("message", "param", "code", "line")
        with self._errors(f"batch {ended.id}"):
            data = list(ended.errors.data or ()) if ended.errors else []
            errors = [{name: getattr(error, name, None) for name in names} for error in data]
        if any(error["code"] == ENQUEUED_LIMIT for error in errors) and len(batch.requests) > 1:
            self.most_requests = len(batch.requests) // 2
            note = f"the account may not have so many tokens enqueued; next: {self.most_requests} requests"
            print(f"note: batch {one_line(ended.id)}: {note}", file=sys.stderr)
            return
        sent = self._dialect.body(batch.requests[0])
        if any(self._dialect.learn(batch.requests[0].model, sent, INVALID_REQUEST[0], error) for error in errors):
            return
        lines = [(f"line {e['line']}: " if e["line"] else "") + f"{e['message']} ({e['code']})" for e in errors[:3]]
        why = one_line("; ".join(lines) or "it gave no reason")
        raise ServerError(f"batch {one_line(ended.id)}: the server refused its file and billed nothing: {why}")

    def _try_again(self, request: ChatRequest, why: str, doubtful: float, tries: Counter[str]) -> Failure:
        tries[request.key] += 1
        last = tries[request.key] >= TRIES
        if last:
            why = f"model '{request.model}': no reply in {TRIES} batches; the last one: {why}"
            self._refused[request.key] = ChatError(why)
        return request, why, doubtful, last

    def _lines(self, ended: Any) -> Iterator[dict[str, Any]]:
        for file in filter(None, (ended.output_file_id, ended.error_file_id)):
            with self._errors(f"batch {ended.id}: reading its file {file}"):
                content = self._sdk.files.content(file).content
            for number, line in enumerate(io.BytesIO(content), start=1):
                try:
                    row = parse_json(line) if line.strip() else None
                except ValueError as error:  # it may be a paid reply: another request could be paid twice
                    where = (
                        f"{display_path(self._tape.path)}: {one_line(f'batch {ended.id}, file {file}')}, line {number}"
                    )
                    raise ServerError(f"{where}: no JSON object; {RESTART}") from error
                except RecursionError:
                    name = _CUSTOM_ID.search(line)
                    row = {"custom_id": name and name[1].decode(), "response": {"status_code": 200}, "unreadable": True}
                if isinstance(row, dict):
                    yield row


def _metadata(batch: Any) -> dict[str, Any]:
    return batch.metadata if isinstance(getattr(batch, "metadata", None), dict) else {}


def _refusal(line: dict[str, Any]) -> tuple[int | None, Any]:
    """Status and error of a line without a reply."""
    response = line.get("response")
    if not isinstance(response, dict):
        return None, line.get("error")
    body, status = response.get("body"), response.get("status_code")
    error = line.get("error") or (isinstance(body, dict) and body.get("error")) or body
    return status if isinstance(status, int) else None, error


def _read_line(line: dict[str, Any], request: ChatRequest, price: Price) -> ChatReply:
    if line.get("unreadable"):
        return unreadable_reply(request, price, TOO_DEEP)
    status, error = _refusal(line)
    if status == 200:
        try:
            return read_reply(line["response"].get("body"), request, price)
        except NoCompletionError as wrong:
            return unreadable_reply(request, price, str(wrong))
    fields = error if isinstance(error, dict) else {"message": error}
    why = f"{f'status {status}' if status else fields.get('code')}: {fields.get('message') or error_text(error)}"
    if status is None or retryable(status):
        raise RetryableError(one_line(why))
    raise ChatError(f"model '{request.model}': {one_line(why)}")
