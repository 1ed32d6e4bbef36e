"""Chat completions as servers speak them: the parameters of a request, refusals, and the text of a reply."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from companion.teacher.chat import ChatReply, ChatRequest, Price, ServerError, cost_usd, valid_unicode
from companion.teacher.connection import one_line
from companion.teacher.reasoning import without_reasoning

FATAL_STATUS = (401, 402, 403, 404, 405, 410)  # every other request would get the same answer
INVALID_REQUEST = (400, 422)
OTHER_NAME: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None}
"""What is sent instead of a parameter that a server does not take: OpenAI's newer name, or nothing."""
SETTINGS = ("max_tokens", "max_completion_tokens", "temperature")
_UNKNOWN = re.compile(r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|deprecated", re.I)
_LIMIT = re.compile(
    r"too (?:large|high|long|many)|at most|at least|maximum|exceed|context|less than|greater than", re.I
)
_FOR_ALL = re.compile(
    r"unsupported_(?:parameter|value|country)|unsupported (?:parameter|value)|api[ _-]?key|authenti|unauthori[sz]ed"
    r"|billing|quota|balance|insufficient (?:funds|credit)|location is not supported"
    r"|model_not_found|invalid_model|(?:invalid|unknown|no such|not a valid) model|model .{0,80}?"
    r"(?:not exist|not found|not a valid|not available|not supported|deprecated|decommissioned|unknown)",
    re.I | re.S,
)
FINISHED = (
    "stop",
    "eos",
    "eos_token",
    "end_turn",
    "end_of_turn",
    "stop_sequence",
    "complete",
    "completed",
    "endoftext",
)
CUT_OFF = ("length", "max_tokens", "max_output_tokens", "model_length")
NOT_REPORTED = "not reported"  # by a server without `finish_reason`
ONLY_REASONING = "reasoning without a reply"
TOO_DEEP = "JSON of too many levels"
MOST_TOKENS = 10**7  # of a request and of a reply, above the context of every model


class RetryableError(Exception):
    """An attempt failed for a reason that may not hold for the next one."""


class NoCompletionError(RetryableError):
    """A body with status 200 is JSON, but neither a chat completion nor an error: it may be paid."""


class Dialect:
    """The parameters that a server takes for each model, learned from what it refuses."""

    def __init__(self) -> None:
        self._learned: dict[str, dict[str, str | None]] = {}
        self._lock = threading.Lock()

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """Return the body of a request."""
        other = self._learned.get(request.model, {})
        body = json.loads(request.canonical)
        renamed = {other.get(name, name): value for name, value in body.items()}
        return {name: value for name, value in renamed.items() if name is not None}

    def learn(self, model: str, sent: Collection[str], status: int | None, error: Any) -> bool:
        """Return whether a request with the parameters `sent` was refused for one that can be left out or renamed."""
        name = _refused_parameter(sent, status, error)
        if name not in OTHER_NAME:
            return False
        other = OTHER_NAME[name]
        with self._lock:
            if name not in self._learned.setdefault(model, {}):
                instead = f"'{other}' is sent instead" if other else "it is left out, so the server's own value holds"
                print(f"note: the server does not take '{name}' for model '{model}'; {instead}", file=sys.stderr)
            self._learned[model] = {**self._learned[model], name: other}
        return True


def left_out(sent: Collection[str]) -> str:
    """Return the names of the parameters that a body lacks, for `ChatReply.kind`."""
    return "".join(f", without {name}" for name, other in OTHER_NAME.items() if not {name, other} & set(sent))


def _refused_parameter(sent: Collection[str], status: int | None, error: Any) -> str | None:
    """The parameter that the error names, unless only its size is wrong."""
    if status not in INVALID_REQUEST:
        return None
    text = error_text(error)
    named = [name for name in SETTINGS if name in sent and name in text]
    first = min(named, key=text.find, default=None)
    if isinstance(error, Mapping) and error.get("param") in named:
        first = error["param"]
    return first if _UNKNOWN.search(text) or not _LIMIT.search(text) else None


def error_text(error: Any) -> str:
    """Return an error as text, without the request that some servers repeat in it."""

    def without_input(part: Any) -> Any:
        if isinstance(part, list):
            return [without_input(value) for value in part]
        if isinstance(part, dict):
            return {name: without_input(value) for name, value in part.items() if name != "input"}
        return part

    try:
        return json.dumps(without_input(error), default=str)
    except RecursionError:
        return TOO_DEEP


def same_for_all(status: int | None, error: Any) -> bool:
    """Whether a refusal holds for every request: wrong key, unknown model, exhausted quota, unsupported parameter."""
    code, param = (error.get("code"), error.get("param")) if isinstance(error, Mapping) else (None, None)
    if status in FATAL_STATUS or code == "insufficient_quota" or 300 <= (status or 0) < 400:
        return True
    if status not in INVALID_REQUEST:
        return False
    text = error_text(error)
    setting = param in SETTINGS and "context" not in text  # a prompt may leave less room in the model's context
    unsupported = _refused_parameter(SETTINGS, status, error) is not None
    return param == "model" or setting or unsupported or bool(_FOR_ALL.search(text))


def retryable(status: int) -> bool:
    """Whether the openai SDK repeats a request with this status."""
    return status in (408, 409, 429) or status >= 500


def parse_json(text: str | bytes) -> Any:
    """Return JSON as a server writes it: with line breaks in texts, bytes that are no UTF-8, numbers of any length.

    Raises:
        ValueError: it is no JSON.
        RecursionError: it has more levels than Python's parser reads.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig", errors="replace")
    # Python converts integers of at most 4300 digits
    return json.loads(text, strict=False, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


def read_reply(body: Any, request: ChatRequest, price: Price) -> ChatReply:
    """Return the reply in the body of a response with status 200, as bytes or parsed.

    The text is without reasoning. `finish_reason` says why it is not a whole reply: the server's reason, `refusal`,
    `ONLY_REASONING`, a part of the content that is no text, or that the body cannot be read.

    Raises:
        RetryableError: it is no chat completion; a NoCompletionError if the server may have billed it.
        ServerError: it is an error that every other request would get.
    """
    start = body[:300] if isinstance(body, bytes) else error_text(body)[:300]
    try:
        answer = parse_json(body) if isinstance(body, bytes) else body
        if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
            refused = answer["error"]
            status = refused.get("code") if isinstance(refused, dict) else None
            if same_for_all(status if isinstance(status, int) else INVALID_REQUEST[0], refused):
                raise ServerError(f"model '{request.model}': {one_line(error_text(refused))}")
            raise RetryableError(f"not a chat completion: {start!r}")
        choice = answer["choices"][0]
        message, reason = choice.get("message"), choice.get("finish_reason")
        if not isinstance(message, dict):
            message = {"content": choice.get("text")}
        return _reply(message, reason, answer, request, price)
    except RecursionError:
        return unreadable_reply(request, price, TOO_DEEP)
    except ValueError as error:
        raise RetryableError(f"not a chat completion: {start!r} ({error})") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise NoCompletionError(f"not a chat completion: {start!r} ({type(error).__name__})") from error


def unreadable_reply(request: ChatRequest, price: Price, why: str) -> ChatReply:
    """Return a reply without text, at the highest cost that it can have: it is paid, so it is not asked for again."""
    tokens, date = request.most_tokens(), datetime.now(UTC).isoformat(timespec="seconds")
    return ChatReply("", request.model, *tokens, cost_usd(tokens, price), f"unreadable: {why}", *price, date)


def _reply(
    message: Mapping[str, Any], reason: Any, answer: Mapping[str, Any], request: ChatRequest, price: Price
) -> ChatReply:
    text, reasoning, wrong = _content(message.get("content"))
    reasoning += "".join(str(message.get(name) or "") for name in ("reasoning_content", "reasoning", "thinking"))
    usage = answer.get("usage")
    if not reason:
        completion = _count(usage, 0, "completion_tokens", "output_tokens")
        reason = "length" if completion >= request.max_tokens else NOT_REPORTED
    tokens = (
        _count(usage, request.expected_tokens()[0], "prompt_tokens", "input_tokens"),
        _count(usage, round(len(text + reasoning) / 4) + 1, "completion_tokens", "output_tokens"),
    )
    if (unicode := valid_unicode(text)) != text:
        text, wrong = unicode, "half of a character"
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        text, wrong = text or valid_unicode(message["refusal"]), "refusal"
    without = without_reasoning(text)
    if without is None or (reasoning and not text.strip()):
        wrong = wrong or ONLY_REASONING
    if wrong and is_finished(str(reason)):
        reason = wrong
    date = datetime.now(UTC).isoformat(timespec="seconds")
    model = one_line(answer.get("model") or request.model)
    text = text if without is None else without
    return ChatReply(text, model, *tokens, cost_usd(tokens, price), one_line(reason), *price, date)


def is_finished(reason: str) -> bool:
    """Whether a reply with this `finish_reason` is whole, as far as its server says."""
    return reason.lower() in (*FINISHED, NOT_REPORTED)


def is_cut_off(reason: str) -> bool:
    return reason.lower() in CUT_OFF


def _content(content: Any) -> tuple[str, str, str]:
    """Text, reasoning, and what is wrong, of a message's content: a string, null, or a list of parts."""
    texts, reasoning, wrong = [], [], ""
    for part in content if isinstance(content, list) else [] if content is None else [content]:
        fields = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = str(fields.get("type") or "text") if isinstance(fields, Mapping) else type(fields).__name__
        if re.search("think|thought|reason", kind) or (isinstance(fields, Mapping) and fields.get("thought") is True):
            reasoning.append(json.dumps(fields))
        elif kind in ("text", "output_text") and isinstance(fields.get("text"), str):
            texts.append(fields["text"])
        elif kind == "refusal":
            texts.append(str(fields.get("refusal") or ""))
            wrong = "refusal"
        else:
            wrong = wrong or f"content of type {kind}"
    return "".join(texts), "".join(reasoning), wrong


def _count(usage: Any, estimate: int, *names: str) -> int:
    """Tokens as the server counts them; our estimate where it reports no possible number or less than half of it."""
    values: list[Any] = [usage.get(name) for name in names] if isinstance(usage, Mapping) else []
    for value in values:
        whole = type(value) is int or (type(value) is float and value.is_integer())
        if whole and max(1, estimate / 2) <= value <= MOST_TOKENS:
            return int(value)
    return estimate
