"""The audit of instruction data: duplicates, leaks, and objects without support."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from companion.data_tools.audit import LEAK, Fault, find_faults, near_duplicates
from companion.data_tools.coco import AnnotatedImage, load_annotations
from llava_core.data.instruct import Sample
from llava_core.runtime import DataError

BOX = (0.1, 0.1, 0.5, 0.5)


def sample(name: str, *turns: tuple[str, str], kind: str = "conversation", image: str | None = None) -> Sample:
    first, *more = turns
    return Sample(name, [(f"<image>\n{first[0]}", first[1]), *more], Path(image or f"{name}.jpg"), kind)


def named(faults: list[Fault], beginning: str) -> Fault:
    return next(fault for fault in faults if fault.name.startswith(beginning))


def annotated(name: str, captions: list[str], *categories: str) -> AnnotatedImage:
    return AnnotatedImage(name, f"{name}.jpg", captions, [(category, BOX) for category in categories])


# ------------------------------------------------------------------------------------------------ duplicates and leaks


def test_repeated_turns_about_one_image_are_duplicates() -> None:
    twice = Sample("2", [("What is it?\n<image>", "A dog.")], Path("1.jpg"), "detail")
    other = sample("3", ("What is it?", "A cat."), image="1.jpg")
    faults = find_faults([sample("1", ("What is it?", "A dog.")), twice, other])
    same = named(faults, "the same turn")
    assert (same.counts, same.of) == ({"detail": 1}, {"conversation": 2, "detail": 1})
    assert same.examples == [{"kind": "detail", "record": "2", "text": "What is it? A dog."}]
    assert named(faults, "the same question and answer").total == 0  # it is the same image


def test_turns_repeated_with_other_images_are_a_share() -> None:
    samples = [sample(name, ("Is there a dog?", "No."), (f"What is {name}?", "A thing.")) for name in "ab"]
    row = named(find_faults(samples), "the same question and answer").row()
    assert (row["found"], row["of"], row["percent"]) == (2, 4, 50.0)


def test_near_duplicates_ignore_case_and_punctuation() -> None:
    long = " ".join(f"word{k}" for k in range(60))
    texts = [long, long.upper() + "!", long.replace("word59", "other"), long.replace("word2", "x")]
    assert near_duplicates([*texts, "", "A dog.", "a dog", "a cat"]) == [(1, 0), (2, 0), (6, 5)]


def test_near_duplicate_dialogues_name_the_earlier_record() -> None:
    turn = ("What is to be seen here?", "A red car stands in front of a house in the snow.")
    fault = named(find_faults([sample("1", turn), sample("2", turn), sample("3", ("Why?", "Because."))]), "a dialogue")
    assert (fault.total, fault.examples[0]["record"], fault.examples[0]["text"]) == (1, "2", "like conversation 1")


@pytest.mark.parametrize(
    ("leak", "text"),
    [
        ("captions", "As the second caption says, it rains."),
        ("captions", "It is CAPTIONED as a dog."),
        ("bounding boxes", "The bounding-boxes overlap."),
        ("coordinates", "Its coordinates are known."),
        ("annotations", "The annotators saw a dog."),
        ("the given sentences", "The sentences speak of a dog."),
        ("numbers like", "The dog is at 0.125."),
    ],
)
def test_leaks_name_their_record(leak: str, text: str) -> None:
    faults = find_faults([sample("1", ("What is it?", "A dog.")), sample("2", ("What is it?", text))])
    hit = [fault for fault in faults if fault.name.startswith(LEAK) and fault.total]
    assert len(hit) == 1
    assert leak in hit[0].name
    assert (hit[0].total, hit[0].examples[0]["record"]) == (1, "2")


@pytest.mark.parametrize(
    "text",
    [
        "The captain waves.",
        "Players coordinate their game.",
        "A sentence on a sign.",
        "It costs 0.5 dollars.",
        "v10.25.3",
    ],
)
def test_similar_phrases_are_no_leak(text: str) -> None:
    faults = find_faults([sample("1", (text, text))])
    assert sum(fault.total for fault in faults if fault.name.startswith(LEAK)) == 0


def test_request_for_a_caption_is_no_leak() -> None:
    wanted = "Give this image a caption."
    faults = find_faults([sample("1", (wanted, "A dog.")), sample("2", ("Why that caption?", "A dog."))])
    assert named(faults, f"{LEAK} a word on captions").examples[0]["record"] == "2"


# ------------------------------------------------------------------------------------------------ objects


def test_objects_are_supported_by_boxes_or_captions() -> None:
    images = [annotated("000000000001", ["A puppy sleeps."], "car"), annotated("x/2", ["Snow."], "dog", "bus")]
    coco = "train/COCO_train2014_000000000001.jpg"  # the prefix of COCO 2014 is no difference
    samples = [
        sample("1", ("What?", "A dog in a car."), ("And?", "A bus."), image="000000000001.jpg"),
        sample("2", ("What?", "A car."), kind="detail", image="x/2.jpg"),
        sample("3", ("What?", "A zebra crossing and a bus."), kind="detail", image="absent.jpg"),
    ]
    fault = find_faults(samples, images)[-1]
    assert (fault.of, fault.counts) == ({"conversation": 2, "detail": 1}, {"conversation": 1, "detail": 1})
    assert [(example["record"], example["text"]) for example in fault.examples] == [
        ("1", "bus: And? A bus."),
        ("2", "car: What? A car."),
    ]
    inside = replace(samples[0], image=Path("images") / coco.removeprefix("train/"))
    assert find_faults([inside], images, Path("images"))[-1].total == 1
    with pytest.raises(DataError, match=r"none of the 2 annotated images .* absent\.jpg"):
        find_faults(samples[2:], images)


def test_real_answers_are_supported_by_their_own_images(reference: Path) -> None:
    folder = reference / "coco"
    images = {image.image: image for image in load_annotations(folder / "caps_boxes_coco2014_val_80.jsonl")}
    rows = [
        json.loads(question) | {"answer": json.loads(answer)["text"]}
        for question, answer in zip(
            (folder / "qa90_questions.jsonl").read_text().splitlines(),
            (folder / "qa90_gpt4_answer.jsonl").read_text().splitlines(),
            strict=True,
        )
    ]
    samples = [
        sample(str(row["question_id"]), (row["text"], row["answer"]), kind=row["category"], image=row["image"])
        for row in rows
    ]
    own = find_faults(samples, list(images.values()))[-1]
    assert own.total <= 3, own.examples
    used = sorted({row["image"] for row in rows})
    others = [replace(images[b], image=a) for a, b in zip(used, used[1:] + used[:1], strict=True)]
    assert find_faults(samples, others)[-1].total >= 75


# ------------------------------------------------------------------------------------------------ root verbs


# ------------------------------------------------------------------------------------------------ the card
