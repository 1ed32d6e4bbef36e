"""Comparison of two checkpoints: the first tensor or module that differs."""

from __future__ import annotations

from pathlib import Path

import foreign
import pytest
import torch
from checkpoint_fixtures import change_json, edit_tensors, intact, loaded, original, root, world  # noqa: F401 - fixtures
from foreign import logits

from companion.checkpoints import divergence
from companion.checkpoints.convert import convert
from companion.checkpoints.divergence import first_divergence, first_module, verify_export
from llava_core.checkpoints.load import load
from llava_core.checkpoints.open import open_checkpoint
from llava_core.runtime import CheckpointError


def test_first_divergence_names_the_changed_tensor(world, intact, tmp_path) -> None:
    import shutil

    loaded = world[1]
    folder = tmp_path / "c"
    shutil.copytree(intact["original"], folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            tensors[key][0, 0] += 0.25

    edit_tensors(folder, change)
    one, other = (open_checkpoint(f) for f in (intact["original"], folder))
    result = first_divergence(one, other)
    assert result is not None
    assert result.name == "language_model.model.layers.0.mlp.down_proj.weight"
    assert result.largest == pytest.approx(0.25, rel=1e-5)
    assert first_divergence(one, other, tolerance=0.3) is None
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits(load(folder)), logits(loaded))


def test_verification_names_the_first_module_that_differs(world, tmp_path) -> None:
    root, loaded, _ = world
    source = foreign.write_original(loaded, root, tmp_path / "source")
    report = convert(source, tmp_path / "hf", "hf", verify=True)
    assert 0 <= report["largest_difference"] < 1e-5
    checkpoint = open_checkpoint(source).require("vision_tower")
    full = verify_export(checkpoint, tmp_path / "hf")
    names = [d.name for d in full]
    assert first_module(full) is None
    assert names.index("vision_tower.embeddings") < names.index("multi_modal_projector") < len(names) - 1
    assert {"language_model.model.layers.1.mlp", "language_model.lm_head"} <= set(names)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].map(lambda t: t + 0.1)
    wrong = first_module(verify_export(checkpoint, tmp_path / "hf"))
    assert wrong is not None
    assert wrong.name == "language_model.model.layers.1.mlp.up_proj"
    with pytest.raises(CheckpointError, match="only what is written as 'hf'"):
        convert(source, tmp_path / "x", "original", verify=True)


def _tokenizer(folder: Path) -> None:
    change_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


def _chat_template(folder: Path) -> None:
    file = folder / "chat_template.json"
    file.write_text(file.read_text().replace("USER: ", "USER:  "))


def _pixels(folder: Path) -> None:
    change_json(folder / "preprocessor_config.json", image_std=[0.3] * 3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_tokenizer, r"tokens of 'What is in the image\?': from 0 on"),
        (_chat_template, r"the prompt of 'What is in  the image\?'"),
        (_pixels, "other pixels"),
    ],
)
def test_verification_finds_what_weights_do_not_show(original, change, problem, tmp_path) -> None:
    convert(original, tmp_path / "hf", "hf")
    change(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=problem):
        verify_export(open_checkpoint(original).require("vision_tower"), tmp_path / "hf")


def test_comparison_of_no_module_is_an_error(original, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(divergence, "_in_memory", lambda name: f"nowhere.{name}")
    with pytest.raises(CheckpointError, match="nothing is compared"):
        convert(original, tmp_path / "hf", "hf", verify=True)
    assert not (tmp_path / "hf").exists()
