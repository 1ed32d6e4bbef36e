from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch
from chats import images, loaded, prompts  # noqa: F401 - fixtures
from PIL import Image

import llava_core
from llava_core.chat import Assistant, Conversation, chat_in_terminal, preview, seen
from llava_core.checkpoints.load import Loaded, save_checkpoint
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.data.conversation import TEMPLATES
from llava_core.data.images import ImageProcessor
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


def test_one_call_each_from_python(loaded: Loaded, images: list[Path], tmp_path: Path) -> None:
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


def test_the_terminal_answers_several_turns_and_survives_mistakes(
    loaded: Loaded, images: list[Path], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    lines = iter(["what color", "/image nowhere.png", f"/image {images[1]}", "is it a dog", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    chat_in_terminal(Assistant(loaded), images[0])
    said = capsys.readouterr().out.splitlines()
    cut = "20% is cut off, half of it each left and right"
    assert said[0] == f"red.png: 40 x 32 pixels, the middle 32 x 32 scaled to 32 x 32; {cut}"
    assert said[1] == "LLaVA: red car"
    assert said[2].startswith("error: nowhere.png")
    assert said[3].startswith("blue.png: 40 x 32")
    assert said[4] == "LLaVA: red car"
    assert len(prompts) == 2
    assert "\x1b" not in "".join(said)  # no colors where no terminal shows them


@pytest.mark.parametrize(
    ("mode", "size", "words"),
    [
        ("crop", (30, 60), "50% is cut off, half of it each above and below"),
        ("crop", (50, 50), "the middle 50 x 50 scaled to 16 x 16"),
        ("pad", (30, 60), "whole, on a square of 16 x 16"),
        ("resize", (30, 60), "squeezed into 16 x 16"),
    ],
)
def test_it_says_what_was_cropped(mode, size, words) -> None:
    assert seen(Image.new("RGB", size), ImageProcessor(16, mode)).endswith(words)


def test_the_preview_has_two_pixels_per_character() -> None:
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 4, 8, 8))
    lines = preview(picture, 4).split("\n")
    assert len(lines) == 2
    assert "38;2;255;0;0" in lines[0]
    assert "48;2;0;0;255" in lines[1]
