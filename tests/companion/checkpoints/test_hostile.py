"""Hostile checkpoints: inspecting, converting and loading refuse them in the same line, which names the checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from checkpoint_fixtures import change_json, edit_tensors

from companion.checkpoints.convert import convert
from companion.checkpoints.inspection import inspect
from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import load, save_checkpoint
from llava_core.checkpoints.open import open_checkpoint
from llava_core.runtime import CheckpointError

DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    root, loaded, options = foreign.model_with_bases(tmp_path_factory.mktemp("hostile"))
    folders = {
        "original": foreign.write_original(loaded, root, root / "original"),
        "hf": foreign.write_hf(loaded, root, root / "hf"), "lora": root / "lora", "projector": root / "projector",
        "llava": save_checkpoint(root / "llava", loaded, "full", template="v1", image_position="first"),
    }  # fmt: skip
    foreign.write_adapter(loaded.model.language_model, root / "lora", options.base or "")
    (root / "lora" / "config.json").write_bytes((root / "original" / "config.json").read_bytes())
    torch.save(foreign.projector_tensors(loaded.model), root / "lora" / "non_lora_trainables.bin")
    (root / "projector").mkdir()
    torch.save(foreign.projector_tensors(loaded.model), root / "projector" / "mm_projector.bin")
    convert(folders["llava"], root / "export", "hf")
    return folders | {"export": root / "export", "bases": root}


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def add_tokens(number: int, first: int = 320) -> Callable[[dict[str, Any]], object]:
    tokens = [{"id": first + k, "content": f"<word {k}>", **TOKEN} for k in range(number)]
    return lambda value: value["added_tokens"].extend(tokens)


def set_value(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(t for n, t in tensors.items() if n.endswith(name)).flatten()[3] = value

    return lambda folder: edit_tensors(folder, change)


def link_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = shutil.move(folder / name, folder.with_name(f"outside-{name}"))
        (folder / name).symlink_to(outside)

    return change


def normalizer(*steps: dict[str, Any]) -> Callable[[Path], None]:
    value = {"type": "Sequence", "normalizers": list(steps)}
    return lambda folder: change_tokenizer(folder, lambda tokenizer: tokenizer.update(normalizer=value))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "token without a row": ("original", lambda f: change_tokenizer(f, add_tokens(1)), "tokenizer knows 321 tokens"),
    "word without a row": (
        "hf", lambda f: change_tokenizer(f, lambda v: v["model"]["vocab"].update(zebra=5000)), "knows 5001 tokens"
    ),
    "NaN": ("original", set_value("o_proj.weight", math.nan), "o_proj.weight holds NaN or infinity"),
    "infinite projector": ("hf", set_value("linear_2.bias", math.inf), "linear_2.bias holds NaN or infinity"),
    "infinite scale": ("lora", lambda f: change_json(f / "adapter_config.json", lora_alpha=math.inf), "not a finite"),
    "large scale": ("lora", lambda f: change_json(f / "adapter_config.json", lora_alpha=10**400), "give no scale"),
    "boolean rank": ("lora", lambda f: change_json(f / "adapter_config.json", r=True), "r True and lora_alpha"),
    "doubling": ("original", normalizer(*[DOUBLING] * 40), "tokenizer.json: its steps may lengthen a text"),
    "tenfold": ("hf", normalizer(*[DOUBLING | {"content": "a" * 10}] * 5), "tokenizer.json: its steps may lengthen"),
    "one long replacement": ("hf", normalizer(DOUBLING | {"content": "a" * 10**6}), "its steps may lengthen a text"),
    "many steps": ("original", normalizer(*[{"type": "NFC"}] * 5000), "tokenizer.json: its steps may lengthen"),
    "many tokens": ("original", lambda f: change_tokenizer(f, add_tokens(10**5)), "adds 100,004 tokens"),
    "many listed tokens": (
        "hf", lambda f: change_json(f / "tokenizer_config.json", extra_special_tokens=["<a>"] * 20_000),
        "tokenizer_config.json: adds 20,000 tokens",
    ),
    "tokenizer elsewhere": ("original", link_out("tokenizer.json"), "tokenizer.json: is a link out of its folder"),
    "its settings elsewhere": ("hf", link_out("tokenizer_config.json"), "tokenizer_config.json: is a link out of"),
    "long system message": ("llava", lambda f: change_json(f / "manifest.json", system="x" * 200_000), "200,000 char"),
    "longer message": ("llava", lambda f: change_json(f / "manifest.json", system="x" * 10**8), "json: larger than"),
    "list of files": ("llava", lambda f: change_json(f / "manifest.json", files=["a"]), "manifest.json: files is"),
    "boolean width": ("llava", lambda f: change_json(f / "manifest.json", d_vision=True), "d_vision is missing or no"),
    "projector": ("llava", lambda f: change_json(f / "manifest.json", projector="mlp9"), "unknown projector 'mlp9'"),
    "template": ("llava", lambda f: change_json(f / "manifest.json", template="v9"), "conversation template 'v9'"),
    "no template": ("llava", lambda f: change_json(f / "manifest.json", template=None), "conversation template 'None'"),
    "no tower": (
        "llava", lambda f: change_json(f / "manifest.json", base={"vision_tower": "a/b"}), "its vision tower cannot"
    ),
    "many rows": (
        "export", lambda f: change_json(f / "config.json", llava_core=json.loads((f / "config.json").read_text())[
            "llava_core"] | {"vocabulary": 10**20}), "config.json: llava_core is not what this project writes",
    ),
    "half a character": ("original", lambda f: change_json(f / "config.json", a="\ud800"), "config.json: holds half"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_all_commands_refuse_a_hostile_checkpoint(name, sound, tmp_path) -> None:
    kind, damage, message = DAMAGES[name]
    folder = tmp_path / "hostile"
    shutil.copytree(sound[kind], folder)
    damage(folder)
    begin = time.monotonic()
    (problem,) = inspect(folder)["problems"]
    assert message in problem
    assert str(folder) in problem
    to = "llava" if kind in ("hf", "export") else "hf"
    for read in (lambda: convert(folder, tmp_path / "out", to), lambda: load(folder)):
        with pytest.raises(CheckpointError) as raised:
            read()
        assert " ".join(str(raised.value).split()) == problem
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - begin < 30  # of three commands


def test_a_chain_of_bases_is_bounded(sound, tmp_path) -> None:
    base = sound["bases"] / "base"
    for k in range(12):
        folder = shutil.copytree(sound["lora"], tmp_path / f"lora{k}")
        change_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
        base = folder
    with pytest.raises(CheckpointError, match=r"lora\d+: .*base model.*; fix: "):
        open_checkpoint(base)


def test_a_projector_by_itself_is_read_or_needs_its_base(sound, tmp_path) -> None:
    """`mm_projector.bin` without config.json."""
    assert inspect(sound["projector"])["problems"] == []
    for to in ("projector", "original"):
        with pytest.raises(CheckpointError, match=r"projector: has no .*language model; fix: --base"):
            convert(sound["projector"], tmp_path / to, to)
    options = Options(str(sound["bases"] / "base"), str(sound["bases"] / "clip"))
    convert(sound["projector"], tmp_path / "out", "projector", options)
    assert inspect(tmp_path / "out")["problems"] == []


def test_a_tower_that_is_not_here_is_named(sound, tmp_path) -> None:
    folder = shutil.copytree(sound["original"], tmp_path / "original")
    change_json(folder / "config.json", mm_vision_tower="someone/a-tower")
    with pytest.raises(CheckpointError, match=r"/original: its vision tower someone/a-tower is not here.*; fix: "):
        convert(folder, tmp_path / "out", "llava")


def test_a_projector_with_a_second_layer_of_another_shape_is_refused(sound, tmp_path) -> None:
    for k, shape in enumerate([(30_000, 0), (), (32,), (32, 33)]):
        folder = shutil.copytree(sound["hf"], tmp_path / f"hf{k}")
        edit_tensors(folder, lambda t, s=shape: t.update({"multi_modal_projector.linear_2.weight": torch.zeros(s)}))
        (problem,) = inspect(folder)["problems"]
        assert f"hf{k}" in problem
        assert "linear_2" in problem
