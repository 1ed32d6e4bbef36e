"""Fixtures of the checkpoint tests: a random model with its base models, and a checkpoint in each foreign format."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import foreign
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llava_core.checkpoints.describe import Options
from llava_core.checkpoints.load import Loaded, build, save_checkpoint
from llava_core.config import AdapterConfig
from llava_core.train.adapters import add_adapters

BITS = [None, pytest.param(4, marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes"))]
"""None and 4: LoRA and QLoRA."""


def adapted(bases: tuple[str, str], bits: int | None = None, dtype: torch.dtype = torch.float32) -> Loaded:
    """A model with adapters whose second matrices are random, as after training."""
    torch.manual_seed(1)
    loaded = build(*bases, dtype, bits=bits)
    loaded.model.set_trainable(["projector", "language_model"])
    add_adapters(loaded.model, AdapterConfig(r=4, alpha=8), seed=3)
    for name, parameter in loaded.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return loaded


def needed_options(options: Options, name: str) -> Options:
    """Options for what a format does not contain; unused ones are refused."""
    return options if name in ("mmpretrain", "projector") else Options()


def write_checkpoint(name: str, loaded: Loaded, root: Path, folder: Path) -> Path:
    """Write a checkpoint in the named format: `original`, `original with tower`, `mmpretrain`, `hf`, `llava`, ..."""
    if name == "llava":
        return save_checkpoint(folder, loaded, "full", template="v1", image_position="first")
    if name == "hf":
        return foreign.write_hf(loaded, root, folder)
    if name == "mmpretrain":
        return foreign.write_mmpretrain(loaded, folder)
    if name == "projector":  # its language model is in the folder `base`
        folder.mkdir()
        torch.save(foreign.projector_tensors(loaded.model), folder / "mm_projector.bin")
        return folder
    return foreign.write_original(loaded, root, folder, shards=3, tower=name.endswith("tower"))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint in one file."""
    (file,) = folder.glob("*.safetensors") if list(folder.glob("*.safetensors")) else folder.glob("*.[bp]*[nh]")
    read = load_file if file.suffix == ".safetensors" else lambda f: torch.load(f, weights_only=True)
    tensors = read(file)
    inner = tensors.get("state_dict", tensors)
    change(inner)
    if file.suffix == ".safetensors":
        save_file(inner, file)
    else:
        torch.save(tensors, file)


def change_json(file: Path, **fields: object) -> None:
    """Replace fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope="module", params=["linear", "mlp2x_gelu"])
def world(request, tmp_path_factory) -> tuple[Path, Loaded, Options]:
    """A folder with base models, a random model on them, and the options that name the bases."""
    return foreign.model_with_bases(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def intact(world, tmp_path_factory) -> dict[str, Path]:
    """One intact checkpoint of each foreign format, in one file."""
    root, loaded, _ = world
    folder = tmp_path_factory.mktemp("intact")
    paths = {name: write_checkpoint(name, loaded, root, folder / name) for name in ("mmpretrain", "hf")}
    return paths | {"original": foreign.write_original(loaded, root, folder / "original")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("releases")


@pytest.fixture(scope="module")
def loaded(root: Path) -> Loaded:
    """A random model on base models in `root`."""
    return foreign.random_model(root)


@pytest.fixture
def original(loaded, root, tmp_path) -> Path:
    """A checkpoint in the original format, in two shards."""
    return foreign.write_original(loaded, root, tmp_path / "original", shards=2)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a tiny language model and a tiny CLIP model."""
    return tiny.base_models(tmp_path_factory.mktemp("bases"))
