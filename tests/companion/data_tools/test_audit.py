"""The audit of instruction data: root verbs, planted faults, objects that nothing supports, and the card."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from companion import cli
from companion.data_tools import data_card, phrases
from companion.data_tools.audit import LEAK, Fault, find_faults, near_duplicates
from companion.data_tools.coco import AnnotatedImage, load_annotations
from companion.data_tools.data_card import audit_file, card_text, write_card
from companion.data_tools.objects import Vocabulary, plural, unsupported
from companion.data_tools.verbs import BARE, NONE, PAIR, root_verbs
from llava_core.data.instruct import Sample
from llava_core.runtime import ConfigError, DataError

BOX = (0.1, 0.1, 0.5, 0.5)
PARSER = importlib.util.find_spec("spacy") and any(importlib.util.find_spec(m.package) for m in phrases.SPACY_MODELS)
needs_parser = pytest.mark.skipif(not PARSER, reason="spaCy and its English model are not installed")


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
    assert (same.found, same.of) == ({"detail": 1}, {"conversation": 2, "detail": 1})
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
    ("text", "found"),
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
def test_objects_stated_as_present(text: str, found: list[str]) -> None:
    assert [mention.category for mention in Vocabulary(COCO).mentions(text) if not mention.negated] == found


def test_categories_are_no_synonyms_of_each_other() -> None:
    assert Vocabulary(["dining table"]).named("a table") == {"dining table"}
    assert Vocabulary(["dining table", "table"]).named("a table and a dining table") == {"dining table", "table"}


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        ("What is there?", "A car and a dog.", {"dog": "dog"}),
        ("What is there?", "A car and two puppies.", {"dog": "puppies"}),
        ("Is there a dog?", "No, only a car.", {}),
        ("Is there a dog?", "No, dogs are not to be seen.", {}),
        ("Is there a dog?", "No, but there is a bus.", {"bus": "bus"}),
        ("Is there a dog?", "Yes, a dog.", {"dog": "dog"}),
    ],
)
def test_denied_objects_are_not_unsupported(question: str, answer: str, found: dict[str, str]) -> None:
    assert unsupported(Vocabulary(COCO), question, answer, {"car"}) == found


def test_objects_are_supported_by_boxes_or_captions() -> None:
    images = [annotated("000000000001", ["A puppy sleeps."], "car"), annotated("x/2", ["Snow."], "dog", "bus")]
    coco = "train/COCO_train2014_000000000001.jpg"  # the prefix of COCO 2014 is no difference
    samples = [
        sample("1", ("What?", "A dog in a car."), ("And?", "A bus."), image="000000000001.jpg"),
        sample("2", ("What?", "A car."), kind="detail", image="x/2.jpg"),
        sample("3", ("What?", "A zebra crossing and a bus."), kind="detail", image="absent.jpg"),
    ]
    fault = find_faults(samples, images)[-1]
    assert (fault.of, fault.found) == ({"conversation": 2, "detail": 1}, {"conversation": 1, "detail": 1})
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

SENTENCES = {
    "Describe this image in detail.": ("describe", "image"),
    "Can you describe the main features of this image for me?": ("describe", "feature"),
    "Give a complete description of the scene.": ("give", "description"),
    "Examine the image closely.": ("examine", "image"),
    "Put the whole scene into words.": ("put", "scene"),
    "Which thing could somebody hold in one hand?": ("hold", "thing"),
    "Why are these people holding umbrellas?": ("hold", "umbrella"),
    "What place does the image show?": ("show", "place"),  # the model tags this verb as a noun
    "What does this picture show? Describe the scene.": ("describe", "scene"),
    "What do you see?": BARE,
    "Look closely and tell me about every part of the image.": BARE,
    "What color is the chair?": NONE,
    "Is there a bird?": NONE,
}


@needs_parser
def test_root_verbs_are_counted_per_question_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "chat.json"
    source.write_text("[]")
    questions = {"a": [*SENTENCES, "Is there a bird?"], "b": ["Describe this image in detail."] * 3}
    found = root_verbs(questions, source, tmp_path / "cache")
    assert found["a"].pairs == {pair: 1 for pair in SENTENCES.values() if isinstance(pair, tuple)}
    assert found["a"].found == {PAIR: 9, BARE: 2, NONE: 3}
    assert found["b"].pairs == {("describe", "image"): 3}

    def never(*_: object) -> Any:
        raise AssertionError("parsed again")

    monkeypatch.setattr(phrases.Extractor, "start", never)
    assert root_verbs(questions, source, tmp_path / "cache") == found
    with pytest.raises(AssertionError, match="parsed again"):  # other questions of the same file
        root_verbs({"a": ["Describe the dog."]}, source, tmp_path / "cache")


def test_audit_runs_without_a_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    with pytest.raises(ConfigError, match=r"root verbs need a parser.*pip install"):
        root_verbs({"a": ["What?"]}, tmp_path)
    result = audit_file(chat(tmp_path))
    assert result["verbs"] is None
    assert "pip install" in result["verbs_missing"]
    assert "Root verbs were not looked for. root verbs need a parser" in card_text(result)


# ------------------------------------------------------------------------------------------------ the card


def chat(folder: Path, name: str = "chat.json") -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog. See the caption."}]
    path = folder / name
    path.write_text(
        json.dumps([{"id": k, "image": f"{k}.jpg", "type": "detail", "conversations": turns} for k in "ab"])
    )
    return path


def provenance(folder: Path) -> None:
    row = {"id": "a", "image": "a.jpg", "type": "detail", "request": "f00", "prompt": "beef", "client": "live"}
    row |= {"temperature": 0.7, "asked_model": "gpt-4-0314", "price": [30.0, 60.0], "context": "A car."}
    rows = [
        row | {"model": "gpt-4-0314", "date": f"2023-04-0{day}T10:00:00Z", "cost_usd": 0.25}
        | {"prompt_tokens": 100, "completion_tokens": 20} for day in (2, 1, 3)
    ]  # fmt: skip
    (folder / "provenance.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "failures.jsonl").write_text('{"error": "MissingLabel"}\n')


def test_card_has_the_measurements_and_no_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    provenance(tmp_path)
    (tmp_path / "card.json").write_text('{"name": "mine", "about": "Photos.", "license": "CC0-1.0"}')
    boxes = [{"id": k, "image": f"{k}.jpg", "captions": ["A car."], "instances": []} for k in "ab"]
    boxes[0]["instances"] = [{"category": "dog", "bbox": [0, 0, 1, 1]}]
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in boxes))
    result = audit_file(chat(tmp_path), tmp_path / "boxes.jsonl")
    text = card_text(result)
    for part in (
        "2 records, 2 turns, 2 images",
        "mine: Photos. License: CC0-1.0",
        "2023-04-01 to 2023-04-03",
        "gpt-4-0314 (3 replies)",
        "| refused replies | 1 |",
        "30 and 60 USD per million tokens",
        "0.75 USD",
        "300 of prompts, 60 of replies",
        "detail `beef`",
        "| detail | 2 | 2 | 1 | 3 | 5 | 1 | 1 |",
        "| a text with a word on captions | 2 | 4 | texts | 50 |",
        "| an answer names an object that no caption and no box has | 1 | 2 | answers | 50 |",
        "Such as detail `b`.",
        "llava data audit chat.json --annotations boxes.jsonl",
    ):
        assert part in text, part
    card, twin = (write_card(result, tmp_path / "out")[k] for k in (1, 0))
    assert card.read_text() == text
    assert json.loads(twin.read_text()) == json.loads(json.dumps(result))
    assert card_text(json.loads(twin.read_text())) == text  # the twin holds all that the card needs


def test_foreign_cards_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    result = audit_file(chat(tmp_path))
    (tmp_path / data_card.CARD).write_text("# Another's")
    with pytest.raises(DataError, match="somebody else"):
        write_card(result, tmp_path)
    assert (tmp_path / data_card.CARD).read_text() == "# Another's"
    write_card(result, tmp_path / "own")
    write_card(result, tmp_path / "own")
    with pytest.raises(DataError, match=r"the card of chat\.json"):
        write_card(audit_file(chat(tmp_path, "more.json")), tmp_path / "own")


def test_card_has_notes_on_the_released_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    text = card_text(audit_file(chat(tmp_path, "llava_instruct_150k.json")))
    assert "CC BY NC 4.0" in text
    assert "OpenAI's terms" in text
    assert "not recorded" in text
    assert "no annotations were given" in text
    assert "not stated" in card_text(audit_file(chat(tmp_path, "mine.json")))


def test_audit_command_writes_the_card_next_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(phrases, "SPACY_MODELS", ())
    path = chat(tmp_path)
    assert cli.main(["data", "audit", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["records"] == 2
    assert (tmp_path / data_card.CARD).is_file()
    assert cli.main(["data", "audit", str(path), "--out", str(tmp_path / "there")]) == 0
    assert "2 of        4 texts    a text with a word on captions" in capsys.readouterr().out
    assert (tmp_path / "there" / data_card.TWIN).is_file()
    path.write_text("[{}]")
    assert cli.main(["data", "audit", str(path)]) == 1
    assert "chat.json" in capsys.readouterr().err
