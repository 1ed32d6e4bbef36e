from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_fixtures import loaded  # noqa: F401 - a fixture
from PIL import Image

from llava_core import inference as answering
from llava_core.checkpoints.load import Loaded
from llava_core.config import load_experiment
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.data.images import load_image
from llava_core.data.instruct import Sample
from llava_core.inference import answer_questions, prompt_ids
from llava_core.models import generation
from llava_core.runtime import DataError
from llava_core.train.dataset import TrainingSet

COLORS = {"red.png": (200, 30, 30), "blue.png": (30, 30, 200)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, color in COLORS.items():
        Image.new("RGB", (40, 32), color).save(tmp_path / name)
    return tmp_path


ROWS = [
    {"question_id": 7, "text": "what color is the car that a curious human can see", "image": "red.png"},
    {"question_id": 3, "text": "the dog", "image": None},
    {"question_id": 5, "text": "what is the color", "image": "blue.png"},
    {"question_id": 9, "text": "what is the color", "image": "red.png"},
    {"question_id": 1, "text": "what <image>", "image": "blue.png"},
]


def test_answers_do_not_depend_on_the_batch(loaded: Loaded, images: Path) -> None:
    together = answer_questions(loaded, ROWS, images, max_new_tokens=8)
    single: dict[str, str] = {}
    for row in ROWS:
        single |= answer_questions(loaded, [row], images, max_new_tokens=8)
    assert together == single == answer_questions(loaded, ROWS, images, max_new_tokens=8, batch=2)
    assert list(together) == ["7", "3", "5", "9", "1"]
    assert together["5"] != together["9"]  # only the image tells them apart


def test_no_questions_give_no_answers(loaded: Loaded) -> None:
    assert answer_questions(loaded, []) == {}


def test_missing_image_is_named(loaded: Loaded, images: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        answer_questions(loaded, [{**ROWS[0], "image": "gone.png"}], images)


def test_prompt_has_one_image_and_ends_before_the_answer(loaded: Loaded) -> None:
    n = loaded.model.n_image_tokens
    for text in ("what", "what\n<image>", "<image>\nwhat"):
        ids = prompt_ids(loaded, [(text, None)], True)
        assert ids.count(IMAGE_TOKEN_ID) == n
    blind = prompt_ids(loaded, [("what", None)], False)
    assert IMAGE_TOKEN_ID not in blind
    assert loaded.tokenizer.decode(blind).endswith("### Human: what\n### Assistant:")
    prompt = prompt_ids(loaded, [("what", None)], False, answer_prefix="red")
    assert prompt[: len(blind)] == blind
    assert loaded.tokenizer.decode(prompt[len(blind) :]) == " red"


def test_manifest_decides_template_and_image_position(loaded: Loaded) -> None:
    other = Loaded(loaded.model, loaded.tokenizer, loaded.processor, {"template": "v1", "image_position": "last"})
    ids = prompt_ids(other, [("what", None)], True)
    after = ids[len(ids) - ids[::-1].index(IMAGE_TOKEN_ID) :]
    assert loaded.tokenizer.decode(after) == " ASSISTANT:"


def test_prompt_equals_the_training_question(loaded: Loaded) -> None:
    """For every template and image position: the same usage, the same ids on both sides."""
    for template in ("v0", "v1", "plain"):
        for position in ("data", "first", "last", "random"):
            usage = {"template": template, "image_position": position}
            config = load_experiment("finetune", "mini", usage)
            for key, question in enumerate(("what", "<image>\nwhat", "what\n<image>")):
                samples = [Sample(str(key), [(question, "red")], Path("image.png"))]
                data = TrainingSet(samples, loaded.tokenizer, loaded.processor, config, loaded.model.n_image_tokens)
                data.system, data.image_delimiters = "The {dog}.", ["<s>", "</s>"]
                usage |= {"system": data.system, "image_delimiters": data.image_delimiters}
                other = Loaded(loaded.model, loaded.tokenizer, loaded.processor, usage)
                prompt = prompt_ids(other, [(question, None)], True, key=str(key))
                assert data.encoded(0).input_ids[: len(prompt)] == prompt
                at = prompt.index(IMAGE_TOKEN_ID)
                assert loaded.tokenizer.decode([prompt[at - 1], prompt[at + loaded.model.n_image_tokens]]) == "<s></s>"
                assert template == "plain" or "The {dog}." in loaded.tokenizer.decode(prompt[: at - 1])


def test_released_v0_prompt_has_the_image_after_the_question(loaded: Loaded) -> None:
    other = Loaded(loaded.model, loaded.tokenizer, loaded.processor, {"template": "v0_exact", "system": "See."})
    ids = prompt_ids(other, [("what", None)], True)
    at, n = ids.index(IMAGE_TOKEN_ID), loaded.model.n_image_tokens
    assert loaded.tokenizer.decode(ids[:at]) == "<s>See.###Human: what"
    assert loaded.tokenizer.decode(ids[at + n :]) == "###Assistant:"
    prompt = prompt_ids(other, [("what", None)], True, answer_prefix="red")
    assert loaded.tokenizer.decode(prompt[at + n :]) == "###Assistant: red"


def test_mentioned_image_is_not_inserted_twice(loaded: Loaded) -> None:
    ids = prompt_ids(loaded, [("what", "red"), ("the dog\n<image>", None)], True)
    assert ids.count(IMAGE_TOKEN_ID) == loaded.model.n_image_tokens


def test_unknown_delimiter_is_named(loaded: Loaded) -> None:
    usage = {"image_delimiters": ["<im_start>", "<im_end>"]}
    other = Loaded(loaded.model, loaded.tokenizer, loaded.processor, usage)
    with pytest.raises(DataError, match=r"<im_start>.*manifest"):
        prompt_ids(other, [("what", None)], True)


def test_answer_prefixes_go_to_their_own_questions(
    loaded: Loaded, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}
    original = answering.prompt_ids

    def spy(model, turns, has_image, answer_prefix="", key="", max_ids=None):
        asked[key] = answer_prefix
        return original(model, turns, has_image, answer_prefix, key, max_ids)

    monkeypatch.setattr(answering, "prompt_ids", spy)
    answer_questions(loaded, ROWS, images, max_new_tokens=1, answer_prefixes={"3": "red", "5": "blue"})
    assert asked == {"7": "", "3": "red", "5": "blue", "9": "", "1": ""}


def test_long_answer_prefixes_keep_their_end(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_ids(loaded, [("what", None)], False, answer_prefix="red " * 300 + "blue", max_ids=100)
    assert len(prompt) == 100
    assert loaded.tokenizer.decode(prompt).endswith("red red blue")
    assert loaded.tokenizer.decode(prompt).startswith("<s>A curious human")
    used: list[int] = []
    monkeypatch.setattr(
        generation,
        "generate",
        lambda m, t, prompts, p, each: used.append(len(prompts[0]) + each[0].max_new_tokens) or [""],
    )
    answer_questions(loaded, ROWS[1:2], max_new_tokens=10_000, reserve=100)
    assert used == [256 - 100]


def test_a_question_without_room_or_with_the_id_of_another_is_named(
    loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ROWS[1], {"question_id": 8, "text": "red " * 300, "image": None}]
    with pytest.raises(DataError, match=r"question 8: its prompt of .* tokens leaves no room"):
        answer_questions(loaded, rows)
    with pytest.raises(DataError, match="question 3 is there twice"):
        answer_questions(loaded, [ROWS[1], ROWS[1]])
    assert not capsys.readouterr().err
    answer_questions(loaded, ROWS[1:2], max_new_tokens=4, reserve=255, desc=None)
    assert "1 of 1 answers have room for fewer than 4 tokens" in capsys.readouterr().err


def test_answers_equal_plain_forward_passes(loaded: Loaded, images: Path) -> None:
    row = ROWS[0]
    ids = prompt_ids(loaded, [(row["text"], None)], True)
    pixels = torch.from_numpy(loaded.processor(load_image(images / row["image"])))[None]
    start = len(ids)
    with torch.inference_mode():
        for _ in range(6):  # no cache, no padding
            ids.append(int(loaded.model(torch.tensor([ids]), pixels).logits[0, -1].argmax()))
    assert answer_questions(loaded, ROWS, images, max_new_tokens=6)["7"] == loaded.tokenizer.decode(ids[start:]).strip()
