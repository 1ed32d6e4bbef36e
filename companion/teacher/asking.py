"""Put many requests to a chat model: several at once, a malformed reply asked for once more, every failure counted."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from companion.teacher.chat import BudgetError, ChatClient, ChatError, ChatReply, ChatRequest, ServerError
from companion.teacher.parse import ReplyError
from llava_core.runtime import progress

MOST_SILENT = 20  # requests in a row without a reply, after which the server counts as gone
Check = Callable[[ChatReply], Any]
"""Returns what a reply holds, or raises `ReplyError`: why it cannot be used."""
Retry = Callable[[ChatRequest, ChatReply, ReplyError], ChatRequest]
"""The request that follows a reply which cannot be used."""
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass
class Asked:
    """What asking came to.

    Attributes:
        request: the first one.
        replies: one, or two where the first was malformed; each with its request and what is wrong with it.
        value: what the last reply holds, if it is good.
        refused: why there is no reply to the last request.
    """

    request: ChatRequest
    replies: list[tuple[ChatRequest, ChatReply, ReplyError | None]] = field(default_factory=list)
    value: Any = None
    refused: ChatError | None = None

    @property
    def good(self) -> bool:
        """Whether the last reply can be used."""
        return bool(self.replies) and self.replies[-1][2] is None

    @property
    def unasked(self) -> bool:
        """Whether the budget did not allow all its requests."""
        return isinstance(self.refused, BudgetError)

    @property
    def text(self) -> str | None:
        """The last reply, good or not."""
        return self.replies[-1][1].text if self.replies else None

    @property
    def paid(self) -> float:
        """USD paid now."""
        return sum(reply.cost_usd for _, reply, _ in self.replies if not reply.cached)

    def source(self) -> dict[str, Any]:
        """Where the text comes from: request, who was asked, who answered, how and when, cost; the first try too."""
        found: dict[str, Any] = {"request": self.request.key, "asked_model": self.request.model}
        if self.replies:
            (_, first, wrong), (_, last, _) = self.replies[0], self.replies[-1]
            found |= {"model": last.model, "client": last.kind, "date": last.date or None}
            found["cost_usd"] = sum(reply.cost_usd for _, reply, _ in self.replies)
            found |= {"first": {"content": first.text, "wrong": str(wrong)}} if wrong else {}
        return found | ({"refused": str(self.refused)} if self.refused else {})


def again(request: ChatRequest, reply: ChatReply, reason: str) -> ChatRequest:
    """Return a request with what was said to it, and why that is asked for once more."""
    said = [{"role": "assistant", "content": reply.text}] if reply.text.strip() else []
    return replace(request, messages=[*request.messages, *said, {"role": "user", "content": reason}])


def _retry(request: ChatRequest, reply: ChatReply, error: ReplyError) -> ChatRequest:
    return again(request, reply, f"This reply cannot be used: {error}. Reply again, in the form that was asked for.")


def ask_all(
    client: ChatClient, requests: Sequence[ChatRequest], check: Check, desc: str
) -> tuple[list[Asked], dict[str, Any]]:
    """Ask everything and count what came of it; otherwise as `ask_each`.

    Args:
        client: who answers.
        requests: what is asked; the result is in this order.
        check: of every reply.
        desc: of the progress bar.

    Returns:
        What each request came to, and the tally: requests (sent now), replayed (from a cassette), spend_usd (paid now),
        retried (malformed first replies), repaired (those whose second one is good), failed (no good reply), stopped
        (why not all was asked, or None), unasked, models (good replies by snapshot).

    Raises:
        ServerError, DataError: the client's; what was answered until then is in its cassette.
    """
    asked = ask_each(client, [(request, check) for request in requests], _retry, desc, leave=False)
    replies = [reply for found in asked for _, reply, _ in found.replies]
    over = [found for found in asked if found.unasked]
    retried = [found for found in asked if found.replies and found.replies[0][2]]
    return asked, {
        "requests": sum(not reply.cached for reply in replies),
        "replayed": sum(reply.cached for reply in replies),
        "spend_usd": round(sum(found.paid for found in asked), 6),
        "retried": len(retried),
        "repaired": sum(found.good for found in retried),
        "failed": sum(not found.good for found in asked) - len(over),
        "stopped": str(over[0].refused) if over else None,
        "unasked": len(over),
        "models": dict(Counter(found.replies[-1][1].model for found in asked if found.good)),
    }


def ask_each(
    client: ChatClient, jobs: Sequence[tuple[ChatRequest, Check]], retry: Retry, desc: str, **options: Any
) -> list[Asked]:
    """Ask everything, as many requests under way at once as the client's attribute `concurrency` says.

    A malformed reply is kept, and asked for once more with the reason. Where the budget ends nothing more is asked; a
    recording client lets the next call go on from there. A client with `prefetch` gets all first requests together, and
    then all second ones.

    Args:
        client: who answers.
        jobs: what is asked, and what its reply must be; the result is in this order.
        retry: makes the second request.
        desc: of the progress bar.
        options: of the progress bar.

    Returns:
        What each request came to.

    Raises:
        ServerError, DataError: the client's; what was answered until then is in its cassette.
    """
    _prefetch(client, jobs, retry)
    asked: list[Asked] = []
    spend, failed, silent = 0.0, 0, 0
    stop = getattr(client, "stop", lambda: None)
    with progress(len(jobs), desc, **options) as bar:
        for found in concurrently(lambda job: _ask(client, *job, retry), jobs, getattr(client, "concurrency", 1), stop):
            asked.append(found)
            silent = silent + 1 if found.refused and not found.unasked else 0
            if silent >= MOST_SILENT:
                raise ServerError(f"{silent} requests in a row had no reply; the last one: {found.refused}")
            spend += found.paid
            failed += not found.good and not found.unasked
            bar.set_postfix_str(f"{spend:.2f} USD, {failed} failed", refresh=False)
            bar.update()
    return asked


def _prefetch(client: ChatClient, jobs: Sequence[tuple[ChatRequest, Check]], retry: Retry) -> None:
    """Have a client that wants to know them beforehand answer all first requests, then those that follow from them."""
    prefetch = getattr(client, "prefetch", None)
    if prefetch is None:
        return
    repairs = []
    for (request, check), reply in zip(jobs, prefetch([request for request, _ in jobs]), strict=True):
        try:
            if reply is not None:
                check(reply)
        except ReplyError as error:
            repairs.append(retry(request, reply, error))
    prefetch(repairs)


def _ask(client: ChatClient, request: ChatRequest, check: Check, retry: Retry) -> Asked:
    """Ask, and once more where the reply is malformed."""
    found = Asked(request)
    for _ in range(2):
        try:
            reply = client.complete(request)
        except ServerError:
            raise
        except ChatError as error:
            found.refused = error
            break
        try:
            found.value = check(reply)
        except ReplyError as error:
            found.replies.append((request, reply, error))
            request = retry(request, reply, error)
        else:
            found.replies.append((request, reply, None))
            break
    return found


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
