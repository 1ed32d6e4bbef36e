from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from training_root import make_training_root

from companion import cli, train_preview
from companion.train_preview import dry_run, slurm_script
from llava_core.checkpoints import base_models
from llava_core.config import load_experiment
from llava_core.runtime import CheckpointError, ConfigError

PLAN: dict[str, Any] = {
    "memory_gib": 30.0, "limit_gib": 79.0, "fits": True,
    "disk_gib": {"features": 1.0, "saved states": 0.0, "checkpoint": 0.0},
}  # fmt: skip


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the planner's answer."""
    answer = {**PLAN, "disk_gib": dict(PLAN["disk_gib"])}
    monkeypatch.setattr(train_preview, "_plan", lambda config: (answer, None))
    return answer


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs and without copies of models of the hub."""

    def absent(source: str) -> Path:
        raise CheckpointError("not here")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(base_models, "model_folder", absent)


def whats(result: dict[str, Any]) -> str:
    return "\n".join(item["what"] for item in result["missing"])


def test_run_at_the_papers_scale_on_a_laptop(plan: dict[str, Any], no_gpu: None, workspace: Path) -> None:
    result = dry_run(load_experiment("finetune", "a100x8"))
    assert [run["run"] for run in result["runs"]] == ["pretrain at a100x8", "finetune at a100x8"]
    assert "8 GPUs; PyTorch sees 0" in whats(result)
    assert "data/LLaVA-Instruct-150K/llava_instruct.json" in whats(result)
    assert result["runs"][1]["batch"] == {
        "global_batch": 32, "ranks": 8, "samples_per_rank": 4, "row_tokens": 8192,
    }  # fmt: skip
    assert result["runs"][1]["models"]["vicuna-13b"] == {
        "source": "lmsys/vicuna-13b-v1.3", "state": "to be downloaded",
    }  # fmt: skip
    fields = {row["field"]: row for row in result["runs"][1]["fields"]}
    assert fields["train.learning_rate"] == {
        "field": "train.learning_rate", "value": 2e-5, "source": "paper App. C",
    }  # fmt: skip


def test_complete_run_misses_nothing_and_writes_nothing(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_training_root(workspace)
    monkeypatch.setattr(train_preview, "_plan", lambda config: (None, "no plan: a reason"))
    monkeypatch.setattr("llava_core.checkpoints.load.build", None)  # no weights
    before = sorted(workspace.rglob("*"))
    assert cli.main(["train", "finetune", "--dry-run", "--set", "train.seed=5"]) == 0
    text = capsys.readouterr().out
    assert "nothing is missing" in text
    assert "no plan: a reason" in text
    assert "not the paper's 42: set by the caller" in text
    assert sorted(workspace.rglob("*")) == before
    (workspace / "data" / "it" / "llava_instruct.json").unlink()
    assert cli.main(["train", "finetune", "--dry-run", "--json"]) == 1
    (missing,) = json.loads(capsys.readouterr().out)["missing"]
    assert missing["what"] == "data/it/llava_instruct.json"
    assert "`llava generate`" in missing["fix"]


def test_each_missing_thing_is_named(plan: dict[str, Any], workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_training_root(workspace)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plan["fits"], plan["disk_gib"]["saved states"] = False, 1e9
    (workspace / "models" / "clip").rename(workspace / "models" / "elsewhere")
    adapters = {"train.adapters": {"r": 4, "alpha": 8, "bits": 4}, "scale.trackers": ["wandb"]}
    result = dry_run(load_experiment("finetune", "mini", {"scale.parallel.kind": "zero3", **adapters}))
    for text in (
        "the package deepspeed", "the package peft", "the package bitsandbytes", "the package wandb",
        "clip-vit-large-patch14: models/clip", "memory: 30 GiB per process of 79", "GiB on disk; ",
    ):  # fmt: skip
        assert text in whats(result)


def test_gpus_that_are_too_small_are_named(
    plan: dict[str, Any], no_gpu: None, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    small = type("Properties", (), {"total_memory": 24 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: small)
    assert "30 GiB per GPU; the smallest here has 24" in whats(dry_run(load_experiment("pretrain", "a100x8")))


def test_slurm_script_runs_the_same_configuration(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "finetune", "--scale", "a100x8", "--set", "scale.parallel.nodes=2", "--set", "train.seed=1"]
    assert cli.main([*words, "--set", "train.adapters={r: 8, alpha: 16}", "--fast", "--slurm"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    lines = script.splitlines()
    for option in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@600", "--requeue"):
        assert f"#SBATCH {option}" in lines
    (line,) = [line for line in lines if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1" in line
    stub = 'srun() { printf "%s\\n" "$@"; }\n' + line
    given = subprocess.run(["bash", "-c", stub], capture_output=True, text=True, check=True).stdout.splitlines()
    args = cli._parser().parse_args(given[given.index("llava") + 1 :])
    assert (args.experiment, args.scale, args.fast, args.slurm) == ("finetune", "a100x8", True, False)
    assert dict(args.set) == {
        "scale.parallel.nodes": 2, "train.seed": 1, "train.adapters": {"r": 8, "alpha": 16},
    }  # fmt: skip


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_script_requeues_a_stopped_run_only(workspace: Path, code: int) -> None:
    stubs = f'srun() {{ return {code}; }}\nscontrol() {{ echo "scontrol $1"; }}\nSLURM_JOB_ID=7 SLURM_JOB_NODELIST=a\n'
    script = stubs + slurm_script(load_experiment("pretrain", "mini"), {})
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert ("scontrol requeue" in ended.stdout) == (code == 75)


def test_slurm_script_needs_a_number_of_gpus(workspace: Path, no_gpu: None) -> None:
    config = load_experiment("pretrain", "a100x8", {"scale.parallel.processes": "gpus"})
    with pytest.raises(ConfigError, match="set it to a number"):
        slurm_script(config, {})
