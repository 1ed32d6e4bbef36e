"""Exports read by transformers of 2025 and 2026, each in a process of its own: same ids, logits and greedy tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign
import hf_client
import numpy as np
import pytest
import tiny
import torch
from checkpoint_fixtures import change_json, sentencepiece_model  # noqa: F401 - fixtures
from PIL import Image

from companion.checkpoints.convert import convert
from llava_core.checkpoints.load import Loaded, build, load, save_checkpoint
from llava_core.constants import IMAGE_TOKEN_ID
from llava_core.inference import prompt_ids
from llava_core.models.generation import GenerationSettings, generate_tokens
from llava_core.runtime import ROOT

TEXTS = [
    "what color is the car", "  two spaces", "a\nline", "tabs\tand  runs   of spaces ", "", "red\n\n### Human: dog",
    "çà 犬 🐶",
]  # fmt: skip
DIALOGUES: list[list[list[str]]] = [
    [["what color is the car"]], [["  what\ndog"]], [["is the car red", "red. "], ["and the  dog"]],
]  # fmt: skip
NEW = 8


def _older(version: str) -> Any:
    folder = ROOT / ".interop" / version
    missing = pytest.mark.skipif(not folder.is_dir(), reason=f"no transformers {version}; run `make interop`")
    return pytest.param(folder, marks=[pytest.mark.interop, missing], id=version)


CLIENTS = [pytest.param(None, id="installed"), _older("4.57"), _older("4.51")]


def linear_rope(root: Path) -> Path:
    """A v1 checkpoint whose rotary embedding is scaled, with another base frequency."""
    llm, _ = tiny.base_models(root)
    config = {"rope_theta": 5000.0, "rope_type": "linear", "factor": 4.0}
    change_json(Path(llm) / "config.json", rope_parameters=config)
    (Path(llm) / "manifest.json").unlink()
    loaded = foreign.random_model(root, "mlp2x_gelu")
    return save_checkpoint(root / "c", loaded, "full", template="v1", image_position="first")


def paper(root: Path) -> Path:
    loaded = foreign.random_model(root, delimiters=True)
    usage = {"image_position": "last", "image_delimiters": foreign.DELIMITERS}
    return save_checkpoint(root / "c", loaded, "full", template="v0", **usage)


def miniature(root: Path) -> Path:
    bases = (str(ROOT / "models" / "mini" / name) for name in ("llm-7b", "clip"))
    loaded = build(*bases, torch.float32)
    return save_checkpoint(root / "c", loaded, "full", template="v0", image_position="first")


KINDS = {kind.__name__: kind for kind in (linear_rope, paper, miniature)}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory) -> tuple[Loaded, Path]:
    root = tmp_path_factory.mktemp(request.param)
    source = KINDS[request.param](root)
    convert(source, root / "hf", "hf")
    return load(source), root / "hf"


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_see_our_ids_logits_and_tokens(exported, client: Path | None, tmp_path) -> None:
    ours, folder = exported
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    request = {"texts": TEXTS, "questions": DIALOGUES, "image": str(tmp_path / "image.png"), "new": NEW}
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, hf_client.__file__, folder, tmp_path / "request.json", tmp_path / "answer.npz"]
    path = os.pathsep.join(map(str, filter(None, (client, os.environ.get("PYTHONPATH")))))
    done = subprocess.run(
        list(map(str, command)), env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = dict(np.load(tmp_path / "answer.npz"))
    assert client is None or str(theirs["version"]).startswith(client.name)
    image_id = json.loads((folder / "config.json").read_text())["image_token_index"]
    for k, text in enumerate(TEXTS):
        assert theirs[f"text{k}"].tolist() == ours.tokenizer(text)["input_ids"]
    pixels = torch.from_numpy(ours.processor(image))[None]
    for k, dialogue in enumerate(DIALOGUES):
        turns = [(question, *(answer or [None])) for question, *answer in dialogue]
        ids = prompt_ids(ours, turns, has_image=True)
        assert [IMAGE_TOKEN_ID if t == image_id else t for t in theirs[f"ids{k}"].tolist()] == ids
        with torch.no_grad():
            logits = ours.model(torch.tensor([ids]), pixels).logits[0].numpy()
        np.testing.assert_allclose(theirs[f"logits{k}"][:, : logits.shape[1]], logits, rtol=1e-5, atol=1e-5)
        tokens = [int(t[0]) for t in generate_tokens(ours.model, [ids], pixels, GenerationSettings(NEW))]
        greedy = theirs[f"greedy{k}"].tolist()
        assert greedy == tokens[: len(greedy)]
