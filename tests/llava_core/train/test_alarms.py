from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_root import make_training_root

from llava_core.config import RunConfig, load_experiment
from llava_core.runtime import ROOT, DataError
from llava_core.train.alarms import Alarms, find_non_finite, precision_warning, reference_band
from llava_core.train.dataset import load_samples
from llava_core.train.launch import launch
from llava_core.train.loader import RowInputs, StepBatch
from llava_core.train.preflight import Preflight
from llava_core.train.trainer import Trainer, TrainingError

SAMPLES = Preflight(np.full(1050, 100), np.arange(1050) % 21 + 10, [])  # 10 to 30 of 100 tokens are supervised
ROW = {"loss": 1.0, "grad_norm": 1.0}


def batch(share: float = 0.2, samples: int = 16, image: bool = True) -> StepBatch:
    rows: Any = [SimpleNamespace(images=torch.ones(1) if image else None)]
    return StepBatch(rows, round(share * 100 * samples), 100 * samples, samples)


def alarms(weights: dict[str, torch.Tensor] | None = None, name: str = "pretrain", first: int = 0) -> Alarms:
    watch = Alarms(load_experiment(name, "mini"), lambda: weights or {}, SAMPLES, 100, first)
    watch.band = {}
    return watch


@pytest.mark.parametrize(("dtype", "rate", "alarmed"), [
    (torch.float32, 2e-5, False), (torch.bfloat16, 2e-5, True), (torch.bfloat16, 2e-3, False),
])  # fmt: skip
def test_bf16_weights_that_do_not_move_are_noticed(dtype: torch.dtype, rate: float, alarmed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(300, 400, generator=generator)).to(dtype))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0)
    watch = alarms({"language_model.layers.0.weight": weight})
    messages = []
    for step in range(1, 25):
        weight.grad = torch.randn(300, 400, generator=generator).to(dtype)
        optimizer.step()
        messages += [(step, text) for text in watch.check(step, ROW, batch())]
    assert [step for step, _ in messages] == [20] * alarmed
    assert all("weights of language_model changed in 20 steps" in text for _, text in messages)


def test_frozen_part_is_noticed_after_a_resume_too() -> None:
    weights = {"multi_modal_projector.weight": torch.zeros(3), "language_model.weight": torch.zeros(70_000)}
    watch = alarms(weights, first=50)
    weights["multi_modal_projector.weight"] += 1
    assert watch.check(69, ROW, batch()) == []
    (message,) = watch.check(70, ROW, batch())
    assert "step 70: 0.0% of the weights of language_model changed" in message
    assert "train.trainable" in message
    assert "multi_modal_projector" not in message


def test_word_embeddings_and_empty_shards_are_not_judged() -> None:
    watch = alarms({"language_model.embed_tokens.weight": torch.zeros(9), "multi_modal_projector.x": torch.zeros(0)})
    assert watch.check(20, ROW, batch()) == []


@pytest.mark.parametrize(("share", "samples", "alarmed"), [
    (0.2, 16, False), (0.22, 16, False), (0.0, 16, True), (0.96, 16, True), (0.5, 16, True), (0.05, 16, True),
    (0.3, 4, False),
])  # fmt: skip
def test_supervised_share_is_compared_with_all_samples(share: float, samples: int, alarmed: bool) -> None:
    watch = alarms()
    found = watch.check(1, ROW, batch(share, samples))
    assert bool(found) == alarmed
    assert all("of all samples' 20.0%" in text and "label mask" in text for text in found)
    assert watch.check(2, ROW, batch(share, samples)) == []  # each alarm once


def test_zero_gradient_is_an_alarm_where_something_could_learn() -> None:
    row = {**ROW, "grad_norm": 0.0}
    watch = alarms()
    assert [bool(watch.check(k, row, batch(image=k > 4))) for k in range(1, 9)] == [False] * 6 + [True, False]
    watch = alarms()
    assert [bool(watch.check(k, row if k != 3 else ROW, batch())) for k in range(1, 7)] == [False] * 5 + [True]
    finetune = alarms(name="finetune")
    assert [bool(finetune.check(k, row, batch(image=False))) for k in range(1, 4)] == [False, False, True]


def test_non_finite_numbers_are_named() -> None:
    (message,) = alarms().check(3, {**ROW, "heldout_loss": math.nan}, batch())
    assert "step 3: heldout_loss not finite; fix: " in message


@pytest.mark.parametrize(("precision", "rate", "warned"), [
    ("pure_bf16", 2e-5, True), ("pure_bf16", 2e-3, False), ("mixed_bf16", 2e-5, False),
])  # fmt: skip
def test_pure_bf16_at_a_small_rate_is_warned_of(precision: str, rate: float, warned: bool) -> None:
    overrides = {"train.precision": precision, "train.learning_rate": rate}
    warning = precision_warning(load_experiment("finetune", "a100x8", overrides))
    assert (warning is not None) == warned
    if warning:
        assert "2e-05" in warning
        assert "train.precision=mixed_bf16" in warning
        watch = Alarms(load_experiment("finetune", "a100x8", overrides), dict, SAMPLES, 100)
        assert [watch.check(step, ROW, batch()) for step in (1, 2)] == [[f"step 1: {warning}"], []]


# ------------------------------------------------------------------------------------------------ the reference band


def write_band(workspace: Path, text: str) -> Path:
    real = (workspace / "configs").resolve()
    (workspace / "configs").unlink()
    (workspace / "configs").mkdir()
    for part in ("experiments", "scales"):
        (workspace / "configs" / part).symlink_to(real / part)
    path = workspace / "configs" / "reference_curves" / "pretrain.mini.csv"
    path.parent.mkdir()
    path.write_text("# how it was made\n" + text)
    return path


def losses_alarmed(losses: list[float], config: RunConfig, first: int = 0) -> list[int]:
    watch = Alarms(config, dict, SAMPLES, len(losses), first)
    steps = list(enumerate(losses, start=1))[first:]
    return [step for step, loss in steps if watch.check(step, {**ROW, "loss": loss}, batch())]


def test_loss_outside_the_reference_band_is_noticed(workspace: Path) -> None:
    write_band(workspace, "begin,end,low,high\n0,0.1,2.0,3.0\n0.1,1,0.9,1.1\n")
    config = load_experiment("pretrain", "mini", {"train.seed": 7})
    assert losses_alarmed([2.5] * 4 + [1.0] * 36, config) == []
    assert losses_alarmed([1.9] * 4 + [1.0] * 36, config) == [4]
    assert losses_alarmed([2.5] * 4 + [0.5, 1.5] * 18, config) == []  # the mean counts
    assert losses_alarmed([2.5] * 4 + [1.2] * 36, config) == [40]
    assert losses_alarmed([1.9] * 4 + [1.2] * 36, config, first=2) == [40]  # the first part was not seen whole
    other = load_experiment("pretrain", "mini", {"train.global_batch": 32})
    assert losses_alarmed([9.0] * 40, other) == []


def test_damaged_reference_band_is_named(workspace: Path) -> None:
    write_band(workspace, "begin,end,low\n0,1,x\n")
    with pytest.raises(DataError, match=r"reference_curves/pretrain\.mini\.csv: no table of begin,end,low,high"):
        reference_band(load_experiment("pretrain", "mini"), 10)


CURVES = sorted((ROOT / "configs" / "reference_curves").glob("*.csv"))


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.stem)
def test_reference_curves_cover_their_run(path: Path) -> None:
    band = reference_band(load_experiment(*path.stem.split(".")), 100)
    assert [first for first, *_ in band.values()] == [0, *band][:-1]
    assert [*band][-1] == 100
    assert all(0 < low < high for _, low, high in band.values())


# ------------------------------------------------------------------------------------------------ the failing sample


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_sample_with_a_non_finite_loss_or_gradient_is_found(poisoned: str) -> None:
    weight = torch.ones(1, requires_grad=True)

    def loss_of(index: int) -> torch.Tensor:
        calls.append(index)
        if index != 6:
            return (weight * index).sum()
        return (weight * math.nan).sum() if poisoned == "loss" else torch.sqrt(weight - 1).sum()

    def norm(loss: torch.Tensor) -> float:
        (gradient,) = torch.autograd.grad(loss, weight)
        return float(gradient.norm())

    calls: list[int] = []
    assert find_non_finite(loss_of, norm, [4, 5, 6, 7], 4) == [6]
    assert calls == [4, 5, 6, 7]
    assert find_non_finite(loss_of, norm, [5, 6], 4) == [6]  # once, although its pass is repeated
    assert find_non_finite(loss_of, norm, [], 2) == []
    assert len(calls) == 4 + 4 + 2


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_trainer_names_the_sample_that_is_not_finite(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, poisoned: str
) -> None:
    make_training_root(workspace)
    file = workspace / "data" / "cc" / "chat.json"
    records = json.loads(file.read_text())
    records[17]["conversations"][1]["value"] = "z"
    file.write_text(json.dumps(records, indent=1))
    row_loss = Trainer._row_loss

    def loss(self: Trainer, row: RowInputs) -> torch.Tensor:
        value, (mark,) = row_loss(self, row), self.loaded.tokenizer("z", add_special_tokens=False).input_ids
        if mark not in row.targets.tolist():
            return value
        return value * math.nan if poisoned == "loss" else value + torch.sqrt(value - value)

    monkeypatch.setattr(Trainer, "_row_loss", loss)
    values = {"train.max_length": 96, "train.global_batch": 8, "data.held_out": 0}
    samples, _ = load_samples(load_experiment("pretrain", "mini", values))
    line = samples[17].line
    with pytest.raises(TrainingError, match=rf"not finite by itself: sample 17 \(line {line}\); fix: "):
        launch(load_experiment("pretrain", "mini", values))
