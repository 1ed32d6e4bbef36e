from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from llava_core.data.conversation import TEMPLATES, encode
from llava_core.lab import chapters_speed as speed
from llava_core.train.trainer import Trainer, supervised_tokens
from llava_core.weights.checkpoint import build


def test_functions_are_timed_in_turns() -> None:
    calls: list[str] = []
    times = speed.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert all(t["low"] <= t["median"] <= t["high"] for t in times.values())


@pytest.fixture
def ours(tmp_path):
    """What `Ours` holds, without a run: a tiny model and its batch of two samples of different length."""
    loaded = build(*tiny.base_models(tmp_path), torch.float32)
    loaded.model.set_trainable(["projector", "language_model"])
    items = []
    for question in ("<image>\nwhat color is the car?", "<image>\nwhat color is the dog? A red car."):
        encoded = encode(
            TEMPLATES.get("v0").render([(question, "blue")]), loaded.tokenizer, loaded.model.n_image_tokens
        )
        items.append((encoded, torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8).numpy()))
    trainer = object.__new__(Trainer)
    trainer.model, trainer.loaded, trainer.device = loaded.model.train(), loaded, torch.device("cpu")
    settings = SimpleNamespace(trainable=["projector", "language_model"], learning_rate=1e-3, grad_clip=1.0)
    return SimpleNamespace(loaded=loaded, settings=settings, trainer=trainer), items


def test_transformers_model_is_the_same_function(ours) -> None:
    ours, items = ours
    found = speed.parity(ours, speed.Peer(ours), items)
    assert found["ours"] == pytest.approx(found["transformers"], rel=1e-5)
    assert found["gradient error"] < 1e-4
    assert supervised_tokens(items) > 2


def test_a_peer_that_reads_another_layer_is_seen(ours) -> None:
    ours, items = ours
    peer = speed.Peer(ours)
    peer.model.config.vision_feature_layer = -1
    assert speed.parity(ours, peer, items)["gradient error"] > 1e-3


def test_stage_2_needs_more_arithmetic_than_stage_1(ours) -> None:
    ours, items = ours
    less = speed.step_flops(ours.loaded, items, ["projector"])
    assert 0 < less < speed.step_flops(ours.loaded, items, ["projector", "language_model"])
