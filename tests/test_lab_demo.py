from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.data.conversation import TEMPLATES
from llava_core.evaluate.answer import answer_questions, prompt_ids
from llava_core.lab import demo
from llava_core.lab.demo import Conversation, chat_widget
from llava_core.models import generation
from llava_core.models.generation import GenerationSettings, generate
from llava_core.runtime import DataError
from llava_core.weights.checkpoint import Loaded, build


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    made = build(*tiny.base_models(tmp_path_factory.mktemp("bases")), torch.float32)
    torch.nn.init.normal_(made.model.multi_modal_projector.weight, std=0.5)  # so that the image decides answers
    torch.nn.init.normal_(made.model.language_model.get_output_embeddings().weight, std=0.5)
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

    def spy(model: Any, tokenizer: Any, rows: list[list[int]], pixels: Any, settings: Any, **kept: Any) -> Any:
        given.extend(rows)
        assert (kept["image_features"] is not None) == (IMAGE_TOKEN_ID in rows[0])
        says = iter(tokenizer(" red car\n### Human: what", add_special_tokens=False)["input_ids"])
        monkeypatch.setattr(generation, "_draw", lambda *_: torch.tensor([next(says)]))
        return generation.stream(model, tokenizer, rows, pixels, settings, **kept)

    monkeypatch.setattr(demo, "stream", spy)
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


QUESTIONS = ["what color is the car", "is it a dog", "what is the color"]


def test_over_the_turns_the_image_is_encoded_once_and_no_token_is_read_twice(
    loaded: Loaded, images: list[Path]
) -> None:
    model = loaded.model
    encoded: list[int] = []
    read: list[int] = []
    hooks = [
        model.vision_tower.register_forward_hook(lambda *_: encoded.append(1)),
        model.language_model.register_forward_pre_hook(
            lambda _, __, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        ),
    ]
    talk, prefills = Conversation(loaded, Image.open(images[0])), []
    for question in QUESTIONS:
        begin = len(read)
        talk.ask(question, 10)
        prefills.append(read[begin])
    assert encoded == [1]
    prompts = [prompt_ids(loaded, [*talk.turns[:k], (q, None)], True) for k, (q, _) in enumerate(talk.turns)]
    for k in (1, 2):  # at most the answer, if its text is not tokenized as it was generated, and what follows it
        assert prefills[k] <= len(prompts[k]) - len(prompts[k - 1]) + 1
    assert prefills[0] == len(prompts[0])
    talk.look(Image.open(images[1]))
    talk.ask(QUESTIONS[0], 10)
    assert encoded == [1, 1]
    for hook in hooks:
        hook.remove()


def test_what_is_kept_over_the_turns_changes_no_answer(loaded: Loaded, images: list[Path]) -> None:
    stop = TEMPLATES.get("v0").stop
    for path in images:
        talk = Conversation(loaded, Image.open(path))
        pixels = torch.from_numpy(loaded.processor(talk.image))[None]
        for k, question in enumerate(QUESTIONS):
            answer = talk.ask(question, 12)
            ids = prompt_ids(loaded, [*talk.turns[:k], (question, None)], True)
            fresh = generate(loaded.model, loaded.tokenizer, [ids], pixels, GenerationSettings(12, stop=stop))
            assert [answer] == fresh


def test_other_images_give_other_answers(loaded: Loaded, images: list[Path]) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    first = talk.ask(QUESTIONS[0], 12)
    talk.look(Image.open(images[1]))
    assert talk.ask(QUESTIONS[0], 12) != first
    talk.look(Image.open(images[0]))
    assert talk.ask(QUESTIONS[0], 12) == first


def test_it_tells_why_an_answer_ended(loaded: Loaded, images: list[Path], prompts: list[list[int]]) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    assert talk.finish is None
    talk.ask("what color")
    assert talk.finish == "stop"
    assert talk.ask("what color", 1) == talk.turns[1][1] != "red car"
    assert talk.finish == "length"
    talk.look(Image.open(images[1]))
    assert talk.finish is None


def test_an_abandoned_answer_is_no_turn(loaded: Loaded, images: list[Path]) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    next(talk.stream(QUESTIONS[0], 12))
    assert talk.turns == []
    assert talk.ask(QUESTIONS[1], 12) == Conversation(loaded, Image.open(images[0])).ask(QUESTIONS[1], 12)


def test_turns_beyond_the_models_positions_are_an_error_with_a_fix(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="256 positions; fix: shorten the prompt"):
        Conversation(loaded).ask("dog " * 300)


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
