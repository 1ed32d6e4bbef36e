from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from companion.miniature import acceptance, base_models, contrastive, language_model, pretraining_text, training, world
from companion.miniature.language import PLACE_PHRASE, POSITION_PHRASE, facts_of_scene, noun_phrase, plural, questions
from llava_core.checkpoints.base_models import base_hash, load_language_model, load_vision_tower
from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.data.conversation import encode
from llava_core.runtime import CheckpointError


def test_documents_depend_only_on_the_seed() -> None:
    with_patches = 0
    for seed in range(160):
        segments, patches = pretraining_text.document(random.Random(seed))
        assert (segments, patches) == pretraining_text.document(random.Random(seed))
        assert any(s.supervised and s.text.strip() for s in segments)
        assert sum(s.image for s in segments) == bool(patches)
        assert len(patches) in (0, pretraining_text.GRID**2)
        with_patches += bool(patches)
    assert 40 < with_patches < 90
    assert pretraining_text.document(random.Random(1)) != pretraining_text.document(random.Random(2))


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


def test_context_text_states_every_fact() -> None:
    for k in range(60):
        scene, rng = world.sample_scene(k, 5), random.Random(k)
        for text in (
            pretraining_text.context_text(scene, rng),
            pretraining_text.dense_caption(scene.groups, "by a lake", rng),
        ):
            for group in scene.groups:
                phrase, place = noun_phrase(group), POSITION_PHRASE[group.position or ""]
                assert f"{place} {phrase}" in text.lower() or f"{phrase} {place}" in text.lower()
        assert PLACE_PHRASE[scene.background] in pretraining_text.context_text(scene, rng).lower()


def test_patch_words_are_row_by_row() -> None:
    dog = world.Item("dog", "red", "large", (0.0, 0.5, 0.5, 1.0))
    cat = world.Item("cat", "blue", "large", (0.25, 0.5, 0.5, 1.0))  # nearer: it hides half of the dog
    lamp = world.Item("lamp", "white", "small", (0.86, 0.0, 0.9, 0.2))  # too narrow for any center
    groups = tuple(
        world.Group(i.category, i.color, 1, at)
        for i, at in zip((dog, cat, lamp), ("left", "middle", "right"), strict=True)
    )
    patches = pretraining_text.patch_words(world.Scene(0, "beach", (dog, cat, lamp), groups, 0))
    rows = [patches[7 * k : 7 * k + 7] for k in range(7)]
    assert rows[0] == ["beach"] * 6 + ["right one white lamp"]
    assert rows[3] == rows[6] == ["left one red dog"] * 2 + ["middle one blue cat"] * 2 + ["beach"] * 3


def test_patch_phrases_match_the_scene() -> None:
    for index in range(12):
        example, scene = contrastive._clip_example(index, 3), world.sample_scene(index, 1003, 1 if index % 3 else None)
        nouns = {g.category if g.count == 1 else plural(g.category) for g in scene.groups}
        assert set(re.findall(r"\w+", example.captions[5].lower())) - {"and"} == nouns
        for patch, words in enumerate(pretraining_text.patch_words(scene)):
            full, named = (example.region_text(patch, named, mirrored=False) for named in (False, True))
            if words == scene.background:
                assert full == named == PLACE_PHRASE[words]
                continue
            position, number, color, noun = words.split()
            assert full == f"{'a' if number == 'one' else number} {color} {noun} {POSITION_PHRASE[position]}".replace(
                "a orange", "an orange"
            )
            assert named == f"{noun} {POSITION_PHRASE[position]}"
            other = {"left": "right", "right": "left"}.get(position, position)
            assert example.region_text(patch, True, mirrored=True) == f"{noun} {POSITION_PHRASE[other]}"


def test_clip_text_model_pools_at_the_end_token(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    for special, reads_on in ((contrastive.CAPTION_SPECIAL, True), (training.SPECIAL, False)):
        tokenizer = training.train_tokenizer(tmp_path, contrastive.caption_texts(20), 320, special)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        batch = contrastive.caption_ids(tokenizer, ["a dog on the left", "two red cars at night", "a kite"])
        with torch.no_grad():
            output = CLIPTextModel(config).eval()(**batch)
        end = (batch["input_ids"] == tokenizer.eos_token_id).int().argmax(1)
        assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(3), end]) == reads_on


def test_sine_grid_separates_all_positions() -> None:
    places = contrastive.sine_grid(7, 128)
    assert places.shape == (49, 128)
    assert float(places.std()) == pytest.approx(1, abs=0.1)
    assert torch.cdist(places, places).add(torch.eye(49) * 99).min() > 2
    row = places.view(7, 7, 128)
    assert torch.equal(row[0, :, :64], row[0, :1, :64].expand(7, 64))  # half tells the row, half the column


def test_patch_embedding_is_a_sum_of_words() -> None:
    embedding = torch.nn.Embedding(10, 4)
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 6], [IMAGE_TOKEN_ID, 7, 0, 0]])
    words = torch.tensor([[1, 2, -1, -1], [3, -1, -1, -1], [4, 1, 2, 3]])
    embeds = language_model.embed_with_patches(embedding, ids, words)
    assert torch.equal(embeds[0, 0], embedding.weight[5])
    for patch, (row, place) in zip(words, ((0, 1), (0, 2), (1, 0)), strict=True):
        known = embedding.weight[patch[patch >= 0]]
        share = torch.linalg.lstsq(known.T, embeds[row, place][:, None]).solution[:, 0]
        torch.testing.assert_close(known.T @ share, embeds[row, place], rtol=1e-3, atol=1e-3)
        assert ((share > 0.39) & (share < 1.61)).all()


def test_multiple_choice_letter_is_right() -> None:
    kinds = set()
    for k in range(80):
        scene, rng = world.sample_scene(k, 6), random.Random(k)
        asked, output = pretraining_text.multiple_choice("Told.", facts_of_scene(scene), rng)
        question, context, options = asked.split("\n")
        assert context == "Context: Told."
        choices = dict(re.findall(r"\((\w)\) ([^(]+?)(?= \(|$)", options))
        solution, letter = re.fullmatch(r"SOLUTION: (.+)\.\n###\nANSWER: (\w)\.", output).groups()
        assert choices[letter] == solution.lower()
        assert len(choices) == len(set(choices.values())) >= 2
        (right,) = (q for q in questions(facts_of_scene(scene), rng) if q.question == question)
        assert right.answer == f"{solution}."
        kinds.add(right.kind)
    assert kinds == set(pretraining_text.OPTIONS)


def test_clearest_patch_is_visible() -> None:
    far = world.Item("dog", "red", "large", (0.0, 0.5, 0.5, 1.0))
    near = world.Item("cat", "blue", "large", (0.15, 0.5, 0.5, 1.0))
    behind = world.Item("cup", "white", "small", (0.2, 0.6, 0.45, 0.9))
    groups = tuple(world.Group(i.category, i.color, 1, "left") for i in (far, near, behind))
    scene = world.Scene(0, "beach", (behind, far, near), groups, 0)
    seen = [acceptance.clearest_patch(scene, item) for item in (far, near, behind)]
    assert seen[2] is None
    assert [k % 7 for k in seen[:2]] == [0, 2]
    assert all(k // 7 >= 4 for k in seen[:2])


def test_patch_weights_are_shares_of_the_box() -> None:
    assert acceptance.patch_weights((0.5, 0.0, 1.0, 0.5), 2).tolist() == [0, 1, 0, 0]
    assert acceptance.patch_weights((0.0, 0.25, 1.0, 1.0), 2) == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    weights = acceptance.patch_weights((0.1, 0.2, 0.37, 0.9), 7).reshape(7, 7)
    assert weights.sum() == pytest.approx(1)
    assert np.flatnonzero(weights.sum(0)).tolist() == [0, 1, 2]


class Parrot:
    """Puts all weight on the right next token, except at the positions in `wrong`: row -> position from the end."""

    def __init__(self, tokenizer: Any, dialogues: list[tuple[str, str]], wrong: dict[str, int]) -> None:
        self.texts = {}
        for question, answer in dialogues:
            ids = encode(pretraining_text.dialogue([(question, answer)]), tokenizer, 0).input_ids
            output = list(ids)
            if question in wrong:
                output[wrong[question]] = tokenizer.bos_token_id
            self.texts[tuple(ids)] = output

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 400)
        for row, ids in enumerate(input_ids.tolist()):
            # the row lacks the last token of the longest text and is padded if it is a shorter one
            (output,) = (s for full, s in self.texts.items() if (*ids, full[-1])[: len(full)] == full)
            for place, token in enumerate(output[1:]):
                logits[row, place, token] = 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_exact_answers_counts_answer_tokens_only(tmp_path: Path, batch: int) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    dialogues = [("what color is the car", "blue and red"), ("the dog", "red"), ("what", "a helpful human")]
    assert acceptance.exact_answers(Parrot(tokenizer, dialogues, {}), tokenizer, dialogues, batch) == [True] * 3
    spoiled = {"the dog": -1, "what": 5}  # the terminator of one answer; one word of the other's prompt
    result = acceptance.exact_answers(Parrot(tokenizer, dialogues, spoiled), tokenizer, dialogues, batch)
    assert result == [True, False, True]


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


def test_text_batches_are_padded_on_the_right(tmp_path: Path) -> None:
    tokenizer, rng = tiny.tokenizer(tmp_path), random.Random(0)
    batches = language_model._text_batches(tokenizer, 3, lambda: pretraining_text.document(rng), 0)
    for ids, labels, words in islice(batches, 16):
        assert ids.shape == labels.shape
        assert ids.shape[0] == 3
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        padded = ids == tokenizer.pad_token_id
        assert (labels[padded] == IGNORE_INDEX).all()
        assert (padded.int().diff(dim=1) >= 0).all()
        assert ((labels == ids) | (labels == IGNORE_INDEX)).all()
        assert words.shape == (int((ids == IMAGE_TOKEN_ID).sum()), 4)


def test_unit_features_keeps_the_tower_output(tmp_path: Path) -> None:
    _, clip = tiny.base_models(tmp_path)
    tower, _ = load_vision_tower(clip, torch.float32)
    pixels = torch.randn(6, 3, 32, 32)
    transformer = getattr(tower, "vision_model", tower)  # where it is differs between transformers' versions
    with torch.no_grad():
        for layer in transformer.encoder.layers:
            layer.mlp.fc2.weight.mul_(40)
        before = tower(pixels, output_hidden_states=True)
        factor = contrastive.unit_features(transformer, pixels)
        after = tower(pixels, output_hidden_states=True)
    assert factor != pytest.approx(1, abs=0.1)
    assert float(after.hidden_states[-2][:, 1:].std()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(after.pooler_output, before.pooler_output, rtol=1e-2, atol=1e-2)


def test_image_settings_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, clip = tiny.base_models(tmp_path)
    monkeypatch.setattr(contrastive, "IMAGE_SIZE", 32)
    contrastive.write_preprocessor(Path(clip))
    _, processor = load_vision_tower(clip, torch.float32)
    assert list(processor.mean) == [contrastive.PIXEL_MEAN] * 3
    assert list(processor.std) == [contrastive.PIXEL_STD] * 3
    # the tower is trained on the pixels that the processor produces later
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    trained = contrastive.normalise(torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.from_numpy(processor.normalise(pixels)) == pytest.approx(trained, abs=1e-6)


def test_tower_of_two_steps_loads(tmp_path: Path) -> None:
    summary = contrastive.train_clip(tmp_path / "clip", steps=2, images=16, batch=8)
    assert (summary["steps"], summary["images"]) == (2, 16)
    assert 0 < summary["final_loss"] < 20
    tower, processor = load_vision_tower(str(tmp_path / "clip"), torch.float32)
    assert (tower.config.image_size, tower.config.patch_size) == (contrastive.IMAGE_SIZE, contrastive.PATCH_SIZE)
    assert processor.size == contrastive.IMAGE_SIZE
    assert {f.name for f in (tmp_path / "clip").iterdir()} >= {"model.safetensors", "preprocessor_config.json"}


def test_interrupted_retraining_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "model.safetensors").write_text("old")

    def broken(out: Path, seed: int) -> None:
        out.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(base_models, "train_clip", broken)
    with pytest.raises(KeyboardInterrupt):
        base_models.train_base_models(tmp_path, only=["clip"])
    assert (tmp_path / "clip" / "model.safetensors").read_text() == "old"

    def full(out: Path, seed: int) -> dict[str, int]:
        out.mkdir()
        (out / "model.safetensors").write_text("new")
        return {"steps": 1}

    monkeypatch.setattr(base_models, "train_clip", full)
    monkeypatch.setattr(base_models, "measure_acceptance", lambda out: {"passed": {}})
    base_models.train_base_models(tmp_path, only=["clip"])
    assert (tmp_path / "clip" / "model.safetensors").read_text() == "new"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["clip", "gates.json"]
