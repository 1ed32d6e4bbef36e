"""The language model of the miniature: its initialisation, training and verification."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest
import tiny
import torch

from companion.miniature import language_model, training
from llava_core.checkpoints.base_models import base_hash, load_language_model
from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.runtime import CheckpointError


def test_lookup_init_attends_to_equal_words(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.06, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        attn_implementation="eager", bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    start = tokenizer.bos_token_id
    ids = torch.tensor([[start, 35, 39, 47, 63, 71, 82, 93, 39, 107, 110]])
    for looks_up in (False, True):
        if looks_up:
            language_model.lookup_init(model, tokenizer)
        with torch.no_grad():
            first, second, _, fourth = model(input_ids=ids, output_attentions=True).attentions
        for head in range(3):
            assert (first[0, head].diagonal(-1 - head)[3:].min() > 0.9) == looks_up
        assert (second[0, 0, 8, 2] > 0.25) == looks_up  # the same word, six places before
        assert (fourth[0, 0].diagonal(-5)[3:].mean() > 0.3) == looks_up


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    size = language_model.LanguageModelSize(128, 4, 4, 32, steps=3, batch=2)
    monkeypatch.setattr(language_model, "SIZES", {"llm-7b": size})
    texts = language_model.document_texts
    monkeypatch.setattr(language_model, "document_texts", lambda: texts(60))


def test_trained_language_model_loads_and_is_verified(small: None, tmp_path: Path) -> None:
    folder = tmp_path / "llm-7b"
    summary = language_model.train_language_model("llm-7b", folder)
    assert (summary["steps"], summary["shape"]["hidden"]) == (3, 128)
    assert 0 < summary["final_loss"] < 20
    bare = base_hash(str(folder))  # by its weights, as for a foreign model
    training.write_manifest(folder, summary)
    known = base_hash(str(folder))
    assert known != bare
    with pytest.raises(CheckpointError, match="no base model here"):
        base_hash(str(tmp_path / "absent"))
    model, tokenizer = load_language_model(str(folder), torch.float32)
    assert model.config.vocab_size == len(tokenizer)
    assert len(tokenizer("###", add_special_tokens=False)["input_ids"]) == 1
    text = " Is there a red car?\n###"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    training.write_manifest(folder, {"other": "facts"})  # a manifest does not list itself
    assert base_hash(str(folder)) == known
    weights = folder / "model.safetensors"
    full = weights.read_bytes()
    weights.write_bytes(full[:-1] + bytes([full[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*SHA-256"):
        base_hash(str(folder))
    weights.write_bytes(full)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        base_hash(str(folder))


def test_language_model_depends_only_on_the_seed(small: None, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        language_model.train_language_model("llm-7b", tmp_path / name, seed, steps=2)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_half_of_the_first_batches_are_of_letters_only(tmp_path: Path) -> None:
    batches = language_model._text_batches(tiny.tokenizer(tmp_path), 3, random.Random(0), 0, letter_steps=16)
    supervised = [(labels != IGNORE_INDEX).sum(1) for _, labels, _ in islice(batches, 48)]
    letters = [bool((n <= 2).all()) for n in supervised]  # " B" may be two tokens of another tokenizer
    assert (sum(letters[:16]), sum(letters[16:32]), sum(letters[32:])) == (8, 2, 2)


def test_text_batches_are_padded_on_the_right(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    batches = language_model._text_batches(tokenizer, 3, random.Random(0), 0)
    for ids, labels, words in islice(batches, 16):
        assert ids.shape == labels.shape
        assert ids.shape[0] == 3
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        padded = ids == tokenizer.pad_token_id
        assert (labels[padded] == IGNORE_INDEX).all()
        assert (padded.int().diff(dim=1) >= 0).all()
        assert ((labels == ids) | (labels == IGNORE_INDEX)).all()
        assert words.shape == (int((ids == IMAGE_TOKEN_ID).sum()), 4)
