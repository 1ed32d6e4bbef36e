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
from collections.abc import Sequence
from dataclasses import dataclass, replace

from companion.miniature import everyday, language, scienceqa
from companion.miniature.everyday import Box, Photo, either
from companion.miniature.language import NUMBERS, PLACE_PHRASE, POSITION_PHRASE, QA, Facts, number_word
from companion.miniature.world import BACKGROUNDS, CATEGORIES, COLORS, POSITIONS, Group
from llava_core.constants import IMAGE_MARKER
from llava_core.runtime import DataError

TURNS = 8  # of a conversation about a scene of the miniature


@dataclass(frozen=True)
class JudgeSettings:
    """Criteria of a judge in addition to correctness.

    detail: weight of completeness in the score of a free answer, from 0 to 1. max_words: the score of a longer answer
    is divided by its excess: half at twice as many; None for no limit.
    """

    detail: float = 0.7
    max_words: int | None = None


THOROUGH = JudgeSettings()
TERSE = JudgeSettings(detail=0.2, max_words=12)


def respond(messages: Sequence[dict[str, str]], settings: JudgeSettings = THOROUGH) -> str:
    """Reply to the system message and the last user message, in the format that they ask for.

    Raises:
        DataError: the prompt asks for no known task.
    """
    system = " ".join(m["content"] for m in messages if m["role"] == "system").lower()
    user = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    rng = random.Random(hashlib.sha256(json.dumps([dict(m) for m in messages], sort_keys=True).encode()).hexdigest())
    if "[End of Assistant 2]" in user:
        return judge(user, settings)
    if "[Question]" in user:
        return answer(read_context(_section(user, "[Context]", "[Question]")), _section(user, "[Question]", "[Answer]"))
    if options := _options(user):
        return answer_multiple_choice(user, options)
    context = read_context(user)
    if context.captions and "conversation" in system:
        return "\n===\n".join(_block(qa) for qa in conversation(context, rng))
    if context.captions and "question" in system:
        return _block(reasoning(context, rng))
    if context.captions and "describe" in system:
        return description(context)
    raise DataError(
        f"the offline model does not know what to do with {user[:60]!r}; it writes conversations, descriptions and "
        "reasoning questions, answers questions about a context or with choices, and judges two answers"
    )


def _block(qa: QA) -> str:
    return f"Question:\n{qa.question}\n===\nAnswer:\n{qa.answer}"


_BOX = re.compile(r"^(?P<name>[^:\[\]]+): [\[(](?P<box>[\d., ]+)[\])]$")


@dataclass(frozen=True)
class Context:
    captions: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...]

    @property
    def facts(self) -> Facts | None:
        """The facts of a scene; None if a sentence is not of the miniature's language."""
        return read_scene(self.captions, self.boxes)

    @property
    def photo(self) -> Photo:
        return Photo(self.captions, self.boxes)


def read_context(text: str) -> Context:
    """Parse captions (a line each) and boxes (`category: [x1, y1, x2, y2]`) of a user message."""
    captions: list[str] = []
    boxes: list[tuple[str, Box]] = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        match = _BOX.match(line)
        numbers = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", match["box"])] if match else []
        if match and len(numbers) == 4:
            boxes.append((match["name"].strip(), (numbers[0], numbers[1], numbers[2], numbers[3])))
        else:
            captions.append(line)
    return Context(tuple(captions), tuple(boxes))


_WORDS = {form: name for name in CATEGORIES for form in (language.plural(name), name)}
_GROUP = (
    rf"(?P<n>an?|{either(NUMBERS[1:])}) (?:(?P<size>small|large) )?(?:(?P<color>{either(COLORS)}) )?"
    rf"(?P<noun>{either(_WORDS)})\b"
)
_POSITION = rf"(?P<position>{either(POSITION_PHRASE.values())})"
_STATED = rf"\bthe (?P<noun>{either(_WORDS)}) (?:is|are) (?:(?P<size>small|large) and )?{_POSITION}"
_LEFT_OF = re.compile(rf"\b{re.sub('P<', 'P<a_', _GROUP)} to the left of {re.sub('P<', 'P<b_', _GROUP)}")
_MENTION = re.compile(rf"\b{_GROUP}(?: {_POSITION})?")
_TOTAL = re.compile(rf"\bthere (?:is|are) {either(NUMBERS)} objects? in total")
_FILLER = re.compile(r"\b(?:the image shows|there (?:is|are)|and|with)\b|[\s,.]")
_SIDE = {phrase: position for position, phrase in POSITION_PHRASE.items()}


def read_scene(captions: Sequence[str], boxes: Sequence[tuple[str, Box]] = ()) -> Facts | None:
    """Parse a scene of the miniature from captions, description or boxes; None if a word is not of its language.

    Boxes, (x1, y1, x2, y2) from 0 to 1, decide positions that the captions leave open. Groups are from left to right.
    """
    known: dict[str, Group] = {}
    order: list[tuple[str, str]] = []
    background = None

    def learn(noun: str, **facts: object) -> None:
        name = _WORDS[noun]
        news = {key: value for key, value in facts.items() if value is not None}
        known[name] = replace(known.get(name, Group(name, None, 1, None)), **news)  # type: ignore[arg-type]

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
        stated = known[name].position if name in known else None
        learn(name, count=len(own), position=stated or nearest)
    for left, right in order if len(known) == 3 else ():  # "a to the left of b" leaves the middle to the third
        learn(left, position=known[left].position or "left")
        learn(right, position=known[right].position or "right")
    groups = sorted(known.values(), key=lambda g: POSITIONS.index(g.position or "middle"))
    return Facts(tuple(groups), background)


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
    return _right_answer(facts, question) or language.describe(facts)


_KEYWORDS: dict[str, tuple[str, str]] = {
    **{form: ("thing", name) for form, name in _WORDS.items()},
    **{word: ("color", word) for word in COLORS},
    **{word: ("count", word) for word in NUMBERS[1:]},
    **{word: ("position", word) for word in POSITIONS},
    **{word: ("place", word) for word in BACKGROUNDS},
    **dict.fromkeys(("no", "not"), ("truth", "no")),
    "yes": ("truth", "yes"),
}
_EMPTY = "the and are was has had its for not but with that this these there from image which who"
_COLORED = re.compile(rf"\bthe (?P<noun>{either(_WORDS)}) (?:is|are) (?P<color>{either(COLORS)})\b")
Claims = set[tuple[str, ...]]


def judge(prompt: str, settings: JudgeSettings = THOROUGH) -> str:
    """Score two answers from 1 to 10 by the facts in them, independent of their order: "a b", then lines of reasons.

    If the question has one correct answer, agreement with it counts; otherwise the share of the answer's facts that
    the context supports (accuracy) and the share of the context's facts in the answer (detail). The prompt has
    sections [Context], [Question], [Assistant 1], [Assistant 2] as in LLaVA-Bench.
    """
    context = read_context(_section(prompt, "[Context]", "[Question]"))
    question = _section(prompt, "[Question]", "[Assistant 1]")
    answers = [_section(prompt, f"[Assistant {k}]", f"[End of Assistant {k}]") for k in (1, 2)]
    right = _right_answer(context.facts, question) if context.facts else None
    values = [_agreement(a, right, question) for a in answers] if right else _support(context, answers, settings)
    if settings.max_words is not None:
        values = [
            value * min(1, settings.max_words / max(1, len(a.split())))
            for a, value in zip(answers, values, strict=True)
        ]
    scores = [round(2 * (1 + 9 * value)) / 2 for value in values]
    reasons = [f"Assistant {k}: {_verdict(value)}." for k, value in enumerate(values, start=1)]
    return f"{scores[0]:g} {scores[1]:g}\n" + " ".join(reasons)


def _verdict(value: float) -> str:
    grades = ((0.8, "right and complete"), (0.5, "mostly right"), (0.2, "right in part"), (0.0, "wrong or empty"))
    return next(words for least, words in grades if value >= least)


def _section(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0].strip()


def _keywords(text: str) -> Claims:
    return {_KEYWORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _KEYWORDS}


def _right_answer(facts: Facts, question: str) -> str | None:
    """The answer to a question of the miniature; None to any other."""
    if match := re.fullmatch(r"Is there an? (\w+)\?", question):
        return "Yes." if match[1] in {g.category for g in facts.groups} else "No."
    for g in facts.groups:
        if question == language.AFFORDANCE[CATEGORIES[g.category]][0]:
            return f"The {g.category}."
    for seed in range(64):  # each draws other pairs and absent objects
        for qa in language.questions(facts, random.Random(seed)):
            if qa.question == question:
                return qa.answer
    return None


def _agreement(answer: str, right: str, question: str) -> float:
    """Agreement (0 to 1) of an answer with the right one, in facts of the same kinds."""
    wanted, given = _keywords(right), _keywords(answer)
    if ("truth", "yes") in wanted and question.startswith(("Is ", "Are ")) and answer.strip():
        given |= set() if ("truth", "no") in given else {("truth", "yes")}  # a statement without "no" means yes
    kinds = {kind for kind, _ in wanted}
    asked = _keywords(question) - wanted
    other = {claim for claim in given - wanted - asked if claim[0] in kinds}
    exact = len(wanted & given) / len(wanted | other) if wanted else 0.0
    same_kind = bool(given & wanted or other)  # a wrong color is still a color
    return 0.08 * same_kind + 0.82 * exact + 0.1 * exact * (len(answer.split()) > 2)


def _support(context: Context, answers: Sequence[str], settings: JudgeSettings) -> list[float]:
    """Score (0 to 1) of free answers: their claims against those of the context."""
    facts = context.facts
    if facts is not None:
        truth = _claims(language.describe(facts))
        claimed = [_claims(answer) for answer in answers]
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
        values.append(accuracy * (1 - settings.detail + settings.detail * detail) if claims & truth else 0.0)
    return values


def _claims(text: str) -> Claims:
    """Facts of a text in the miniature's language, each bound to its category."""
    text, claims = text.lower(), set()
    for m in [*_MENTION.finditer(text), *re.finditer(_STATED, text), *_COLORED.finditer(text)]:
        name, parts = _WORDS[m["noun"]], m.groupdict()
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


_FACTS = sorted({_tokens(fact) for facts in scienceqa.FACTS.values() for fact in facts}, key=sorted)


def _known(stem: str, options: dict[str, str]) -> str | None:
    """The choice that one fact of the miniature, or two with a common word, connect with the question."""
    asked = _tokens(stem)

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
