"""Send many requests to a chat client: concurrency, one more request per malformed reply, counts of what failed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from companion.teacher.chat import BudgetError, ChatClient, ChatError, ChatReply, ChatRequest, ServerError
from companion.teacher.parse import ReplyError, whole_text
from companion.teacher.protocol import NOT_REPORTED
from llava_core.runtime import progress

MAX_UNANSWERED = 20  # consecutive requests without a reply, after which the server counts as unreachable
MOST_CHARACTERS_PER_TOKEN = 20  # a longer reply than this was not limited to `max_tokens`; it is not sent back whole
Check = Callable[[ChatReply], Any]
"""Returns the content of a whole reply, whose text is without reasoning, or raises `ReplyError`."""
Retry = Callable[[ChatRequest, ChatReply, ReplyError], ChatRequest]


@dataclass
class Asked:
    """The result of a request.

    Attributes:
        replies: one, or two if the first was malformed; each with its request and its error.
        value: the checked content of the last reply, None if it is malformed.
        refused: why there is no reply to the last request.
    """

    request: ChatRequest
    replies: list[tuple[ChatRequest, ChatReply, ReplyError | None]] = field(default_factory=list)
    value: Any = None
    refused: ChatError | None = None

    @property
    def good(self) -> bool:
        return bool(self.replies) and self.replies[-1][2] is None

    @property
    def unasked(self) -> bool:
        """Whether the budget did not allow all its requests."""
        return isinstance(self.refused, BudgetError)

    @property
    def reason(self) -> str | None:
        """Why there is no good reply; None also if the budget ended before."""
        if self.good or self.unasked:
            return None
        return str(self.refused or self.replies[-1][2])

    @property
    def text(self) -> str | None:
        return self.replies[-1][1].text if self.replies else None

    @property
    def paid(self) -> float:
        return sum(reply.cost_usd for _, reply, _ in self.replies if not reply.cached)

    def source(self) -> dict[str, Any]:
        """Provenance of the text: request, models, client, date, cost, and the first reply if it was malformed."""
        row: dict[str, Any] = {"request": self.request.key, "asked_model": self.request.model}
        if self.replies:
            (_, first, wrong), (_, last, _) = self.replies[0], self.replies[-1]
            row |= {"model": last.model, "client": last.kind, "date": last.date or None}
            row["cost_usd"] = sum(reply.cost_usd for _, reply, _ in self.replies)
            row |= {"first": {"content": first.text, "wrong": str(wrong)}} if wrong else {}
            row |= {"wrong": str(self.replies[-1][2])} if not self.good else {}
        return row | ({"refused": str(self.refused)} if self.refused else {})


def follow_up(request: ChatRequest, reply: ChatReply, reason: str) -> ChatRequest:
    """Return the request that continues a chat: the reply, then the reason why another one is needed."""
    text = reply.text[: MOST_CHARACTERS_PER_TOKEN * request.max_tokens]
    quoted = [{"role": "assistant", "content": text}] if text.strip() else []
    return replace(request, messages=[*request.messages, *quoted, {"role": "user", "content": reason}])


def _retry(request: ChatRequest, reply: ChatReply, error: ReplyError) -> ChatRequest:
    return follow_up(
        request, reply, f"This reply cannot be used: {error}. Reply again, in the form that was asked for."
    )


def ask_all(
    client: ChatClient, requests: Sequence[ChatRequest], check: Check, desc: str
) -> tuple[list[Asked], dict[str, Any]]:
    """Send requests that share one check, as `ask_each`; return the results and their `tally`."""
    asked = ask_each(client, [(request, check) for request in requests], _retry, desc, leave=False)
    return asked, tally(asked)


def tally(asked: Sequence[Asked]) -> dict[str, Any]:
    """Count results.

    Returns:
        requests (sent now), replayed (from a cassette), spend_usd (paid now), retried (malformed first replies),
        repaired (those whose second one is good), failed (no good reply), stopped (why not all requests were sent, or
        None), unasked (those that the budget did not allow), models (good replies by snapshot).
    """
    replies = [reply for one in asked for _, reply, _ in one.replies]
    unasked = [one for one in asked if one.unasked]
    retried = [one for one in asked if one.replies and one.replies[0][2]]
    return {
        "requests": sum(not reply.cached for reply in replies),
        "replayed": sum(reply.cached for reply in replies),
        "spend_usd": round(sum(one.paid for one in asked), 6),
        "retried": len(retried),
        "repaired": sum(one.good for one in retried),
        "failed": sum(not one.good for one in asked) - len(unasked),
        "stopped": str(unasked[0].refused) if unasked else None,
        "unasked": len(unasked),
        "models": dict(Counter(one.replies[-1][1].model for one in asked if one.good)),
    }


def ask_each(
    client: ChatClient, jobs: Sequence[tuple[ChatRequest, Check]], retry: Retry, desc: str, **options: Any
) -> list[Asked]:
    """Send requests, as many at once as the client's `concurrency` says; return the results in the order of the jobs.

    A malformed reply stays in the result and is followed by one more request. A client with `prefetch` gets all first
    requests together, and then all second ones. `desc` and `options` are the progress bar's.

    Raises:
        ServerError, DataError: the client's; a recording client has the replies until then in its cassette.
    """
    _prefetch(client, jobs, retry)
    asked: list[Asked] = []
    spend, failed, silent = 0.0, 0, 0
    with progress(len(jobs), desc, **options) as bar:
        for one in _in_order(client, jobs, retry):
            asked.append(one)
            silent = silent + 1 if one.refused and not one.unasked else 0
            if silent >= MAX_UNANSWERED:
                raise ServerError(f"{silent} requests in a row had no reply; the last one: {one.refused}")
            spend += one.paid
            failed += not one.good and not one.unasked
            bar.set_postfix_str(f"{spend:.2f} USD, {failed} failed", refresh=False)
            bar.update()
    _report(asked)
    return asked


def _report(asked: Sequence[Asked]) -> None:
    """Print why requests failed or were not sent, and whether the server says that its replies are whole."""
    reasons = Counter(one.reason for one in asked if one.reason)
    if reasons:
        [(reason, count)] = reasons.most_common(1)
        print(f"note: {reasons.total()} of {len(asked)} requests failed, {count} of them: {reason}", file=sys.stderr)
    unasked = [one for one in asked if one.unasked]
    if unasked:
        print(f"note: {len(unasked)} of {len(asked)} requests were not sent: {unasked[0].refused}", file=sys.stderr)
    silent = sum(one.good and one.replies[-1][1].finish_reason == NOT_REPORTED for one in asked)
    if silent:
        text = "have no finish_reason, so one that was cut off before its token limit cannot be recognised"
        print(f"note: {silent} of {len(asked)} replies {text}", file=sys.stderr)


def _prefetch(client: ChatClient, jobs: Sequence[tuple[ChatRequest, Check]], retry: Retry) -> None:
    prefetch = getattr(client, "prefetch", None)
    if prefetch is None:
        return
    repairs = []
    for (request, check), reply in zip(jobs, prefetch([request for request, _ in jobs]), strict=True):
        try:
            if reply is not None:
                check(_whole(reply))
        except ReplyError as error:
            repairs.append(retry(request, reply, error))
    prefetch(repairs)


def _whole(reply: ChatReply) -> ChatReply:
    return replace(reply, text=whole_text(reply.text, reply.finish_reason))


def _ask(client: ChatClient, request: ChatRequest, check: Check, retry: Retry) -> Asked:
    asked = Asked(request)
    for _ in range(2):
        try:
            reply = client.complete(request)
        except ServerError:
            raise
        except ChatError as error:
            asked.refused = error
            break
        try:
            reply = _whole(reply)
            asked.value = check(reply)
        except ReplyError as error:
            asked.replies.append((request, reply, error))
            request = retry(request, reply, error)
        else:
            asked.replies.append((request, reply, None))
            break
    return asked


def _in_order(client: ChatClient, jobs: Sequence[tuple[ChatRequest, Check]], retry: Retry) -> Iterator[Asked]:
    threads = getattr(client, "concurrency", 1)
    if threads <= 1:
        yield from (_ask(client, request, check, retry) for request, check in jobs)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="ask") as pool:
        try:
            yield from pool.map(lambda job: _ask(client, job[0], job[1], retry), jobs)
        except KeyboardInterrupt:
            getattr(client, "stop", lambda: None)()  # otherwise the pool waits for all further attempts
            raise
