"""Delta weights: made from a target, applied to its base, refused on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import foreign
import pytest
import torch
from checkpoint_fixtures import loaded, original, root  # noqa: F401 - fixtures
from foreign import logits
from safetensors.torch import load_file, save_file

from companion.checkpoints import delta
from companion.checkpoints.divergence import first_divergence
from companion.checkpoints.inspection import inspect
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, load
from llava_core.checkpoints.open import open_checkpoint
from llava_core.runtime import CheckpointError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Loaded, Options]:
    """Base models, a random model, and its language model as a plain LLaMA folder `base`."""
    return foreign.model_with_bases(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def tuned(world) -> tuple[Path, Loaded, Path]:
    """A LLaVA in the original format, fine-tuned from its base and with three more rows."""
    root, loaded, options = world
    torch.manual_seed(9)
    tensors = {n: t for n, t in foreign.language_tensors(loaded.model).items() if "inv_freq" not in n}
    tensors = {n: t + 0.01 * torch.randn_like(t) for n, t in tensors.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(3, 32)])
    folder = root / "target"
    folder.mkdir()
    torch.save(tensors | foreign.projector_tensors(loaded.model), folder / "pytorch_model.bin")
    config = foreign.original_config(loaded.model, str(root / "clip"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 3}))
    loaded.tokenizer.save_pretrained(folder)
    return folder, load(folder), Path(options.base or "")


def test_delta_round_trip_gives_the_target(tuned, tmp_path) -> None:
    target, loaded, base = tuned
    report = delta.make(str(base), target, tmp_path / "delta", shard_bytes=20_000)
    assert report["blocks"] == {"model.embed_tokens.weight": 320, "lm_head.weight": 320}
    assert sorted(report["stored"]) == ["model.mm_projector.bias", "model.mm_projector.weight"]
    applied = delta.apply(str(base), tmp_path / "delta", tmp_path / "again", shard_bytes=20_000)
    assert applied["fingerprint"] == "matches"
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(loaded), rtol=1e-5, atol=1e-5)
    divergence = first_divergence(open_checkpoint(target), open_checkpoint(tmp_path / "again"), tolerance=1e-6)
    assert divergence is None
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
    with pytest.raises(CheckpointError, match=r"fingerprint .*--base with the model that the delta"):
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
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinity; fix: "):
        delta.apply(str(base), tmp_path / "delta", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_models_and_deltas_are_distinguished(original, loaded, root, tmp_path) -> None:
    base = foreign.write_llama(loaded, tmp_path / "base", offset=0.001)
    with pytest.raises(CheckpointError, match="is a model already, no delta"):
        delta.apply(str(base), original, tmp_path / "out")
    delta.make(str(base), original, tmp_path / "delta")
    with pytest.raises(CheckpointError, match="is a delta already"):
        delta.make(str(base), tmp_path / "delta", tmp_path / "out")
    result = inspect(tmp_path / "delta")
    assert (result["layout"], result["problems"]) == ("delta", [])
    assert "fingerprint is recorded" in result["notes"][0]
    with pytest.raises(CheckpointError, match=r"not a folder with a LLaVA.*fix"):
        delta.apply(str(base), tmp_path / "nowhere", tmp_path / "out")


def test_a_recorded_delta_is_one_whatever_its_norms(tuned, tmp_path) -> None:
    target, loaded, base = tuned
    far = tmp_path / "far"
    shutil.copytree(base, far)
    tensors = load_file(far / "model.safetensors")
    save_file({n: t - 2 if "norm" in n else t for n, t in tensors.items()}, far / "model.safetensors")
    delta.make(str(far), target, tmp_path / "delta")
    assert inspect(tmp_path / "delta")["layout"] == "delta"
    with pytest.raises(CheckpointError, match=r"delta\.json.*`llava delta apply`"):
        open_checkpoint(tmp_path / "delta")
    with pytest.raises(CheckpointError, match="is a delta already"):
        delta.make(str(far), tmp_path / "delta", tmp_path / "out")
    assert delta.apply(str(far), tmp_path / "delta", tmp_path / "again")["fingerprint"] == "matches"
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(loaded), rtol=1e-5, atol=1e-5)
    (tmp_path / "delta" / delta.DELTA).unlink()
    with pytest.raises(CheckpointError, match="is a model already"):
        delta.apply(str(far), tmp_path / "delta", tmp_path / "third")


@pytest.mark.parametrize("kind", ["original", "llava", "hf"])
def test_base_that_is_a_llava_gives_its_language_model(world, tuned, kind, tmp_path) -> None:
    """Its projector, of the same shape as the delta's, is not added to it."""
    from checkpoint_fixtures import write_checkpoint

    root, loaded, _ = world
    target, wanted, base = tuned
    llava = write_checkpoint(kind, loaded, root, tmp_path / "llava")
    plan = delta.make(str(llava), target, tmp_path / "delta")
    assert plan == delta.make(str(base), target, tmp_path / "other") | {"base": plan["base"]}
    assert delta.apply(str(llava), tmp_path / "other", tmp_path / "again")["fingerprint"] == "matches"
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(wanted), rtol=1e-5, atol=1e-5)
