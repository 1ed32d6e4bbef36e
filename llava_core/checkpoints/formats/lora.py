"""LoRA adapters in peft's files, and the LoRA folders of the original code with `non_lora_trainables.bin` (projector).

Adapters are merged as tensors are read, W + scale * B A in fp32; the result equals peft's `merge_and_unload`. After
QLoRA, W is the weight as it was in training: rounded to NF4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.describe import Adapter, Checkpoint, Options
from llava_core.checkpoints.files import contained_file, error_at, has_file, read_config
from llava_core.checkpoints.formats.common import CheckpointFormat, with_tower_settings
from llava_core.checkpoints.formats.names import export_name, import_name, rename_tensors
from llava_core.checkpoints.formats.original import RULES, from_original, mm_config, read_description
from llava_core.checkpoints.tensors import LazyTensor, open_file, write_file
from llava_core.runtime import resolve_dtype, sha256_file, user_path, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IN_LANGUAGE_MODEL = (("language_model.", ""),)
IN_TRANSFORMERS = (("language_model.model.", "model.language_model."),)
"""Rules of the modules' names in a language model by itself, and in transformers' LLaVA."""

_IRRELEVANT = frozenset({  # peft's settings that do not change the meaning of W + scale * B A
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "task_type", "peft_version",
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size",
})  # fmt: skip
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")
}  # fmt: skip


def detect(path: Path) -> bool:
    return path.is_dir() and has_file(path, CONFIG)


def base_of(path: Path, options: Options) -> str:
    """Return the folder of the model that the adapters were trained on: a language model, or a LLaVA of any format."""
    where = path / CONFIG
    source = options.base or read_config(path, CONFIG).get("base_model_name_or_path")
    if not isinstance(source, str) or (not options.base and not user_path(source).is_dir()):
        raise error_at(where, f"its base model {source!r} is not here; fix: --base DIR")
    if user_path(source).resolve() == path.resolve():
        raise error_at(where, "names itself as its base; fix: --base DIR")
    return source


def read(path: Path, options: Options, base: Checkpoint) -> Checkpoint:
    adapter = open_adapter(path)
    trained = "non_lora_trainables.bin"
    extra = open_file(contained_file(path, trained)) if has_file(path, trained) else {}
    replaced, names, left_out = rename_tensors(extra, lambda name: from_original(_unwrapped(name)), path)
    tensors = base.tensors | replaced
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
        base.tokenizer, notes, uses_base=True, adapter=adapter,
    )  # fmt: skip


def open_adapter(path: Path) -> Adapter:
    """Open the adapter of a folder; its settings and the pairs of its matrices are checked."""
    settings = read_config(path, CONFIG)
    _scale(settings, path / CONFIG)
    file = next((contained_file(path, name) for name in (WEIGHTS, "adapter_model.bin") if has_file(path, name)), None)
    if file is None:
        raise error_at(path, f"no {WEIGHTS}; fix: get the complete adapter")
    return new_adapter(settings, open_file(file), file)


def write_adapter(adapter: Adapter, folder: Path, rules: Iterable[tuple[str, str]], **settings: Any) -> dict[str, str]:
    """Write an adapter as peft does, for a model whose modules the rules name; return file -> SHA-256."""
    write_json(folder / CONFIG, {**adapter.settings, **settings})
    tensors = {
        f"base_model.model.{export_name(name.removesuffix('.weight'), rules)}.lora_{letter}.weight": tensor
        for name, pair in adapter.matrices.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    return {WEIGHTS: write_file(folder / WEIGHTS, tensors), CONFIG: sha256_file(folder / CONFIG)}


def merge(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its adapter, if it has one, merged into the weights when they are read."""
    adapter = checkpoint.adapter
    if adapter is None:
        return checkpoint
    tensors, scale = dict(checkpoint.tensors), _scale(adapter.settings, adapter.path)
    usage = dict(checkpoint.description.usage)
    nf4 = usage.pop("base_nf4", None)
    if nf4 is not None and find_spec("bitsandbytes") is None:
        raise error_at(checkpoint.path, "trained on weights in 4 bits (NF4); fix: pip install bitsandbytes")
    for name, (a, b) in adapter.matrices.items():
        if name not in tensors:
            raise error_at(adapter.path, f"adapts {name}, which its base does not have; fix: --base DIR")
        if tensors[name].shape != (b.shape[0], a.shape[1]):
            shapes = f"{(b.shape[0], a.shape[1])}, in its base {tensors[name].shape}"
            raise error_at(adapter.path, f"{name} is {shapes}; fix: --base with the model that it was trained on")
        tensors[name] = tensors[name].map(partial(_merge, a=a, b=b, scale=scale, nf4=nf4))
    base = "its base" if nf4 is None else "its base, rounded to NF4 as in training"
    notes = [*checkpoint.notes, f"LoRA adapter of rank {adapter.settings['r']} merged into {base}"]
    description = replace(checkpoint.description, usage=usage)
    return replace(checkpoint, description=description, tensors=tensors, adapter=None, notes=notes)


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


def new_adapter(settings: dict[str, Any], tensors: Mapping[str, LazyTensor], path: Path) -> Adapter:
    """Return the adapter of peft's settings and of tensors under peft's names; each A must have its B."""
    matrices, rank = dict[str, dict[str, LazyTensor]](), settings["r"]
    for theirs, tensor in tensors.items():
        name, separator, matrix = theirs.replace(".default.", ".").partition(".lora_")
        if not separator or matrix not in ("A.weight", "B.weight"):
            raise error_at(path, f"{theirs} is no LoRA matrix; it would be lost; use peft to merge it")
        ours = import_name(f"{_unwrapped(name)}.weight", (*IN_TRANSFORMERS, *RULES))
        matrices.setdefault(ours, {})[matrix[0]] = tensor
    for name, pair in matrices.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            raise error_at(path, f"{name} lacks one of its two matrices, or their rank is not {rank}")
    return Adapter(settings, {name: (pair["A"], pair["B"]) for name, pair in matrices.items()}, path)


def _merge(weight: torch.Tensor, a: LazyTensor, b: LazyTensor, scale: float, nf4: str | None) -> torch.Tensor:
    if nf4 is not None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = dequantize_4bit(*quantize_4bit(weight.to(resolve_dtype(nf4)), quant_type="nf4"))
    return (weight.float() + scale * (b.read().float() @ a.read().float())).to(weight.dtype)


FORMAT = CheckpointFormat("lora", detect, read, base_of)
