from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_core import config
from llava_core.config import ExperimentConfig, RunConfig, load_experiment, load_scale
from llava_core.config_files import StrictModel, flatten, read_yaml, validated
from llava_core.runtime import ConfigError

EXPERIMENTS, SCALES = sorted(config.experiments()), sorted(config.scales())


def own_fields(name: str) -> dict[str, object]:
    path = config.experiments()[name]
    values = flatten(ExperimentConfig, yaml.safe_load(path.read_text()), str(path))
    return {field: value for field, value in values.items() if field not in config.META}


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configs that a test may spoil."""
    for kind, files in (("experiments", config.experiments()), ("scales", config.scales())):
        (tmp_path / "configs" / kind).mkdir(parents=True)
        for name, path in files.items():
            (tmp_path / "configs" / kind / f"{name}.yaml").write_text(path.read_text())
    base = config.experiments()["pretrain"].with_name("base.yaml")
    (tmp_path / "configs" / "experiments" / "base.yaml").write_text(base.read_text())
    monkeypatch.setattr("llava_core.runtime.ROOT", tmp_path)
    return tmp_path / "configs"


def change(path: Path, **values: object) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


def spoil(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---------------------------------------------------------------------------------------- the shipped files


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_loads_at_every_scale(name: str, scale: str) -> None:
    run = load_experiment(name, scale)
    assert run.experiment.name == name
    assert run.data_path.is_absolute()
    assert all(departure.why and departure.paper != departure.here for departure in run.departures)
    if (upstream := run.upstream()) is not None:
        assert upstream.experiment.model == run.experiment.model
        assert upstream.experiment.template == run.experiment.template
        assert upstream.run_id == run.init_id


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_value_has_a_source(name: str) -> None:
    experiment = load_experiment(name, "a100x8").experiment
    written = yaml.safe_load(config.experiments()[name].read_text())["sources"]
    for field in own_fields(name):
        assert any(field == known or field.startswith(f"{known}.") for known in written), (
            f"{name}: {field} has no source"
        )
        assert experiment.source_of(field)
    for known in written:
        config_fields = [f for f in own_fields(name) if f == known or f.startswith(f"{known}.")]
        assert config_fields, f"{name}: a source for {known}, which the file does not set"


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if load_experiment(n, "a100x8").experiment.base != "base"])
def test_ablation_changes_one_field(name: str) -> None:
    """A run may start from another experiment only if that one has the same single change."""
    changed = own_fields(name)
    start = changed.pop("init_from", None)
    if start is None:
        assert len(changed) <= 1
    else:
        assert len(changed) == 1
        assert own_fields(str(start)) == changed


@pytest.mark.parametrize(
    ("name", "facts"),
    {
        "pretrain": (1, "cc595k", 0.002, 1, 128, ["projector"], None),
        "finetune": (2, "instruct158k", 2e-5, 3, 32, ["projector", "language_model"], "pretrain"),
        "science_qa": (2, "scienceqa", 2e-5, 12, 32, ["projector", "language_model"], "pretrain"),
    }.items(),
)
def test_paper_recipe(name: str, facts: tuple[object, ...]) -> None:
    run = load_experiment(name, "a100x8")
    e, t = run.experiment, run.experiment.train
    assert (e.stage, e.data.name, t.learning_rate, t.epochs, t.global_batch, t.trainable, e.init_from) == facts
    assert (e.model.language_model, e.model.feature_layer, e.template) == ("vicuna-13b", -2, "v0")
    assert (t.warmup_ratio, t.weight_decay, t.betas, t.eps, t.grad_clip) == (0.03, 0, (0.9, 0.999), 1e-8, 1.0)
    assert [d.field for d in run.departures] == ["scale.vicuna-13b"]


def test_mini_scale_explains_its_departures() -> None:
    departures = {d.field: d for d in load_experiment("finetune", "mini").departures}
    size = departures["model.language_model"]
    assert (size.paper, size.here) == ("vicuna-13b", "vicuna-7b")
    assert size.why
    assert departures["scale.instruct158k"].here == load_scale("mini").data["instruct158k"]
    assert "scale.scienceqa" not in departures


def test_full_mix_is_the_default_run() -> None:
    assert load_experiment("instruct_full", "a100x8").run_id == load_experiment("finetune", "a100x8").run_id
    assert load_experiment("instruct_conversation_only", "a100x8").experiment.data.subset == {"conversation": 1.0}


# ---------------------------------------------------------------------------------------- order of the layers


def test_scale_departures_never_undo_an_ablation(sandbox: Path) -> None:
    departs = {
        "*": {
            "set": {"model.language_model": "vicuna-7b", "train.epochs": 1, "train.precision": "float32"},
            "why": "small",
        },
        "science_qa": {
            "set": {"data.prompt_format": "QCM-A", "train.epochs": 2, "model.feature_layer": -3},
            "why": "quick",
        },
        "answer_first": {"set": {"train.epochs": 5}, "why": "needs more"},
    }
    change(sandbox / "scales" / "mini.yaml", departs=departs)
    base, arm = load_experiment("science_qa").experiment, load_experiment("answer_first").experiment
    assert (base.data.prompt_format, base.train.epochs, base.model.feature_layer) == ("QCM-A", 2, -3)
    assert (arm.data.prompt_format, arm.train.epochs, arm.model.feature_layer) == ("QCM-ALE", 5, -3)
    assert load_experiment("science_qa_13b").experiment.model.language_model == "vicuna-13b"
    assert base.model.language_model == "vicuna-7b"
    assert load_experiment("answer_first", overrides={"train.epochs": 9}).experiment.train.epochs == 9


def test_run_that_a_run_starts_from_takes_its_own_overrides() -> None:
    run = load_experiment("science_qa", overrides={"train.seed": 1, "init.train.seed": 7})
    upstream = run.upstream()
    assert upstream is not None
    assert (run.experiment.train.seed, upstream.experiment.train.seed) == (1, 7)
    assert run.init_id == upstream.run_id == load_experiment("pretrain", overrides={"train.seed": 7}).run_id
    with pytest.raises(ConfigError, match="pretrain starts from no other run"):
        load_experiment("pretrain", overrides={"init.train.seed": 7})


def test_overrides_win_and_are_listed() -> None:
    run = load_experiment("finetune", "a100x8", {"train.learning_rate": 1e-4, "train.epochs": 3})
    assert run.experiment.train.learning_rate == 1e-4
    assert (run.departures[0].field, run.departures[0].paper, run.departures[0].here) == (
        "train.learning_rate",
        2e-5,
        1e-4,
    )
    assert not [d for d in run.departures if d.field == "train.epochs"]


def test_model_override_applies_to_the_start_run() -> None:
    run = load_experiment("finetune", "mini", {"model.language_model": "vicuna-13b"})
    upstream = run.upstream()
    assert upstream is not None
    assert upstream.experiment.model.language_model == "vicuna-13b"
    assert upstream.run_id == run.init_id == load_experiment("pretrain_13b", "mini").run_id


def test_fast_run_starts_from_a_fast_run() -> None:
    run = load_experiment("finetune", "mini", {"train.epochs": 2}, fast=True)
    assert (run.fast, run.experiment.data.limit, run.experiment.train.epochs) == (True, 96, 2)
    upstream = run.upstream()
    assert upstream == load_experiment(
        "pretrain", "mini", config._upstream_overrides(run.experiment, {}, {}), fast=True
    )
    assert upstream.run_id == run.init_id == load_experiment("pretrain", "mini", fast=True).run_id
    assert load_experiment("finetune", "mini", {"data.limit": 96}).upstream().experiment.data.limit is None


def test_base_has_sources_and_keeps_scale_departures() -> None:
    base = yaml.safe_load(config.experiments()["pretrain"].with_name("base.yaml").read_text())
    fields = set(flatten(ExperimentConfig, base, "base")) - {*config.META}
    covered = {f for f in fields for known in base["sources"] if f == known or f.startswith(f"{known}.")}
    assert fields == covered
    assert load_experiment("finetune", "mini").experiment.train.max_length == 512


# ---------------------------------------------------------------------------------------- the run's id


def test_run_id_depends_only_on_what_changes_results(sandbox: Path) -> None:
    before = load_experiment("finetune").run_id
    mini, stage_2 = sandbox / "scales" / "mini.yaml", sandbox / "experiments" / "finetune.yaml"
    change(mini, row_tokens=3000, threads=2, title="Renamed", seeds=[5], eval_samples=7)
    change(stage_2, title="Renamed", sources={}, claims=["some-claim"])
    assert load_experiment("finetune").run_id == before
    seen = {before}
    for spoiled in (
        lambda: spoil(sandbox / "experiments" / "base.yaml", "warmup_ratio: 0.03", "warmup_ratio: 0.04"),
        lambda: spoil(sandbox / "experiments" / "pretrain.yaml", "epochs: 1", "epochs: 2"),
        lambda: spoil(mini, "models/mini/clip", "models/mini/other"),
        lambda: spoil(mini, "float32", "pure_bf16"),
        lambda: change(stage_2, template="v1"),
    ):
        spoiled()
        run_id = load_experiment("finetune").run_id
        assert run_id not in seen
        seen.add(run_id)
    assert load_experiment("finetune", overrides={"train.seed": 1}).run_id not in seen


def test_resolved_run_round_trips_through_its_file(tmp_path: Path) -> None:
    run = load_experiment("science_qa", "mini")
    second = RunConfig.read(run.write(tmp_path / "config.yaml"))
    assert second == run
    assert second.run_id == run.run_id


def test_paths_start_at_the_root_and_hub_ids_stay(workspace: Path) -> None:
    mini, gpu = load_experiment("finetune", "mini"), load_experiment("finetune", "gpu")
    assert mini.model_source("vicuna-7b") == str(workspace / "models" / "mini" / "llm-7b")
    assert gpu.model_source("clip-vit-large-patch14") == "openai/clip-vit-large-patch14"


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_experiment("finetun"), r"unknown experiment 'finetun'; did you mean 'finetune'\?"),
        (lambda: load_experiment("base"), "unknown experiment 'base'"),
        (lambda: load_experiment("finetune", "mimi"), r"unknown scale 'mimi'; did you mean 'mini'\?"),
        (lambda: load_experiment("finetune", overrides={"lerning_rate": 1}), "did you mean 'train.learning_rate'"),
        (lambda: load_experiment("finetune", overrides={"train.epochs": 0}), r"override: train\.epochs.*\(it is 0\)"),
        (lambda: load_experiment("finetune", overrides={"name": "x"}), "cannot be overridden"),
        (lambda: load_experiment("finetune", overrides={"data.subset": {"convo": 1}}), "did you mean 'conversation'"),
        (lambda: load_experiment("finetune", overrides={"data.subset": {"detail": 0}}), "share of 'detail'"),
        (lambda: load_experiment("finetune", overrides={"train.learning_rate": float("nan")}), "learning_rate"),
    ],
)
def test_wrong_calls_are_errors(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "experiments/finetune",
            "epochs: 3",
            "epoch: 3",
            r"finetune\.yaml: unknown key 'train\.epoch'.*'train\.epochs'",
        ),
        ("experiments/finetune", "epochs: 3", "epochs: three", r"finetune\.yaml: train\.epochs: .*'three'"),
        ("experiments/finetune", "epochs: 3", "epochs: 3\n  epochs: 4", r"line \d+: .*'epochs' is written twice"),
        ("experiments/finetune", "stage: 2", "", r"finetune\.yaml: stage: Field required"),
        ("experiments/finetune", "name: finetune", "name: other", "must be 'finetune'"),
        ("experiments/finetune", "stage: 2", "stage: [2", r"finetune\.yaml, line \d+: not valid YAML"),
        ("experiments/finetune", "init_from: pretrain", "init_from: finetune", "goes round in a circle"),
        ("experiments/answer_first", "base: science_qa", "base: answer_first", "goes round in a circle"),
        ("experiments/finetune", "base: base", "base: bass", r"unknown experiment 'bass'; did you mean 'base'\?"),
        ("scales/gpu", "kind: fsdp2", "kind: fsdp3", r"parallel.kind: .*'fsdp2'"),
        ("scales/mini", "device: cpu", "devise: cpu", r"mini\.yaml: unknown key 'devise'; did you mean 'device'"),
        ("scales/gpu", "stand_ins:", "stand_ins:\n  vicuna-8b: x", r"stand_ins: unknown data set or model 'vicuna-8b'"),
    ],
)
def test_wrong_files_are_named_with_their_key(sandbox: Path, file: str, old: str, new: str, message: str) -> None:
    spoil(sandbox / f"{file}.yaml", old, new)
    kind, _, name = file.partition("/")
    with pytest.raises(ConfigError, match=message):
        load_experiment(*([name] if kind == "experiments" else ["finetune", name]))


def test_two_experiments_of_one_name_are_an_error(sandbox: Path) -> None:
    (sandbox / "experiments" / "own").mkdir()
    (sandbox / "experiments" / "own" / "pretrain.yaml").write_text("name: pretrain\n")
    with pytest.raises(ConfigError, match=r"own/pretrain.yaml and .*pretrain.yaml: two experiments of one name"):
        load_experiment("finetune", "mini")


def test_missing_data_path_of_a_scale_is_an_error(sandbox: Path) -> None:
    path = sandbox / "scales" / "mini.yaml"
    change(path, stand_ins={}, data={"cc595k": "data/x"})
    with pytest.raises(
        ConfigError, match=r"mini\.yaml: 'instruct158k', which 'finetune' needs, has no path in its `data`"
    ):
        load_experiment("finetune")


def test_invalid_scale_value_names_the_scale(sandbox: Path) -> None:
    path = sandbox / "scales" / "mini.yaml"
    change(path, departs={"finetune": {"set": {"train.epochs": -1}, "why": "wrong"}})
    with pytest.raises(ConfigError, match=r"mini\.yaml, departs\.finetune: train\.epochs"):
        load_experiment("finetune")
    change(path, departs={"finetune": {"set": {"name": "x"}, "why": "wrong"}})
    with pytest.raises(ConfigError, match="describes the experiment"):
        load_scale("mini")
    change(path, departs={"finetunes": {"set": {"stage": 1}, "why": "wrong"}})
    with pytest.raises(ConfigError, match=r"departs\.finetunes: unknown experiment .*'finetune'"):
        load_scale("mini")
    change(path, departs={"*": {"set": {"train.max_lenght": 1}, "why": "wrong"}})
    with pytest.raises(ConfigError, match=r"departs\.\*: .*did you mean 'train\.max_length'"):
        load_scale("mini")


def test_error_outside_a_checkout_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.runtime.ROOT", tmp_path)
    with pytest.raises(ConfigError, match="LLAVA_ROOT"):
        load_experiment("finetune")


def test_mixed_precision_of_all_weights_needs_an_engine() -> None:
    mixed = {"train.precision": "mixed_bf16"}
    with pytest.raises(ConfigError, match="'none' is not; fix: fsdp2"):
        load_experiment("finetune", "mini", mixed)
    assert load_experiment("finetune", "mini", mixed | {"scale.parallel.kind": "fsdp2"}).dtype == "bfloat16"
    assert load_experiment("pretrain", "mini", mixed).dtype == "bfloat16"  # the language model is frozen
    adapted = mixed | {"train.adapters": {"r": 4, "alpha": 8}}
    assert load_experiment("finetune", "mini", adapted).experiment.train.adapters.r == 4


def test_scale_fields_can_be_overridden() -> None:
    run = load_experiment("finetune", "a100x8", {"scale.parallel.kind": "zero3"})
    assert (run.scale.parallel.kind, run.scale.parallel.processes) == ("zero3", 8)
    assert run.upstream().scale.parallel.kind == "zero3"
    assert run.run_id == load_experiment("finetune", "a100x8").run_id  # the engine does not change the result
    with pytest.raises(ConfigError, match=r"override scale: unknown key 'parallel\.knd'"):
        load_experiment("finetune", "a100x8", {"scale.parallel.knd": "zero3"})


def test_pure_bf16_needs_an_engine_without_fp32_weights() -> None:
    pure = {"train.precision": "pure_bf16", "scale.parallel.kind": "zero2"}
    with pytest.raises(ConfigError, match="DeepSpeed keeps fp32 weights"):
        load_experiment("finetune", "a100x8", pure)
    assert load_experiment("finetune", "a100x8", pure | {"scale.parallel.kind": "fsdp2"}).dtype == "bfloat16"


BAD_YAML = {
    "deep": "[" * 5000, "deep mapping": "{a: " * 5000, "deep list": "- " * 100_000, "control": "a: \x01",
    "bytes": b"\xff\xfe\x00", "date": "a: 2024-13-45", "int": "a: !!int x", "bool": "a: !!bool x",
    "time": "a: !!timestamp x", "digits": "a: " + "9" * 5000, "code": "a: !!python/object/apply:os.getpid []",
    "key": "? [1]\n: 2", "twice": "a: 1\na: 2", "set": "a: !!set [1]", "large": "# " + "x" * 2_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_YAML)
def test_every_error_of_yaml_is_one_line(name: str, tmp_path: Path) -> None:
    content, path = BAD_YAML[name], tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"\A.*mine\.yaml.*(YAML|UTF-8|bytes).*\Z"):
        read_yaml(path)


def test_yaml_of_many_keys_and_of_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("".join(f"key{k}: 1\n" for k in range(30_000)))
    begin = time.process_time()
    assert len(read_yaml(tmp_path / "keys.yaml")) == 30_000
    assert time.process_time() - begin < 8
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: a folder, a pipe or a device"):
        read_yaml(tmp_path / "pipe.yaml")


def test_a_nested_value_is_shown_short() -> None:
    bomb: Any = "x"
    for _ in range(40):
        bomb = [bomb, bomb]

    class Model(StrictModel):
        number: int

    with pytest.raises(ConfigError, match=r"mine\.yaml: number: .*\(it is ") as caught:
        validated(Model, {"number": bomb}, "mine.yaml")
    assert len(str(caught.value)) < 2000
