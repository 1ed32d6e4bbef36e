"""School texts, which the base language models read: facts, exercises, letters of options, and whole problems.

Whole problems are of the train split only; those with an image have its scene told in words or as patches of words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, permutations, product

from companion.data_tools.scienceqa import Problem, format_problem
from companion.miniature.language import number_word, sentence
from companion.miniature.science_skills import (
    BINS,
    COMPASS,
    ENDINGS,
    GROUP_OF,
    GROUPS,
    LEGS,
    MOVES,
    NEEDS,
    OPPOSITE,
    PLACES,
    RANKS,
    RHYMES,
    SITES,
    SKILLS,
    WORDS,
    article,
    equation,
    is_a,
    last_letters,
)
from companion.miniature.scienceqa import make_problem
from companion.miniature.world import CATEGORIES, COLORS, Scene
from llava_core.data.conversation import TEMPLATES
from llava_core.data.label_mask import Segment

REASON_FIRST, ANSWER_FIRST = "QCM-LEPA", "QCM-ALE"
_PAIRS = list(product(range(1, 13), repeat=2))


def _facts() -> dict[str, list[str]]:
    letters = sorted({word[0] for word in WORDS})
    return {
        "group": [is_a(noun) for noun in GROUP_OF],
        "kin": [
            f"{article(a)} and {article(b)} belong to one group" for g in GROUPS.values() for a, b in permutations(g, 2)
        ],
        "need": [f"{article(group)} needs {need}" for group, need in NEEDS.items()],
        "move": [f"{article(noun)} moves {way}" for way, nouns in MOVES.items() for noun in nouns],
        "legs": [f"{article(animal)} has {number_word(n)} legs" for animal, n in LEGS.items()],
        "weather": [f"{name} is {weather}" for name, weather, _ in PLACES.values()],
        "take": [f"when it is {weather}, people take {item}" for _, weather, item in PLACES.values()],
        "compass": [f"{seen.removesuffix(' of')} is {way}" for way, seen in COMPASS.items()],
        "opposite": [f"the opposite of {a} is {b}" for a, b in OPPOSITE.items()],
        "plus": [equation(a, "plus", b) for a, b in _PAIRS if a + b <= 12],
        "times": [equation(a, "times", b) for a, b in _PAIRS if a * b <= 12],
        "divided": [equation(a * b, "divided by", b) for a, b in _PAIRS if a * b <= 12],
        "more": [f"{number_word(a)} is more than {number_word(b)}" for a, b in _PAIRS if a > b],
        "less": [f"{number_word(a)} is less than {number_word(b)}" for a, b in _PAIRS if a < b],
        "letter": [f"{word} starts with {word[0]}" for word in WORDS],
        "alphabet": [f"{a} comes before {b}" for a, b in combinations(letters, 2)],
        "rhyme": [f"{a} rhymes with {b}" for words in RHYMES.values() for a, b in permutations(words, 2)],
        "sound": [f"{word} ends in {end}" for end, words in RHYMES.items() for word in words],
        "plural": [f"{word} takes {end} in its plural" for end, words in ENDINGS.items() for word in words],
        "ending": [f"{word} ends in {last_letters(word)}" for words in ENDINGS.values() for word in words],
    }


FACTS = _facts()
SUMS = [fact for kind in ("plus", "times", "divided") for fact in FACTS[kind]]


def science_text(rng: random.Random) -> str:
    """Two to five sentences of facts, lectures and hints as pretraining text, never a question."""
    said = [sentence(rng.choice(FACTS[kind])) for kind in rng.choices(list(FACTS), k=rng.randint(2, 4))]
    skill, kind = rng.choice(list(SKILLS.values())), rng.random()
    extra = skill.lecture if kind < 0.3 else skill.draw(rng).hint if kind < 0.4 else ""
    return " ".join([extra, *said]).strip()


# --- exercises: a question and a reply of one step ----------------------------------------------------------------

Exercise = tuple[str, str]
_NUMBERS = [number_word(n) for n in range(1, 13)]
_LISTS: Sequence[tuple[str, str, Sequence[str], Sequence[str]]] = (  # start and end of an entry, keys, values
    ("{} goes", "in {}", list(COLORS), BINS),
    ("{} costs", "{}", [article(noun) for noun in CATEGORIES], _NUMBERS),
    ("{} goes", "{} miles", [article(noun) for noun in CATEGORIES], _NUMBERS[1:]),
    ("the {} came", "{}", list(CATEGORIES), RANKS),
    ("{} is", "{}", list(COLORS), _NUMBERS),
    ("the {} is", "{}", SITES, list(COLORS)),
)


def _sum(rng: random.Random) -> Exercise:
    fact = rng.choice(SUMS)
    return f"What is {fact.split(' is ')[0]}?", sentence(fact)


def _comparison(rng: random.Random) -> Exercise:
    values = rng.sample(range(1, 13), rng.randint(2, 3))
    word, pick = rng.choice((("more", max), ("less", min)))
    found = pick(values)
    others = " and ".join(number_word(n) for n in values if n != found)
    asked = " or ".join(number_word(n) for n in rng.sample(values, len(values)))
    return f"Which is {word}, {asked}?", sentence(f"{number_word(found)} is {word} than {others}")


def look_up(rng: random.Random, by_value: bool | None = None) -> Exercise:
    """A list of two or three entries, one of which is asked for by its key or by its value (drawn when None)."""
    start, end, keys, values = rng.choice(_LISTS)
    n = rng.randint(2, 3)
    starts = [start.format(key) for key in rng.sample(keys, n)]
    ends = [end.format(value) for value in rng.sample(values, n)]
    rows = [f"{a} {b}" for a, b in zip(starts, ends, strict=True)]
    told = rng.choice((" ".join(map(sentence, rows)), sentence(", ".join(rows))))
    k = rng.randrange(n)
    if by_value is None:
        by_value = rng.random() >= 0.7
    question = f"Which one: {ends[k]}?" if by_value else f"Go on: {starts[k]}"
    return f"{told}\n{question}", sentence(rows[k])


def _recall(rng: random.Random) -> Exercise:
    fact = rng.choice(FACTS[rng.choice(("group", "need", "move", "legs", "weather", "sound", "ending", "letter"))])
    words = fact.split(" ")
    start = 1 + next(k for k, word in enumerate(words) if word in ("is", "needs", "moves", "has", "ends", "starts"))
    return f"Go on: {' '.join(words[:start])}", sentence(fact)


EXERCISES: Sequence[Callable[[random.Random], Exercise]] = (_sum, _comparison, look_up, look_up, _recall)


def exercise(rng: random.Random) -> list[tuple[str, str | None]]:
    """One to three exercises as the turns of a dialogue."""
    return [rng.choice(EXERCISES)(rng) for _ in range(rng.randint(1, 3))]


# --- letters and whole problems -----------------------------------------------------------------------------------


def draw_problem(rng: random.Random, split: str = "train") -> tuple[Problem, Scene | None]:
    """A problem of a split as the prompt formats take it, without an image file, and the scene of its image."""
    raw = make_problem(rng, split=split)
    fields = ("question", "choices", "answer", "hint", "lecture", "solution", "subject", "skill")
    grade = int(raw["grade"].removeprefix("grade"))
    return Problem("read", image=None, grade=grade, split=split, **{f: raw[f] for f in fields}), raw["scene"]


def problem_turn(problem: Problem, prompt_format: str, context: str = "") -> Exercise:
    """A problem as question and reply; `context` tells its image."""
    ((question, reply),) = format_problem(problem, prompt_format).turns
    return (f"{context}\n{question}" if context else question), reply


def with_letter(turn: Exercise, letter: str) -> list[Segment]:
    """A dialogue of one turn in which only the reply's letter is supervised, after `ANSWER:` or `The answer is`."""
    question, reply = turn
    *prompt, last = TEMPLATES.get("v0").render([(question, reply)])
    before = last.text.index(f" {letter}.", last.text.rfind("ANSWER:") if "ANSWER:" in reply else 0)
    head, tail = last.text[:before], last.text[before + 2 :]
    return [*prompt, Segment(head), Segment(f" {letter}", True), Segment(tail, eos=last.eos)]


def letter_document(rng: random.Random) -> list[Segment]:
    """A dialogue in which only the letter of an option is learned: asked for by name, or after a text that names it."""
    problem, _ = draw_problem(rng)
    kind = rng.random()
    if kind < 0.4:
        return with_letter(problem_turn(problem, REASON_FIRST), problem.letter)
    answer = rng.randrange(len(problem.choices))
    named = replace(problem, answer=answer, hint="", lecture="", solution="")
    if kind < 0.7:
        named = replace(named, question=f"Which letter is {problem.choices[answer]}?")
        return with_letter(problem_turn(named, rng.choice((ANSWER_FIRST, REASON_FIRST))), named.letter)
    named = replace(named, solution=sentence(f"it is {problem.choices[answer]}"))
    return with_letter(problem_turn(named, REASON_FIRST), named.letter)
