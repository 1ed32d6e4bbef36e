from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_fixtures import images, loaded, prompts  # noqa: F401 - fixtures
from checkpoint_fixtures import loaded, original, root  # noqa: F401 - fixtures
from PIL import Image

import llava_core
from llava_core.chat import Assistant, Conversation
from llava_core.checkpoints.load import Loaded, save_checkpoint
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.data.conversation import TEMPLATES
from llava_core.inference import answer_questions, prompt_ids
from llava_core.models.generation import GenerationSettings, generate
from llava_core.runtime import CheckpointError, DataError


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


def test_new_image_starts_a_new_dialogue(loaded: Loaded, images: list[Path], prompts: list[list[int]]) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    talk.ask("what color")
    visible = talk.set_image(Image.open(images[1]))
    assert talk.turns == []
    assert visible.size == (32, 32)
    talk.ask("what color")
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("question", ["", "  \n", "<image>"])
def test_empty_question_is_an_error(loaded: Loaded, images: list[Path], question: str) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    with pytest.raises(DataError, match="question is empty"):
        talk.ask(question)
    assert talk.turns == []


def test_question_without_image(loaded: Loaded, prompts: list[list[int]]) -> None:
    assert Conversation(loaded).ask("what") == "red car"
    assert IMAGE_TOKEN_ID not in prompts[0]


QUESTIONS = ["what color is the car", "is it a dog", "what is the color"]


def test_image_is_encoded_once_and_no_token_is_fed_twice(loaded: Loaded, images: list[Path]) -> None:
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
    talk.set_image(Image.open(images[1]))
    talk.ask(QUESTIONS[0], 10)
    assert encoded == [1, 1]
    for hook in hooks:
        hook.remove()


def test_cached_turns_do_not_change_answers(loaded: Loaded, images: list[Path]) -> None:
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
    talk.set_image(Image.open(images[1]))
    assert talk.ask(QUESTIONS[0], 12) != first
    talk.set_image(Image.open(images[0]))
    assert talk.ask(QUESTIONS[0], 12) == first


def test_finish_reason(loaded: Loaded, images: list[Path], prompts: list[list[int]]) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    assert talk.finish is None
    talk.ask("what color")
    assert talk.finish == "stop"
    assert talk.ask("what color", 1) == talk.turns[1][1] != "red car"
    assert talk.finish == "length"
    talk.set_image(Image.open(images[1]))
    assert talk.finish is None


def test_interrupted_answer_is_no_turn(loaded: Loaded, images: list[Path]) -> None:
    talk = Conversation(loaded, Image.open(images[0]))
    next(talk.stream(QUESTIONS[0], 12))
    assert talk.turns == []
    assert talk.ask(QUESTIONS[1], 12) == Conversation(loaded, Image.open(images[0])).ask(QUESTIONS[1], 12)


def test_too_many_tokens_are_an_error(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="256 positions; fix: shorten the prompt"):
        Conversation(loaded).ask("dog " * 300)


def test_conversation_equals_evaluation(loaded: Loaded, images: list[Path]) -> None:
    row = {"question_id": 0, "text": "what color is the car", "image": images[0].name}
    expected = answer_questions(loaded, [row], images[0].parent, max_new_tokens=12)["0"]
    talk = Conversation(loaded, Image.open(images[0]))
    displayed = list(talk.stream(row["text"], 12))
    assert displayed[-1] == expected == talk.turns[0][1]
    assert len(displayed) > 1  # it appears as it is written


def test_assistant_from_python(loaded: Loaded, images: list[Path], tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path / "c", loaded, "full", template="v0")
    assistant = llava_core.load(saved)
    talk = Conversation(loaded, Image.open(images[0]))
    assert assistant.ask(images[0], QUESTIONS[0], 12) == talk.ask(QUESTIONS[0], 12)
    captions = [assistant.caption(picture, max_new_tokens=12) for picture in (images[0], Image.open(images[0]))]
    assert captions[0] == captions[1] == assistant.ask(images[0], "Give a short caption.", 12)
    assert assistant.caption(images[1], max_new_tokens=12) != captions[0]
    chat = assistant.chat(images[0])
    assert [chat.ask(q, 12) for q in QUESTIONS[:2]] == [a for _, a in chat.turns]
    assert assistant.chat().image is None
    with pytest.raises(CheckpointError, match="no such file or folder"):
        llava_core.load(tmp_path / "nowhere")
    plain = llava_core.load(saved, template="plain")
    ids = prompt_ids(plain.loaded, [("", None)], True)
    assert ids.count(IMAGE_TOKEN_ID) == loaded.model.n_image_tokens
    assert isinstance(plain.caption(images[0], max_new_tokens=4), str)


def test_image_and_image_file_give_the_same_pixels(loaded, tmp_path) -> None:
    clear = Image.new("RGBA", (40, 32), (10, 20, 30, 0))
    clear.save(tmp_path / "clear.png")
    turned, exif = Image.new("RGB", (32, 40), (255, 255, 255)), Image.Exif()
    turned.paste((0, 0, 0), (0, 0, 32, 20))
    exif[0x0112] = 3
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assistant = Assistant(loaded)
    for name in ("clear.png", "turned.jpg"):
        from_file, from_image = (assistant.chat(p).image for p in (tmp_path / name, Image.open(tmp_path / name)))
        assert from_file is not None
        assert from_image is not None
        assert from_file.tobytes() == from_image.tobytes()
