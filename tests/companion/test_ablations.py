from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from companion import ablations as ab
from llava_core import runtime
from llava_core.config import load_experiment
from llava_core.runtime import ConfigError


def test_papers_small_differences_are_not_significant() -> None:
    z = {name: ab.published_difference(name)["z"] for name in ab.ablations()}
    assert {name for name, value in z.items() if abs(value) >= 1.96} == {"pretraining"}
    assert z["feature_layer"] == pytest.approx(-1.514, abs=1e-3)  # 3856 against 3815 of 4241


def test_difference_pairs_the_seeds() -> None:
    result = ab.difference(ab.Arm("a", "x", [90.0, 80.0, 70.0]), ab.Arm("b", "y", [89.0, 79.2, 68.8]))
    assert result["effect"] == pytest.approx(-1)
    assert result["interval"][1] < 0  # unpaired, the scatter of 10 points between seeds would hide it
    row = ab.verdict_check("ablation-7b", {**result, "verdict": "not resolved"})
    assert (row["verdict"], row["id"]) == ("not resolved", "ablation-7b")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("feature_layer", {"model.feature_layer"}),
        ("cot_order", {"data.prompt_format"}),
        ("pretraining", {"starts from stage 1"}),
        ("model_size", {"model.language_model"}),
    ],
)
def test_arms_differ_in_one_setting(name, settings) -> None:
    chosen = ab.ablation(name)
    rows = ab.arm_settings((chosen.reference, chosen.other), "mini")
    assert {row["setting"] for row in rows} == settings


ADDED = """
name: half_rate
base: science_qa
title: ScienceQA at half the learning rate
train: {learning_rate: 1.0e-5}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a new ablation in a root with a copy of the project's configs."""
    shutil.copytree(runtime.ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    return tmp_path / "configs" / "experiments" / "ablations" / "half_rate.yaml"


def test_ablation_is_one_file(path: Path) -> None:
    path.write_text(ADDED + "ablation: {labels: [full rate, half rate]}")
    chosen = ab.ablation("half_rate")
    assert (chosen.reference, chosen.other) == (("full rate", "science_qa"), ("half rate", "half_rate"))
    rows = ab.arm_settings((chosen.reference, chosen.other), "a100x8")
    assert [row["setting"] for row in rows] == ["train.learning_rate"]
    assert load_experiment("half_rate").run_id == load_experiment("half_rate", "mini").run_id
    path.write_text(ADDED)
    assert "half_rate" not in ab.ablations()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{name: cot_order}", "half_rate.yaml, ablation: another ablation has the name 'cot_order'"),
        ("{reference: science_qe}", "ablation: unknown reference experiment 'science_qe'; did you mean 'science_qa'"),
        ("{claim: ablation-7}", "unknown claim 'ablation-7'; did you mean 'ablation-7b'"),
        ("{labls: [a, b]}", "half_rate.yaml: unknown key 'labls'; did you mean 'labels'"),
    ],
)
def test_wrong_ablation_section_is_refused(path: Path, section: str, message: str) -> None:
    path.write_text(f"{ADDED}ablation: {section}")
    with pytest.raises(ConfigError, match=message):
        ab.ablations()


def test_unknown_ablation_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="feature_layer"):
        ab.ablate("feature_layers")


@pytest.mark.parametrize(("worse", "expected"), [(2, "not resolved"), (160, "agrees")])
def test_two_close_seeds_are_not_resolved(monkeypatch: pytest.MonkeyPatch, worse: int, expected: str) -> None:
    better = 1  # questions that only the ablated arm answers; its accuracy falls equally with both seeds
    first = [1.0] * worse + [0.0] * better + [1.0] * (400 - worse - better)
    second = [0.0] * worse + [1.0] * better + [1.0] * (400 - worse - better)
    arms = [ab.Arm("a", "science_qa", [50.0, 52.0]), ab.Arm("b", "x", [50 - worse / 4 + 0.25, 52 - worse / 4 + 0.25])]
    monkeypatch.setattr(ab, "run_arms", lambda *_: arms)
    monkeypatch.setattr(ab, "question_scores", lambda arm, _: [first if arm is arms[0] else second] * 2)
    result = ab.ablate("feature_layer")
    assert result["interval"][0] == result["interval"][1] == pytest.approx(-(worse - better) / 4)
    assert result["widest"][0] < result["interval"][0]
    assert result["verdict"] == expected
    assert ab.difference_check("x", None, result)["measured"] == result["widest"]


@pytest.mark.parametrize(
    ("means", "output"),
    [
        ((38.0, 39.0), "No arm is above a blind guess (50.0 %)"),
        ((80.0, 45.0), "Not above a blind guess (50.0 %): other."),
        ((80.0, 70.0), "(2 seeds per arm)"),
    ],
)
def test_explanation_names_arms_at_chance_level(
    means: tuple[float, float], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ab, "load_problems", lambda *_: [SimpleNamespace(choices=["a", "b"])] * 200)
    record = SimpleNamespace(config=SimpleNamespace(data_path=None))
    arms = [SimpleNamespace(name=n, mean=m, records=[record]) for n, m in zip(("full", "other"), means, strict=True)]
    text = ab.explain({"n_seeds": 2, "arms": arms, "verdict": "not resolved"})
    assert text.startswith("**Not resolved.** Over seeds or over questions")
    assert output in text
    assert ab.explain({"n_seeds": 1, "arms": arms, "verdict": "not resolved"}).startswith(
        "**Not resolved.** There is one"
    )
