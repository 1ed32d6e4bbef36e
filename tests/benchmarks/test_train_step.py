"""The training step against transformers: the same function, with every saving on or off."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch

from benchmarks import train_step as bench
from benchmarks.train_step import ALL, PEER, SAVINGS, Case, PackedStep, TransformersStep, difference
from llava_core.checkpoints.load import build
from llava_core.data.conversation import TEMPLATES
from llava_core.runtime import ConfigError

QUESTIONS = ("what color is the car", "what color is the dog ? A red car", "is the dog blue")


def case(folder: Path, stage: int) -> Case:
    """A tiny model and four samples of three images, one with its image after the question, and one of text only."""
    loaded = build(*tiny.base_models(folder), torch.float32)
    loaded.model.set_trainable(bench.PARTS[stage])
    template, n = TEMPLATES.get("v0"), loaded.model.n_image_tokens
    turns = [f"<image>\n{question}" for question in QUESTIONS] + [f"{QUESTIONS[0]}\n<image>", QUESTIONS[1]]
    items = [template.encode([(turn, "blue and red")], loaded.tokenizer, n) for turn in turns]
    keys = ["a", "a", "b", "c", None]
    draw = torch.Generator().manual_seed(0)
    pixels = {
        key: torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8, generator=draw).numpy() for key in ("a", "b", "c")
    }
    return Case(loaded.model, items, keys, pixels, loaded.processor.normalise, stage)


@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize("stage", [1, 2])
def test_every_saving_keeps_loss_and_gradients(tmp_path: Path, stage: int, saving: str) -> None:
    result = difference(case(tmp_path, stage), saving)
    assert result["loss"] < 1e-5
    assert result["gradient"] < 1e-4


@pytest.mark.parametrize(("samples", "padding"), [(8, 1.5), (16, 1.7)])
def test_stage_2_samples_have_the_stated_lengths(samples: int, padding: float) -> None:
    rng, n_image = random.Random(1), 196
    fixed = bench.SYSTEM_TOKENS + n_image
    drawn = [[fixed + sum(map(sum, bench._turns(rng, 2))) for _ in range(samples)] for _ in range(2000)]
    tokens = sum(map(sum, drawn))
    assert tokens / (2000 * samples) - fixed == pytest.approx(110, abs=4)
    assert samples * sum(map(max, drawn)) / tokens == pytest.approx(padding, abs=0.05)
    chosen = [len(item.input_ids) for item in bench._typical(2, samples, n_image)]
    assert samples * max(chosen) / sum(chosen) == pytest.approx(padding, abs=0.06)


def test_loss_curves_of_both_sides_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench._settings()
    monkeypatch.setattr(bench, "_settings", lambda: real.model_copy(update={"learning_rate": 1e-3}))
    result = case(tmp_path, 2)
    peer, ours = TransformersStep(result), PackedStep(result)
    curves = [[side.step() for _ in range(8)] for side in (peer, ours)]
    assert curves[0][-1] < 0.95 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_peer_with_another_feature_layer_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, real = case(tmp_path, 1), TransformersStep.__init__

    def another(self: TransformersStep, case: Case) -> None:
        real(self, case)
        self.model.model.config.vision_feature_layer = -1

    monkeypatch.setattr(TransformersStep, "__init__", another)
    assert difference(result)["gradient"] > 1e-3


def test_samples_and_tokens_are_counted(tmp_path: Path) -> None:
    one, two = case(tmp_path / "one", 1), case(tmp_path / "two", 2)
    assert bench.tokens(two, "samples") > bench.tokens(two, "packed") > bench.tokens(two, "shared")
    assert 0 < bench.step_flops(PackedStep(one)) < bench.step_flops(PackedStep(two))
    assert bench.step_flops(PackedStep(two)) < bench.step_flops(PackedStep(two, "packed"))
    assert two.padding > 1


def test_each_saving_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "make_case", lambda *_, **__: case(tmp_path, 2))
    rows = bench.bench_train_step("mini", 2, rounds=1, savings=("packed", ALL), memory=False)["cases"]
    assert [row["case"] for row in rows] == ["packed", ALL]
    for row in rows:
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert float(row["loss_difference"]) < 1e-5
        assert {"model", "stage", "ours", "peer", "ratio", "peak_ratio", "loss_difference", "device"} < set(row)


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model '8b'; choose one of mini, 60m, 135m, 7b"):
        bench.make_case("8b", 1)
    with pytest.raises(ConfigError, match="50 image tokens are no square of patches"):
        bench.make_case("60m", 1, image_tokens=50)
    with pytest.raises(ConfigError, match="no saving 'pack'; choose one of head, features, packed, shared"):
        PackedStep(case(tmp_path, 1), "pack")
    assert PEER not in SAVINGS
