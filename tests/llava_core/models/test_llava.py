from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from llava_core.checkpoints.load import Loaded, build, load, load_into, save_checkpoint
from llava_core.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from llava_core.models.vision_tower import patch_features
from llava_core.runtime import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.base_models(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def loaded(bases) -> Loaded:
    torch.manual_seed(1)
    loaded_model = build(*bases, torch.float32)
    loaded_model.model.eval()
    return loaded_model


def test_image_rows_are_replaced_by_projected_features(loaded) -> None:
    model = loaded.model
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[5, *[IMAGE_TOKEN_ID] * 4, 6], [*[IMAGE_TOKEN_ID] * 4, 7, 8]])
    embeds = model.embed(ids, pixels)  # bitwise below: the tower and projector see the same batch of two images
    hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    expected = model.multi_modal_projector(hidden)
    assert torch.equal(embeds[0, 1:5], expected[0])
    assert torch.equal(embeds[1, :4], expected[1])
    words = model.language_model.get_input_embeddings()
    assert torch.equal(embeds[0, 0], words(torch.tensor(5)))


def test_feature_layer_and_class_token(loaded) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    before, last = patch_features(loaded.model.vision_tower, pixels, (-2, -1))
    assert before.shape == last.shape == (1, 4, 24)
    assert not torch.allclose(before, last)
    assert not before.requires_grad


def test_wrong_number_of_images_is_an_error(loaded) -> None:
    with pytest.raises(ValueError, match="4 image tokens in the text but 8"):
        loaded.model.embed(torch.tensor([[IMAGE_TOKEN_ID] * 4]), torch.randn(2, 3, 32, 32))


def test_padding_does_not_change_the_loss(loaded) -> None:
    ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * 4, 9, 10, 11]])
    labels = torch.tensor([[IGNORE_INDEX] * 6 + [10, 11]])
    pixels = torch.randn(1, 3, 32, 32)
    plain = tiny.summed_loss(loaded.model(ids, pixels).logits, labels)
    padded_ids, padded_labels = (
        torch.nn.functional.pad(ids, (0, 5)),
        torch.nn.functional.pad(labels, (0, 5), value=IGNORE_INDEX),
    )
    mask = torch.tensor([[1] * 8 + [0] * 5])
    padded = tiny.summed_loss(loaded.model(padded_ids, pixels, mask).logits, padded_labels)
    torch.testing.assert_close(plain, padded, rtol=1e-5, atol=1e-5)


def test_trainable_parameters(loaded) -> None:
    model = loaded.model
    assert model.set_trainable(["projector"]) == ["multi_modal_projector.weight", "multi_modal_projector.bias"]
    assert any(n.startswith("language_model") for n in model.set_trainable(["projector", "language_model"]))
    assert not any(p.requires_grad for p in model.vision_tower.parameters())
    assert not model.train().vision_tower.training


@pytest.mark.parametrize("kind", ["full", "projector"])
def test_checkpoint_round_trip(loaded, tmp_path: Path, kind) -> None:
    path = save_checkpoint(tmp_path / "c", loaded, kind, template="v0", image_position="data", run_id="r")
    second = load(path)
    ids, pixels = torch.tensor([[1, *[IMAGE_TOKEN_ID] * 4, 9, 10]]), torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded.model(ids, pixels).logits, second.model(ids, pixels).logits)
    assert second.manifest["template"] == "v0"
    assert second.processor == loaded.processor


def test_damaged_checkpoints_are_one_clear_error(loaded, bases, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", loaded, "projector")
    weights = path / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"oops")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*SHA-256"):
        load(path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(path)
    with pytest.raises(CheckpointError, match="not a LLaVA checkpoint"):
        load(tmp_path)


def test_strict_keys_and_shapes(loaded, bases, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", loaded, "projector")
    other = build(*bases, torch.float32, projector="mlp2x_gelu")
    with pytest.raises(CheckpointError, match="multi_modal_projector"):
        load_into(other.model, path)


def test_corrupt_base_model_names_the_file(tmp_path: Path) -> None:
    llm, clip = tiny.base_models(tmp_path)
    file = Path(llm) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"llm/model\.safetensors"):
        build(llm, clip, torch.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"llm/model\.safetensors"):
        build(llm, clip, torch.float32)


def test_unknown_projector(bases) -> None:
    with pytest.raises(ConfigError, match="linear"):
        build(*bases, torch.float32, projector="lineer")
