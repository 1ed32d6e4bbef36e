"""LoRA directories and delta weights: the same function as peft's merge and as the target the delta was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import foreign
import pytest
import torch
from safetensors.torch import load_file, save_file

from companion.checkpoints import delta
from companion.checkpoints.convert import convert
from companion.checkpoints.divergence import first_divergence
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, load
from llava_core.checkpoints.open import open_checkpoint
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.runtime import CheckpointError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Loaded, Options]:
    """Base models, a random model, and its language model as a plain LLaMA folder `base`."""
    root = tmp_path_factory.mktemp("lora")
    loaded = foreign.model(root)
    base = foreign.plain_base(loaded, root / "base")
    return root, loaded, Options(base=str(base), vision_tower=str(root / "clip"))


def logits(loaded: Loaded) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN_ID] * loaded.model.n_image_tokens, 9, 20, 30]])
    with torch.no_grad():
        found: torch.Tensor = loaded.model(ids, torch.randn(1, 3, 32, 32, generator=generator)).logits
    return found


# ------------------------------------------------------------------------------------------------ LoRA


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
    trained = foreign.projector(loaded.model, "base_model.model.model.mm_projector.")
    torch.save({n: t + 0.5 for n, t in trained.items()}, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(foreign.original_config(loaded.model, str(root / "clip"))))
    full.model.language_model = adapted.merge_and_unload()
    with torch.no_grad():
        for p in full.model.multi_modal_projector.parameters():
            p += 0.5
    return folder, logits(full)


def test_lora_merge_equals_peft(world, adapter, tmp_path) -> None:
    folder, wanted = adapter
    opened = open_checkpoint(folder)
    assert opened.format == "lora"
    torch.testing.assert_close(logits(load(folder)), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, logits(world[1]), atol=1e-2)
    for to in ("llava", "original", "hf"):
        convert(folder, tmp_path / to, to)
        torch.testing.assert_close(logits(load(tmp_path / to))[..., : wanted.shape[-1]], wanted, rtol=1e-5, atol=1e-5)


def test_lora_on_a_llava_base(world, adapter, tmp_path) -> None:
    root, loaded, _ = world
    folder, wanted = adapter
    base = foreign.original(loaded, root, tmp_path / "base")
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


# ------------------------------------------------------------------------------------------------ delta


@pytest.fixture(scope="module")
def tuned(world) -> tuple[Path, Loaded, Path]:
    """A LLaVA in the original format, fine-tuned from its base and with three more rows."""
    root, loaded, options = world
    torch.manual_seed(9)
    tensors = {n: t for n, t in foreign.language(loaded.model).items() if "inv_freq" not in n}
    tensors = {n: t + 0.01 * torch.randn_like(t) for n, t in tensors.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(3, 32)])
    folder = root / "target"
    folder.mkdir()
    torch.save(tensors | foreign.projector(loaded.model), folder / "pytorch_model.bin")
    config = foreign.original_config(loaded.model, str(root / "clip"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 3}))
    loaded.tokenizer.save_pretrained(folder)
    return folder, load(folder), Path(options.base or "")


def test_delta_round_trip_gives_the_target(tuned, tmp_path) -> None:
    target, loaded, base = tuned
    made = delta.make(str(base), target, tmp_path / "delta", shard_bytes=20_000)
    assert made["blocks"] == {"model.embed_tokens.weight": 320, "lm_head.weight": 320}
    assert sorted(made["stored"]) == ["model.mm_projector.bias", "model.mm_projector.weight"]
    applied = delta.apply(str(base), tmp_path / "delta", tmp_path / "again", shard_bytes=20_000)
    assert applied["fingerprint"] == "matches"
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(loaded), rtol=1e-5, atol=1e-5)
    found = first_divergence(open_checkpoint(target), open_checkpoint(tmp_path / "again"), tolerance=1e-6)
    assert found is None
    tensors = delta._open(tmp_path / "delta")
    extra = tensors["model.embed_tokens.weight"].read()[320:]
    stored = torch.load(target / "pytorch_model.bin", weights_only=True)
    torch.testing.assert_close(extra, stored["model.embed_tokens.weight"][320:], rtol=0, atol=0)  # stored as it is
    assert float(tensors["model.norm.weight"].read().abs().max()) < 0.1


def test_delta_is_not_opened_as_a_model(tuned, tmp_path) -> None:
    target, _, base = tuned
    delta.make(str(base), target, tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"delta weights.*`llava delta apply`"):
        open_checkpoint(tmp_path / "delta")


def test_dry_run_of_a_delta_writes_nothing(tuned, tmp_path) -> None:
    target, _, base = tuned
    report = delta.make(str(base), target, tmp_path / "delta", dry_run=True)
    assert report["added"] == 2 * 9 + 1
    assert report["written"] is False
    assert not (tmp_path / "delta").exists()


def test_delta_of_another_base_is_refused(tuned, tmp_path) -> None:
    target, _, base = tuned
    delta.make(str(base), target, tmp_path / "delta")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"fingerprint .*--base with that very model"):
        delta.apply(str(other), tmp_path / "delta", tmp_path / "again")
    (tmp_path / "delta" / delta.DELTA).unlink()  # a delta of others records none
    report = delta.apply(str(base), tmp_path / "delta", tmp_path / "again")
    assert report["fingerprint"].startswith("not recorded")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 8)
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is \(64, 32\), in the base \(8, 8\)"
    ):
        delta.apply(str(other), tmp_path / "delta", tmp_path / "third")


def test_non_finite_values_are_refused(tuned, tmp_path) -> None:
    target, _, base = tuned
    delta.make(str(base), target, tmp_path / "delta")
    (file,) = (tmp_path / "delta").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not finite"):
        delta.apply(str(base), tmp_path / "delta", tmp_path / "again")
    assert not (tmp_path / "again").exists()
