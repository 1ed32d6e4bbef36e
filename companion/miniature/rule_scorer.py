"""Rule scorer: scores two answers by rules from the prompt that LLaVA-Bench gives to its judge.

It stands in for GPT-4 and is no language model: it extracts the statements that its rules cover, compares them with the
captions and boxes of the prompt, and ignores everything else, such as style.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from companion.miniature import language
from companion.miniature.everyday import Photo, either
from companion.miniature.language import NUMBERS, Facts
from companion.miniature.scene_text import MENTION, STATED, WORDS, Context, read_context
from companion.miniature.world import BACKGROUNDS, CATEGORIES, COLORS, POSITIONS, Group


@dataclass(frozen=True)
class Criteria:
    """Criteria in addition to correctness.

    detail: weight of completeness in the score of a free answer, from 0 to 1. max_words: the score of a longer answer
    is divided by its excess: half at twice as many; None for no limit.
    """

    detail: float = 0.7
    max_words: int | None = None


THOROUGH = Criteria()
TERSE = Criteria(detail=0.2, max_words=12)

Claims = set[tuple[str, ...]]


def score_answers(prompt: str, criteria: Criteria = THOROUGH) -> str:
    """Score two answers from 1 to 10 by the facts in them, independent of their order: "a b", then lines of reasons.

    If the question has one correct answer, agreement with it counts, for a question that needs reasoning that of the
    object and of the reason; otherwise the share of the answer's facts that the context supports (accuracy) and the
    share of the context's facts in the answer (detail). The prompt has sections [Context], [Question], [Assistant 1],
    [Assistant 2] as in LLaVA-Bench.
    """
    context = read_context(section(prompt, "[Context]", "[Question]"))
    question = section(prompt, "[Question]", "[Assistant 1]")
    answers = [section(prompt, f"[Assistant {k}]", f"[End of Assistant {k}]") for k in (1, 2)]
    wanted = _wanted_object(context.facts, question)
    right = right_answer(context.facts, question) if context.facts else None
    if wanted:
        values = [_reasoned(answer, wanted) for answer in answers]
    elif right:
        values = [_agreement(answer, right, question) for answer in answers]
    else:
        values = _support(context, answers, criteria)
    if criteria.max_words is not None:
        values = [
            value * min(1, criteria.max_words / max(1, len(answer.split())))
            for answer, value in zip(answers, values, strict=True)
        ]
    scores = [round(2 * (1 + 9 * value)) / 2 for value in values]
    reasons = [f"Assistant {k}: {_grade(value)}." for k, value in enumerate(values, start=1)]
    return f"{scores[0]:g} {scores[1]:g}\n" + " ".join(reasons)


def section(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0].strip()


def _grade(value: float) -> str:
    grades = ((0.8, "right and complete"), (0.5, "mostly right"), (0.2, "right in part"), (0.0, "wrong or empty"))
    return next(words for least, words in grades if value >= least)


_KEYWORDS: dict[str, tuple[str, str]] = {
    **{form: ("thing", name) for form, name in WORDS.items()},
    **{word: ("color", word) for word in COLORS},
    **{word: ("count", word) for word in NUMBERS[1:]},
    **{word: ("position", word) for word in POSITIONS},
    **{word: ("place", word) for word in BACKGROUNDS},
    **dict.fromkeys(("no", "not"), ("truth", "no")),
    "yes": ("truth", "yes"),
}
_NEGATED = re.compile(r"\b(?:not|no|never|neither|nor|cannot|without|\w+n't)\b.*?(?=\bbut\b|[.,;]|$)", re.DOTALL)
_EMPTY = "the and are was has had its for not but with that this these there from image which who"
_COLORED = re.compile(rf"\bthe (?P<noun>{either(WORDS)}) (?:is|are) (?P<color>{either(COLORS)})\b")


def _keywords(text: str) -> Claims:
    return {_KEYWORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _KEYWORDS}


def _affirmed(text: str) -> tuple[str, str]:
    """A text without what it negates, and what it negates."""
    text = text.lower()
    return _NEGATED.sub(" ", text), " . ".join(_NEGATED.findall(text))


# ------------------------------------------------------------------------------------------------ one right answer


def right_answer(facts: Facts, question: str) -> str | None:
    """The answer to a factual question of the miniature; None to any other."""
    if match := re.fullmatch(r"Is there an? (\w+)\?", question):
        return "Yes." if match[1] in {g.category for g in facts.groups} else "No."
    for seed in range(64):  # each draws other pairs and absent objects
        for qa in language.questions(facts, random.Random(seed)):
            if qa.question == question:
                return qa.answer
    return None


def _agreement(answer: str, right: str, question: str) -> float:
    """Agreement (0 to 1) of an answer with the right one, in facts of the same kinds; 0 about other objects."""
    wanted, asked = _keywords(right), _keywords(question)
    kinds = {kind for kind, _ in wanted}
    subjects, named = ({claim for claim in claims if claim[0] == "thing"} for claims in (asked, _keywords(answer)))
    if subjects and named and not subjects & named:
        return 0.0
    if "truth" in kinds:
        given = _keywords(answer)
        if given & asked and ("truth", "no") not in given:
            given.add(("truth", "yes"))  # a statement about what is asked for, without "no", means yes
    else:
        affirmed, denied = (_keywords(part) for part in _affirmed(answer))
        given = affirmed | {("denied", word) for _, word in wanted & denied}
        kinds.add("denied")
    other = {claim for claim in given - wanted - (asked - wanted) if claim[0] in kinds}
    exact = len(wanted & given) / len(wanted | other) if wanted else 0.0
    same_kind = bool(given & wanted or other)  # a wrong color is still a color
    return 0.08 * same_kind + 0.82 * exact + 0.1 * exact * (len(answer.split()) > 2)


# ------------------------------------------------------------------------------------------------ reasoning

_REASONS = {  # supercategory -> beginnings of the words that name the kind, and of those that name the reason
    "vehicle": ("vehicl", "carr transport driv rid travel passenger"),
    "animal": ("animal creature", "food feed fed eat hungr"),
    "plant": ("plant", "grow water light sun"),
    "building": ("build", "live lives living resid inhabit dwell shelter home"),
    "furniture": ("furnitur", "room stand sit"),
    "thing": ("small", "hold held hand grasp grip"),
}
_NEUTRAL = (
    "a an the it its is are was be they them that this these there which who what one of on in at to from with and or "
    "so for by as can could may might would will need needs get gets have has thing things object objects kind people "
    "person somebody someone anybody because since away here image picture"
)
_BECAUSE = re.compile(r"\b(?:because|since)\b|, as\b")


def _wanted_object(facts: Facts | None, question: str) -> Group | None:
    """The group that a question for reasoning asks for; None for any other question."""
    for group in facts.groups if facts else ():
        kind = CATEGORIES[group.category]
        if kind in language.AFFORDANCE and question == language.AFFORDANCE[kind][0]:
            return group
    return None


def _reasoned(answer: str, wanted: Group) -> float:
    """Score (0 to 1) of an object with a reason: a half for the right object alone, a quarter with a wrong reason."""
    text = answer.lower()
    because = _BECAUSE.search(text)
    affirmed, denied = _affirmed(text[: because.start()] if because else text)
    named = {name for kind, name in _keywords(affirmed) if kind == "thing"}
    if wanted.category not in named or ("thing", wanted.category) in _keywords(denied):
        return 0.08 * bool(named)
    colors = {name for kind, name in _keywords(affirmed) if kind == "color"}
    right_color = 0.6 if wanted.color and colors - {wanted.color} else 1.0
    reason = _reason(text[because.end() :] if because else text, CATEGORIES[wanted.category], bool(because))
    return right_color / len(named) * (0.5 if reason is None else 0.25 + 0.75 * reason)


def _reason(text: str, kind: str, announced: bool) -> float | None:
    """Score (0 to 1) of a reason, None if there is none.

    The share of its content words that belong to the reason; naming only the kind of the object gives at most a half.
    Without a "because" (`announced`), words that belong to no reason are no reason.
    """
    neutral = {*_NEUTRAL.split(), *_KEYWORDS}
    words, negated = (set(re.findall(r"[a-z]+", part)) - neutral for part in _affirmed(text))
    kinds, purposes = ({w for w in words if w.startswith(tuple(stems.split()))} for stems in _REASONS[kind])
    own = tuple(" ".join(_REASONS[kind]).split())
    if any(word.startswith(own) for word in negated):
        return 0.0
    if not kinds | purposes:
        return 0.0 if announced and words else None
    return (1.0 if purposes else 0.5) * len(kinds | purposes) / len(words)


# ------------------------------------------------------------------------------------------------ free answers


def _support(context: Context, answers: Sequence[str], criteria: Criteria) -> list[float]:
    """Score (0 to 1) of free answers: their claims against those of the context."""
    facts = context.facts
    if facts is not None:
        truth = _claims(language.describe(facts))
        parts = [_affirmed(answer) for answer in answers]
        claimed = [
            _claims(affirmed) | {("denied", *claim) for claim in _claims(denied) & truth} for affirmed, denied in parts
        ]
        complete = truth
    else:
        photo = context.photo
        truth = _photo_claims(photo) | {("word", word) for text in context.captions for word in _content(text)}
        truth |= {("thing", name) for name, _ in context.boxes}
        claimed = [
            _photo_claims(Photo((answer,))) | {("word", w) for w in _content(answer) if ("word", w) in truth}
            for answer in answers
        ]
        complete = set().union(*claimed) & truth
    values = []
    for claims in claimed:
        accuracy = len(claims & truth) / len(claims) if claims else 0.0
        detail = len(claims & complete) / max(1, len(complete))
        values.append(accuracy * (1 - criteria.detail + criteria.detail * detail) if claims & truth else 0.0)
    return values


def _claims(text: str) -> Claims:
    """Facts of a text in the miniature's language, each bound to its category."""
    text, claims = text.lower(), set()
    for m in [*MENTION.finditer(text), *re.finditer(STATED, text), *_COLORED.finditer(text)]:
        name, parts = WORDS[m["noun"]], m.groupdict()
        claims |= {("thing", name)} | {(k, name, parts[k]) for k in ("color", "position", "size") if parts.get(k)}
        if "n" in parts:
            claims.add(("count", name, "one" if parts["n"] in ("a", "an") else parts["n"]))
    return claims | {claim for claim in _keywords(text) if claim[0] == "place"}


def _photo_claims(photo: Photo) -> Claims:
    claims: Claims = {("place", photo.place)} if photo.place else set()
    for t in photo.objects:
        claims |= {("thing", t.name)} | ({("color", t.name, t.color)} if t.color else set())
    return claims


def _content(text: str) -> set[str]:
    return {word[:6] for word in re.findall(r"[a-z]{3,}", text.lower())} - set(_EMPTY.split())
