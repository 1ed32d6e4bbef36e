from __future__ import annotations

import random
from pathlib import Path

import pytest

from companion.data_tools.coco import load_annotations
from companion.miniature.everyday import KIND, Photo, conversation, counted, detail, many, reasoning, relations, tidy

RED = ("A man rides a red bike next to two dogs.", "A man on a red bicycle on a beach.", "Two dogs run along a beach.")


def test_words() -> None:
    assert [many(w) for w in ("person", "bus", "knife", "skis", "toothbrush")] == [
        "people", "buses", "knives", "skis", "toothbrushes"
    ]  # fmt: skip
    assert [counted(1, "apple"), counted(3, "skis"), counted(2, "mouse")] == [
        "an apple",
        "three pairs of skis",
        "two mice",
    ]


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("A CAT  LAYING ON A BED..", "a cat lying on a bed"),
        ("A A bowl and a orange", "a bowl and an orange"),
        ("A boy sits. He smiles.", "a boy sits"),
        ("TV on a one way street.", "TV on a one way street"),
    ],
)
def test_tidy_corrects_common_caption_errors(caption: str, text: str) -> None:
    assert tidy(caption) == text


def test_facts_need_two_captions() -> None:
    photo = Photo(RED)
    things = {t.name: t for t in photo.confirmed}
    assert set(things) == {"person", "bicycle", "dog"}
    assert (things["bicycle"].color, things["dog"].count, things["person"].word) == ("red", 2, "man")
    assert photo.place == "a beach"
    assert Photo(("A blue car.", "A red car.", "A car.")).confirmed[0].color is None
    assert Photo(("Three men.", "Two men.")).confirmed[0].count is None
    assert Photo(("A man.", "A woman.", "A dog on a dog bed.")).objects[0].word == "person"
    assert "bed" not in {t.name for t in Photo(("A dog bed frame.", "An apple tree.")).objects}


def test_conversation_uses_confirmed_facts() -> None:
    turns = {qa.question: qa.answer for seed in range(20) for qa in conversation(Photo(RED), random.Random(seed))}
    assert turns["How many dogs are there?"] == "There are two dogs."
    assert "red" in next(answer for question, answer in turns.items() if question.startswith("What color is the bi"))
    assert not any("Is there a dog" in q or ("bicycle in" in q and "No" in a) for q, a in turns.items())


def test_relations_need_separate_boxes() -> None:
    near = (("dog", (0.1, 0.1, 0.6, 0.6)), ("cat", (0.5, 0.1, 0.9, 0.6)))
    apart = (("dog", (0.1, 0.1, 0.4, 0.6)), ("cat", (0.5, 0.1, 0.9, 0.6)))
    assert relations(Photo(("A dog and a cat.",), near)) == []
    assert relations(Photo(("A dog and a cat.",), apart)) == ["The cat is to the right of the dog."]


def test_photograph_without_known_words_gets_replies() -> None:
    photo = Photo(("Zwei Katzen.",))
    assert len(conversation(photo, random.Random(0))) >= 3
    assert detail(photo)
    assert reasoning(photo).answer


def test_replies_about_real_images_agree_with_their_boxes(reference: Path) -> None:
    asked: dict[str, list[bool]] = {"count": [], "absent": [], "present": []}
    for image in load_annotations(reference / "coco" / "caps_boxes_coco2014_val_80.jsonl"):
        photo = Photo(tuple(image.captions))
        boxes = [name for name, _ in image.boxes]
        for thing in photo.confirmed:
            if thing.name in boxes:
                asked["present"].append(True)
                if thing.count:
                    asked["count"].append(boxes.count(thing.name) == thing.count)
        for qa in conversation(photo, random.Random(image.id)):
            if qa.answer.startswith("No, there is no "):
                asked["absent"].append(qa.answer.split(" no ")[1].removesuffix(" in the image.") not in boxes)
    assert len(asked["count"]) > 20
    assert sum(asked["count"]) / len(asked["count"]) > 0.85
    assert len(asked["absent"]) > 60
    assert sum(asked["absent"]) / len(asked["absent"]) > 0.97
    assert len(asked["present"]) > 80


def test_descriptions_agree_with_the_number_of_boxes(reference: Path) -> None:
    for image in load_annotations(reference / "coco" / "caps_boxes_coco2014_val_80.jsonl"):
        text = detail(Photo(tuple(image.captions), tuple(image.boxes)))
        names = [name for name, _ in image.boxes]
        for name in set(names):
            if 1 < (n := names.count(name)) < 10 and name in KIND:
                assert counted(n, name) in text or counted(n, name).capitalize() in text, (image.id, name)
