"""Offline stand-in for GPT-4: replies to the same prompts, in the requested formats.

The prompt decides the task: instruction data of one of three kinds, scores for two answers, or a question with choices.
Replies about scenes of the miniature use the miniature's language, so that its questions and those of its tests share
one wording; replies about photographs are those of `everyday`. Equal prompts get equal replies.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from companion.miniature import everyday, language, school_texts
from companion.miniature.language import QA, Facts, number_word
from companion.miniature.rule_scorer import THOROUGH, Criteria, right_answer, score_answers, section
from companion.miniature.scene_text import Context, read_context
from companion.miniature.world import BACKGROUNDS, CATEGORIES, COLORS, POSITIONS, Group
from llava_core.constants import IMAGE_MARKER
from llava_core.runtime import DataError

TURNS = 8  # of a conversation about a scene of the miniature


def respond(
    messages: Sequence[dict[str, str]], criteria: Criteria = THOROUGH, *, error: float = 0.0, seed: int = 0
) -> str:
    """Reply to the system message and the last user message, in the format that they ask for.

    Args:
        criteria: of the rule scorer.
        error: error rate of the teacher: instruction data are written from `with_errors` of the scene's facts.
        seed: of the errors; equal prompts, rates and seeds get equal replies.

    Raises:
        DataError: the prompt asks for no known task, or for errors about a photograph.
    """
    system = " ".join(m["content"] for m in messages if m["role"] == "system").lower()
    user = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    prompt = hashlib.sha256(json.dumps([dict(m) for m in messages], sort_keys=True).encode()).hexdigest()
    rng = random.Random(prompt)
    if "[End of Assistant 2]" in user:
        return score_answers(user, criteria)
    if "[Question]" in user:
        return answer(read_context(section(user, "[Context]", "[Question]")), section(user, "[Question]", "[Answer]"))
    if options := _options(user):
        return answer_multiple_choice(user, options)
    context = read_context(user)
    if not 0 <= error <= 1:
        raise DataError(f"the teacher's error rate is {error:g}; give a share from 0 to 1")
    if error and context.captions:
        context = _misread(context, error, random.Random(f"error-{seed}-{prompt}"))
    if context.captions and "conversation" in system:
        return "\n===\n".join(_block(qa) for qa in conversation(context, rng))
    if context.captions and "question" in system:
        return _block(reasoning(context, rng))
    if context.captions and "describe" in system:
        return description(context)
    raise DataError(
        f"the offline model does not know what to do with {user[:60]!r}; it writes conversations, descriptions and "
        "reasoning questions, answers questions about a context or with choices, and scores two answers"
    )


def _misread(context: Context, error: float, rng: random.Random) -> Context:
    if context.facts is None:
        raise DataError(
            f"the offline teacher makes errors about scenes of the miniature only, not about {context.captions[0]!r}; "
            "leave out the error rate"
        )
    return replace(context, misread=with_errors(context.facts, error, rng))


def with_errors(facts: Facts, error: float, rng: random.Random) -> Facts:
    """Return facts of which each one is replaced by another value with probability `error`.

    The facts are category, color, count, size and position of each group, where they are known, and the background. A
    group at the position of another one exchanges it, so that every position still has one group.
    """

    def stated(value: Any, options: Iterable[Any]) -> Any:
        wrong = rng.choice([option for option in options if option != value])
        return wrong if (rng.random() < error) and value is not None else value

    groups = list(facts.groups)
    for k, group in enumerate(facts.groups):
        others = {g.category for g in (*groups, *facts.groups)} - {group.category}
        category = stated(group.category, [name for name in CATEGORIES if name not in others])
        position = stated(group.position, POSITIONS)
        taken = next((i for i, g in enumerate(groups) if i != k and position and g.position == position), None)
        if taken is not None:
            groups[taken] = replace(groups[taken], position=groups[k].position)
        groups[k] = Group(
            category, stated(group.color, COLORS), stated(group.count, (1, 2, 3)), position,
            stated(group.size, ("small", "large")),
        )  # fmt: skip
    groups.sort(key=lambda g: POSITIONS.index(g.position or "middle"))
    return Facts(tuple(groups), stated(facts.background, BACKGROUNDS))


def _block(qa: QA) -> str:
    return f"Question:\n{qa.question}\n===\nAnswer:\n{qa.answer}"


_OVERVIEW = ("What do you see?", "What is in the image?", "What does the image show?")
_KIND_ORDER = ("presence", "background", "count", "color", "position", "relation", "category")


def conversation(context: Context, rng: random.Random) -> list[QA]:
    """Questions with certain answers, of a scene evenly over the kinds; half of them have a general turn too."""
    facts = context.facts
    if facts is None:
        return everyday.conversation(context.photo, rng)
    pool = list({qa.question: qa for qa in language.questions(facts, rng)}.values())
    chosen: list[QA] = []
    while pool and len(chosen) < TURNS:
        kinds = [qa.kind for qa in chosen]
        chosen.append(min(pool, key=lambda qa: kinds.count(qa.kind)))
        pool.remove(chosen[-1])
    # An answer can repeat earlier turns without the image, so the most informative turns are last.
    chosen = sorted(chosen, key=lambda qa: _KIND_ORDER.index(qa.kind))
    overview = QA(rng.choice(_OVERVIEW), language.overview(facts), "overview")
    first, last = rng.random() < 0.2, rng.random() < 0.4
    return [overview, *chosen] if first else [*chosen, overview] if last else chosen


def description(context: Context) -> str:
    return everyday.detail(context.photo) if context.facts is None else language.describe(context.facts)


def reasoning(context: Context, rng: random.Random) -> QA:
    """A question that needs common knowledge; if a scene allows no unambiguous one, the total number of objects."""
    if context.facts is None:
        return everyday.reasoning(context.photo)
    total = sum(g.count for g in context.facts.groups)
    answer = "There is one object in total." if total == 1 else f"There are {number_word(total)} objects in total."
    return language.reasoning(context.facts, rng) or QA("How many objects are there in total?", answer, "reasoning")


def answer(context: Context, question: str) -> str:
    """The reference answer: the correct one to a question of the miniature, else a description."""
    facts = context.facts
    if facts is None:
        return everyday.detail(context.photo)
    for seed in range(64):
        qa = language.reasoning(facts, random.Random(seed))
        if qa is not None and qa.question == question:
            return qa.answer
    return right_answer(facts, question) or language.describe(facts)


_NEEDS_IMAGE = re.compile(r"\b(shown|picture|image|photo|photograph|map|figure|diagram|illustration)\b", re.IGNORECASE)


def _options(text: str) -> dict[str, str]:
    """Letter -> choice, for `(A) one (B) two` and for a line `A. one` each."""
    inline = re.findall(r"\(([A-E])\) (.*?)(?=\s*\([A-E]\) |\n|$)", text.rpartition("Options:")[2])
    choices = dict(inline or re.findall(r"^([A-E])\. (.+)$", text, re.MULTILINE))
    return choices if list(choices) == list("ABCDE")[: len(choices)] and len(choices) > 1 else {}


def answer_multiple_choice(prompt: str, options: dict[str, str]) -> str:
    """Answer "The answer is X." by the facts of the miniature, else decline in a sentence without a letter.

    A question that needs an image is declined. If the prompt holds two earlier answers ("The answer is X."),
    as for the ensemble's judge, the second one replaces declining.
    """
    stem = re.split(r"\n?(?:Options: )?\(A\) |\nA\. ", prompt)[0]
    unseen = IMAGE_MARKER in prompt or bool(_NEEDS_IMAGE.search(stem))
    chosen = None if unseen else _known(stem, options)
    earlier = [letter for letter in re.findall(r"answer is \(?([A-E])\b", prompt) if letter in options]
    if chosen is None and len(earlier) > 1:
        chosen = earlier[-1]
    if chosen is None:
        reason = "is about an image that I cannot see" if unseen else "cannot be decided from the text alone"
        return f"This question {reason}."
    return f"The answer is {chosen}."


def _tokens(text: str) -> frozenset[str]:
    small = "a an the is are it which one what in its as to of with does do by and be"
    return frozenset(re.findall(r"[a-z]+", text.lower())) - set(small.split())


_FACTS = sorted({_tokens(fact) for facts in school_texts.FACTS.values() for fact in facts}, key=sorted)


def _known(stem: str, options: dict[str, str]) -> str | None:
    """The choice that one fact of the miniature, or two with a common word, connect with the question."""
    asked = _tokens(stem) - frozenset[str]().union(*map(_tokens, options.values()))  # a stem may name its choices

    def strength(choice: str) -> float:
        words = _tokens(choice)
        best = 0.0
        for rest in (fact - words for fact in _FACTS if words and words < fact):
            linked = rest - asked  # the common word with a second fact: a dog is an *animal*, an *animal* eats
            if not linked:
                return 2.0
            if len(linked) == 1 and any(linked < fact and fact - linked <= asked for fact in _FACTS):
                best = 1.0
        return best

    scores = {letter: strength(choice) for letter, choice in options.items()}
    best = [letter for letter, score in scores.items() if score == max(scores.values())]
    return best[0] if len(best) == 1 else None
