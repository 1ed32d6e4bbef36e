from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llava_core.constants import IGNORE_INDEX
from llava_core.data.conversation import encode
from llava_core.miniature import base_models, world
from llava_core.miniature.language import POSITION_PHRASE
from llava_core.runtime import CheckpointError
from llava_core.weights import checkpoint

LISTED = re.compile(rf"an? (\w+) (\w+)(?: ({'|'.join(POSITION_PHRASE.values())}))?")


def test_the_first_drill_says_the_colors_of_its_list() -> None:
    for seed in range(50):
        listed, said = base_models.first_drill(random.Random(seed)).split(". ")
        colors = {name: color for color, name, _ in LISTED.findall(listed)}
        answers = re.findall(r"the (\w+) is (\w+)", said)
        assert len(answers) == 8
        assert all(colors[name] == color for name, color in answers)


def test_what_a_drill_asks_and_says_agrees_with_its_list() -> None:
    seen = set()
    for seed in range(400):
        text = base_models.lookup_drill(random.Random(seed))
        assert text == base_models.lookup_drill(random.Random(seed))
        listed, rest = text.split(". ", 1)
        things = {
            name: (color, place) for color, name, place in (LISTED.fullmatch(t).groups() for t in listed.split(", "))
        }
        assert 3 <= len(things) <= 8
        if rest == f"{listed}.":
            seen.add("verbatim")
            continue
        asked = re.findall(r"Is there an? (\w+)\? (Yes|No)\.", rest)
        said = re.findall(r"the (\w+) is ([\w ]+)", rest)
        for name, answer in asked:
            assert (name in things) == (answer == "Yes"), text
            seen.add(answer)
        for name, fact in said:
            assert fact in things[name], text
            seen.add("color" if fact in world.COLORS else "place")
        assert len(asked or said) == len(things)
    assert seen == {"verbatim", "Yes", "No", "color", "place"}


def test_documents_are_decided_by_their_seed_and_show_no_image() -> None:
    for seed in range(120):
        segments = base_models.document(random.Random(seed), 0.2)
        assert segments == base_models.document(random.Random(seed), 0.2)
        assert not any(s.image for s in segments)
        assert any(s.supervised and s.text.strip() for s in segments)
    first, second = (base_models.document(random.Random(s), 0) for s in (1, 2))
    assert first != second


def test_the_share_of_drills_is_obeyed() -> None:
    after_one_draw = random.Random(3)
    after_one_draw.random()
    drill = base_models.document(random.Random(3), drill=1.0)[0].text
    assert drill == base_models.lookup_drill(after_one_draw)


def test_the_initial_attention_looks_one_place_back_and_finds_equal_words() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=128, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.06, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.tensor([[5, 9, 17, 33, 41, 52, 63, 9, 77, 80]])
    for looks_up in (False, True):
        if looks_up:
            base_models.lookup_init(model)
        with torch.no_grad():
            first, second, _ = model(input_ids=ids, output_attentions=True).attentions
        back = first[0, 0].diagonal(-1).mean()
        assert (back > 0.6) == looks_up
        assert (second[0, 0, 7, 1] > 0.25) == looks_up


def _scene(*boxes: tuple[str, str, tuple[float, float, float, float]]) -> world.Scene:
    items = tuple(world.Item(category, color, "large", box) for category, color, box in boxes)
    return world.Scene(0, "beach", items, (), 0)


def test_a_raster_of_words_names_what_stands_at_each_place() -> None:
    dog, cat = ("dog", "red", (0.0, 0.5, 0.5, 1.0)), ("cat", "blue", (0.25, 0.5, 0.5, 1.0))
    assert base_models.grid_text(_scene(dog), 2, 2) == "beach beach\nred dog beach"
    # the nearer object, the later of the two, hides the other
    assert base_models.grid_text(_scene(dog, cat), 4, 2).split("\n")[1] == "red dog blue cat beach beach"
    assert base_models.grid_text(_scene(), 6, 3) == "\n".join(["beach " * 5 + "beach"] * 3)


def test_patch_weights_are_shares_of_the_box_row_by_row() -> None:
    assert base_models.patch_weights((0.5, 0.0, 1.0, 0.5), 2).tolist() == [0, 1, 0, 0]
    assert base_models.patch_weights((0.0, 0.25, 1.0, 1.0), 2) == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    weights = base_models.patch_weights((0.1, 0.2, 0.37, 0.9), 7).reshape(7, 7)
    assert weights.sum() == pytest.approx(1)
    assert np.flatnonzero(weights.sum(0)).tolist() == [0, 1, 2]


class Parrot:
    """Puts all weight on the right next token, except where `wrong` says otherwise: row -> position from the end."""

    def __init__(self, tokenizer: Any, dialogues: list[tuple[str, str]], wrong: dict[str, int]) -> None:
        self.texts = {}
        for question, answer in dialogues:
            ids = encode(base_models._dialogue([(question, answer)]), tokenizer, 0).input_ids
            said = list(ids)
            if question in wrong:
                said[wrong[question]] = tokenizer.bos_token_id
            self.texts[tuple(ids)] = said

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 400)
        for row, ids in enumerate(input_ids.tolist()):
            # the row lacks the last token of the longest text and is padded if it is a shorter one
            (said,) = (s for whole, s in self.texts.items() if (*ids, whole[-1])[: len(whole)] == whole)
            for place, token in enumerate(said[1:]):
                logits[row, place, token] = 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_exact_answers_counts_every_token_of_the_answer_and_no_other(tmp_path: Path, batch: int) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    dialogues = [("what color is the car", "blue and red"), ("the dog", "red"), ("what", "a helpful human")]
    assert base_models.exact_answers(Parrot(tokenizer, dialogues, {}), tokenizer, dialogues, batch) == [True] * 3
    spoiled = {"the dog": -1, "what": 5}  # the terminator of one answer; one word of the other's prompt
    found = base_models.exact_answers(Parrot(tokenizer, dialogues, spoiled), tokenizer, dialogues, batch)
    assert found == [True, False, True]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    size = base_models.LanguageModelSize(128, 3, 4, 32, steps=3, drill_steps=2, batch=2)
    monkeypatch.setattr(base_models, "SIZES", {"llm-7b": size})
    texts = base_models.document_texts
    monkeypatch.setattr(base_models, "document_texts", lambda: texts(60))


def test_a_trained_language_model_is_found_again_and_checked(small: None, tmp_path: Path) -> None:
    folder = tmp_path / "llm-7b"
    facts = base_models.train_language_model("llm-7b", folder)
    assert (facts["steps"], facts["shape"]["hidden"]) == (3, 128)
    assert 0 < facts["final_loss"] < 20
    with pytest.raises(CheckpointError, match="no base model here"):
        checkpoint.base_hash(str(folder))
    base_models.write_manifest(folder, facts)
    known = checkpoint.base_hash(str(folder))
    model, tokenizer = checkpoint.load_language_model(str(folder), torch.float32)
    assert model.config.vocab_size == len(tokenizer)
    assert len(tokenizer("###", add_special_tokens=False)["input_ids"]) == 1
    text = " Is there a red car?\n###"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    base_models.write_manifest(folder, {"other": "facts"})  # a manifest does not list itself
    assert checkpoint.base_hash(str(folder)) == known
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*SHA-256"):
        checkpoint.base_hash(str(folder))
    weights.write_bytes(whole)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        checkpoint.base_hash(str(folder))


def test_a_language_model_is_decided_by_its_seed(small: None, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        base_models.train_language_model("llm-7b", tmp_path / name, seed, steps=2)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_text_batches_are_padded_on_the_right_and_unsupervised_there(tmp_path: Path) -> None:
    tokenizer, rng = tiny.tokenizer(tmp_path), random.Random(0)
    ids, labels = next(base_models._text_batches(tokenizer, 3, lambda: base_models.document(rng), 0))
    assert ids.shape == labels.shape
    assert ids.shape[0] == 3
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    padded = ids == tokenizer.pad_token_id
    assert (labels[padded] == IGNORE_INDEX).all()
    assert (padded.int().diff(dim=1) >= 0).all()
    assert ((labels == ids) | (labels == IGNORE_INDEX)).all()


def test_the_towers_image_settings_are_read_back(tmp_path: Path) -> None:
    _, clip = tiny.base_models(tmp_path)
    base_models.write_preprocessor(Path(clip))
    _, processor = checkpoint.load_vision_tower(clip, torch.float32)
    assert (list(processor.mean), list(processor.std)) == base_models.pixel_statistics()
    # what the tower saw while it was trained is what it is given later
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    trained = base_models._normalise(torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.from_numpy(processor.normalise(pixels)) == pytest.approx(trained, abs=1e-6)
