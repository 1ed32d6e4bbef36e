from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_root import make_training_root

from benchmarks.memory import make_run
from companion import cli, planner, training_memory
from companion.planner import GIB, plan_train
from llava_core.config import load_experiment
from llava_core.ops.transformers_backend import packed_attention
from llava_core.runtime import CompanionError, ConfigError, DataError
from llava_core.train.engine import PEAK_TFLOPS

SEVEN = {"model.language_model": "vicuna-7b"}


def _plan(name: str, scale: str = "a100x8", values: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return plan_train(load_experiment(name, scale, values), **changes)


def _fixed(name: str, kind: str = "fsdp2", ranks: int = 8, **values: Any) -> dict[str, float]:
    values = {"scale.parallel.kind": kind, "scale.parallel.processes": ranks, **values}
    config = load_experiment(name, "a100x8", values)
    fixed = training_memory.fixed_bytes(training_memory.setting_of(config), kind, ranks, config.scale.parallel.offload)
    return {part: size / GIB for part, size in fixed.items()}


@pytest.mark.parametrize(
    ("values", "ranks", "weights"), [(SEVEN, 8, 3.14), ({}, 8, 6.06), ({}, 4, 12.13)], ids=["7B", "13B", "13B on 4"]
)
def test_sharded_bytes_per_gpu(values: dict[str, Any], ranks: int, weights: float) -> None:
    fixed = _fixed("finetune", ranks=ranks, **values)
    assert fixed["weights"] == pytest.approx(weights, abs=0.01)
    assert fixed["gradients"] == fixed["weights"]  # both fp32
    assert fixed["optimizer"] == 2 * fixed["weights"]
    assert not torch.distributed.is_initialized()


def test_bytes_of_other_engines() -> None:
    whole, ranks = 13.02e9 / GIB, 8
    assert _fixed("finetune", "ddp", **{"train.precision": "float32"})["weights"] == pytest.approx(4 * whole, rel=1e-2)
    assert _fixed("finetune", "zero2")["weights"] == pytest.approx(whole * (2 + 4 / ranks), rel=1e-2)
    assert _fixed("finetune", "zero3")["weights"] == pytest.approx(whole * (2 + 4) / ranks, rel=1e-2)
    assert _fixed("pretrain")["frozen"] == pytest.approx(2 * whole / ranks, rel=1e-2)
    offloaded = _fixed("finetune", **{"scale.parallel.offload": True})
    assert offloaded["weights"] == offloaded["optimizer"] == 0
    assert offloaded["offloaded"] == pytest.approx(16 * whole / ranks, rel=1e-2)


def test_counted_bytes_are_those_of_a_real_row(tmp_path: Path) -> None:
    """On the CPU the same counter sees the tensors of the trainer's own packed row and attention."""
    from llava_core.train.dataset import TrainingSet, build_model, load_samples
    from llava_core.train.loader import Loader

    config = make_run(tmp_path, 128, 1024, stage=2, recompute=False)
    loaded = build_model(config, None)
    model = loaded.model
    train_set = TrainingSet(load_samples(config)[0], loaded.tokenizer, loaded.processor, config, model.n_image_tokens)
    row = Loader(train_set, 1024).batch(range(24)).rows[0]
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    features = torch.zeros(len(row.image_index), model.n_image_tokens, model.vision_tower.config.hidden_size)
    inputs = (row.input_ids, row.position_ids, row.packed_mask, row.logit_positions, row.targets, features)
    with packed_attention(model.language_model), training_memory.LiveBytes() as live:
        model.packed_loss(*inputs).backward()
    tokens = row.input_ids.shape[1]
    data = planner._data(config, None)
    planned = planner._memory(config, data._replace(supervised=len(row.targets) / tokens), False, tokens)["activations"]
    assert planned * GIB == pytest.approx(live.peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_planned_memory_is_the_measured_peak(recompute: bool) -> None:
    from benchmarks.memory import bench_memory

    (case,) = bench_memory(widths=(256,), row_tokens=1536, recompute=recompute)["cases"]
    assert 0.85 < case["ratio"] < 1.15


def test_largest_row_fits_and_a_longer_one_does_not() -> None:
    config = load_experiment("pretrain", "gpu")
    plan = plan_train(config, gpu="RTX-4090")
    assert plan["fits"]
    assert plan["activation_checkpointing"]  # auto: without it the row does not fit
    again = planner._changed(config, {"scale.activation_checkpointing": "always"})
    largest, unit, data = plan["largest_row_tokens"], config.experiment.train.max_length, planner._data(config, None)
    here, beyond = (planner._total(planner._memory(again, data, True, n)) for n in (largest, largest + 2 * unit))
    assert here <= plan["limit_gib"] < beyond


def test_hours_of_the_paper_are_upper_bounds() -> None:
    for name, hours in {"pretrain": 4, "finetune": 10, "science_qa": 4}.items():
        plan = _plan(name)
        assert plan["hours_least"] < plan["hours"] < 1.02 * hours
        assert plan["usd"] == pytest.approx(8 * plan["hours"] * planner.FACTS["gpus"]["A100-80"]["usd"])
    assert plan["hours"] > 0.5 * hours
    assert _plan("pretrain", price=10.0)["usd"] == pytest.approx(80 * _plan("pretrain")["hours"])
    assert _plan("pretrain", samples=1000)["flops"] < 0.01 * _plan("pretrain")["flops"]


def test_frozen_parts_cost_less(workspace: Path) -> None:
    pytest.importorskip("peft", reason="adapters are peft's")
    make_training_root(workspace)
    adapters = {"full": None, "lora": {"r": 4, "alpha": 8}, "qlora": {"r": 4, "alpha": 8, "bits": 4}}
    plans = {name: _plan("finetune", "mini", {"train.adapters": adapter}) for name, adapter in adapters.items()}
    stage_1 = _plan("pretrain", "mini", samples=plans["full"]["samples"])
    frozen = {name: plan["parts_gib"]["frozen"] for name, plan in plans.items()}
    assert frozen["lora"] > 1.5 * frozen["qlora"] > frozen["full"] == 0
    assert plans["full"]["flops"] / 3 > plans["lora"]["flops"] / 3 > stage_1["flops"]
    assert plans["full"]["state_gib"] > 3 * plans["lora"]["state_gib"] > stage_1["state_gib"]


def test_run_that_cannot_fit_is_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_training_root(workspace)
    monkeypatch.setitem(planner.FACTS["gpus"], "small", {"memory_gib": 0.5, "tflops": 1, "usd": 1})
    assert cli.main(["plan", "train", "pretrain"]) == 0
    assert cli.main(["plan", "train", "pretrain", "--gpu", "small", "--json"]) == 1
    assert '"would_fit": []' in capsys.readouterr().out


@pytest.mark.slow
def test_refused_run_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="adapters are peft's")
    words = ["plan", "train", "finetune", "--scale", "a100x8"]
    assert cli.main([*words, "--json"]) == 0
    assert {"memory_gib", "hours", "usd"} <= json.loads(capsys.readouterr().out).keys()
    assert cli.main([*words, "--engine", "ddp", "--gpus", "4", "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    changes = [option["set"] for option in plan["would_fit"]]
    assert {"scale.parallel.kind": "fsdp2"} in changes
    assert any("train.adapters" in change for change in changes)
    assert all(option["memory_gib"] <= plan["limit_gib"] < plan["memory_gib"] for option in plan["would_fit"])
    text = planner.plan_text(plan)
    assert "--set scale.parallel.kind=fsdp2" in text
    (line,) = (line for line in text.splitlines() if "adapters" in line and "bits" not in line and "7b" not in line)
    options = shlex.split(line)[2:]
    parsed = dict(cli._parser().parse_args([*words, *options]).set)
    assert planner._changed(load_experiment("finetune", "a100x8"), parsed).experiment.train.adapters is not None


def test_data_on_this_machine_is_measured(workspace: Path) -> None:
    make_training_root(workspace)
    config = load_experiment("finetune", "mini", {"train.global_batch": 8, "train.max_length": 96})
    plan = plan_train(config)
    assert plan["samples"] == 24  # of 26, two are held out
    assert plan["assumed"]["tokens"].endswith(", measured")
    assert plan["row_tokens"] < 8 * 96
    assert plan["steps"] == 3 * math.ceil(24 / 8)
    record = planner.RunRecord(workspace / "runs/finetune/mini/abc")
    config.write(record.path / "config.yaml")
    record.finish({"tokens_per_s": 100.0})
    plan = plan_train(config)
    assert plan["hours"] == plan["hours_least"] == pytest.approx(plan["tokens"] / 100 / 3600, rel=1e-3)


def test_impossible_plans_are_named(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown GPU 'A100'.*A100-80"):
        _plan("finetune", gpu="A100")
    with pytest.raises(ConfigError, match="which 3 ranks cannot share"):
        _plan("finetune", gpus=3)
    with pytest.raises(DataError, match=r"llava_instruct\.json: not found"):
        _plan("finetune", "mini")
    config = load_experiment("pretrain", "a100x8")
    config.scale.models["vicuna-13b"] = "models/none"
    with pytest.raises(CompanionError, match=r"none.*config\.json"):
        plan_train(config)


def test_gpu_of_this_machine_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=30 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: device)
    plan = _plan("pretrain")
    assert (plan["gpu"], plan["limit_gib"], plan["fits"]) == (device.name, 30, True)
    assert plan["usd"] == pytest.approx(8 * plan["hours"] * planner.FACTS["gpus"]["A100-40"]["usd"])


def test_every_gpu_has_memory_speed_and_price() -> None:
    for facts in planner.FACTS["gpus"].values():
        assert facts.keys() == {"memory_gib", "tflops", "usd"}
    assert planner.FACTS["default_gpu"] in planner.FACTS["gpus"]
    assert planner.FACTS["models"].keys() == {"vicuna-7b", "vicuna-13b", "clip-vit-large-patch14"}


def test_peaks_of_gpus_are_those_of_the_trainer() -> None:
    compared = 0
    for name, gpu in planner.FACTS["gpus"].items():
        known = [peak for pattern, peak in PEAK_TFLOPS.items() if re.search(pattern, name.replace("-", " "))]
        compared += len(known)
        assert set(known) <= {gpu["tflops"]}, name
    assert compared >= 6
