"""Objects named in answers: plurals, negation, and support by boxes and captions."""

from __future__ import annotations

import pytest

from companion.data_tools.objects import Vocabulary, plural, unsupported


@pytest.mark.parametrize(
    ("noun", "several"),
    [
        ("dog", "dogs"), ("bus", "buses"), ("bench", "benches"), ("cherry", "cherries"), ("toy", "toys"),
        ("wine glass", "wine glasses"), ("knife", "knives"), ("person", "people"), ("sheep", "sheep"), ("man", "men"),
    ],
)  # fmt: skip
def test_plurals(noun: str, several: str) -> None:
    assert plural(noun) == several


COCO = ("person", "dog", "bed", "bear", "teddy bear", "orange", "car", "truck", "bus", "couch", "knife", "remote")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs and a dog's bowl.", ["dog", "dog"]),
        ("A woman, men and the people.", ["person"] * 3),
        ("A sofa beside knives.", ["couch", "knife"]),
        ("Teddy bears on a dog bed.", ["teddy bear", "bed"]),
        ("An orange truck and an orange and white bus.", ["truck", "bus"]),
        ("The bright orange, and oranges.", ["orange", "orange"]),
        ("A remote area where people who like it bear with it.", []),
        ("The carpet, hotdogs and a Doge.", []),
        ("There are no dogs, cars or trucks, but two buses.", ["bus"]),
        ("There isn't a dog. A car is here.", ["car"]),
        ("Not only a dog but also a car", ["dog", "car"]),
        ("No, the animal is a dog.", ["dog"]),
        ("No dog.", []),
        ("No", []),
    ],
)
def test_objects_stated_as_present(text: str, expected: list[str]) -> None:
    assert [mention.category for mention in Vocabulary(COCO).mentions(text) if not mention.negated] == expected


def test_categories_are_no_synonyms_of_each_other() -> None:
    assert Vocabulary(["dining table"]).named("a table") == {"dining table"}
    assert Vocabulary(["dining table", "table"]).named("a table and a dining table") == {"dining table", "table"}


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("What is there?", "A car and a dog.", {"dog": "dog"}),
        ("What is there?", "A car and two puppies.", {"dog": "puppies"}),
        ("Is there a dog?", "No, only a car.", {}),
        ("Is there a dog?", "No, dogs are not to be seen.", {}),
        ("Is there a dog?", "No, but there is a bus.", {"bus": "bus"}),
        ("Is there a dog?", "Yes, a dog.", {"dog": "dog"}),
    ],
)
def test_denied_objects_are_not_unsupported(question: str, answer: str, expected: dict[str, str]) -> None:
    assert unsupported(Vocabulary(COCO), question, answer, {"car"}) == expected
