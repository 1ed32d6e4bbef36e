"""LoRA directories: the logits of peft's merge, and clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import foreign
import pytest
import torch
from checkpoint_fixtures import (  # noqa: F401 - fixtures
    loaded,
    root,
)
from foreign import logits
from safetensors.torch import load_file, save_file

from companion.checkpoints.convert import convert
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, load
from llava_core.checkpoints.open import open_checkpoint
from llava_core.runtime import CheckpointError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Loaded, Options]:
    """Base models, a random model, and its language model as a plain LLaMA folder `base`."""
    return foreign.model_with_bases(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def adapter(world) -> tuple[Path, torch.Tensor]:
    """A LoRA directory as the original trainer writes it (adapters by peft itself), and the logits of peft's merge."""
    import copy

    from peft import LoraConfig, get_peft_model

    root, loaded, options = world
    folder = root / "lora"
    full = copy.deepcopy(loaded)
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(full.model.language_model, config)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, 0, 0.2)
    adapted.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = options.base
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    trained = foreign.projector_tensors(loaded.model, "base_model.model.model.mm_projector.")
    torch.save({n: t + 0.5 for n, t in trained.items()}, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(foreign.original_config(loaded.model, str(root / "clip"))))
    full.model.language_model = adapted.merge_and_unload()
    with torch.no_grad():
        for p in full.model.multi_modal_projector.parameters():
            p += 0.5
    return folder, logits(full)


def test_lora_merge_equals_peft(world, adapter, tmp_path) -> None:
    folder, wanted = adapter
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "lora"
    torch.testing.assert_close(logits(load(folder)), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, logits(world[1]), atol=1e-2)
    for to in ("llava", "original", "hf"):
        convert(folder, tmp_path / to, to)
        torch.testing.assert_close(logits(load(tmp_path / to))[..., : wanted.shape[-1]], wanted, rtol=1e-5, atol=1e-5)


def test_lora_on_a_llava_base(world, adapter, tmp_path) -> None:
    root, loaded, _ = world
    folder, wanted = adapter
    base = foreign.write_original(loaded, root, tmp_path / "base")
    got = logits(load(folder, options=Options(base=str(base))))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"r": 0}, "give no scale"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"base_model_name_or_path": "nowhere/at-all"}, r"nowhere/at-all.* is not here; fix: --base"),
    ],
)
def test_unsupported_lora_settings_are_refused(adapter, change, message, tmp_path) -> None:
    shutil.copytree(adapter[0], tmp_path / "c")
    file = tmp_path / "c" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "c")


def test_incomplete_adapters_are_refused(world, adapter, tmp_path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(adapter[0], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_B" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lacks one of its two matrices"):
        open_checkpoint(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match="could not use an image"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_adapters_that_change_their_base_are_refused(kind, loaded, root, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "llm")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=kind, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=f"init_lora_weights is '{kind}'"):
        open_checkpoint(tmp_path / "lora", Options(base=str(root / "llm")))


def test_lora_on_all_linear_layers_equals_peft(loaded, root, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, folder = foreign.write_llama(loaded, tmp_path / "base"), tmp_path / "lora"
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.2)
    adapted.save_pretrained(folder)
    torch.save(
        foreign.projector_tensors(loaded.model, "base_model.model.model.mm_projector."),
        folder / "non_lora_trainables.bin",
    )
    (folder / "config.json").write_text(json.dumps(foreign.original_config(loaded.model, str(root / "clip"))))
    merged = adapted.merge_and_unload()
    ours = load(folder, options=Options(base=str(base)))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
