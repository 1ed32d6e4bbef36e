from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from companion.cli import miniature
from companion.miniature import acceptance, base_models, contrastive, language_model, training, world
from llava_core.checkpoints.base_models import load_vision_tower
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.runtime import ConfigError, read_json


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
        out.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(base_models, "train_clip", broken)
    with pytest.raises(KeyboardInterrupt):
        base_models.train_base_models(tmp_path, only=["clip"])
    assert (tmp_path / "clip" / "model.safetensors").read_text() == "old"

    def full(out: Path, seed: int) -> dict[str, int]:
        out.mkdir(exist_ok=True)
        (out / "model.safetensors").write_text("new")
        return {"steps": 1}

    monkeypatch.setattr(base_models, "train_clip", full)
    monkeypatch.setattr(base_models, "measure_acceptance", lambda out: {"passed": {}})
    base_models.train_base_models(tmp_path, only=["clip"])
    assert (tmp_path / "clip" / "model.safetensors").read_text() == "new"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["clip", "gates.json"]


def test_a_seed_that_misses_a_check_is_trained_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[int, int]] = []

    def train(size: str, out: Path, seed: int, steps: int) -> dict[str, int]:
        trained.append((seed, steps))
        out.mkdir(exist_ok=True)
        return {"steps": steps}

    def checks(folder: Path) -> dict[str, Any]:
        seed, steps = trained[-1]
        look_up = 0.48 if seed == 1 and steps == 3000 else 0.96
        names = ("told", "letter", "sums")
        return {
            **dict.fromkeys(names, 1.0),
            "look_up": look_up,
            "blind": 0,
            "blind_prior": 0,
            "told_by_kind": {"a": 0.9},
        }

    monkeypatch.setattr(base_models, "train_language_model", train)
    monkeypatch.setattr(base_models, "language_model_checks", checks)
    monkeypatch.setattr(base_models, "measure_acceptance", lambda out: {"passed": {}})
    base_models.train_base_models(tmp_path, only=["llm-13b", "llm-13b-1"])
    assert trained == [(0, 3000), (1, 3000), (1, 4500)]
    assert read_json(tmp_path / "llm-13b-1" / "manifest.json")["training"] == {"steps": 4500}


def test_only_the_named_models_of_the_folder_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"base model 'llm-7B'"):
        base_models.measure_acceptance(only=["llm-7B"])
    measured: list[str] = []
    monkeypatch.setattr(base_models, "language_model_checks", lambda folder: measured.append(folder.name))
    monkeypatch.setattr(base_models, "vision_tower_checks", lambda folder: measured.append(folder.name))
    monkeypatch.setattr(base_models, "_text_gates", lambda checks: {"text": True})
    monkeypatch.setattr(base_models, "_vision_gates", lambda checks: {"vision": True})
    assert base_models.measure_acceptance(only=["llm-7b"])["passed"] == {"llm-7b text": True}
    assert base_models.measure_acceptance(only=["clip"])["passed"] == {"vision": True}
    assert measured == ["llm-7b", "clip"]


def test_command_line_names_every_base_model() -> None:  # a copy there, so that `llava --help` needs no torch
    assert set(miniature.BASE_MODELS) == {*base_models.LANGUAGE_MODELS, "clip"}
