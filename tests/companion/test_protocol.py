"""The plan of the ablations is complete, strict, and hashed by what it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from companion.protocol import load_protocol
from llava_core import runtime
from llava_core.runtime import ConfigError

ADDED = """
name: half_rate
base: science_qa
title: ScienceQA at half the learning rate
train: {learning_rate: 1.0e-5}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with a copy of the project's configs."""
    shutil.copytree(runtime.ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    return tmp_path


def edit(root: Path, old: str, new: str) -> None:
    path = root / "configs" / "protocol.yaml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_shipped_plan_is_complete() -> None:
    protocol = load_protocol()
    assert len(protocol.seeds) >= 5
    assert all(plan.questions and plan.margin and plan.seeds for plan in protocol.ablations.values())
    assert list(protocol.ablations["cot_order"].arms) == ["reasons first", "answer first"]
    assert "cot_order: learning speed" in protocol.family
    assert "pretraining: without stage 1, steps matched" not in protocol.family
    assert not [name for name in protocol.family if name.startswith("pretraining: with stage 1")]


def test_hash_is_of_the_content_and_of_one_ablation(root: Path) -> None:
    def hashes() -> dict[str, str]:
        protocol = load_protocol()
        return {name: protocol.protocol_hash(name) for name in protocol.ablations}

    before = hashes()
    edit(root, "tuning_seed: 100 ", "tuning_seed: 100   # a comment\n#")
    assert hashes() == before
    edit(root, "speed: {target: ", "speed: {target: 1")
    after = hashes()
    assert [name for name in before if after[name] != before[name]] == ["cot_order"]
    edit(root, "margin: 2.5 ", "margin: 3.5 ")
    assert not set(hashes().items()) & set(after.items())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("margin: 2.5 ", "margn: 2.5 ", "protocol.yaml: unknown key 'margn'; did you mean 'margin'"),
        (
            "control_subset: no image",
            "control_subset: no images",
            "protocol.yaml: ablations.pretraining.control_subset",
        ),
        ("unit: base model ", "units: base model ", "protocol.yaml: unknown key"),
        ("{experiment: pretrain,", "{experiment: pretran,", "instruction_data.none: unknown experiment 'pretran'"),
        ("set: {model.projector:", "set: {model.projektor:", r"MLP projector.set: unknown key 'model.projektor'"),
        ("claim: change-none", "claim: change-non", "unknown claim 'change-non'; did you mean 'change-none'"),
        ("claim: cot-convergence", "claim: cot-converge", "cot_order.speed: unknown claim"),
        ("    bench: bench-coco-all\n", "", "`quantity: relative score` and `bench` belong together"),
        ("tuning_seed: 100 ", "tuning_seed: 42 ", "tuning_seed 42 is one of seeds"),
        ("  feature_layer: {}", "  feature_layers: {}", "ablations.feature_layers: needs `arms`"),
    ],
)
def test_wrong_plan_is_refused(root: Path, old: str, new: str, message: str) -> None:
    edit(root, old, new)
    with pytest.raises(ConfigError, match=message):
        load_protocol()


def test_ablation_of_an_experiment_file_has_the_defaults(root: Path) -> None:
    path = root / "configs" / "experiments" / "ablations" / "half_rate.yaml"
    before = load_protocol()
    path.write_text(ADDED + "ablation: {labels: [full rate, half rate]}")
    protocol = load_protocol()
    plan = protocol.plan("half_rate")
    assert [arm.experiment for arm in plan.arms.values()] == ["science_qa", "half_rate"]
    assert (plan.margin, plan.seeds) == (protocol.margin, protocol.seeds)
    assert protocol.protocol_hash("cot_order") == before.protocol_hash("cot_order")
    path.write_text(ADDED)
    with pytest.raises(ConfigError, match="unknown ablation 'half_rate'"):
        load_protocol().plan("half_rate")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{name: cot_order}", "half_rate.yaml, ablation: another ablation has the name 'cot_order'"),
        ("{reference: science_qe}", "ablation: unknown reference experiment 'science_qe'; did you mean 'science_qa'"),
        ("{claim: ablation-7}", "unknown claim 'ablation-7'; did you mean 'ablation-7b'"),
        ("{labls: [a, b]}", "half_rate.yaml: unknown key 'labls'; did you mean 'labels'"),
    ],
)
def test_wrong_ablation_section_is_refused(root: Path, section: str, message: str) -> None:
    path = root / "configs" / "experiments" / "ablations" / "half_rate.yaml"
    path.write_text(f"{ADDED}ablation: {section}")
    with pytest.raises(ConfigError, match=message):
        load_protocol()
