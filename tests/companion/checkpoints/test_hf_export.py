"""Exports read by transformers of 2025 and 2026, each in a process of its own: same ids, logits and greedy tokens."""

from __future__ import annotations

import json
import os
import shutil
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
from checkpoint_fixtures import change_json
from PIL import Image
from sentencepiece_models import small_model
from transformers import LlamaForCausalLM

from companion.checkpoints.convert import convert
from companion.checkpoints.hf_export import rope_fields
from llava_core.checkpoints.load import Loaded, build, load, save_checkpoint
from llava_core.checkpoints.tokenizer import open_tokenizer
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
    return pytest.param(folder, marks=[pytest.mark.interop, pytest.mark.slow, missing], id=version)


CLIENTS = [pytest.param(None, id="installed"), _older("4.57"), _older("4.51")]


def scaled(root: Path, **rope: Any) -> Loaded:
    """A model whose rotary embedding is scaled, with another base frequency."""
    tiny.base_models(root)
    change_json(root / "llm" / "config.json", rope_parameters={"rope_theta": 5000.0, **rope})
    (root / "llm" / "manifest.json").unlink()
    return foreign.random_model(root, "mlp2x_gelu")


def linear_rope(root: Path) -> Path:
    loaded = scaled(root, rope_type="linear", factor=4.0)
    return save_checkpoint(root / "c", loaded, "full", template="v1", image_position="first")


def tied(root: Path) -> Path:
    """Word embeddings in one tensor, and a rotary embedding as Llama 3's."""
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    loaded = scaled(root, rope_type="llama3", **rope)
    llm = loaded.model.language_model
    llm.config.tie_word_embeddings, llm.lm_head.weight = True, llm.model.embed_tokens.weight
    return save_checkpoint(root / "c", loaded, "full", template="v1_hf", image_position="first")


def paper(root: Path) -> Path:
    loaded = foreign.random_model(root, delimiters=True)
    usage = {"image_position": "last", "image_delimiters": foreign.DELIMITERS}
    return save_checkpoint(root / "c", loaded, "full", template="v0", **usage)


def padded_images(root: Path) -> Path:
    loaded = foreign.random_model(root)
    loaded.processor = type(loaded.processor).from_dict(loaded.processor.to_dict() | {"mode": "pad"})
    return save_checkpoint(root / "c", loaded, "full", template="v0_exact_eval", image_position="last")


def miniature(root: Path) -> Path:
    loaded = build(*(str(ROOT / "models" / "mini" / name) for name in ("llm-7b", "clip")), torch.float32)
    return save_checkpoint(root / "c", loaded, "full", template="v0", image_position="first")


def vicuna(root: Path, **tokenizer_config: Any) -> Path:
    """A v1 release in the original format with a `tokenizer.model` alone, whose tokenizer adds the BOS token."""
    tiny.base_models(root)
    for file in (root / "llm").glob("*"):
        if file.name.startswith(("tokenizer", "manifest")):
            file.unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (root / "llm" / "tokenizer_config.json").write_text(json.dumps(special | tokenizer_config))
    small_model(root / "llm" / "tokenizer.model")
    model = LlamaForCausalLM.from_pretrained(root / "llm")
    model.resize_token_embeddings(len(open_tokenizer(root / "llm")))
    model.save_pretrained(root / "llm")
    path = foreign.write_original(foreign.random_model(root), root, root / "c")
    shutil.copyfile(root / "llm" / "tokenizer.model", path / "tokenizer.model")
    return path


def vicuna_not_legacy(root: Path) -> Path:
    return vicuna(root, legacy=False, tokenizer_class="LlamaTokenizer")


def delimiters_not_legacy(root: Path) -> Path:
    vicuna(root, legacy=False)
    usage = {"image_position": "first", "image_delimiters": foreign.DELIMITERS}
    return save_checkpoint(root / "d", foreign.random_model(root, delimiters=True), "full", template="v1", **usage)


def vicuna_with_eos(root: Path) -> Path:
    """Its tokenizer adds EOS to each text, which would end a prompt."""
    return vicuna(root, add_eos_token=True)


_ALL = (
    linear_rope, tied, paper, padded_images, miniature, vicuna, vicuna_not_legacy, delimiters_not_legacy,
    vicuna_with_eos,
)  # fmt: skip
KINDS = {kind.__name__: kind for kind in _ALL}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory) -> tuple[Loaded, Path]:
    root = tmp_path_factory.mktemp(request.param)
    source = KINDS[request.param](root)
    convert(source, root / "hf", "hf", verify=True)
    return load(source), root / "hf"


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_see_our_ids_logits_and_tokens(exported, client: Path | None, tmp_path) -> None:
    ours, folder = exported
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    request = {"texts": TEXTS, "questions": DIALOGUES, "image": str(tmp_path / "image.png"), "new": NEW}
    if client is None:
        hf_client.main(str(folder), request, str(tmp_path / "answer.npz"))
    else:
        (tmp_path / "request.json").write_text(json.dumps(request))
        files = (hf_client.__file__, folder, tmp_path / "request.json", tmp_path / "answer.npz")
        path = os.pathsep.join(filter(None, (str(client), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"PYTHONPATH": path}
        done = subprocess.run([sys.executable, *map(str, files)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    theirs = dict(np.load(tmp_path / "answer.npz"))
    assert client is None or str(theirs["version"]).startswith(client.name)
    image_id = json.loads((folder / "config.json").read_text())["image_token_index"]
    for k, text in enumerate(TEXTS):
        ids = ours.tokenizer(text)["input_ids"]
        assert theirs[f"text{k}"].tolist() == (ids[:-1] if ids[-1:] == [ours.tokenizer.eos_token_id] else ids)
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


def test_files_have_what_other_clients_read(exported) -> None:
    _, folder = exported
    config, tokenizer = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "tokenizer_config"))
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]  # vLLM
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"extra_special_tokens", "backend", "is_local"} & set(tokenizer)
    source = folder / "tokenizer" / "tokenizer.model"
    assert (folder / "tokenizer.model").exists() == source.exists()  # llama.cpp
    assert not source.exists() or (folder / "tokenizer.model").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("to", ["hf", "original"])
def test_rotary_embedding_has_the_fields_of_transformers_4(to, tmp_path) -> None:
    convert(linear_rope(tmp_path), tmp_path / to, to)
    config = json.loads((tmp_path / to / "config.json").read_text())
    config = config.get("text_config", config)
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}


def test_unscaled_rotary_embedding_needs_no_scaling() -> None:
    rope = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert rope_fields({"rope_parameters": rope}) == {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
