from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.evaluate.answer import answer_questions
from llava_core.lab import demo
from llava_core.lab.demo import Conversation, chat_widget
from llava_core.runtime import DataError
from llava_core.weights.checkpoint import Loaded, build


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    made = build(*tiny.base_models(tmp_path_factory.mktemp("bases")), torch.float32)
    made.model.eval()
    return made


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path, color in zip(paths, ((200, 30, 30), (30, 30, 200)), strict=True):
        Image.new("RGB", (40, 32), color).save(path)
    return paths


@pytest.fixture
def prompts(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that the model was given; it always answers "red car" and stops as the template says."""
    given: list[list[int]] = []

    def speak(model: Any, rows: list[list[int]], pixels: Any, settings: Any) -> Iterator[torch.Tensor]:
        given.extend(rows)
        assert (pixels is not None) == (IMAGE_TOKEN_ID in rows[0])
        for token in loaded.tokenizer(" red car\n### Human: what", add_special_tokens=False)["input_ids"]:
            yield torch.tensor([token])

    monkeypatch.setattr(demo, "generate_tokens", speak)
    return given


def _text(loaded: Loaded, ids: list[int]) -> str:
    return str(loaded.tokenizer.decode([i for i in ids if i != IMAGE_TOKEN_ID]))


def test_asking_keeps_the_turns(loaded: Loaded, images: list[Path], prompts: list[list[int]]) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    assert talk.ask("what color <image>") == "red car"
    assert talk.ask("is it a dog") == "red car"
    assert talk.turns == [("what color", "red car"), ("is it a dog", "red car")]
    assert [p.count(IMAGE_TOKEN_ID) for p in prompts] == [loaded.model.n_image_tokens] * 2
    assert _text(loaded, prompts[1]).startswith(_text(loaded, prompts[0]) + " red car\n###")
    assert _text(loaded, prompts[1]).endswith("is it a dog\n### Assistant:")


def test_a_new_image_forgets_the_turns(loaded: Loaded, images: list[Path], prompts: list[list[int]]) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    talk.ask("what color")
    seen = talk.look(Image.open(images[1]))
    assert talk.turns == []
    assert seen.size == (32, 32)
    talk.ask("what color")
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("question", ["", "  \n", "<image>"])
def test_an_empty_question_is_an_error_and_no_turn(loaded: Loaded, images: list[Path], question: str) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    with pytest.raises(DataError, match="question is empty"):
        talk.ask(question)
    assert talk.turns == []


def test_without_an_image_the_model_is_asked_as_text(loaded: Loaded, prompts: list[list[int]]) -> None:
    assert Conversation(loaded).ask("what") == "red car"
    assert IMAGE_TOKEN_ID not in prompts[0]


def test_the_end_token_ends_an_answer_and_is_not_shown(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [*loaded.tokenizer(" red", add_special_tokens=False)["input_ids"], loaded.tokenizer.eos_token_id, 5]
    monkeypatch.setattr(demo, "generate_tokens", lambda *_: (torch.tensor([i]) for i in ids))
    assert Conversation(loaded).ask("what") == "red"


def test_a_conversation_answers_as_the_evaluation_does(loaded: Loaded, images: list[Path]) -> None:
    row = {"question_id": 0, "text": "what color is the car", "image": images[0].name}
    expected = answer_questions(loaded, [row], images[0].parent, max_new_tokens=12)["0"]
    talk = Conversation(loaded, Image.open(images[0]))
    shown = list(talk.stream(row["text"], 12))
    assert shown[-1] == expected == talk.turns[0][1]
    assert len(shown) > 1  # it appears as it is written


def _parts(app: Any) -> tuple[Any, Any, Any, Any]:
    """Choice, upload, suggestions and log of the widget."""
    left, right = app.children
    return left.children[0], left.children[1], right.children[1], right.children[2]


def test_the_ask_button_fills_the_log(loaded: Loaded, images: list[Path], prompts: list[list[int]]) -> None:
    app = chat_widget(loaded, images, "what <b>color</b>")
    choice, _, suggestions, log = _parts(app)
    assert log.value == ""
    app.ask_button.click()
    assert "what &lt;b&gt;color&lt;/b&gt;" in log.value
    assert log.value.count("red car") == 1
    assert not app.ask_button.disabled
    suggestions.children[0].click()
    assert log.value.count("red car") == len(app.conversation.turns) == 2
    assert app.conversation.turns[1][0] == demo.SUGGESTIONS[0]
    choice.value = images[1]
    assert log.value == ""
    assert app.conversation.turns == []
    app.question.value = " "
    app.ask_button.click()
    assert "question is empty" in log.value
    assert not app.ask_button.disabled


def test_an_own_image_is_taken_upright_and_a_text_is_refused(loaded: Loaded, images: list[Path]) -> None:
    app = chat_widget(loaded, images)
    _, upload, _, log = _parts(app)
    buffer, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 3  # orientation: upside down
    picture = Image.new("RGB", (32, 32), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 32, 16))
    picture.save(buffer, "PNG", exif=turned)
    file = {"name": "own.png", "type": "image/png", "size": 1, "last_modified": datetime.now(UTC)}
    upload.set_trait("value", ({**file, "content": buffer.getvalue()},))
    assert app.conversation.image.getpixel((16, 4)) == (255, 255, 255)
    upload.set_trait("value", ({**file, "name": "<own>.txt", "content": b"text"},))
    assert "&lt;own&gt;.txt is not an image" in log.value
