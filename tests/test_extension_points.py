"""Add a projector, a template, an ablation and an attention backend, each in one place, and train with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from training_root import make_training_root

from llava_core.config import load_experiment
from llava_core.data.conversation import TEMPLATES
from llava_core.models.projector import PROJECTORS
from llava_core.ops import BACKENDS, reference
from llava_core.ops.attention import Backend
from llava_core.ops.transformers_backend import packed_attention
from llava_core.registry import Registry
from llava_core.runtime import ROOT
from llava_core.train import trainer
from llava_core.train.launch import launch

ONE_STEP = {"train.epochs": 1, "train.global_batch": 8, "train.max_length": 96, "data.limit": 8}


@pytest.fixture
def root(workspace: Path) -> Path:
    """A root with the project's experiments copied, so that a file can be added."""
    experiments = (workspace / "configs" / "experiments").resolve()
    make_training_root(workspace)
    (workspace / "configs" / "experiments").unlink()
    for file in experiments.rglob("*.yaml"):
        target = workspace / "configs" / "experiments" / file.relative_to(experiments)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    return workspace


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Remove what a test has registered."""
    kept: list[tuple[Registry, dict]] = [(r, dict(r._parts)) for r in (PROJECTORS, TEMPLATES, BACKENDS)]
    yield
    for registry, entries in kept:
        registry._parts.clear()
        registry._parts.update(entries)


def test_files_of_the_page_on_own_data_make_an_experiment(root: Path) -> None:
    page = (ROOT / "book" / "bring_your_own_data.md").read_text().partition("## Train and evaluate")[2]
    folders, experiment = re.findall(r"```yaml\n(.*?)```", page, re.S)[:2]
    scale = (ROOT / "configs" / "scales" / "gpu.yaml").read_text().replace("\ndata:\n", f"\ndata:\n{folders}")
    (root / "configs" / "scales" / "gpu.yaml").write_text(scale)
    (root / "configs" / "experiments" / "mine.yaml").write_text(experiment)
    config = load_experiment("mine", "gpu", {"data.held_out": 0.04})
    assert config.training_files == [root / "data" / "mine" / "my_data.json"]
    assert config.images_path == root / "my_images"
    assert config.experiment.train == load_experiment("finetune", "gpu").experiment.train


def test_projector_of_llava_1_5_trains(root: Path) -> None:
    record = launch(load_experiment("pretrain", "mini", {**ONE_STEP, "model.projector": "mlp2x_gelu"}))
    assert json.loads((record.checkpoint / "manifest.json").read_text())["projector"] == "mlp2x_gelu"
    assert record.summary["steps"] == 1


def test_projector_is_one_registered_builder(root: Path) -> None:
    @PROJECTORS.register("normed")
    def normed(d_vision: int, d_model: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(d_vision), nn.Linear(d_vision, d_model))

    record = launch(load_experiment("pretrain", "mini", {**ONE_STEP, "model.projector": "normed"}))
    assert record.summary["trainable_parameters"] == sum(p.numel() for p in normed(24, 32).parameters())


def test_template_is_one_registered_record(root: Path) -> None:
    TEMPLATES.register("short")(replace(TEMPLATES.get("v0"), name="short", system="Talk about the image."))
    record = launch(load_experiment("pretrain", "mini", {**ONE_STEP, "template": "short"}))
    assert json.loads((record.checkpoint / "manifest.json").read_text())["template"] == "short"


def test_ablation_is_one_file(root: Path) -> None:
    from companion.protocol import declared_ablations

    file = root / "configs" / "experiments" / "ablations" / "half_rate.yaml"
    file.write_text(
        "name: half_rate\nbase: science_qa\ntitle: Half the learning rate\ninit_from: null\n"
        "train: {learning_rate: 0.00001}\nablation: {name: rate, labels: [full, half]}\n"
        "sources: {train.learning_rate: a test}\n"
    )
    assert [arm.experiment for arm in declared_ablations()["rate"].arms.values()][1] == "half_rate"
    (root / "data" / "sqa").mkdir()
    (root / "data" / "sqa" / "images").symlink_to(root / "data" / "images")
    for split in ("train", "val"):
        records = (root / "data" / "it" / "llava_instruct.json").read_text()
        (root / "data" / "sqa" / f"llava_{split}_QCM-LEPA.json").write_text(records)
    record = launch(load_experiment("half_rate", "mini", ONE_STEP))
    assert record.config.experiment.train.learning_rate == 1e-5
    assert record.summary["steps"] == 1


def test_attention_backend_is_one_registered_record(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def mine(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object) -> torch.Tensor:
        calls.append(q.shape)
        return reference.attention(q, k, v, mask)

    BACKENDS.register("mine")(Backend("mine", mine))
    plain = launch(load_experiment("pretrain", "mini", ONE_STEP))
    monkeypatch.setattr(trainer, "packed_attention", lambda model: packed_attention(model, backend="mine"))
    other = launch(load_experiment("pretrain", "mini", {**ONE_STEP, "train.eps": 1.1e-8}))
    assert calls
    losses = [next(row["loss"] for row in run.metrics() if "loss" in row) for run in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
