from __future__ import annotations

from pathlib import Path

import pytest

from companion.teacher import parse
from companion.teacher.parse import parse_detail, parse_dialogue, parse_reasoning
from llava_core.runtime import DataError

TWO = "Question:\nHow many?\n===\nAnswer:\nTwo.\n\nReally.\n===\nQuestion:\nWhere?\n===\nAnswer:\nThere."


@pytest.mark.parametrize(
    "text",
    [
        TWO,
        f"\n===\n{TWO}\n===\n\n===\n",
        TWO.replace("\n", "\r\n"),
        TWO.replace("Question:\n", "question: ").replace("Answer:", "**Answer:**"),
        TWO.replace("===", "  ===== "),
    ],
)
def test_dialogue(text: str) -> None:
    assert parse_dialogue(text) == [("How many?", "Two.\n\nReally."), ("Where?", "There.")]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "EmptyReply"),
        (" \n\t", "EmptyReply"),
        ("===\n===", "EmptyReply"),
        ("Here you are:\n" + TWO, "MissingLabel"),
        ("How many?\n===\nTwo.", "MissingLabel"),
        ("Question:\nA?\n===\nQuestion:\nB?\n===\nAnswer:\nC.", "BadAlternation"),
        ("Answer:\nA.\n===\nQuestion:\nB?", "BadAlternation"),
        ("Question:\nA?\n===\nAnswer:\nB.\n===\nAnswer:\nC.", "BadAlternation"),
        ("Question:\nA?\nAnswer:\nB.", "BadAlternation"),
        (TWO + "\n===\nQuestion:\nWhy?", "MissingAnswer"),
        ("Question:\nA?", "MissingAnswer"),
        ("Question:\n===\nAnswer:\nB.", "EmptyTurn"),
        ("Question:\nA?\n===\nAnswer:\n \n", "EmptyTurn"),
        ("Question:\nA <image>?\n===\nAnswer:\nB.", "StrayMarker"),
        ("I'm sorry, but I can't see images.", "Refusal"),
        ("As an AI language model, I", "Refusal"),
    ],
)
def test_dialogue_errors_have_names(text: str, error: str) -> None:
    with pytest.raises(parse.ReplyError) as raised:
        parse_dialogue(text)
    assert type(raised.value) is getattr(parse, error)
    assert isinstance(raised.value, DataError)
    assert str(raised.value)


def test_truncated_reply_is_refused() -> None:
    for function in (parse_dialogue, parse_reasoning, parse_detail):
        with pytest.raises(parse.CutOffReply):
            function("Question:\nA?\n===\nAnswer:\nB and", "length")


def test_reasoning_is_one_question() -> None:
    assert parse_reasoning("Question:\nWhy?\n===\nAnswer:\nBecause.") == [("Why?", "Because.")]
    with pytest.raises(parse.NotOnePair, match="2 questions"):
        parse_reasoning(TWO)


def test_description_is_paragraphs() -> None:
    assert parse_detail("\n A dog.\n\n \n\nA cat: it sleeps.\n") == "A dog.\n\nA cat: it sleeps."
    for text in (TWO, "A dog.\n===\nA cat.", "Question: A dog?"):
        with pytest.raises(parse.NotADescription):
            parse_detail(text)
    with pytest.raises(parse.EmptyReply):
        parse_detail("\n")
    with pytest.raises(parse.Refusal):
        parse_detail("I cannot describe people.")


def test_released_few_shot_replies_parse(reference: Path) -> None:
    folder = reference / "coco" / "prompts"
    turns = [len(parse_dialogue(f.read_text())) for f in sorted((folder / "conversation").glob("*_conv.txt"))]
    assert len(turns) == 2
    assert min(turns) >= 4
    for file in (folder / "complex_reasoning").glob("*_conv.txt"):
        assert len(parse_reasoning(file.read_text())) == 1
    for file in (folder / "detail_description").glob("*_conv.txt"):
        assert len(parse_detail(file.read_text())) > 100
