"""Every engine gives the run of one process: losses, gradient norms, weights and moments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_rank
from training_root import make_training_root

from llava_core.config import RunConfig, load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import ROOT
from llava_core.train import engine as engine_module
from llava_core.train.engine import model_flops, start
from llava_core.train.processes import free_port

CASES = ("stage_1", "stage_2", "lora")
SETTINGS = {
    "train.epochs": 4, "train.global_batch": 8, "train.max_length": 96, "train.learning_rate": 1e-3,
    "data.held_out": 2,
}  # fmt: skip


def configured(case: str, **overrides: Any) -> RunConfig:
    """A run of 12 steps that starts from a fresh projector."""
    values = {**SETTINGS, **({"train.adapters": {"r": 4, "alpha": 8}} if case == "lora" else {}), **overrides}
    run = load_experiment("pretrain" if case == "stage_1" else "finetune", "mini", values)
    return run.model_copy(update={"experiment": run.experiment.model_copy(update={"init_from": None})})


def train(root: Path, folder: str, runs: dict[str, RunConfig], ranks: int, **environment: str) -> Path:
    """Train runs one after the other in `ranks` processes; returns the folder of their records and states."""
    out = root / folder
    for name, run in runs.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        run.write(out / name / "config.yaml")
    port = str(free_port())
    shared = os.environ | environment | {
        "OMP_NUM_THREADS": "1", "LLAVA_ROOT": str(root),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja
    }  # fmt: skip
    command = [sys.executable, training_rank.__file__, str(out), *(str(out / name) for name in runs)]
    processes = []
    for rank in range(ranks):
        one = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        processes.append(subprocess.Popen(command, env=shared | one, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(e[-1500:] for e in errors)
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("world")
    (root / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_core.runtime.ROOT", root)
        make_training_root(root)
        yield root


@pytest.fixture(scope="module")
def one_process(world: Path) -> Path:
    return train(world, "one", {case: configured(case) for case in CASES}, ranks=1)


def assert_equal_runs(one: Path, other: Path, case: str) -> None:
    rows = [[r for r in RunRecord(folder / case).metrics() if "loss" in r] for folder in (one, other)]
    assert len(rows[0]) == len(rows[1]) == 12
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    held_out = [[r["heldout_loss"] for r in RunRecord(f / case).metrics() if "heldout_loss" in r] for f in (one, other)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    states = [torch.load(folder / f"{case}.pt")["state"] for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))


def parallel(kind: str, processes: int) -> dict[str, Any]:
    return {"scale.parallel.kind": kind, "scale.parallel.processes": processes}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_ranks_equal_one_process(world: Path, one_process: Path, kind: str) -> None:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    runs = {case: configured(case, **parallel(kind, 2)) for case in CASES}
    two = train(world, kind, runs, ranks=2)
    for case in CASES:
        assert_equal_runs(one_process, two, case)


def test_four_micro_steps_equal_one(world: Path, one_process: Path) -> None:
    runs = {case: configured(case, **{"scale.row_tokens": 96}) for case in CASES}
    rows = train(world, "rows", runs, ranks=1)
    for case in CASES:
        assert_equal_runs(one_process, rows, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_random_schedules_do_not_hang(world: Path, kind: str) -> None:
    """50 steps with unequal samples, rows and supervised tokens, often with one rank of text only or nothing."""
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folders = [world / f"{kind}-schedules-{ranks}" for ranks in (1, 2)]
    for ranks, folder in enumerate(folders, start=1):
        run = configured("stage_2", **(parallel(kind, 2) if ranks == 2 else {}))
        train(world, folder.name, {"stage_2": run}, ranks, SCHEDULES="50")
    one, two = (torch.load(folder / "stage_2.pt")["schedules"] for folder in folders)
    assert len(one) == 50
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["none fsdp2", "none zero2", "none zero3", "zero3 none"])
def test_state_continues_under_another_engine(world: Path, one_process: Path, kinds: str) -> None:
    first, second = kinds.split()
    if "zero" in kinds:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folders = []
    for kind, stop in ((first, {"STOP": "5"}), (second, {})):
        ranks = 1 if kind == "none" else 2
        run = configured("stage_2", **(parallel(kind, 2) if ranks == 2 else {}))
        folder = world / f"{first}-{second}-{kind}"
        if folders:  # the state and the rows of the first five steps
            shutil.copytree(folders[0], folder)
        folders.append(train(world, folder.name, {"stage_2": run}, ranks, **stop))
    assert not (folders[0] / "stage_2.pt").exists()
    assert_equal_runs(one_process, folders[1], "stage_2")


def test_each_rank_takes_its_own_gpu(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: calls.append(backend))
    gpu = {"scale.device": "cuda", "train.precision": "mixed_bf16"}
    assert start(configured("stage_2", **parallel("fsdp2", 8), **gpu)) == torch.device("cuda", 3)
    assert calls == [torch.device("cuda", 3), "high", "cpu:gloo,cuda:nccl"]  # TF32; the device before the group


def test_model_flops_count_trained_weights_once_more() -> None:
    shapes = {"multi_modal_projector.weight": (9, 9), "language_model.embed_tokens.weight": (8, 4)}
    engine = SimpleNamespace(shapes={**shapes, "language_model.w": (10, 100)}, world=2, device=torch.device("cpu"))
    engine.trainable = {}
    assert model_flops(engine, 1e9) == {"tflops": pytest.approx(4 * 1000 * 1e9 / 2 / 1e12)}
    engine.trainable = {"language_model.w": None}
    assert model_flops(engine, 1e9) == {"tflops": pytest.approx(6 * 1000 * 1e9 / 2 / 1e12)}


def test_peak_of_a_gpu_follows_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(shapes={"language_model.w": (1000,)}, world=1, device=torch.device("cuda"), trainable={})
    peaks = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989}
    for name, peak in {**peaks, "NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 4090 Laptop GPU": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        rate = model_flops(engine, 1e9)
        assert rate.get("mfu") == (None if peak is None else pytest.approx(rate["tflops"] / peak))


def test_packed_4_bit_weights_count_with_their_own_shape() -> None:
    packed = SimpleNamespace(shape=(500, 1), quant_state=SimpleNamespace(shape=torch.Size((100, 20))))
    assert engine_module._shape(packed) == (100, 20)
    assert engine_module._shape(torch.zeros(3, 4)) == (3, 4)
