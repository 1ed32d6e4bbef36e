"""mmpretrain's `.pth`: what its converter writes, and models that mmengine saved, with mmpretrain's own tower."""

from __future__ import annotations

from pathlib import Path

import foreign
import pytest
import torch
from checkpoint_fixtures import edit_tensors, world  # noqa: F401 - fixtures

from companion.checkpoints.convert import convert
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, load
from llava_core.checkpoints.open import open_checkpoint
from llava_core.runtime import CheckpointError


def tower_of_mmpretrain(loaded: Loaded) -> dict[str, torch.Tensor]:
    """CLIP's tower as mmpretrain's VisionTransformer has it: qkv in one, no last norm."""
    state = {n: t.detach().clone() for n, t in loaded.model.vision_tower.state_dict().items()}
    embeddings = "embeddings."
    tower = {
        "cls_token": state[f"{embeddings}class_embedding"][None, None],
        "pos_embed": state[f"{embeddings}position_embedding.weight"][None],
        "patch_embed.projection.weight": state[f"{embeddings}patch_embedding.weight"],
    }
    for end in ("weight", "bias"):
        tower[f"pre_norm.{end}"] = state[f"pre_layrnorm.{end}"]
        for k in range(loaded.model.vision_tower.config.num_hidden_layers):
            theirs, ours = f"layers.{k}.", f"encoder.layers.{k}."
            qkv = [state[f"{ours}self_attn.{letter}_proj.{end}"] for letter in "qkv"]
            tower |= {
                f"{theirs}attn.qkv.{end}": torch.cat(qkv),
                f"{theirs}attn.proj.{end}": state[f"{ours}self_attn.out_proj.{end}"],
                f"{theirs}ln1.{end}": state[f"{ours}layer_norm1.{end}"],
                f"{theirs}ln2.{end}": state[f"{ours}layer_norm2.{end}"],
                f"{theirs}ffn.layers.0.0.{end}": state[f"{ours}mlp.fc1.{end}"],
                f"{theirs}ffn.layers.1.{end}": state[f"{ours}mlp.fc2.{end}"],
            }
    return {f"model.vision_tower.{name}": tensor for name, tensor in tower.items()}


@pytest.fixture(params=["flat", "mmengine"])
def saved(request, world, tmp_path) -> tuple[Path, Loaded, Options]:
    """A `.pth` with mmpretrain's tower; the tower that the options name has other weights."""
    _, loaded, options = world
    folder = foreign.write_mmpretrain(loaded, tmp_path / "mm")
    edit_tensors(folder, lambda tensors: tensors.update(tower_of_mmpretrain(loaded)))
    file = folder / "llava_7b.pth"
    if request.param == "mmengine":
        tensors = torch.load(file, weights_only=True)
        torch.save({"meta": {"epoch": 1}, "state_dict": tensors, "message_hub": {}}, file)
    other = foreign.random_model(tmp_path / "other")
    torch.nn.init.zeros_(other.model.vision_tower.embeddings.class_embedding)
    foreign.write_tower(other.model, tmp_path / "other" / "clip")
    return folder, loaded, Options(base=options.base, vision_tower=str(tmp_path / "other" / "clip"))


def test_tower_of_mmpretrain_is_read(saved, tmp_path) -> None:
    folder, loaded, options = saved
    read = load(folder, options=options)
    assert torch.equal(foreign.logits(read), foreign.logits(loaded))
    assert read.processor.mode == "resize"
    convert(folder, tmp_path / "hf", "hf", options)
    back = foreign.logits(load(tmp_path / "hf"))[..., : loaded.model.language_model.config.vocab_size]
    torch.testing.assert_close(back, foreign.logits(loaded), rtol=1e-5, atol=1e-5)


def test_notes_say_what_mmpretrain_does_otherwise(saved) -> None:
    folder, _, options = saved
    notes = " ".join(open_checkpoint(folder, options).notes)
    assert "feature layer -2" in notes
    assert "reads layer -1" in notes
    assert "no BOS token" in notes


def test_other_towers_of_mmpretrain_are_refused_by_name(saved) -> None:
    folder, _, options = saved
    edit_tensors(folder, lambda tensors: tensors.update({"model.vision_tower.layers.0.gamma1.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.gamma1\.weight"):
        load(folder, options=options)
    edit_tensors(folder, lambda tensors: tensors.update({"model.vision_tower.stem.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"model\.vision_tower\.stem\.weight is no part of a CLIP"):
        load(folder, options=options)


def test_base_that_is_a_llava_gives_its_language_model(world, tmp_path) -> None:
    root, loaded, options = world
    folder = foreign.write_mmpretrain(loaded, tmp_path / "mm")
    llava = foreign.write_original(loaded, root, tmp_path / "llava")
    read = load(folder, options=Options(base=str(llava), vision_tower=options.vision_tower))
    assert torch.equal(foreign.logits(read), foreign.logits(loaded))


def test_without_a_tower_one_must_be_named(world, tmp_path) -> None:
    _, loaded, options = world
    folder = foreign.write_mmpretrain(loaded, tmp_path / "mm")
    with pytest.raises(CheckpointError, match="names no vision tower; fix: --vision-tower"):
        load(folder, options=Options(base=options.base))
    edit_tensors(folder, lambda tensors: tensors.update(tower_of_mmpretrain(loaded)))
    with pytest.raises(CheckpointError, match="vision tower without configuration; fix: --vision-tower"):
        load(folder, options=Options(base=options.base))


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.layers.0.attn.qkv.weight",
        "model.vision_tower.pos_embed",
        "model.vision_tower.pre_norm.weight",
        "model.lang_encoder.model.embed_tokens.weight",
        "model.lang_encoder.model.mm_projector.weight",
    ],
)
def test_tensors_without_dimensions_are_refused(saved, name) -> None:
    folder, _, options = saved
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.tensor(1.0)}))
    with pytest.raises(CheckpointError):
        load(folder, options=options)
