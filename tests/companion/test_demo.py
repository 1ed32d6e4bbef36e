"""The chat widget without a browser: answers in a thread, stop, images, errors, attention per word."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_fixtures import images, loaded, prompts  # noqa: F401 - fixtures
from PIL import Image

from companion import demo
from companion.demo import Chat, about, chat_widget, word_attention
from companion.guard import FILTERS, Guard
from llava_core.checkpoints.load import Loaded
from llava_core.runtime import DataError


def png(color: Any, size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def test_answers_are_turns_and_a_new_image_begins_again(
    loaded: Loaded, images: list[Path], prompts: list[list[int]]
) -> None:
    chat = chat_widget(loaded, images, "what <b>color</b>")
    assert [row["name"] for row in chat.gallery] == ["red", "blue"]
    assert chat.image["name"] == "red.png"
    for text in ("what <b>color</b>", "<image>is it a dog"):
        chat.ask(text)
        chat.wait()
    assert not chat.busy
    assert chat.turns == [
        {"question": "what <b>color</b>", "answer": "red car", "note": ""},
        {"question": "is it a dog", "answer": "red car", "note": ""},
    ]
    assert chat.conversation.turns == [(turn["question"], turn["answer"]) for turn in chat.turns]
    assert chat.status.startswith("First word after")
    chat._receive(chat, {"do": "pick", "number": 1}, [])
    assert (chat.turns, chat.conversation.turns, chat.image["name"]) == ([], [], "blue.png")
    chat.ask(" ")
    chat.wait()
    assert "question is empty" in chat.error
    chat.ask("what color")
    chat.wait()
    assert chat.error == ""


def test_stop_ends_the_generation_and_keeps_the_answer_so_far(
    loaded: Loaded, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, second, steps = chat_widget(loaded, images), threading.Event(), []

    def endless(*_: Any) -> Iterator[str]:
        for k in range(10**6):
            steps.append(k)
            if k == 2:
                second.set()
            yield "red"

    monkeypatch.setattr(chat.conversation, "stream", endless)
    chat._receive(chat, {"do": "ask", "text": "what color", "tokens": 9, "temperature": 0.5}, [])
    assert second.wait(30)
    assert chat.busy
    chat.ask("another question")  # refused while an answer is under way
    chat._receive(chat, {"do": "stop"}, [])
    chat.wait()
    assert len(steps) < 10**6
    assert [turn["note"] for turn in chat.turns] == ["stopped"]
    assert chat.conversation.turns[0][1] == chat.turns[0]["answer"] == "red"
    monkeypatch.undo()
    chat.ask("what color", 8)
    chat.wait()
    assert len(chat.turns) == 2
    assert chat.error == ""


def test_uploads_are_turned_upright_and_other_files_are_one_sentence(loaded: Loaded, images: list[Path]) -> None:
    chat = chat_widget(loaded, images)
    buffer, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 3  # orientation: upside down
    picture = Image.new("RGB", (32, 32), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 32, 16))
    picture.save(buffer, "PNG", exif=turned)
    chat._receive(chat, {"do": "image", "name": "own.png"}, [memoryview(buffer.getvalue())])
    assert chat.conversation.image is not None
    assert chat.conversation.image.getpixel((16, 4)) == (255, 255, 255)
    for content in (b"text", b"", png("red")[:60], png("red", (4000, 1))):
        chat._receive(chat, {"do": "image", "name": "<own>.txt"}, [content])
        assert "<own>.txt" in chat.error or "4000 x 1" in chat.error
        assert "\n" not in chat.error
        assert chat.image["name"] == "own.png"  # the dialogue goes on about the image that it has


def test_failure_of_the_model_is_one_sentence(
    loaded: Loaded, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = chat_widget(loaded, images)

    def fails(*_: Any) -> Iterator[str]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        yield ""

    monkeypatch.setattr(chat.conversation, "stream", fails)
    chat.ask("what color")
    chat.wait()
    assert chat.error == "the model failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert not chat.busy


def test_an_answer_that_fails_half_way_is_no_turn(
    loaded: Loaded, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = chat_widget(loaded, images)

    def fails_later(*_: Any) -> Iterator[str]:
        yield "red"
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(chat.conversation, "stream", fails_later)
    chat.ask("what color")
    chat.wait()
    assert (chat.turns, chat.conversation.turns) == ([], [])
    monkeypatch.undo()
    chat.ask("is it a dog", 8)
    chat.wait()
    assert [turn["question"] for turn in chat.turns] == ["is it a dog"]
    assert [question for question, _ in chat.conversation.turns] == ["is it a dog"]
    assert chat.turns[0]["note"] != "stopped"


def test_the_filter_reads_the_question_that_the_model_reads(
    loaded: Loaded, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, checked = chat_widget(loaded, images), []
    monkeypatch.setattr(chat.guard, "check_text", checked.append)
    chat.ask("is it a d<im<image>age>og", 8)
    chat.wait()
    assert checked == [chat.turns[0]["question"]] == [chat.conversation.turns[0][0]] == ["is it a dog"]


def test_question_needs_an_image(loaded: Loaded) -> None:
    chat = Chat(loaded)
    chat.ask("what color")
    chat.wait()
    assert chat.error == "there is no image; choose or upload one"
    with pytest.raises(DataError, match="there is no image"):
        word_attention(loaded, None, [("what color", "red")])


def test_guard_is_asked_before_the_model(
    loaded: Loaded, images: list[Path], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Wide:
        checks, title = "image", "wide images"

        def __init__(self, image_file: Path | None = None) -> None: ...

        def refusal(self, value: Image.Image) -> str | None:
            seen.append(value.size)
            return "it is wide" if value.width > 100 else None

    class Broken(Wide):
        checks, title = "text", "a broken filter"

        def refusal(self, value: Any) -> str | None:
            raise DataError("no network; fix: a network")

    monkeypatch.setitem(FILTERS._parts, "wide", Wide)
    monkeypatch.setitem(FILTERS._parts, "broken", Broken)
    chat = Chat(loaded, images, Guard(["wide", "broken"]))
    assert "Safety filters: wide images and a broken filter." in chat.about
    chat.open_file("wide.png", png("red", (200, 40)))
    assert chat.error == "the filter 'wide' refuses this image: it is wide"
    assert seen == [(40, 32), (200, 40)]  # whole images, not what the crop keeps
    chat.ask("what color")
    chat.wait()
    assert chat.error.startswith("the filter 'broken' cannot run, so nothing passes it: no network")
    assert (prompts, chat.turns) == ([], [])


def test_attention_of_each_word_is_that_of_the_positions_that_predict_it(loaded: Loaded, images: list[Path]) -> None:
    image = loaded.processor.visible(Image.open(images[0]).convert("RGB"))
    turns = [("what color is the car", "red"), ("what is it", "blue dog, a car")]
    words = word_attention(loaded, image, turns)
    assert [text for text, _ in words] == ["blue", "dog,", "a", "car"]
    assert all(len(weights) == loaded.model.n_image_tokens for _, weights in words)
    assert all(0 < sum(weights) < 1 for _, weights in words)
    # a later word changes no earlier one: the language model is causal
    shorter = word_attention(loaded, image, [turns[0], (turns[1][0], "blue")])
    assert shorter[0][1] == pytest.approx(words[0][1], abs=1e-6)
    other = word_attention(loaded, image, [turns[0], ("what color is it", "blue")])
    assert other[0][1] != pytest.approx(words[0][1], abs=1e-6)
    assert loaded.model.language_model.config._attn_implementation != "eager"


def test_checkpoint_is_described_with_how_far_to_trust_it(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "check what matters" in about(loaded, "folder")[-1]
    monkeypatch.setitem(loaded.manifest, "base", {"language_model": "models/mini/llm-7b"})
    assert "Its answers about photographs mean nothing." in about(loaded, "folder")[-1]
    assert about(loaded, "folder")[0].startswith("folder: 0.")


def test_missing_model_is_a_sentence_with_its_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(DataError, match=r"no trained model in runs/finetune/mini; fix: `llava reproduce` trains one"):
        demo.newest_checkpoint()
    for name in ("a", "b"):
        path = tmp_path / "runs" / "finetune" / "mini" / name / "checkpoint" / "manifest.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    assert demo.newest_checkpoint().parent.name == "b"
