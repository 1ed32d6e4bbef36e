"""LoRA directories of the original code: adapters, `non_lora_trainables.bin` (the projector), and the base beneath.

The adapters are merged as the tensors are read, W + scale * B A in fp32, so a 13B model is merged without ever being
whole in memory; the result equals peft's `merge_and_unload`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.description import Opened, in_order
from llava_core.checkpoints.formats.common import (
    LAYOUTS,
    Layout,
    Options,
    open_language_model,
    renamed,
    with_tower_settings,
)
from llava_core.checkpoints.formats.original import describe_original, from_original, mm_config
from llava_core.checkpoints.tensors import Lazy, has_file, inside, open_file, read_settings
from llava_core.runtime import CheckpointError, located, shown

_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_KNOWN = frozenset({  # of peft's settings those that do not change what merging by W + scale * B A means
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "task_type", "peft_version",
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size",
})  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")
}  # fmt: skip


def _found(path: Path) -> bool:
    return path.is_dir() and has_file(path, "adapter_config.json")


def _bare(name: str) -> str:
    """A tensor's name in the original layout: peft's and the trainer's wrapping taken off."""
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name


def _scale(settings: dict[str, Any], where: str) -> float:
    for name, value in settings.items():
        plain = value in _ONLY[name] if name in _ONLY else name in _KNOWN or not value
        if not plain:
            raise CheckpointError(f"{where}: {name} is {value!r}; only plain LoRA can be merged here; fix: use peft")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{where}: r {rank!r} and lora_alpha {alpha!r} give no scale")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _read(path: Path, options: Options) -> Opened:
    where = path / "adapter_config.json"
    settings = read_settings(path, where.name)
    scale = _scale(settings, shown(where))
    base_name = options.base or settings.get("base_model_name_or_path")
    if not isinstance(base_name, str) or (not options.base and not located(base_name).is_dir()):
        raise CheckpointError(f"{shown(where)}: its base model {base_name!r} is not here; fix: --base DIR")
    if located(base_name).resolve() == path.resolve():
        raise CheckpointError(f"{shown(where)}: names itself as its base; fix: --base DIR")
    base = _base(base_name, options)
    adapters = next((inside(path, name) for name in _ADAPTERS if has_file(path, name)), None)
    if adapters is None:
        raise CheckpointError(f"{shown(path)}: no {_ADAPTERS[0]}; fix: get the adapter whole")
    extra = open_file(inside(path, "non_lora_trainables.bin")) if has_file(path, "non_lora_trainables.bin") else {}
    whole, names, left_out = renamed(extra, lambda name: from_original(_bare(name)), path)
    tensors, all_names = base.tensors | whole, base.names | names
    for name, (a, b) in _pairs(open_file(adapters), adapters, settings["r"]).items():
        if name not in tensors:
            raise CheckpointError(f"{shown(adapters)}: adapts {name}, which the base {shown(base.path)} does not have")
        if tensors[name].shape != (b.shape[0], a.shape[1]):
            raise CheckpointError(
                f"{shown(adapters)}: {name} is {tensors[name].shape} in the base {shown(base.path)}, the adapter's is "
                f"{(b.shape[0], a.shape[1])}; fix: --base with the model that it was trained on"
            )
        tensors[name] = tensors[name].then(lambda w, a=a, b=b: _merged(w, a, b, scale))  # type: ignore[misc]
    notes: list[str] = []
    description = base.description
    if mm_config(path):
        description = describe_original(path, mm_config(path), options, notes)
        words = base.description.language_model["vocab_size"]
        description = replace(description, language_model=description.language_model | {"vocab_size": words})
    if not any(name.startswith("multi_modal_projector.") for name in tensors):
        raise CheckpointError(
            f"{shown(path)}: no projector in non_lora_trainables.bin or the base; the model would be blind; fix: copy "
            "that file from the training output, too"
        )
    description = with_tower_settings(description, notes)
    opened = Opened("lora", path, description, tensors, all_names, left_out, base.tokenizer, notes, uses_base=True)
    return in_order(opened)


def _base(source: str, options: Options) -> Opened:
    """The base: a plain language model, or a whole LLaVA in any layout."""
    from llava_core.checkpoints.open import layout_of, open_checkpoint

    folder = located(source)
    if folder.is_dir() and layout_of(folder) is not None:
        return open_checkpoint(folder, Options(vision_tower=options.vision_tower))
    return open_language_model(source)


def _pairs(adapters: dict[str, Lazy], file: Path, rank: int) -> dict[str, tuple[Lazy, Lazy]]:
    halves: dict[str, dict[str, Lazy]] = {}
    for theirs, tensor in adapters.items():
        name, found, half = theirs.replace(".default.", ".").partition(".lora_")
        if not found or half not in ("A.weight", "B.weight"):
            raise CheckpointError(f"{shown(file)}: {theirs} is no LoRA matrix; it would be lost; use peft to merge it")
        halves.setdefault(from_original(f"{_bare(name)}.weight"), {})[half[0]] = tensor
    for name, pair in halves.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            raise CheckpointError(f"{shown(file)}: {name} lacks one of its two matrices, or their rank is not {rank}")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _merged(weight: torch.Tensor, a: Lazy, b: Lazy, scale: float) -> torch.Tensor:
    return (weight.float() + scale * (b.read().float() @ a.read().float())).to(weight.dtype)


LAYOUTS.register("lora")(Layout("lora", "LoRA adapters with their projector, on a base model", _found, _read))
