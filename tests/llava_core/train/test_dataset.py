from __future__ import annotations

import json
import math
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from training_root import make_training_root

from llava_core.config import load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import ConfigError, DataError
from llava_core.train.dataset import TrainingSet, held_out_indices, load_samples, steps_of
from llava_core.train.launch import _note_differences


@pytest.mark.parametrize(("name", "samples", "steps"), [("pretrain", 595_375, 4652), ("finetune", 157_712, 14_787)])
def test_steps_at_the_papers_scale_are_the_papers(name: str, samples: int, steps: int) -> None:
    data, train = (getattr(load_experiment(name, "a100x8").experiment, part) for part in ("data", "train"))
    assert steps_of(samples - len(held_out_indices(samples, data.held_out)), train) == steps


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_held_out_samples_are_a_listed_departure(name: str) -> None:
    config = load_experiment(name, "gpu")
    (departure,) = (d for d in config.departures if d.field == "data.held_out")
    assert (departure.paper, departure.here) == (0, config.scale.eval_samples)
    assert "held out" in departure.why


@pytest.mark.parametrize(("samples", "held_out"), [(595_375, 1000), (26, 7), (10, 9), (7, 1), (3, 0)])
def test_exactly_the_number_is_held_out(samples: int, held_out: int) -> None:
    indices = held_out_indices(samples, held_out)
    assert len(indices) == held_out
    assert indices <= set(range(samples))
    gaps = {b - a for a, b in zip(sorted(indices), sorted(indices)[1:], strict=False)}
    assert gaps <= {
        math.floor(samples / max(1, held_out)),
        math.ceil(samples / max(1, held_out)),
    }  # over the whole file
    with pytest.raises(DataError, match="hold out fewer"):
        held_out_indices(held_out, max(1, held_out))


@pytest.mark.parametrize("share", [0.04, 0.1, 0.3, 0.4, 0.45, 0.5])
def test_a_share_is_held_out_evenly(share: float) -> None:
    indices = sorted(held_out_indices(3834, share))
    assert abs(len(indices) - 3834 * share) <= 1
    gaps = {b - a for a, b in pairwise(indices)}
    assert gaps <= {math.floor(1 / share), math.ceil(1 / share)}


def test_template_for_prompts_only_is_refused() -> None:
    nothing: Any = None
    for template, refused in (("v0", False), ("v0_exact", False), ("plain", False), ("v1_hf", True)):
        config = load_experiment("finetune", "mini", {"template": template})
        with pytest.raises(ConfigError, match="v1_hf has no end of an answer") if refused else nullcontext():
            TrainingSet([], nothing, nothing, config, 4)


@pytest.fixture
def world(workspace: Path) -> Path:
    make_training_root(workspace)
    return workspace


def break_records(world: Path) -> Path:
    """Give record 3 no answer, and record 9 an image outside of the folder; one record per line."""
    file = world / "data" / "cc" / "chat.json"
    records = json.loads(file.read_text())
    records[3]["conversations"].pop()
    records[9]["image"] = "../9.png"
    file.write_text("[" + ",\n".join(map(json.dumps, records)) + "]")
    return file


def test_wrong_records_stop_or_are_left_out(world: Path) -> None:
    break_records(world)
    with pytest.raises(DataError, match=r"chat\.json: 2 problem.*\n  line 4, record 3: .*\n  line 10, record 9: "):
        load_samples(load_experiment("pretrain", "mini"))
    skipped: list[str] = []
    config = load_experiment("pretrain", "mini", {"data.on_bad_sample": "skip", "data.held_out": 0})
    train, _ = load_samples(config, skipped)
    assert [sample.id for sample in train] == [str(k) for k in range(26) if k not in (3, 9)]
    assert [(s.line, s.position) for s in train] == [(int(s.id) + 1, int(s.id)) for s in train]
    assert [text.split(": ")[0] for text in skipped] == [
        "data/cc/chat.json, line 4, record 3", "data/cc/chat.json, line 10, record 9",
    ]  # fmt: skip


def test_skip_does_not_lose_the_rest_of_a_damaged_list(world: Path) -> None:
    file = break_records(world)
    file.write_text(file.read_text().replace('"id": "12"', '"id" "12"'))
    with pytest.raises(DataError, match=r"line 13, record #12: no JSON"):
        load_samples(load_experiment("pretrain", "mini", {"data.on_bad_sample": "skip"}))


def test_fewer_held_out_samples_are_from_all_of_the_file(world: Path) -> None:
    share = {"data.held_out": 0.5}
    _, all_held_out = load_samples(load_experiment("pretrain", "mini", {**share, "scale.eval_samples": 26}))
    train, held_out = load_samples(load_experiment("pretrain", "mini", {**share, "scale.eval_samples": 4}))
    assert [int(sample.id) for sample in all_held_out] == list(range(0, 26, 2))
    assert [int(sample.id) for sample in held_out] == [0, 6, 12, 18]
    assert len(train) == 13


def test_finished_run_says_that_other_held_out_samples_do_not_count(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = load_experiment("pretrain", "mini", {"scale.eval_samples": 3})
    record = RunRecord.open(load_experiment("pretrain", "mini"))
    assert record.run_id == asked.run_id
    _note_differences(record, record.config)
    assert not capsys.readouterr().err
    _note_differences(record, asked)
    stored = record.config.scale.eval_samples
    assert f"finished with scale.eval_samples = {stored}, and its numbers stay those" in capsys.readouterr().err
