"""Fixtures of the chat tests: a tiny model, two images, and a model with a scripted answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from llava_core import chat
from llava_core.checkpoints.load import Loaded, build
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.models import generation


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    loaded_model = build(*tiny.base_models(tmp_path_factory.mktemp("bases")), torch.float32)
    torch.nn.init.normal_(loaded_model.model.multi_modal_projector.weight, std=0.5)  # so that the image decides answers
    torch.nn.init.normal_(loaded_model.model.language_model.get_output_embeddings().weight, std=0.5)
    loaded_model.model.eval()
    return loaded_model


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path, color in zip(paths, ((200, 30, 30), (30, 30, 200)), strict=True):
        Image.new("RGB", (40, 32), color).save(path)
    return paths


@pytest.fixture
def prompts(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that the model receives; it always answers "red car" and stops as the template says."""
    received: list[list[int]] = []

    def spy(model: Any, tokenizer: Any, rows: list[list[int]], pixels: Any, settings: Any, **kept: Any) -> Any:
        received.extend(rows)
        assert (kept["image_features"] is not None) == (IMAGE_TOKEN_ID in rows[0])
        says = iter(tokenizer(" red car\n### Human: what", add_special_tokens=False)["input_ids"])
        monkeypatch.setattr(generation, "_sample", lambda *_: torch.tensor([next(says)]))
        return generation.stream(model, tokenizer, rows, pixels, settings, **kept)

    monkeypatch.setattr(chat, "stream", spy)
    return received
