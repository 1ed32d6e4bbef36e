"""LoRA folders of the original code: adapters, `non_lora_trainables.bin` (the projector), and the base model's name.

Adapters are merged as tensors are read, W + scale * B A in fp32; the result equals peft's `merge_and_unload`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.describe import Checkpoint, Options
from llava_core.checkpoints.files import contained_file, error_at, has_file, read_config
from llava_core.checkpoints.formats.common import CheckpointFormat, with_tower_settings
from llava_core.checkpoints.formats.names import rename_tensors
from llava_core.checkpoints.formats.original import from_original, mm_config, read_description
from llava_core.checkpoints.tensors import LazyTensor, open_file
from llava_core.runtime import display_path, user_path

_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_IRRELEVANT = frozenset({  # peft's settings that do not change the meaning of W + scale * B A
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "task_type", "peft_version",
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size",
})  # fmt: skip
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")
}  # fmt: skip


def detect(path: Path) -> bool:
    return path.is_dir() and has_file(path, "adapter_config.json")


def base_of(path: Path, options: Options) -> str:
    """Return the folder of the model that the adapters were trained on: a language model, or a LLaVA of any format."""
    where = path / "adapter_config.json"
    source = options.base or read_config(path, "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(source, str) or (not options.base and not user_path(source).is_dir()):
        raise error_at(where, f"its base model {source!r} is not here; fix: --base DIR")
    if user_path(source).resolve() == path.resolve():
        raise error_at(where, "names itself as its base; fix: --base DIR")
    return source


def read(path: Path, options: Options, base: Checkpoint) -> Checkpoint:
    settings = read_config(path, "adapter_config.json")
    scale = _scale(settings, path / "adapter_config.json")
    adapters = next((contained_file(path, name) for name in _ADAPTERS if has_file(path, name)), None)
    if adapters is None:
        raise error_at(path, f"no {_ADAPTERS[0]}; fix: get the complete adapter")
    trained = "non_lora_trainables.bin"
    extra = open_file(contained_file(path, trained)) if has_file(path, trained) else {}
    replaced, names, left_out = rename_tensors(extra, lambda name: from_original(_unwrapped(name)), path)
    tensors = base.tensors | replaced
    for name, (a, b) in _pairs(open_file(adapters), adapters, settings["r"]).items():
        if name not in tensors:
            raise error_at(adapters, f"adapts {name}, which the base {display_path(base.path)} does not have")
        if tensors[name].shape != (b.shape[0], a.shape[1]):
            shapes = f"{(b.shape[0], a.shape[1])}, in the base {display_path(base.path)} {tensors[name].shape}"
            raise error_at(adapters, f"{name} is {shapes}; fix: --base with the model that it was trained on")
        tensors[name] = tensors[name].map(partial(_merge, a=a, b=b, scale=scale))
    if not any(name.startswith("multi_modal_projector.") for name in tensors):
        raise error_at(path, f"no projector, so the model could not use an image; fix: copy {trained} here, too")
    notes: list[str] = []
    description = base.description
    if mm_config(path):
        rows = description.language_model["vocab_size"]
        description = read_description(path, mm_config(path), options, notes)
        description = replace(description, language_model=description.language_model | {"vocab_size": rows})
    return Checkpoint(
        FORMAT.name, path, with_tower_settings(description, notes), tensors, base.names | names, left_out,
        base.tokenizer, notes, uses_base=True,
    )  # fmt: skip


def _scale(settings: dict[str, Any], where: Path) -> float:
    for name, value in settings.items():
        plain = value in _SUPPORTED[name] if name in _SUPPORTED else name in _IRRELEVANT or not value
        if not plain:
            raise error_at(where, f"{name} is {value!r}; only plain LoRA can be merged here; fix: use peft")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise error_at(where, f"r {rank!r} and lora_alpha {alpha!r} give no scale")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _unwrapped(name: str) -> str:
    """Return a tensor's name in the original format, without the prefixes of peft and of the trainer."""
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name


def _pairs(adapters: dict[str, LazyTensor], file: Path, rank: int) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """Return the matrices A and B of each adapted tensor, under our names."""
    matrices: dict[str, dict[str, LazyTensor]] = {}
    for theirs, tensor in adapters.items():
        name, separator, matrix = theirs.replace(".default.", ".").partition(".lora_")
        if not separator or matrix not in ("A.weight", "B.weight"):
            raise error_at(file, f"{theirs} is no LoRA matrix; it would be lost; use peft to merge it")
        matrices.setdefault(from_original(f"{_unwrapped(name)}.weight"), {})[matrix[0]] = tensor
    for name, pair in matrices.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            raise error_at(file, f"{name} lacks one of its two matrices, or their rank is not {rank}")
    return {name: (pair["A"], pair["B"]) for name, pair in matrices.items()}


def _merge(weight: torch.Tensor, a: LazyTensor, b: LazyTensor, scale: float) -> torch.Tensor:
    return (weight.float() + scale * (b.read().float() @ a.read().float())).to(weight.dtype)


FORMAT = CheckpointFormat("lora", detect, read, base_of)
