from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from training_root import SCALE, make_training_root

from llava_core import config as configuration
from llava_core.config import load_experiment, load_scale
from llava_core.record import RunRecord
from llava_core.runtime import CheckpointError, ConfigError, DataError
from llava_core.train import identity
from llava_core.train import launch as launching
from llava_core.train import trainer as training
from llava_core.train.dataset import load_samples
from llava_core.train.optimizer import learning_rate
from llava_core.train.trainer import snapshot_steps


@pytest.fixture
def world(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root as `make_training_root` writes it."""
    make_training_root(workspace)
    (workspace / "llava_core").symlink_to(Path(launching.__file__).parents[1])
    return workspace


def _run(name="pretrain", **overrides) -> RunRecord:
    values = {"train.epochs": 2, "train.global_batch": 8, "train.max_length": 96, "train.learning_rate": 1e-3}
    return launching.launch(
        load_experiment(name, "mini", {**values, **{k.replace("__", "."): v for k, v in overrides.items()}})
    )


def test_stage_1_trains_only_the_projector(world: Path) -> None:
    record = _run(train__epochs=6, train__learning_rate=0.03)
    rows = [r for r in record.metrics() if "loss" in r]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert record.summary["steps"] == len(rows) == 6 * 3
    assert {"lr", "grad_norm", "tokens_per_s", "samples_per_s"} <= rows[0].keys()
    manifest = json.loads((record.checkpoint / "manifest.json").read_text())
    assert manifest["kind"] == "projector"
    assert record.metrics()[0]["trainable"] == ["multi_modal_projector"]


def test_stage_2_starts_from_stage_1_and_is_reused(world: Path) -> None:
    record = _run("finetune")
    assert {p.parent.parent.name for p in world.glob("runs/*/mini/*/summary.json")} == {"mini"}
    assert len(list(world.glob("runs/*/mini/*/summary.json"))) == 2  # pretrain was launched on the way
    assert json.loads((record.checkpoint / "manifest.json").read_text())["kind"] == "full"
    before = record.summary
    (record.path / "states").mkdir()  # as a kill after the summary leaves it
    assert _run("finetune").summary == before  # a finished record is returned without training
    assert not (record.path / "states").exists()


def test_snapshots_are_checkpoints_of_the_same_run(world: Path) -> None:
    record = _run("finetune", train__snapshots=3)
    steps = record.summary["steps"]
    assert [int(p.name) for p in sorted((record.path / "snapshots").iterdir())] == snapshot_steps(steps, 3)
    assert len(snapshot_steps(steps, 3)) == 2
    folders = [*sorted((record.path / "snapshots").iterdir()), record.checkpoint, _run("finetune").checkpoint]
    name = "multi_modal_projector.weight"
    early, middle, last, plain = (load_file(folder / "model.safetensors")[name] for folder in folders)
    assert not torch.equal(early, middle)
    assert not torch.equal(middle, last)
    assert torch.equal(last, plain)  # saving does not change the training


def test_micro_batches_do_not_change_the_run(world: Path) -> None:
    full = _run(train__seed=3)
    (world / "configs" / "scales" / "mini.yaml").write_text(SCALE.format(row_tokens=288))
    for folder in world.glob("runs/*"):
        folder.rename(world / "kept")
    parts = _run(train__seed=3)
    for a, b in zip(full.__class__(world / "kept" / "mini" / full.run_id).metrics(), parts.metrics(), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_out_of_memory_enables_activation_checkpointing(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = _run("finetune", train__seed=4)
    for folder in world.glob("runs/finetune"):
        folder.rename(world / "kept")
    real, failed = training.Trainer._row_loss, []

    def loss(self, row):
        summed = real(self, row)
        if self.step == 2 and summed.requires_grad and not failed:
            summed.backward(retain_graph=True)  # gradients of an incomplete pass
            failed.append(self.model.language_model.is_gradient_checkpointing)
            raise torch.OutOfMemoryError("simulated")
        return summed

    monkeypatch.setattr(training.Trainer, "_row_loss", loss)
    record = _run("finetune", train__seed=4)
    assert failed == [False]
    assert "out of memory" in capsys.readouterr().err
    assert [r["step"] for r in record.metrics() if r.get("activation_checkpointing")] == [2]
    losses, expected = ([r["loss"] for r in run.metrics() if "loss" in r] for run in (
        record, undisturbed.__class__(world / "kept" / "mini" / undisturbed.run_id)))  # fmt: skip
    assert losses == pytest.approx(expected, rel=1e-5)

    def always(self, row):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(training.Trainer, "_row_loss", always)
    monkeypatch.setattr(training.Trainer, "heldout_loss", lambda self: 0.0)
    with pytest.raises(
        training.TrainingError, match=r"no memory for a row of up to 768 tokens and its images.*row_tokens"
    ):
        _run("finetune", train__seed=9)


def test_killed_run_resumes_bitwise(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = _run(train__seed=5)
    numbers = [(r["step"], r["loss"]) for r in undisturbed.metrics() if "loss" in r]
    for folder in world.glob("runs/*"):
        folder.rename(world / "kept")
    original = training.Trainer._train_step

    def dies(self, items):
        if self.step == 5:
            raise KeyboardInterrupt
        return original(self, items)

    monkeypatch.setattr(training.Trainer, "_train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        _run(train__seed=5)
    monkeypatch.setattr(training.Trainer, "_train_step", original)
    resumed = _run(train__seed=5)  # bitwise: the same batches in the same order on one thread
    assert [(r["step"], r["loss"]) for r in resumed.metrics() if "loss" in r] == numbers
    assert (
        resumed.summary["heldout_loss"] == RunRecord(world / "kept" / "mini" / resumed.run_id).summary["heldout_loss"]
    )
    assert not (resumed.path / "state.pt").exists()


def test_bad_data_is_an_error_before_the_first_step(world: Path) -> None:
    image = world / "data" / "images" / "3.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match=r"3\.png"):
        _run()
    (world / "data" / "cc" / "chat.json").unlink()
    with pytest.raises(DataError, match=r"chat\.json"):
        _run()


def test_offline_scale_asks_no_hub_though_the_libraries_were_imported_before(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local: list[bool] = []

    def snapshot(source: str, local_files_only: bool, **_: object) -> str:
        local.append(local_files_only)
        raise LocalEntryNotFoundError(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # read when it was imported
    models = load_scale("mini").models | {"vicuna-13b": "someone/llm"}
    with pytest.raises(CheckpointError, match=r"someone/llm: .*not in the cache"):
        _run(scale__models=models)
    assert local == [True]


def test_changed_kernel_changes_the_run_id(tmp_path: Path) -> None:
    package = tmp_path / "llava_core"
    shutil.copytree(Path(launching.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    before = identity.code_fingerprint(package)
    assert before == identity.code_fingerprint()
    assert all((package / name).is_file() for name in identity.NOT_TRAINING)
    for name in (*identity.NOT_TRAINING, "chat.py"):
        (package / name).write_text("")
    assert identity.code_fingerprint(package) == before
    seen = {before}
    for name in ("ops/triton_attention.py", "models/llava.py", "data/packing.py", "train/loader.py"):
        (package / name).write_text((package / name).read_text() + "x = 1\n")
        seen.add(identity.code_fingerprint(package))
    (package / "ops" / "new.py").write_text("")
    assert len(seen | {identity.code_fingerprint(package)}) == 6


def test_comments_and_docstrings_do_not_change_a_run() -> None:
    source = '"""Old."""\n\ndef f(x):\n    """Old\n    text."""\n    # old\n    return x\n'
    other = '"""New."""\n\n\ndef f(x):\n    return x\n'
    assert identity._code_lines(source) == identity._code_lines(other) == ["def f(x):", "    return x"]
    assert identity._code_lines(source.replace("return x", "return -x")) != identity._code_lines(source)


def test_registered_projector_trains(world: Path) -> None:
    record = _run("finetune", model__projector="mlp2x_gelu", data__limit=16)
    names = {name for file in record.checkpoint.glob("*.safetensors") for name in load_file(file)}
    assert {n.partition(".")[2] for n in names if "projector" in n} == {"0.bias", "0.weight", "2.bias", "2.weight"}
    with pytest.raises(ConfigError, match="unknown projector 'mlp3x'; did you mean 'mlp2x_gelu'"):
        _run(model__projector="mlp3x")


def test_validation_file_replaces_the_held_out_share(world: Path) -> None:
    config = load_experiment("pretrain", "mini")
    train, held_out = load_samples(config)
    assert ([s.id for s in held_out], len(train)) == (["0", "25"], 24)
    records = json.loads((world / "data" / "cc" / "chat.json").read_text())
    (world / "data" / "cc" / "val_A.json").write_text(json.dumps(records[3:9]))
    named = {"data.validation_file": "val_{prompt_format}.json", "data.prompt_format": "A"}
    train, held_out = load_samples(load_experiment("pretrain", "mini", named))
    assert ([s.id for s in held_out], len(train)) == (["3", "4", "6", "7"], 26)
    named["data.prompt_format"] = "B"
    with pytest.raises(
        DataError, match=r"val_B\.json: not found; fix: run notebook 10_cc3m_filtering \(`llava filter`"
    ):
        load_samples(load_experiment("pretrain", "mini", named))


def test_learning_rate_schedule() -> None:
    config = load_experiment("finetune", "a100x8").experiment.train
    rates = [learning_rate(k, 1000, config) for k in range(1001)]
    assert rates[0] == pytest.approx(config.learning_rate / 30)
    assert max(rates) == rates[29] == pytest.approx(config.learning_rate)
    assert rates[515] == pytest.approx(config.learning_rate / 2, rel=0.01)
    assert rates[1000] == pytest.approx(0, abs=1e-12)


def test_training_root_uses_its_own_configuration(world: Path) -> None:
    assert configuration.load_scale("mini").row_tokens == 768
    assert torch.get_num_threads() >= 1
