"""School texts: facts are true, exercises have right replies, and only the letter of a letter document is learned."""

from __future__ import annotations

import random
import re

from companion.data_tools.scienceqa import LETTERS
from companion.miniature import school_texts
from companion.miniature.language import NUMBERS
from companion.miniature.science_skills import COMPASS, SKILLS
from companion.miniature.scienceqa import make_problem, split_of


def test_science_text_states_facts_only() -> None:
    rng = random.Random(0)
    texts = [school_texts.science_text(rng) for _ in range(4000)]
    assert all(re.fullmatch(r"[A-Z][^?]*\.", text) for text in texts)
    full = "\n".join(texts).lower()
    facts = [fact for kind in school_texts.FACTS.values() for fact in kind]
    assert sum(fact.lower() in full for fact in facts) > 0.9 * len(facts)
    assert all(skill.lecture.lower() in full for skill in SKILLS.values())
    solutions = {make_problem(rng)["solution"].lower() for _ in range(500)}
    assert not [s for s in solutions if s in full and s.count(".") > 2], "a solution is in the text"
    assert max(len(text.split()) for text in texts) < 60
    assert set(COMPASS) <= set(re.findall(r"\w+", full))


def test_sums_are_right() -> None:
    signs = {"plus": int.__add__, "times": int.__mul__, "divided by": int.__floordiv__}
    for fact in school_texts.SUMS:
        a, sign, b, value = re.fullmatch(r"(\w+) (plus|times|divided by) (\w+) is (\w+)", fact).groups()
        assert signs[sign](NUMBERS.index(a), NUMBERS.index(b)) == NUMBERS.index(value)
    assert len(set(school_texts.SUMS)) == len(school_texts.SUMS) > 130


def test_exercises_are_answered_by_what_they_tell() -> None:
    rng, kinds = random.Random(0), set()
    for _ in range(600):
        told, reply = school_texts.look_up(rng)
        rows, question = told.split("\n")
        key = question.split(": ")[1].rstrip("?")
        assert reply.rstrip(".").lower() in rows.lower()
        assert key in reply.lower()
        kinds.add(question.split(":")[0])
    assert kinds == {"Go on", "Which one"}
    for _ in range(300):
        question, reply = school_texts._comparison(rng)
        first, *others = (NUMBERS.index(word) for word in re.findall("|".join(NUMBERS[1:][::-1]), reply.lower()))
        assert first == (max if "more" in question else min)([first, *others])


def test_only_the_letter_is_learned_and_it_is_right() -> None:
    by_name = 0
    for k in range(300):
        segments = school_texts.letter_document(random.Random(k))
        text = "".join(s.text for s in segments)
        (letter,) = (s.text for s in segments if s.supervised)
        choices = dict(re.findall(r"\(([A-D])\) ([^(\n]+?)(?= \(|\n)", text))
        named = choices[letter.strip()]
        question, reply = text.split("### Assistant:")
        by_name += f"Which letter is {named}?" in question
        assert f"Which letter is {named}?" in question or named in reply.lower()
        assert re.search(rf"(ANSWER:|The answer is){letter}\.", reply)
        assert set(choices) <= set(LETTERS)
    assert 60 < by_name < 130


def test_read_problems_are_of_the_train_split() -> None:
    rng = random.Random(0)
    for _ in range(300):
        problem, _ = school_texts.draw_problem(rng)
        assert split_of(vars(problem)) == "train"
