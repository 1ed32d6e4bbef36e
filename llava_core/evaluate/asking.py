"""Put many requests to a chat model: several at once, a malformed reply asked for once more, every failure counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llava_core.runtime import progress
from llava_core.teacher.chat import BudgetError, ChatClient, ChatError, ChatReply, ChatRequest, ServerError
from llava_core.teacher.generate import MOST_SILENT, concurrently


@dataclass
class Asked:
    """What asking came to.

    Attributes:
        request: the first one.
        replies: one, or two where the first was malformed.
        wrong: what is wrong with each reply; None for a good one.
        refused: why there is no reply to the last request.
    """

    request: ChatRequest
    replies: list[ChatReply] = field(default_factory=list)
    wrong: list[str | None] = field(default_factory=list)
    refused: ChatError | None = None

    @property
    def good(self) -> bool:
        """Whether the last reply can be used."""
        return bool(self.wrong) and self.wrong[-1] is None

    @property
    def text(self) -> str | None:
        """The last reply, good or not."""
        return self.replies[-1].text if self.replies else None

    def source(self) -> dict[str, Any]:
        """Where the text comes from: request, who was asked, who answered, how and when, cost; the first try too."""
        found: dict[str, Any] = {"request": self.request.key, "asked_model": self.request.model}
        if self.replies:
            last = self.replies[-1]
            found |= {"model": last.model, "client": last.kind, "date": last.date or None}
            found["cost_usd"] = sum(reply.cost_usd for reply in self.replies)
        if self.wrong and self.wrong[0]:
            found["first"] = {"content": self.replies[0].text, "wrong": self.wrong[0]}
        return found | ({"refused": str(self.refused)} if self.refused else {})


def ask_all(
    client: ChatClient, requests: Sequence[ChatRequest], check: Callable[[ChatReply], str | None], desc: str
) -> tuple[list[Asked], dict[str, Any]]:
    """Ask everything, as many requests under way at once as the client's attribute `concurrency` says.

    A malformed reply is kept, and asked for once more with the reason. Where the budget ends nothing more is asked; a
    recording client lets the next call go on from there.

    Args:
        client: who answers.
        requests: what is asked; the result is in this order.
        check: says what is wrong with a reply; None for a good one.
        desc: of the progress bar.

    Returns:
        What each request came to, and the tally: requests (sent now), replayed (from a cassette), spend_usd (paid now),
        retried (malformed first replies), repaired (those whose second one is good), failed (no good reply), stopped
        (why not all was asked, or None), unasked, models (good replies by snapshot).

    Raises:
        ServerError, DataError: the client's; what was answered until then is in its cassette.
    """
    asked: list[Asked] = []
    silent = 0
    stop = getattr(client, "stop", lambda: None)
    workers = getattr(client, "concurrency", 1)
    with progress(len(requests), desc, leave=False) as bar:
        for found in concurrently(lambda request: _ask(client, request, check), requests, workers, stop):
            asked.append(found)
            silent = silent + 1 if found.refused and not isinstance(found.refused, BudgetError) else 0
            if silent >= MOST_SILENT:
                raise ServerError(f"{silent} requests in a row had no reply; the last one: {found.refused}")
            bar.update()
    replies = [reply for found in asked for reply in found.replies]
    over = [found for found in asked if isinstance(found.refused, BudgetError)]
    retried = [found for found in asked if found.wrong and found.wrong[0]]
    return asked, {
        "requests": sum(not reply.cached for reply in replies),
        "replayed": sum(reply.cached for reply in replies),
        "spend_usd": round(sum(reply.cost_usd for reply in replies if not reply.cached), 6),
        "retried": len(retried),
        "repaired": sum(found.good for found in retried),
        "failed": sum(not found.good for found in asked) - len(over),
        "stopped": str(over[0].refused) if over else None,
        "unasked": len(over),
        "models": dict(Counter(found.replies[-1].model for found in asked if found.good)),
    }


def _ask(client: ChatClient, request: ChatRequest, check: Callable[[ChatReply], str | None]) -> Asked:
    found = Asked(request)
    for _ in range(2):
        try:
            reply = client.complete(request)
        except ServerError:
            raise
        except ChatError as error:
            found.refused = error
            break
        found.replies.append(reply)
        found.wrong.append(check(reply))
        if found.good:
            break
        said = [{"role": "assistant", "content": reply.text}] if reply.text.strip() else []
        again = f"This reply cannot be used: {found.wrong[-1]}. Reply again, in the form that was asked for."
        request = replace(request, messages=[*request.messages, *said, {"role": "user", "content": again}])
    return found
