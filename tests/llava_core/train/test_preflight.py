from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from training_root import make_training_root

from llava_core.checkpoints.load import Loaded
from llava_core.config import load_experiment
from llava_core.constants import IGNORE_INDEX
from llava_core.runtime import DataError
from llava_core.train import preflight
from llava_core.train.dataset import TrainingSet, build_model
from llava_core.train.launch import launch
from llava_core.train.preflight import CHECKS, Preflight, checked_samples


@pytest.fixture
def world(workspace: Path) -> Path:
    make_training_root(workspace)
    write(workspace, read(workspace))
    return workspace


@pytest.fixture
def loaded(world: Path) -> Loaded:
    return build_model(load_experiment("pretrain", "mini"), None)


def read(world: Path) -> list[dict]:
    return json.loads((world / "data" / "cc" / "chat.json").read_text())


def write(world: Path, records: list[dict]) -> None:
    (world / "data" / "cc" / "chat.json").write_text("[" + ",\n".join(map(json.dumps, records)) + "]")


def check(loaded: Loaded, **overrides: object) -> tuple[TrainingSet, TrainingSet, Preflight]:
    values = {"train.max_length": 96, **{name.replace("__", "."): value for name, value in overrides.items()}}
    return checked_samples(load_experiment("pretrain", "mini", values), loaded)


def count_checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the samples that are encoded from here on."""
    ids: list[str] = []
    encoded = TrainingSet.encoded

    def counted(self: TrainingSet, k: int):
        ids.append(self.samples[k].id)
        return encoded(self, k)

    monkeypatch.setattr(TrainingSet, "encoded", counted)
    return ids


def test_numbers_are_those_of_the_samples(world: Path, loaded: Loaded) -> None:
    train, held_out, found = check(loaded)
    items = [train.encoded(k) for k in range(len(train))]
    assert found.lengths.tolist() == [len(item.input_ids) for item in items]
    assert found.supervised.tolist() == [sum(t != IGNORE_INDEX for t in item.labels) for item in items]
    assert (len(train), len(held_out), found.row()["skipped_samples"]) == (24, 2, 0)


def too_long(world: Path) -> None:
    records = read(world)
    records[7]["conversations"][1]["value"] = "red car " * 100
    write(world, records)


def removed_image(world: Path) -> None:
    (world / "data" / "images" / "7.png").unlink()


def cut_image(world: Path) -> None:
    image = world / "data" / "images" / "7.png"
    image.write_bytes(image.read_bytes()[:-30])  # the header is good


BAD = [
    (too_long, r"its first turn needs more than max_length = 96 tokens; fix: "),
    (removed_image, r"data/images/7\.png: there is no such image; fix: "),
    (cut_image, r"data/images/7\.png: cannot be decoded .*; fix: "),
]


@pytest.mark.parametrize(("damage", "reason"), BAD)
def test_bad_sample_stops_or_is_left_out(world: Path, loaded: Loaded, damage, reason: str) -> None:
    good = [sample.id for sample in check(loaded)[0].samples]
    damage(world)
    for _ in range(2):  # a second start as well
        with pytest.raises(
            DataError, match=rf"1 of 26 samples.*:\n  data/cc/chat\.json, line 8: sample 7: .*{reason}.*\n.*=skip"
        ):
            check(loaded)
        train, _, found = check(loaded, data__on_bad_sample="skip")
        assert [sample.id for sample in train.samples] == [name for name in good if name != "7"]
        assert (len(found.lengths), found.row()["skipped_samples"]) == (23, 1)
        assert "line 8: sample 7" in found.row()["skipped"][0]


def test_token_beyond_the_embedding_is_named(world: Path, loaded: Loaded) -> None:
    loaded.tokenizer.add_tokens(["zebra"])
    records = read(world)
    records[7]["conversations"][1]["value"] = "a zebra"
    write(world, records)
    rows = loaded.model.language_model.get_input_embeddings().num_embeddings
    with pytest.raises(DataError, match=rf"line 8: sample 7: token id {rows} is none of the model's {rows} word embed"):
        check(loaded)


def test_projector_alone_needs_an_image(world: Path, loaded: Loaded) -> None:
    write(world, read(world)[5:7])
    with pytest.raises(DataError, match="no sample is left that projector could learn from"):
        check(loaded, data__held_out=0)


def test_nothing_is_left(world: Path, loaded: Loaded) -> None:
    with pytest.raises(DataError, match=r"chat\.json: no sample is left"):
        check(loaded, train__max_length=8, data__on_bad_sample="skip")


def test_check_is_remembered(world: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = count_checks(monkeypatch)
    check(loaded, data__limit=5)
    assert len(checked) == 7  # two are held out
    first = check(loaded)
    assert len(checked) == 26
    again = check(loaded, train__seed=3)  # other seeds, and the second start
    assert (len(checked), again[2].lengths.tolist()) == (26, first[2].lengths.tolist())
    image = world / "data" / "images" / "7.png"
    os.utime(image, ns=(1, 1))
    check(loaded)
    assert checked[26:] == ["7"]
    check(loaded, train__max_length=97)
    assert len(checked) == 53
    write(world, read(world)[:-1])
    check(loaded)
    assert len(checked) == 78


def test_dropped_turns_are_counted_at_a_second_start(world: Path, loaded: Loaded) -> None:
    records = read(world)
    records[7]["conversations"] += [{"from": "human", "value": "what " * 60}, {"from": "gpt", "value": "red"}]
    write(world, records)
    assert check(loaded)[0].dropped == check(loaded)[0].dropped == {6: 1}  # sample 0 is held out


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"0": 3}', '{"x": [1, 1, 0, [0, 0], null]}'])
def test_damaged_memory_is_checked_again(world: Path, loaded: Loaded, content: str) -> None:
    before = check(loaded)[2].lengths.tolist()
    (file,) = (world / CHECKS).iterdir()
    file.write_text(content)
    assert check(loaded)[2].lengths.tolist() == before


def test_other_ranks_read_what_rank_0_found(world: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 checks before the barrier, the others after it, without looking at a sample or an image."""
    order: list[str] = []
    checked = count_checks(monkeypatch)
    monkeypatch.setattr(preflight.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(preflight.dist, "barrier", lambda: order.append(f"barrier after {len(checked)}"))
    cut_image(world)
    first = check(loaded, data__on_bad_sample="skip")
    monkeypatch.setattr(preflight, "rank", lambda: 1)
    monkeypatch.setattr(preflight, "_stamp", lambda image: pytest.fail("an image is looked at"))
    second = check(loaded, data__on_bad_sample="skip")
    assert order == ["barrier after 26", "barrier after 26"]
    assert len(checked) == 26
    assert [s.id for s in second[0].samples] == [s.id for s in first[0].samples]
    assert second[2].skipped == first[2].skipped


def test_left_out_samples_are_in_the_record(world: Path) -> None:
    cut_image(world)
    values = {"train.max_length": 96, "train.global_batch": 8, "data.on_bad_sample": "skip"}
    record = launch(load_experiment("pretrain", "mini", values))
    (row,) = [row for row in record.metrics() if "skipped_samples" in row]
    assert (row["step"], row["samples"], row["skipped_samples"]) == (0, 23, 1)
    assert "data/cc/chat.json, line 8: sample 7: data/images/7.png: cannot be decoded" in row["skipped"][0]
    assert (record.summary["samples"], record.summary["skipped_samples"]) == (23, 1)
