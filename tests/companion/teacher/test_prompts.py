from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from companion.teacher.parse import parse_detail, parse_dialogue, parse_reasoning
from companion.teacher.prompts import (
    DETAIL_QUESTIONS,
    KINDS,
    PROMPTS,
    Prompt,
    build_messages,
    context_text,
    load_prompt_folder,
    load_prompts,
)
from llava_core.runtime import ConfigError, DataError

PAIRS = {"conversation": 2, "detail": 3, "complex": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_chat_is_system_message_examples_and_query(kind: str) -> None:
    messages = build_messages(kind, "A dog.")
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * PAIRS[kind], "user"]
    assert messages[-1]["content"] == "A dog."
    assert all(m["content"].strip() == m["content"] for m in messages)
    with_boxes = [": [0." in m["content"] for m in messages if m["role"] == "user"][:-1]
    assert all(with_boxes) if kind != "conversation" else not any(with_boxes)


def test_our_examples_pass_the_parser() -> None:
    assert all(len(parse_dialogue(reply)) > 3 for _, reply in PROMPTS["conversation"].examples)
    assert all(parse_reasoning(reply) for _, reply in PROMPTS["complex"].examples)
    assert all(parse_detail(reply) == reply for _, reply in PROMPTS["detail"].examples)
    for prompt in PROMPTS.values():
        for _, reply in prompt.examples:
            assert not any(word in reply.lower() for word in ("caption", "bounding", "sentence", "0."))


def test_our_prompts_share_no_eight_words_with_released_ones(reference: Path) -> None:
    """No run of eight words is shared with the released prompts."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[k : k + 8]) for k in range(len(words) - 7)}

    released = load_prompts(reference / "coco" / "prompts")
    theirs = set().union(*(runs(t) for p in released.values() for t in (p.system, *sum(p.examples, ()))))
    ours = set().union(*(runs(t) for p in PROMPTS.values() for t in (p.system, *sum(p.examples, ()))))
    assert not ours & theirs


def test_sixteen_different_detail_questions() -> None:
    assert len(set(DETAIL_QUESTIONS)) == 16
    assert all("<image>" not in question and question[-1] in ".?" for question in DETAIL_QUESTIONS)


def test_version_of_a_prompt_follows_its_wording() -> None:
    prompt = PROMPTS["detail"]
    assert prompt.version == Prompt(prompt.system, prompt.examples).version
    assert prompt.version != Prompt(prompt.system + " ", prompt.examples).version
    assert prompt.version != Prompt(prompt.system, prompt.examples[1:]).version


def test_context_text_has_one_line_per_caption_and_box() -> None:
    text = context_text([" a\ndog "], [("dog", (0.12345, 0, 1, 0.5))])
    assert text == "a dog\n\ndog: [0.123, 0.0, 1.0, 0.5]"


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'conversations'; did you mean 'conversation'"):
        build_messages("conversations", "A dog.")


def test_released_folders_load(reference: Path) -> None:
    folder = reference / "coco" / "prompts"
    prompts = load_prompts(folder)
    assert {kind: len(prompt.examples) for kind, prompt in prompts.items()} == PAIRS
    assert all("\n\n" in context for context, _ in prompts["detail"].examples + prompts["complex"].examples)
    assert all("[" not in context for context, _ in prompts["conversation"].examples)
    first = load_prompt_folder(folder / "conversation").examples[0]
    assert first[0] == (folder / "conversation" / "000_caps.txt").read_text().strip()
    messages = build_messages("complex", "A dog.", prompts)
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert "reason" in messages[0]["content"]
    assert json.dumps(messages)


def test_incomplete_folder_of_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"system_message.txt: .*NNN_caps.txt, NNN_conv.txt"):
        load_prompt_folder(tmp_path / "none")
    (tmp_path / "system_message.txt").write_text("Speak.")
    assert load_prompt_folder(tmp_path) == Prompt("Speak.", ())
    (tmp_path / "003_caps.txt").write_text("A dog.")
    with pytest.raises(DataError, match=r"003_conv.txt"):
        load_prompt_folder(tmp_path)
    (tmp_path / "003_conv.txt").write_text("\n")
    with pytest.raises(DataError, match=r"003_conv.txt: is empty"):
        load_prompt_folder(tmp_path)
    (tmp_path / "003_conv.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"003_conv.txt.*utf-8"):
        load_prompt_folder(tmp_path)
    (tmp_path / "003_conv.txt").write_text("It barks.")
    (tmp_path / "notes.txt").write_text("not a pair")
    (tmp_path / "001_caps.txt").write_text("A cat.")
    (tmp_path / "001_conv.txt").write_text("It purrs.")
    examples = load_prompt_folder(tmp_path).examples
    assert examples == (("A cat.", "It purrs."), ("A dog.", "It barks."))
    assert all(a < b for a, b in pairwise(examples))
