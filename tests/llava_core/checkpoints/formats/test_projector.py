"""Projector files: published names, and files with rows of word embeddings."""

from __future__ import annotations

import json

import foreign
import pytest
import torch
from checkpoint_fixtures import loaded, root, world  # noqa: F401 - fixtures
from safetensors.torch import save_file

from llava_core.checkpoints.base_models import load_language_model
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import load
from llava_core.checkpoints.open import detect_format, open_checkpoint
from llava_core.runtime import CheckpointError


def test_projector_file_with_word_embeddings(world, tmp_path) -> None:
    """v0's script extracted all rows, later ones the two rows of the image delimiters."""
    _, loaded, options = world
    words = loaded.model.language_model.get_input_embeddings().weight.detach()
    base = tmp_path / "base"
    tokenizer = load_language_model(options.base, torch.float32)[1]
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    config = loaded.model.language_model.config.to_dict() | {"vocab_size": len(tokenizer)}
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(base)
    tensors = {n: t for n, t in foreign.language_tensors(loaded.model).items() if "inv_freq" not in n}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(2, tensors[name].shape[1])])
    save_file(tensors, base / "model.safetensors")
    options = Options(base=str(base), vision_tower=options.vision_tower)
    file, rows = tmp_path / "projector.bin", torch.randn(2, words.shape[1])
    torch.save({**foreign.projector_tensors(loaded.model), "model.embed_tokens.weight": rows}, file)
    checkpoint = open_checkpoint(file, options)
    table = checkpoint.tensors["language_model.model.embed_tokens.weight"].read()
    torch.testing.assert_close(table, torch.cat([words, rows]))
    assert checkpoint.description.usage["image_delimiters"] == ["<im_start>", "<im_end>"]
    full = torch.randn(len(tokenizer), words.shape[1])
    torch.save({**foreign.projector_tensors(loaded.model), "model.embed_tokens.weight": full}, file)
    table = open_checkpoint(file, options).tensors["language_model.model.embed_tokens.weight"].read()
    torch.testing.assert_close(table, full)
    torch.save({**foreign.projector_tensors(loaded.model), "model.embed_tokens.weight": full[:-1]}, file)
    with pytest.raises(CheckpointError, match="vocabulary was extended"):
        open_checkpoint(file, options)


def test_projector_file_under_its_published_name(loaded, root, tmp_path) -> None:
    folder = tmp_path / "zoo"
    folder.mkdir()
    torch.save(foreign.projector_tensors(loaded.model), folder / "LLaVA-7b-pretrain-projector-v0.bin")
    assert getattr(detect_format(folder), "name", None) == "projector"
    options = Options(base=str(root / "llm"), vision_tower=str(root / "clip"))
    assert open_checkpoint(folder, options).parts == ("multi_modal_projector", "language_model")


def test_base_of_a_projector_may_be_a_llava(loaded, root, tmp_path) -> None:
    """Its language model and its tokenizer are taken, and the tokenizer shows the era."""
    base = foreign.write_original(loaded, root, tmp_path / "base", tower=True)
    (base / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    folder = tmp_path / "projector"
    folder.mkdir()
    tensors = {n: t + 0.5 for n, t in foreign.projector_tensors(loaded.model).items()}
    torch.save(tensors, folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps(foreign.original_config(loaded.model, str(root / "clip"))))
    assert open_checkpoint(folder).description.usage["template"] == "v1"
    for options in (Options(base=str(base)), Options(base=str(base), vision_tower=str(root / "clip"))):
        checkpoint = open_checkpoint(folder, options)
        assert checkpoint.parts == ("multi_modal_projector", "language_model")
        assert checkpoint.description.usage["template"] == "v0_exact_1_0"
        assert checkpoint.tokenizer == base
        ours = load(folder, options=options)
        language_model = loaded.model.language_model.state_dict()
        assert all(torch.equal(t, language_model[n]) for n, t in ours.model.language_model.state_dict().items())
        assert torch.equal(ours.model.multi_modal_projector.bias, tensors["model.mm_projector.bias"])
