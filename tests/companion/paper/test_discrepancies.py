"""The register of differences: every entry has an existing test, or two runs that differ in its field."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import tiny
import torch

from companion.data_tools.scienceqa import Problem, answer_prompt, format_problem
from companion.paper.discrepancies import Arm, Pair, all_discrepancies, read_register
from llava_core.checkpoints.load import build
from llava_core.config import META, ExperimentConfig, load_experiment, load_scale
from llava_core.config_files import field_names, value_of
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.models.projector import PROJECTORS
from llava_core.runtime import ROOT, ConfigError
from llava_core.train.optimizer import make_optimizer

ENTRIES = all_discrepancies()


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.test])
def test_test_of_an_entry_exists(name: str) -> None:
    file, _, function = (ENTRIES[name].test or "").partition("::")
    assert (ROOT / file).is_file()
    assert function in functions(file)


def differing_fields(pair: Pair) -> set[str]:
    """The fields that decide the result and differ, dotted, at the paper's own scale."""
    first, second = (load_experiment(arm.experiment, "a100x8", arm.set).experiment for arm in (pair.first, pair.second))
    fields = set(field_names(ExperimentConfig)) - set(META)
    return {field for field in fields if value_of(first, field) != value_of(second, field)}


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.pair])
def test_paired_runs_differ_in_one_field(name: str) -> None:
    pair = ENTRIES[name].pair
    assert pair is not None
    assert differing_fields(pair) == {pair.field}
    first, second = (
        load_experiment(arm.experiment, "a100x8", {**arm.set, "model.language_model": "vicuna-13b"})
        for arm in (pair.first, pair.second)
    )
    assert first.run_id != second.run_id


def test_pair_that_differs_elsewhere_is_detected() -> None:
    arms = Arm(experiment="finetune"), Arm(experiment="finetune", set={"train.epochs": 1, "template": "v1"})
    assert differing_fields(Pair(first=arms[0], second=arms[1], field="template")) == {"train.epochs", "template"}
    assert differing_fields(Pair(first=arms[0], second=arms[0], field="template")) == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {title: t, paper: p, released: r, at: x, here: h, other: o}", "'a'.*needs a `test` or a `pair`"),
        (
            "a: {title: t, papre: p, released: r, at: x, here: h, other: o, test: 'tests/test_a.py::test_b'}",
            "did you mean 'paper'",
        ),
        ("a: {title: t, paper: p, released: r, at: x, here: h, other: o, test: somewhere}", "test: "),
    ],
)
def test_wrong_entry_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_register(tmp_path / "d.yaml")


LATER = ("convert_sqa_to_llava", "playground/data/prompts", "eval_science_qa_gpt4_requery")  # not in the first commit


def test_citations_name_a_commit_that_has_the_file() -> None:
    for name, entry in ENTRIES.items():
        for part in re.split(r"[;,] ", entry.at):
            assert not ("8959d5c" in part and any(file in part for file in LATER)), name
    assert ENTRIES["optimizer"].at == "llava/train/train.py@8959d5c"
    assert ENTRIES["swapped-letters"].at == "scripts/convert_sqa_to_llava_base_prompt.py@82bc69e"
    assert ENTRIES["base-model"].at == "docs/MODEL_ZOO.md@053c284"
    for path in (ROOT / "companion").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not ("8959d5c" in line and any(file in line for file in LATER)), path


# ------------------------------------------------------------------------------------------------ what entries point to


@pytest.mark.parametrize(("width", "parameters"), [(4096, 4_198_400), (5120, 5_248_000)])
def test_projection_has_the_released_bias_and_size(width: int, parameters: int) -> None:
    with torch.device("meta"):
        projection = PROJECTORS.get("linear")(1024, width)
    assert dict(projection.named_parameters()).keys() == {"weight", "bias"}
    assert sum(p.numel() for p in projection.parameters()) == parameters


def test_every_image_of_a_sample_survives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(*tiny.base_models(tmp_path), torch.float32).model
    pixels = torch.randn(2, 3, 32, 32)
    block = [IMAGE_TOKEN_ID] * model.n_image_tokens
    with torch.no_grad():
        both = model.embed(torch.tensor([[5, *block, 6, *block]]), pixels)[0]
        single = [model.embed(torch.tensor([[5, *block]]), pixels[k : k + 1])[0, 1:] for k in (0, 1)]
    n = model.n_image_tokens
    assert torch.allclose(both[1 : n + 1], single[0], atol=1e-6)
    assert torch.allclose(both[n + 2 :], single[1], atol=1e-6)
    assert not torch.allclose(single[0], single[1])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_without_weight_decay_is_adam(decay: float) -> None:
    config = load_experiment("finetune", "a100x8", {"train.weight_decay": decay}).experiment.train
    start = torch.linspace(-1, 1, 8)
    ours, adam = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    optimizers = make_optimizer([ours], config), torch.optim.Adam([adam], **settings)
    for _ in range(5):
        for parameter, optimizer in zip((ours, adam), optimizers, strict=True):
            parameter.grad = parameter.detach() ** 2 + 0.5
            optimizer.step()
    assert torch.equal(ours, adam) is (decay == 0)  # the same elementwise operations on equal shapes


def test_another_vicuna_is_declared_as_a_stand_in() -> None:
    for name in ("gpu", "a100x8"):
        scale = load_scale(name)
        assert all("v1.3" in scale.models[model] for model in ("vicuna-7b", "vicuna-13b"))
        assert all("v0" in scale.stand_ins[model] for model in ("vicuna-7b", "vicuna-13b"))


def problem() -> Problem:
    return Problem(
        "1", "Which?", ["a", "b"], 1, "A hint.", None, "A lecture.", "A solution.", "natural science", 3, "train"
    )


def test_second_pass_continues_the_training_reply() -> None:
    reply = format_problem(problem(), "QCM-LEPA").turns[0][1] or ""
    bridge = answer_prompt("QCM-LEPA") or ""
    reasons, result, letter = reply.partition(bridge)
    assert result
    assert reasons == "LECTURE: A lecture.\nSOLUTION: A solution."
    assert letter == " B."
    assert " ###\nANSWER:" not in reply
    assert answer_prompt("QCM-LEPA", released=True) == " ###\nANSWER:"  # what the released test appended


def test_released_converter_swaps_two_letters() -> None:
    for name, named, swapped in (("QCM-AL", "A lecture.", "A solution."), ("QCM-AE", "A solution.", "A lecture.")):
        ours, theirs = (format_problem(problem(), name, released=r).turns[0][1] or "" for r in (False, True))
        assert named in ours
        assert swapped not in ours
        assert swapped in theirs
        assert named not in theirs
