"""Parser of the teacher's replies: turns, or a named error. The released pipeline did not publish its parser.

A dialogue has alternating `Question:` and `Answer:` blocks, separated by a line `===`; a description has paragraphs.

Source: paper Section 3 and Table 13; the few-shot replies in playground/data/prompts of haotian-liu/LLaVA@54bcf81.
"""

# ruff: noqa: N818 - the errors are named for what is wrong with the reply

from __future__ import annotations

import re

from companion.teacher.protocol import ONLY_REASONING, is_cut_off, is_finished
from companion.teacher.reasoning import LABEL, without_reasoning
from llava_core.constants import IMAGE_MARKER
from llava_core.runtime import DataError


class ReplyError(DataError):
    """A reply is not of the format that its prompt asks for."""


class NotWhole(ReplyError):
    """There is no text, or only a part of it."""


class EmptyReply(NotWhole):
    """There is no text."""


class CutOffReply(NotWhole):
    """The reply reached the token limit, so its end is missing."""


class UnfinishedReply(NotWhole):
    """The server ended the reply for another reason, e.g. a content filter."""


class OnlyReasoning(NotWhole):
    """There is a model's reasoning, and no text after it."""


class Refusal(ReplyError):
    """The model declines, or refers to itself."""


class MissingLabel(ReplyError):
    """A block opens with neither `Question:` nor `Answer:`."""


class BadAlternation(ReplyError):
    """Questions and answers do not alternate, or a `===` between two blocks is missing."""


class MissingAnswer(ReplyError):
    """The last question has no answer."""


class EmptyTurn(ReplyError):
    """A question or an answer without text."""


class NotOnePair(ReplyError):
    """More than the one question that was asked for."""


class NotADescription(ReplyError):
    """Questions and answers where a description was asked for."""


class StrayMarker(ReplyError):
    """The text holds the image marker, which a record holds once, at the position of the image."""


_LABEL = re.compile(r"^\s*\**(question|answer)\**\s*:\**[ \t]*", re.IGNORECASE)
_ALOUD = re.compile(
    r"\W*(?:(?:okay|ok|alright|hmm|well|so|first)\W+)*"
    r"(?:the user (?:wants|asks|asked|is asking|has asked|provided|gave)\b"
    r"|(?:we|i) (?:need|have|ought) to (?:describe|answer|write|produce|generate|create|provide|respond)\b"
    r"|let me (?:think|start by|see|analy[sz]e)\b)",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
_REFUSAL = re.compile(r"\W*(i['’]?m sorry|i am sorry|sorry,|i can(no|['’])t|as an ai\b)", re.IGNORECASE)


def whole_text(text: str, finish_reason: str = "stop") -> str:
    """Return a reply's text without reasoning, or raise a `ReplyError` where it is empty or not a whole reply."""
    without = without_reasoning(text)
    if finish_reason == ONLY_REASONING or (without is None and is_finished(finish_reason)):
        raise OnlyReasoning(f"no text can be told from the model's reasoning {text[:40]!r}")
    if not text.strip() and is_finished(finish_reason):
        raise EmptyReply("the reply is empty; ask again")
    if is_cut_off(finish_reason):
        raise CutOffReply(f"the reply was cut off after {text[-30:]!r}; allow more tokens (--max-tokens)")
    if finish_reason == "refusal":
        raise Refusal(f"the model declines: {text[:60]!r}; ask again or leave it out")
    if not is_finished(finish_reason):
        raise UnfinishedReply(f"the reply ended with '{finish_reason}' after {text[-30:]!r}")
    assert without is not None
    return without


def answer_text(text: str, finish_reason: str = "stop") -> str:
    """As `whole_text`, but a text that opens with thoughts about its task is an `OnlyReasoning`, too."""
    text = whole_text(text, finish_reason)
    if LABEL.match(text) or _ALOUD.match(text):
        raise OnlyReasoning(f"the reply opens with the model's reasoning {text[:40]!r}")
    return text


def _checked(text: str, finish_reason: str) -> str:
    text = answer_text(text, finish_reason).replace("\r\n", "\n").strip()
    if IMAGE_MARKER in text:
        raise StrayMarker(f"the reply holds {IMAGE_MARKER}; ask again")
    if _REFUSAL.match(text):
        raise Refusal(f"the model declines: {text[:60]!r}; ask again or leave the image out")
    return text


def parse_dialogue(text: str, finish_reason: str = "stop") -> list[tuple[str, str]]:
    """Return (question, answer) per turn, or raise a `ReplyError`; empty blocks and bold labels are accepted."""
    turns: list[tuple[str, str]] = []
    question: str | None = None
    for block in filter(str.strip, _SEPARATOR.split(_checked(text, finish_reason))):
        match = _LABEL.match(block)
        if not match:
            raise MissingLabel(f"a block opens with {block.strip()[:40]!r}, not with Question: or Answer:")
        label, body = match[1].lower(), block[match.end() :].strip()
        if any(_LABEL.match(line) for line in body.split("\n")):
            raise BadAlternation(f"{label.title()}: {body[:40]!r}... holds another label; a line === is missing")
        if not body:
            raise EmptyTurn(f"turn {len(turns) + 1} has a {label} without text")
        if (label == "question") == (question is not None):
            wanted = "a question" if label == "answer" else "the answer"
            raise BadAlternation(f"turn {len(turns) + 1}: {wanted} was due, not {label} {body[:40]!r}")
        if question is None:
            question = body
        else:
            turns.append((question, body))
            question = None
    if question is not None:
        raise MissingAnswer(f"the last question has no answer: {question[:60]!r}")
    if not turns:
        raise EmptyReply("the reply holds separators and no text; ask again")
    return turns


def parse_reasoning(text: str, finish_reason: str = "stop") -> list[tuple[str, str]]:
    """Return one question with its answer, or raise a `ReplyError`."""
    turns = parse_dialogue(text, finish_reason)
    if len(turns) != 1:
        raise NotOnePair(f"{len(turns)} questions where one was asked for")
    return turns


def parse_detail(text: str, finish_reason: str = "stop") -> str:
    """Return the paragraphs of a description with one empty line between, or raise a `ReplyError`."""
    text = _checked(text, finish_reason)
    if _SEPARATOR.search(text) or any(_LABEL.match(line) for line in text.split("\n")):
        raise NotADescription(f"a description was asked for, not a dialogue: {text[:40]!r}")
    return "\n\n".join(part.strip() for part in re.split(r"\n\s*\n", text))
