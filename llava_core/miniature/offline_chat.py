"""The offline model behind the chat protocol: it reads the very prompt that GPT-4 would get and replies in its format.

It tells by the prompt which job it has: instruction data of one of three kinds, judging two answers, or a multiple-choice
question. Of the miniature it speaks with the miniature's own language, so that its questions and the ones that models are
tested with share one wording; of real photographs it speaks as `everyday` does. Equal prompts get equal replies.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_core.miniature import everyday, language
from llava_core.miniature.everyday import Box, Photo
from llava_core.miniature.language import NUMBERS, PLACE_PHRASE, POSITION_PHRASE, QA, Facts, number_word
from llava_core.miniature.world import BACKGROUNDS, CATEGORIES, COLORS, POSITIONS, Group
from llava_core.runtime import DataError

TURNS = 8  # of a conversation about a scene of the miniature


def respond(messages: Sequence[dict[str, str]]) -> str:
    """Reply to a chat.

    Args:
        messages: {role, content}; the system message and the last user message decide, examples between are not read.

    Returns:
        The reply, in the format that the job's prompt asks for.

    Raises:
        DataError: it is none of the jobs that this model knows.
    """
    system = " ".join(m["content"] for m in messages if m["role"] == "system").lower()
    user = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    rng = random.Random(hashlib.sha256(json.dumps([dict(m) for m in messages], sort_keys=True).encode()).hexdigest())
    if "[End of Assistant 2]" in user:
        return judge(user)
    if options := _options(user):
        return answer_multiple_choice(user, options, rng)
    context = read_context(user)
    if context.captions and "conversation" in system:
        return "\n===\n".join(_block(qa) for qa in conversation(context, rng))
    if context.captions and "question" in system:
        return _block(reasoning(context, rng))
    if context.captions and "describe" in system:
        return description(context)
    raise DataError(
        f"the offline model does not know what to do with {user[:60]!r}; it writes conversations, descriptions and "
        "reasoning questions, judges two answers and answers multiple-choice questions"
    )


def _block(qa: QA) -> str:
    return f"Question:\n{qa.question}\n===\nAnswer:\n{qa.answer}"


# ------------------------------------------------------------------------------------------------ the context

_BOX = re.compile(r"^(?P<name>[^:\[\]]+): [\[(](?P<box>[\d., ]+)[\])]$")


@dataclass(frozen=True)
class Context:
    """Captions and boxes out of a prompt, and the facts where they speak of a scene of the miniature."""

    captions: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...]

    @property
    def facts(self) -> Facts | None:
        """The facts of a scene; None when a single sentence is not of the miniature's language."""
        return read_scene(self.captions, self.boxes)

    @property
    def photo(self) -> Photo:
        """The same as a photograph."""
        return Photo(self.captions, self.boxes)


def read_context(text: str) -> Context:
    """Read captions (a line each) and boxes (`category: [x1, y1, x2, y2]`) out of a user message."""
    captions: list[str] = []
    boxes: list[tuple[str, Box]] = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        found = _BOX.match(line)
        numbers = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", found["box"])] if found else []
        if found and len(numbers) == 4:
            boxes.append((found["name"].strip(), (numbers[0], numbers[1], numbers[2], numbers[3])))
        else:
            captions.append(line)
    return Context(tuple(captions), tuple(boxes))


# --- sentences of the miniature

_WORDS = {form: name for name in CATEGORIES for form in (language.plural(name), name)}


def _either(words: Sequence[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_GROUP = (
    rf"(?P<n>an?|{_either(NUMBERS[1:])}) (?:(?P<size>small|large) )?(?:(?P<color>{_either(list(COLORS))}) )?"
    rf"(?P<noun>{_either(list(_WORDS))})\b"
)
_POSITION = rf"(?P<position>{_either(list(POSITION_PHRASE.values()))})"
_STATED = rf"\bthe (?P<noun>{_either(list(_WORDS))}) (?:is|are) (?:(?P<size>small|large) and )?{_POSITION}"
_LEFT_OF = re.compile(rf"\b{re.sub('P<', 'P<a_', _GROUP)} to the left of {re.sub('P<', 'P<b_', _GROUP)}")
_MENTION = re.compile(rf"\b{_GROUP}(?: {_POSITION})?")
_TOTAL = re.compile(rf"\bthere (?:is|are) {_either(NUMBERS)} objects? in total")
_FILLER = re.compile(r"\b(?:the image shows|there (?:is|are)|and|with)\b|[\s,.]")
_SIDE = {phrase: position for position, phrase in POSITION_PHRASE.items()}


def read_scene(captions: Sequence[str], boxes: Sequence[tuple[str, Box]] = ()) -> Facts | None:
    """Read a scene of the miniature out of its captions, its description or its boxes.

    Args:
        captions: sentences; every word of them must be of the miniature's language.
        boxes: (category, (x1, y1, x2, y2)) from 0 to 1; they tell positions that the captions leave open.

    Returns:
        The facts, groups from left to right; None where a sentence says something else.
    """
    known: dict[str, Group] = {}
    order: list[tuple[str, str]] = []
    background = None

    def learn(noun: str, **facts: object) -> str:
        name = _WORDS[noun]
        news = {key: value for key, value in facts.items() if value is not None}
        known[name] = replace(known.get(name, Group(name, None, 1, None)), **news)  # type: ignore[arg-type]
        return name

    def count(word: str) -> int:
        return NUMBERS.index(word) if word in NUMBERS else 1

    for text in (caption.lower() for caption in captions):
        rest = _TOTAL.sub(" ", text)
        for place, phrase in PLACE_PHRASE.items():
            if re.search(rf"\b{phrase}\b", rest):
                background, rest = place, re.sub(rf"\b{phrase}\b", " ", rest)
        for m in _LEFT_OF.finditer(rest):
            order.append((_WORDS[m["a_noun"]], _WORDS[m["b_noun"]]))
        for m in re.finditer(_STATED, rest):
            learn(m["noun"], size=m["size"], position=_SIDE[m["position"]])
        rest = re.sub(_STATED, " ", rest)
        for m in _MENTION.finditer(rest):
            position = _SIDE.get(m["position"] or "")
            learn(m["noun"], count=count(m["n"]), color=m["color"], size=m["size"], position=position)
        if _FILLER.sub("", _MENTION.sub(" ", rest.replace("to the left of", " "))):
            return None
    if not known or not set(known) | {name for name, _ in boxes} <= set(CATEGORIES):
        return None
    for name in dict.fromkeys(name for name, _ in boxes):
        own = [box for other, box in boxes if other == name]
        center = (min(b[0] for b in own) + max(b[2] for b in own)) / 2
        nearest = "left" if center < 0.35 else "right" if center > 0.65 else "middle"
        learn(name, count=len(own), position=known[name].position if name in known and known[name].position else nearest)
    for left, right in order if len(known) == 3 else ():  # "a to the left of b" leaves the middle to the third
        learn(left, position=known[left].position or "left")
        learn(right, position=known[right].position or "right")
    groups = sorted(known.values(), key=lambda g: POSITIONS.index(g.position or "middle"))
    return Facts(tuple(groups), background)


# ------------------------------------------------------------------------------------------------ instruction data

_KIND_ORDER = ("presence", "background", "count", "color", "position", "relation", "category")


def conversation(context: Context, rng: random.Random) -> list[QA]:
    """Questions with sure answers: of a scene at most `TURNS`, as many of each kind as of another."""
    facts = context.facts
    if facts is None:
        return everyday.conversation(context.photo, rng)
    found, chosen = language.questions(facts, rng), []
    while found and len(chosen) < TURNS:
        kinds = [qa.kind for qa in chosen]
        chosen.append(min(found, key=lambda qa: kinds.count(qa.kind)))
        found.remove(chosen[-1])
    # What an earlier turn has said can be repeated without a look at the image, so whatever tells most comes last.
    return sorted(chosen, key=lambda qa: _KIND_ORDER.index(qa.kind))


def description(context: Context) -> str:
    """A detailed description."""
    return everyday.detail(context.photo) if context.facts is None else language.describe(context.facts)


def reasoning(context: Context, rng: random.Random) -> QA:
    """A question that takes knowledge; of a scene without an unambiguous one, a question that takes adding up."""
    if context.facts is None:
        return everyday.reasoning(context.photo)
    total = sum(g.count for g in context.facts.groups)
    answer = "There is one object in total." if total == 1 else f"There are {number_word(total)} objects in total."
    return language.reasoning(context.facts, rng) or QA("How many objects are there in total?", answer, "reasoning")


# ------------------------------------------------------------------------------------------------ the judge


def judge(prompt: str) -> str:
    """Score two answers from 1 to 10 by the facts in them, whichever stands first.

    An answer is worth what of it the context supports (accuracy), how much of what could be said it says (detail), and,
    where the question has one right answer, whether it gives that (helpfulness).

    Args:
        prompt: sections [Context], [Question], [Assistant 1], [Assistant 2] as in LLaVA-Bench.

    Returns:
        "a b" on the first line, then why.
    """
    context = read_context(_section(prompt, r"\[Context\]", r"\[Question\]"))
    question = _section(prompt, r"\[Question\]", r"\[Assistant 1\]")
    answers = [_section(prompt, rf"\[Assistant {k}\]", rf"\[End of Assistant {k}\]") for k in (1, 2)]
    truth = _truth(context)
    right = _right_answer(context, question)
    said = [_claims(answer) for answer in answers]
    sayable = right or set().union(*said) & truth
    scores, reasons = [], []
    for k, claims in enumerate(said, start=1):
        true = claims & (truth | (right or set()))
        if right is not None:
            # a short right answer is a good one; what contradicts it or is made up costs
            hit = len(claims & right) / len(right)
            wrong = len(claims - true) / len(claims) if claims else 1.0
            value = 0.85 * hit * (1 - wrong) + 0.15 * hit * min(1.0, len(true) / 4)
        else:
            accuracy = len(true) / len(claims) if claims else 0.0
            value = accuracy * (0.35 + 0.65 * len(claims & sayable) / max(1, len(sayable)))
        scores.append(round(2 * (1 + 9 * value)) / 2)
        reasons.append(f"Assistant {k}: {len(true)} of {len(claims)} statements agree with the image.")
    return f"{scores[0]:g} {scores[1]:g}\n" + " ".join(reasons)


def _section(text: str, start: str, end: str) -> str:
    found = re.search(rf"{start}\s*\n(.*?)\n?\s*{end}", text, re.DOTALL)
    return found[1].strip() if found else ""
