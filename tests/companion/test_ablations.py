"""Ablations: shared runs, records, verdicts that follow from them, freshness, learning rates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_root import make_training_root

from companion import ablation_records as stored
from companion import ablations as ab
from companion.cli import main
from companion.comparisons import simulated_arms
from companion.protocol import Protocol, load_protocol
from llava_core.config import load_experiment
from llava_core.runtime import ROOT, DataError, read_json, write_json

N = 1000


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return load_protocol()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of stored records."""
    monkeypatch.setattr(stored, "folder", lambda: tmp_path)
    return tmp_path


def digits(row: np.ndarray) -> str:
    return "".join(str(int(value)) for value in row)


def simulated_record(
    protocol: Protocol,
    name: str,
    effect: float,
    accuracy: float = 80.0,
    seeds: int = 5,
    table: float = 0.5,
    key: int = 0,
) -> dict[str, Any]:
    """A record of an ablation whose arms differ by `effect` points; half of the problems have an image."""
    plan, rng = protocol.plan(name), np.random.default_rng(key)
    first, second = simulated_arms(rng, seeds, N, effect, accuracy)
    arms = {}
    for label in plan.arms:
        scores = (first if label == plan.reference else second).scores
        arms[label] = {"runs": [f"runs/{label}/{k}" for k in range(seeds)], "right": [digits(row) for row in scores]}
        if plan.speed is not None:
            end = 0.8 if label == plan.reference else 0.55
            levels = np.linspace(0.4, end, 8)[:, None]
            curve = rng.random((seeds, 8, plan.speed.questions)) < levels
            arms[label]["curve"] = {"steps": list(range(10, 90, 10)), "right": [[digits(c) for c in s] for s in curve]}
    questions = {
        "n": N, "ids": "x", "cluster": " ".join(map(str, range(N))), "image": "10" * (N // 2), "choices": "2" * N,
        "lookup_table": " ".join([str(table)] * N),
    }  # fmt: skip
    chosen = (plan.seeds or [])[:seeds]
    return {
        "ablation": name, "protocol": protocol.protocol_hash(name), "scale": "mini", "fast": False, "seeds": chosen,
        "base_models": [plan.base_model(seed) for seed in chosen], "questions": questions, "arms": arms,
        "made_with": {"training_code": "x", "evaluation_code": "x", "base_models": {}, "data": {}},
    }  # fmt: skip


def verdict(protocol: Protocol, record: dict[str, Any]) -> str:
    return str(next(iter(stored.analyse(record, protocol)["differences"].values()))["verdict"])


def test_verdicts_follow_from_record_and_plan(protocol: Protocol, folder: Path) -> None:
    assert verdict(protocol, simulated_record(protocol, "feature_layer", -10)) == "agrees"
    assert verdict(protocol, simulated_record(protocol, "feature_layer", 10)) == "disagrees"
    null = [verdict(protocol, simulated_record(protocol, "feature_layer", 0, key=k)) for k in range(20)]
    assert sum(found in ("agrees", "disagrees") for found in null) <= 1
    for effect in (-10, 10):
        found = [verdict(protocol, simulated_record(protocol, "feature_layer", effect, key=k)) for k in range(20)]
        assert found == ["agrees" if effect < 0 else "disagrees"] * 20


def test_record_below_the_plan_gives_no_verdict(protocol: Protocol, folder: Path) -> None:
    record = simulated_record(protocol, "feature_layer", -20, seeds=4)
    assert stored.analyse(record, protocol)["shortfall"] == ["4 of 5 seeds"]
    assert verdict(protocol, record) == "not resolved"
    whole = simulated_record(protocol, "feature_layer", -20)
    assert stored.analyse({**whole, "protocol": "of yesterday"}, protocol)["shortfall"] == ["another plan"]
    assert verdict(protocol, {**whole, "fast": True}) == "not resolved"


def test_arms_below_the_look_up_table_cannot_be_tested(protocol: Protocol, folder: Path) -> None:
    record = simulated_record(protocol, "feature_layer", -8, accuracy=60, table=0.75)
    result = stored.analyse(record, protocol)
    assert result["above_baselines"] == {"layer before the last": False, "last layer": False}
    assert (result["chance"], result["lookup_table"]) == (50, 75)
    assert verdict(protocol, record) == "cannot be tested"
    record = simulated_record(protocol, "feature_layer", -25, accuracy=60)  # one arm below, the other above
    assert stored.analyse(record, protocol)["above_baselines"] == {"layer before the last": True, "last layer": False}
    assert verdict(protocol, record) == "agrees"


def test_correction_counts_the_stored_records_of_the_family(protocol: Protocol, folder: Path) -> None:
    record = simulated_record(protocol, "feature_layer", -10)
    name = "feature_layer: last layer"
    p = stored.p_values(record, protocol)[name]
    alone = stored.analyse(record, protocol)["differences"]["last layer"]["p_holm"]
    assert alone == pytest.approx(min(1, len(protocol.family) * p))
    other = simulated_record(protocol, "cot_order", -30)
    stored.write_record(other)
    smaller = sum(value < p for value in stored.p_values(other, protocol).values())
    assert smaller > 0
    with_others = stored.analyse(record, protocol)["differences"]["last layer"]["p_holm"]
    assert with_others == pytest.approx(min(1, (len(protocol.family) - smaller) * p))


def test_subsets_controls_and_units_are_those_of_the_plan(protocol: Protocol, folder: Path) -> None:
    record = simulated_record(protocol, "pretraining", -10)
    result = stored.analyse(record, protocol)
    primary = result["differences"]["without stage 1"]
    assert (primary["subset"], primary["n"]) == ("image", N // 2)
    assert (primary["control_subset"]["subset"], primary["control_subset"]["n"]) == ("no image", N // 2)
    control = result["differences"]["without stage 1, steps matched"]
    assert (control["verdict"], control["p_holm"]) == ("shown only", None)
    sizes = stored.analyse(simulated_record(protocol, "model_size", -10), protocol)
    assert sizes["differences"]["smaller model"]["units"] == 3  # base models, of five seeds


def test_learning_speed_has_its_own_verdict(protocol: Protocol, folder: Path) -> None:
    speed = stored.analyse(simulated_record(protocol, "cot_order", -20), protocol)["speed"]
    assert speed["verdict"] == "agrees"
    assert speed["effect"] > 0
    assert all(step < 80 for step in speed["needed"]["reasons first"])
    assert len(speed["accuracies"]["answer first"][0]) == 8
    rows = stored.difference_checks(stored.analyse(simulated_record(protocol, "cot_order", -20), protocol))
    assert [row["id"] for row in rows] == ["ablation-answer-first", "cot-convergence"]


def bench_record(protocol: Protocol, seeds: int = 5) -> dict[str, Any]:
    """A record of the data mixes on 40 images with three questions each; `none` has half the score of the others."""
    plan, rng, n = protocol.plan("instruction_data"), np.random.default_rng(0), 120
    reference = rng.integers(6, 11, (seeds, n))
    arms = {}
    for label in plan.arms:
        candidate = reference * (0.4 if label == "none" else 0.8) + rng.integers(0, 2, (seeds, n))
        texts = {key: [" ".join(f"{v:g}" for v in row) for row in scores] for key, scores in
                 (("candidate", candidate), ("reference", reference))}  # fmt: skip
        arms[label] = texts
    facts = {
        "n": n,
        "cluster": " ".join(str(k // 3) for k in range(n)),
        "category": " ".join(["conv", "detail", "complex"] * 40),
    }
    chosen = (plan.seeds or [])[:seeds]
    return {
        "ablation": "instruction_data", "protocol": protocol.protocol_hash("instruction_data"), "fast": False,
        "seeds": chosen, "base_models": [0] * seeds, "questions": facts, "arms": arms, "made_with": {},
    }  # fmt: skip


def test_relative_scores_follow_the_same_rule(protocol: Protocol, folder: Path) -> None:
    record = bench_record(protocol)
    rows = {(row["category"], row["arm"]): row for row in stored.category_rows(record)}
    assert {category for category, _ in rows} == {"all", "conv", "detail", "complex"}
    assert rows["all", "full"]["n"] == 120
    assert rows["detail", "none"]["n"] == 40
    assert rows["all", "full"]["difference"] == 0
    low, high = rows["all", "none"]["difference_interval"]
    assert -45 < low < rows["all", "none"]["difference"] < high < -35
    result = stored.analyse(record, protocol)
    assert result["shortfall"] == ["120 of 600 questions"]
    assert result["differences"]["none"]["effect"] == pytest.approx(rows["all", "none"]["difference"])
    assert result["differences"]["conversation, steps matched"]["control"]


def test_chapter_texts_name_verdict_interval_and_what_is_missing(protocol: Protocol, folder: Path) -> None:
    whole = stored.explain(stored.analyse(simulated_record(protocol, "feature_layer", -10), protocol))
    assert whole.startswith("**Agrees**: last layer minus layer before the last, -")
    small = stored.explain(stored.analyse(simulated_record(protocol, "feature_layer", -25, 60, seeds=2), protocol))
    assert "**Not resolved**" in small
    assert re.search(
        r"half-width of last layer, \d+\.\d points, is above the margin of 2.5; the questions alone", small
    )
    assert "half-width" not in whole
    assert "(2 of 5 seeds), so there is no verdict" in small
    assert "Not significantly above both a blind guess (50.0 %) and the look-up table (50.0 %): " in small
    assert {row["verdict"] for row in stored.overview(protocol)} == {"no record"}
    stored.write_record(simulated_record(protocol, "pretraining", -20))
    rows = [row for row in stored.overview(protocol) if row["ablation"] == "pretraining"]
    assert [row["verdict"] for row in rows] == ["agrees", "control"]


def test_shorter_record_does_not_replace_a_longer_one(protocol: Protocol, folder: Path) -> None:
    assert stored.write_record(simulated_record(protocol, "feature_layer", -3))
    assert not stored.write_record(simulated_record(protocol, "feature_layer", -3, seeds=2))
    record = stored.read_record("feature_layer")
    assert record
    assert len(record["seeds"]) == 5
    write_json(folder / "cot_order.json", {"ablation": "cot_order"})
    with pytest.raises(DataError, match=r"cot_order.json: no record of cot_order; write it again"):
        stored.read_record("cot_order")


# ------------------------------------------------------------------------------------------------ runs


Fake = Callable[[ab.Job], dict[str, Any]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[ab.Job]:
    """The jobs that are measured; nothing is trained, and the record's facts need no data."""
    jobs: list[ab.Job] = []

    def measure(job: ab.Job) -> dict[str, Any]:
        jobs.append(job)
        digits = "10" * 24
        return {
            "run": f"runs/{len(jobs)}", "seconds": 1.0, "accuracy": {"value": 50.0, "right": digits},
            **({"curve": {"steps": [1, 2], "right": [digits, digits]}} if "curve" in dict(job.measures) else {}),
            "validation": {"value": json.loads(job.overrides).get("train.learning_rate", 0)},
        }  # fmt: skip

    facts = simulated_record(load_protocol(), "feature_layer", 0)["questions"]
    monkeypatch.setattr(ab, "measure", measure)
    monkeypatch.setattr(stored, "_science_questions", lambda config, n: {**facts, "n": n})
    monkeypatch.setattr(stored, "made_with", lambda plan, configs: {})
    monkeypatch.setattr(stored, "run_inputs", lambda config: {"data": {}})
    return jobs


def test_runs_that_ablations_share_are_trained_once(measured: list[ab.Job], folder: Path) -> None:
    lines: list[str] = []
    names = ["feature_layer", "cot_order", "pretraining"]
    records = ab.ablate(names, seeds=2, store=True, show=lines.append)
    assert len(measured) == 2 * 5  # reference, last layer, answer first, no stage 1 with and without more steps
    assert [job.experiment for job in measured].count("science_qa") == 2
    reference = measured[0]
    assert dict(reference.measures).keys() == {"accuracy", "curve"}  # all that one of the three wants of it
    paths = [records[name]["arms"][load_protocol().plan(name).reference]["runs"] for name in names]
    assert paths[0] == paths[1] == paths[2]
    assert sorted(path.stem for path in folder.iterdir()) == sorted(names)
    assert len(lines) == 2 * (2 + 2 + 3)
    assert "pretraining      with stage 1 50.0 50.0 | without stage 1 50.0 50.0 | without" in lines[-1]
    assert len({job.config.init_id for job in measured if job.experiment == "science_qa"}) == 2  # stage 1 is reseeded


def test_processes_share_stage_1_and_resume(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_training_root(workspace)
    monkeypatch.setenv("LLAVA_ROOT", str(workspace))  # read by the processes when they start
    small = {"train.epochs": 1, "train.global_batch": 8, "train.max_length": 96, "data.limit": 8}
    overrides = [json.dumps({**small, "train.learning_rate": rate}) for rate in (1e-3, 2e-3)]
    jobs = [ab.Job("finetune", "mini", text, fast=False) for text in overrides]
    results = dict(ab.run_jobs(jobs, processes=2))
    assert set(results) == set(jobs)
    summaries = {path: path.stat().st_mtime_ns for path in workspace.glob("runs/*/mini/*/summary.json")}
    assert sorted(path.parts[-4] for path in summaries) == ["finetune", "finetune", "pretrain"]
    assert dict(ab.run_jobs(jobs)) == results  # finished runs are reused
    assert {path: path.stat().st_mtime_ns for path in workspace.glob("runs/*/mini/*/summary.json")} == summaries


SLOW_JOBS = """
import os, time
from companion import ablations as ab
def slow(job):
    print(os.getpid(), flush=True)
    time.sleep(300)
ab.measure = slow
if __name__ == "__main__":
    list(ab.run_jobs([ab.Job("pretrain", "mini", f'{{"train.seed": {k}}}', True) for k in (1, 2)], 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(SLOW_JOBS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, tmp_path / "jobs.py"], stdout=-1, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = [Path(f"/proc/{int(parent.stdout.readline())}/cmdline") for _ in range(2)]
        assert all("spawn_main" in worker.read_text() for worker in workers)
        parent.kill()
    end = time.monotonic() + 10
    while any(worker.exists() and worker.read_text() for worker in workers):  # the text of a zombie is empty
        assert time.monotonic() < end
        time.sleep(0.05)


def test_fast_run_is_one_seed(measured: list[ab.Job], folder: Path) -> None:
    record = ab.ablate(["feature_layer"], fast=True)["feature_layer"]
    assert (record["seeds"], record["fast"], len(measured)) == ([42], True, 2)
    assert all(job.config.fast for job in measured)
    assert not list(folder.iterdir())


def test_brief_run_has_neither_controls_nor_learning_speeds(
    measured: list[ab.Job], folder: Path, protocol: Protocol
) -> None:
    records = ab.ablate(["cot_order", "pretraining"], seeds=1, brief=True)
    assert [dict(job.measures).keys() for job in measured] == [{"accuracy"}] * 3
    assert "without stage 1, steps matched" not in records["pretraining"]["arms"]
    result = stored.analyse(records["cot_order"], protocol)
    assert result["speed"] is None
    assert result["shortfall"][-1] == "no learning speed"
    whole = ab.ablate(["cot_order"], seeds=2)["cot_order"]
    assert stored.confirms({**records["cot_order"], "fast": False}, whole)


def test_size_starts_from_several_base_models(protocol: Protocol) -> None:
    plan = protocol.plan("model_size")
    arm = next(iter(plan.arms.values()))
    seeds = plan.seeds or []
    sources = [
        load_experiment(arm.experiment, "mini", ab.arm_overrides(plan, arm, seed, "mini")).model_source("vicuna-13b")
        for seed in seeds
    ]
    assert [Path(source).name for source in sources] == [f"llm-13b{part}" for part in ("", "-1", "-2", "", "-1")]
    config = load_experiment(arm.experiment, "mini", ab.arm_overrides(plan, arm, seeds[1], "mini"))
    upstream = config.upstream()
    assert upstream is not None
    assert upstream.scale.models == config.scale.models  # stage 1 has the same base model
    assert upstream.experiment.train.seed == config.experiment.train.seed == seeds[1]


def test_arm_without_stage_1_has_no_seed_of_it(protocol: Protocol) -> None:
    plan = protocol.plan("pretraining")
    overrides = [ab.arm_overrides(plan, arm, 3, "mini") for arm in plan.arms.values()]
    assert [o.get("init.train.seed") for o in overrides] == [3, None, None]
    assert [o["train.epochs"] for o in overrides] == [1, 1, 2]
    assert "train.epochs" not in ab.arm_overrides(plan, plan.arms["with stage 1"], 3, "gpu")  # the paper's there


def test_learning_rates_are_chosen_from_one_grid(measured: list[ab.Job], folder: Path, protocol: Protocol) -> None:
    content = ab.tune(["cot_order"])
    grid = protocol.learning_rates
    assert len(measured) == 2 * len(grid)
    assert {json.loads(job.overrides)["train.seed"] for job in measured} == {protocol.tuning_seed}
    assert {row["best"] for row in content["arms"].values()} == {max(grid)}  # the fake score is the rate
    measured.clear()
    ab.ablate(["cot_order"], seeds=[42])
    assert {job.config.experiment.train.learning_rate for job in measured} == {max(grid)}
    path = folder / "learning_rates.json"
    write_json(path, {**read_json(path), "grid": "another"})
    assert stored.learning_rates(protocol) == {}


def test_of_equal_scores_the_smallest_rate_is_chosen(folder: Path, protocol: Protocol) -> None:
    found = {"b": {"0.002": 80.0, "0.0005": 82.5, "0.001": 82.5}, "a": {"0.001": 82.5, "0.0005": 82.5}}
    content = stored.write_learning_rates(protocol, found)
    assert list(content["arms"]) == ["a", "b"]
    assert [row["best"] for row in content["arms"].values()] == [0.0005, 0.0005]
    assert list(content["arms"]["b"]["scores"]) == ["0.0005", "0.001", "0.002"]


def test_freshness_names_what_has_changed(folder: Path, protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"training_code": "a", "evaluation_code": "b", "base_models": {"vicuna-7b": "c"}, "data": {"mini-cc3m": "d"}}
    monkeypatch.setattr(stored, "made_with", lambda plan, configs: now)
    assert ab.freshness(["feature_layer"])[0] == {
        "name": "feature_layer",
        "status": "missing",
        "reasons": ["no record"],
    }
    record = {**simulated_record(protocol, "feature_layer", 0), "made_with": now}
    stored.write_record(record)
    assert ab.freshness(["feature_layer"])[0]["status"] == "fresh"
    other = {**now, "evaluation_code": "x", "base_models": {"vicuna-7b": "y"}}
    stored.write_record({**record, "protocol": "z", "made_with": other})
    row = ab.freshness(["feature_layer"])[0]
    assert row["status"] == "stale"
    assert row["reasons"] == ["another plan", "evaluation code has changed", "base model vicuna-7b has changed"]


def test_a_repeated_seed_with_the_same_answers_confirms_a_record_for_new_code(folder: Path, protocol: Protocol) -> None:
    now = {"training_code": "a", "evaluation_code": "b", "base_models": {}, "data": {}, "environment": {"torch": "1"}}
    later = {**now, "training_code": "x", "environment": {"torch": "2"}}
    record = {**simulated_record(protocol, "feature_layer", -3), "made_with": now}
    one = {
        **record, "seeds": record["seeds"][1:2], "made_with": later,
        "arms": stored.at_seeds(record, [1])["arms"],
    }  # fmt: skip
    label = next(iter(one["arms"]))
    flipped = ("1" if one["arms"][label]["right"][0][0] == "0" else "0") + one["arms"][label]["right"][0][1:]
    differing = {**one, "arms": {**one["arms"], label: {**one["arms"][label], "right": [flipped]}}}
    stored.write_record(record)
    for other in (differing, {**one, "made_with": {**later, "data": {"mini-cc3m": 2}}}, {**one, "fast": True}):
        assert not stored.write_record(other)
        assert stored.read_record("feature_layer") == record
    curves = {label: {**arm, "curve": {"steps": [1], "right": [["1"]]}} for label, arm in one["arms"].items()}
    assert not stored.confirms({**one, "arms": curves}, record)
    assert not stored.write_record(one)
    assert stored.read_record("feature_layer") == {
        **record,
        "made_with": {
            **now, "training_code": "x",
            "confirmed": {"seeds": record["seeds"][1:2], "environment": {"torch": "2"}},
        },
    }  # fmt: skip


def test_command_prints_effect_interval_and_verdict(
    folder: Path, protocol: Protocol, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {}

    def ablate(names: list[str], **options: Any) -> dict[str, Any]:
        asked.update(options)
        return {name: simulated_record(protocol, name, -10) for name in names}

    monkeypatch.setattr(ab, "ablate", ablate)
    assert main(["ablate", "cot_order", "--seeds", "3", "--jobs", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (asked["seeds"], asked["processes"], asked["store"]) == (3, 2, True)
    assert [arm["arm"] for arm in result["arms"]] == ["reasons first", "answer first"]
    assert result["verdict"] == "agrees"
    assert result["interval"][0] < result["effect"] < result["interval"][1]
    assert main(["ablate", "cot_order"]) == 0
    assert "agrees" in capsys.readouterr().out
    assert main(["ablate", "cot_order", "--seeds", "9"]) == 1
    assert "configs/protocol.yaml has 5 seeds" in capsys.readouterr().err
    assert main(["ablate", "cot_order", "--check"]) == 1
    assert "missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("feature_layer", {"model.feature_layer"}),
        ("cot_order", {"data.prompt_format"}),
        ("pretraining", {"starts from stage 1", "train.epochs"}),
        ("model_size", {"model.language_model"}),
        ("projector", {"model.projector"}),
        ("image_position", {"image_position"}),
    ],
)
def test_arms_differ_in_one_setting_and_their_learning_rate(name: str, settings: set[str], protocol: Protocol) -> None:
    plan = protocol.plan(name)
    rows = ab.arm_settings(plan)
    assert {row["setting"] for row in rows} - {"train.learning_rate"} == settings
    rates = stored.learning_rates(protocol)
    wanted = {label: f"{rates[ab.arm_name(plan.tuned_arm(arm))]:g}" for label, arm in plan.arms.items()}
    shown = [{label: row[label] for label in wanted} for row in rows if row["setting"] == "train.learning_rate"]
    assert shown == ([wanted] if len(set(wanted.values())) > 1 else [])
    assert "train.learning_rate" not in {row["setting"] for row in ab.arm_settings(plan, "gpu")}


def test_papers_small_differences_are_not_significant(protocol: Protocol) -> None:
    z = {}
    for name in ("feature_layer", "cot_order", "pretraining", "model_size"):
        plan = protocol.plan(name)
        z[name] = (ab.published_difference(plan, list(plan.arms)[1]) or {})["z"]
    assert {name for name, value in z.items() if abs(value) >= ab.NORMAL_95} == {"pretraining"}
    assert z["feature_layer"] == pytest.approx(-1.514, abs=1e-3)  # 3856 against 3815 of 4241


def test_speed_is_a_bound_where_an_arm_misses_the_target() -> None:
    speed = {"effect": 2.0, "interval": (1.0, 3.0), "steps": [10, 40], "target": 64.0}
    for first, second, text in (
        ([10.0], [40.0], "4 times the steps of the reference (95 % interval 2 to 8)"),
        ([10.0], [None], "at least 4 times the steps of the reference: b does not reach 64 % within 40 steps"),
        ([None], [10.0], "at most 4 times the steps of the reference: a does not reach 64 % within 40 steps"),
        ([None], [None], "4 times the steps of the reference: a and b do not reach 64 % within 40 steps"),
    ):
        assert stored.speed_text({**speed, "needed": {"a": first, "b": second}}) == text
    assert stored.speed_text({**speed, "interval": None, "needed": {"a": [1.0], "b": [4.0]}}).endswith("seed)")


def test_arm_that_another_processor_rounds_is_confirmed_by_the_stored_code(
    protocol: Protocol, folder: Path, workspace: Path
) -> None:
    now = {"training_code": "a", "evaluation_code": "b", "base_models": {}, "data": {}, "training_data": {}}
    record = {**simulated_record(protocol, "feature_layer", -3), "made_with": now}
    first, second = record["arms"]
    answers = record["arms"][second]["right"][0]
    other = {**record["arms"][second], "runs": ["runs/new"], "right": [str(1 - int(answers[0])) + answers[1:]]}
    one = stored.at_seeds(record, [0])
    one = {**one, "arms": {first: one["arms"][first], second: other}}
    weights = {}
    for run in ("runs/new", record["arms"][second]["runs"][0]):
        assert not stored.confirms(one, record)
        weights[run] = workspace / run / "checkpoint" / "model.safetensors"
        weights[run].parent.mkdir(parents=True)
        weights[run].write_text("weights")
    assert stored.confirms(one, record)
    weights["runs/new"].write_text("other weights")
    assert not stored.confirms(one, record)
    same = {**one, "arms": {**one["arms"], second: {**other, "runs": record["arms"][second]["runs"][:1]}}}
    assert not stored.confirms(same, record)  # the run of the record itself: this processor has no other witness
