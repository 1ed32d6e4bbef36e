"""Layouts of rows in wide use, read as turns: messages, query and response, instruction and output, texts.

Source: the data formats of OpenAI, Qwen2-VL, LLaMA-Factory, ms-swift, Alpaca and the Cauldron.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_core.constants import IMAGE_MARKER
from llava_core.data.media import first_of
from llava_core.runtime import shortened

KNOWN_COLUMNS = {
    "id": ("id", "image_id", "question_id"),
    "image": (
        "image", "images", "file_name", "image_path", "filename", "path", "img", "imgs", "img_path", "image_file",
        "image_name", "picture", "photo",
    ),
    "question": ("question", "instruction", "prompt", "query", "user", "input"),
    "answer": ("answer", "caption", "text", "response", "output", "assistant", "completion"),
    "type": ("type",),
    "conversations": ("conversations", "messages", "conversation", "texts", "dialog", "dialogue"),
}  # fmt: skip
"""Field -> column names that need not be given; the first that exists is used."""

_PAIRS = (  # (question, answer) of a turn that holds both
    ("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("question", "answer"), ("query", "response"),
    ("instruction", "output"), ("input", "output"), ("prompt", "response"), ("q", "a"),
)  # fmt: skip
_ROLES = frozenset(("human", "user", "gpt", "assistant", "bot", "model", "system"))
_CHOICES = re.compile(r"choices?|options?|endings|multiple_choices|[ab]|(?:option|choice)_?[a0-9]", re.IGNORECASE)


class RowError(Exception):
    """A row that does not become a record."""


def question_of(fields: Mapping[str, Any], rest: dict[str, Any]) -> str | None:
    """The question of a row; the `input` of an instruction is its second part, and taken out of `rest`."""
    question = fields.get("question")
    if question is not None and not isinstance(question, str):
        raise RowError(f"the question is no text but {_kind(question)}; choose another column")
    if question and isinstance(rest.get("input"), str) and "instruction" not in rest:
        question = "\n".join(filter(None, [question.strip(), rest.pop("input").strip()]))
    return question or None


def answer_of(fields: Mapping[str, Any], rest: Mapping[str, Any]) -> str:
    """The answer of a row; a number is a text, but for the index of a choice."""
    answer = fields.get("answer")
    choices = [name for name, value in rest.items() if _CHOICES.fullmatch(name) and value not in (None, "", [])]
    if choices:
        raise RowError(
            f"a question with choices ({first_of(choices)}); write them into the question, and the answer as text (of "
            "ScienceQA: `llava data scienceqa`)"
        )
    if isinstance(answer, float):
        answer = None if not math.isfinite(answer) else int(answer) if answer.is_integer() else answer
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    if answer is not None and not isinstance(answer, str):
        raise RowError(f"the answer is no text but {_kind(answer)}; choose another column or one text of it")
    if not answer or not answer.strip():
        raise RowError("no answer; fill it in or remove the row")
    if IMAGE_MARKER in answer:
        raise RowError(f"the answer contains {IMAGE_MARKER}; take it out")
    return answer


def history_of(rest: dict[str, Any]) -> list[dict[str, str]]:
    """Earlier turns, [[question, answer], ...], which are taken out of `rest`."""
    history = rest.pop("history", None)
    if history in (None, "", []):
        return []
    turns = turns_of(history)[0]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"the history is no list of questions and answers but {_kind(history)}")
    return turns


def turns_of(value: Any) -> tuple[Any, list[Any], int]:
    """Turns as a list of objects, the images that they hold, and how many turns of a system were left out.

    `datasets` stores some as one object of lists, a CSV as JSON text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"the turns are no JSON ({error})") from None
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        return value, [], 0
    images: list[Any] = []
    turns = [turn for item in value for turn in _turns_of_item(item, images)]
    kept = [turn for turn in turns if not (isinstance(turn, dict) and _role(turn) == "system")]
    return kept, images, len(turns) - len(kept)


def _role(turn: Mapping[str, Any]) -> Any:
    role = turn.get("from", turn.get("role"))
    return role.strip().lower() if isinstance(role, str) else role


def _turns_of_item(item: Any, images: list[Any]) -> list[Any]:
    if isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
        if item[0].strip().lower() in _ROLES:  # [["user", "Why?"], ["assistant", "So."]]
            return [{"from": item[0], "value": item[1]}]
        return [{"from": "human", "value": item[0]}, {"from": "gpt", "value": item[1]}]
    if not isinstance(item, dict):
        return [item]
    turn = {name: value for name, value in item.items() if value is not None}  # an absent field is a null in a struct
    if not turn.keys() & {"from", "role"}:
        for question, answer in _PAIRS:
            if question in turn and answer in turn:
                rest = {name: value for name, value in turn.items() if name not in (question, answer, "source")}
                before = [{"from": "system", "value": rest.pop("system")}] if rest.get("system") else []
                return [
                    *before,
                    {"from": "human", "value": turn[question], **rest},
                    {"from": "gpt", "value": turn[answer]},
                ]
    for name in ("content", "value"):
        if isinstance(turn.get(name), list):
            turn[name] = _text_of_parts(turn[name], images)
    return [turn]


def _text_of_parts(parts: Sequence[Any], images: list[Any]) -> str:
    """The text of a message of parts, with a marker for each image, whose name (if it has one) goes to `images`."""
    texts: list[str] = []
    for part in parts:
        found = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else part
        if isinstance(found, str):
            texts.append(found)
            continue
        if not isinstance(found, dict):
            raise RowError(f"a part of a message is neither text nor an object but {_kind(found)}")
        kind = found.get("type") or next((name for name in ("text", "image") if name in found), None)
        if kind in ("text", "input_text") and isinstance(found.get("text"), str):
            texts.append(found["text"])
        elif kind in ("image", "image_url", "input_image"):
            named = next(
                (found[name] for name in ("image", "image_url", "path", "url", "bytes") if found.get(name)), None
            )
            named = named.get("url", named) if isinstance(named, dict) else named
            images += [named] if named is not None else []
            texts.append(IMAGE_MARKER)
        else:
            raise RowError(
                f"a part of a message is neither text nor image but {shortened(kind, 40)}; leave the row out"
            )
    return "\n".join(text for text in texts if text.strip())


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({shortened(value, 40)})"
