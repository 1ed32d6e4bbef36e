"""LoRA adapters in peft's files, and the LoRA folders of the original code with `non_lora_trainables.bin` (projector).

Adapters are merged as tensors are read, W + scale * B A in fp32; the result equals peft's `merge_and_unload`. After
QLoRA, W is the weight as it was in training: rounded to NF4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.describe import IMAGE_DELIMITERS, Adapter, Checkpoint, Options
from llava_core.checkpoints.files import contained_file, error_at, has_file, read_config
from llava_core.checkpoints.formats.common import (
    EMBEDDINGS,
    PROJECTOR,
    CheckpointFormat,
    one_layer,
    with_tower_settings,
)
from llava_core.checkpoints.formats.names import export_name, rename_tensors
from llava_core.checkpoints.formats.original import mm_config, read_description
from llava_core.checkpoints.tensors import LazyTensor, check_finite, open_file, write_file
from llava_core.checkpoints.tokenizer import tokenizer_folder
from llava_core.runtime import resolve_dtype, sha256_file, user_path, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IN_LANGUAGE_MODEL = (("language_model.", ""),)
IN_TRANSFORMERS = (("language_model.model.", "model.language_model."),)
"""Rules of the modules' names in a language model by itself, and in transformers' LLaVA."""

_NAMES = (  # in a language model, in the original code, and in transformers' LLaVA before and since 4.52
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower."),
    (r"(model\.)?multi_modal_projector\.linear_1\.", "multi_modal_projector.0."),
    (r"(model\.)?multi_modal_projector\.linear_2\.", "multi_modal_projector.2."),
    (r"model\.mm_projector\.", "multi_modal_projector."),
    (r"model\.language_model\.", "language_model.model."),
    (r"(?=(model|lm_head)\.)", "language_model."),
)
_MERGE = "fix: merge it with peft (merge_and_unload, save_pretrained) and open the result"

_IRRELEVANT = frozenset({  # peft's settings that do not change the meaning of W + scale * B A
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "task_type", "peft_version",
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size", "modules_to_save", "save_embedding_layers",
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
    adapter, config = open_adapter(path), mm_config(path)
    trained = "non_lora_trainables.bin"
    extra = open_file(contained_file(path, trained)) if has_file(path, trained) else {}
    replaced, names, left_out = rename_tensors(extra, _our_name, path)
    if any(name.startswith("vision_tower.") for name in adapter.matrices) and "vision_tower" not in base.parts:
        base = base.require("vision_tower")
    tensors = base.tensors | replaced
    if not any(name.startswith(PROJECTOR) for name in tensors | adapter.replaced):
        raise error_at(path, f"no projector, so the model could not use an image; fix: copy {trained} here, too")
    description, notes, tokenizer, added = base.description, list(base.notes), base.tokenizer, base.added_tokens
    if config:
        tokenizer, notes = tokenizer_folder(path) or tokenizer, []
        table = (tensors | adapter.replaced).get(EMBEDDINGS[0])
        rows = table.shape[0] if table is not None and table.shape else 0
        if tokenizer == base.tokenizer:
            added += _added_tokens(config, base, rows, path)
        pad = "[PAD]" if "[PAD]" in added else None
        description = read_description(path, config, options, notes, tensors, tokenizer, pad)
        description = replace(description, language_model=description.language_model | {"vocab_size": rows})
    elif any(name in EMBEDDINGS and t.shape != base.tensors.get(name, t).shape for name, t in adapter.replaced.items()):
        raise error_at(adapter.path, f"has word embeddings of another vocabulary than its base; {_MERGE}")
    description = with_tower_settings(description, notes, path, tensors)
    layers = (f"{PROJECTOR}0.", f"{PROJECTOR}2.")
    if description.projector == "linear" and any(n.startswith(layers) for n in (*adapter.matrices, *adapter.replaced)):
        tensors = _as_two_layers(tensors, path)
    return Checkpoint(
        FORMAT.name, path, description, tensors, base.names | names, left_out, tokenizer, notes, uses_base=True,
        adapter=adapter, added_tokens=added,
    )  # fmt: skip


def _added_tokens(config: dict[str, Any], base: Checkpoint, rows: int, path: Path) -> tuple[str, ...]:
    """Return the tokens that the training added to its base's tokenizer, in their order; `rows` are the embeddings."""
    same_rows = rows == base.description.language_model["vocab_size"]
    if same_rows and not config.get("mm_use_im_start_end"):
        return ()
    vocabulary = base.open_tokenizer().get_vocab()
    tokens = ["<im_patch>"] if config.get("mm_use_im_patch_token", True) else []
    tokens += IMAGE_DELIMITERS if config.get("mm_use_im_start_end") else []
    new = [token for token in tokens if token not in vocabulary]
    if same_rows and not new:
        return ()
    if rows == len(vocabulary) + len(new) + 1 and "[PAD]" not in vocabulary:  # v0 adds a padding token first
        new = ["[PAD]", *new]
    if rows != len(vocabulary) + len(new):
        problem = f"word embeddings of {rows} rows for {len(vocabulary)} tokens of its base and {len(new)} new ones"
        raise error_at(path, f"{problem}; fix: copy its tokenizer here, or the complete non_lora_trainables.bin")
    return tuple(new)


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
    tensors, scale = checkpoint.tensors | adapter.replaced, _scale(adapter.settings, adapter.path)
    usage = dict(checkpoint.description.usage)
    nf4 = usage.pop("base_nf4", None)
    if nf4 is not None and find_spec("bitsandbytes") is None:
        raise error_at(checkpoint.path, "trained on weights in 4 bits (NF4); fix: pip install bitsandbytes")
    for name, (a, b) in adapter.matrices.items():
        if name not in tensors:
            raise error_at(adapter.path, f"adapts {name}, which its base does not have; fix: --base DIR")
        if tensors[name].shape != (b.shape[0], a.shape[1]):
            shapes = f"{(b.shape[0], a.shape[1])}, in its base {tensors[name].shape}"
            fix = _MERGE if name in EMBEDDINGS else "fix: --base with the model that it was trained on"
            raise error_at(adapter.path, f"{name} is {shapes}; {fix}")
        merged = tensors[name].map(partial(_merge, a=a, b=b, scale=scale, nf4=nf4))
        tensors[name] = merged.map(partial(check_finite, name=f"{name}, merged,", path=adapter.path))
    if f"{PROJECTOR}2.weight" in tensors and checkpoint.description.projector == "linear":
        tensors = one_layer(tensors, adapter.path)
    base = "its base" if nf4 is None else "its base, rounded to NF4 as in training"
    notes = [*checkpoint.notes, f"LoRA adapter of rank {adapter.settings['r']} merged into {base}"]
    description = replace(checkpoint.description, usage=usage)
    return replace(checkpoint, description=description, tensors=tensors, adapter=None, notes=notes)


def _scale(settings: dict[str, Any], where: Path) -> float:
    for name, value in settings.items():
        plain = value in _SUPPORTED[name] if name in _SUPPORTED else name in _IRRELEVANT or not value
        if not plain:
            raise error_at(where, f"{name} is {value!r}; only plain LoRA can be merged here; {_MERGE}")
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    sound = isinstance(rank, int) and 1 <= rank <= 2**16 and isinstance(alpha, int | float) and abs(alpha) <= 1e6
    if not sound or isinstance(rank, bool) or isinstance(alpha, bool):
        raise error_at(where, f"r {rank!r} and lora_alpha {alpha!r} give no scale; fix: copy the adapter again")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _our_name(theirs: str) -> str:
    """Return our name for one of peft's, or of the original code's without peft's prefix."""
    theirs = re.sub(r"^(base_model\.model\.|model\.(?=model\.|lm_head\.))", "", theirs)
    for pattern, ours in _NAMES:
        name, found = re.subn(f"^{pattern}", ours, theirs)
        if found:
            return name
    return theirs


def new_adapter(settings: dict[str, Any], tensors: Mapping[str, LazyTensor], path: Path) -> Adapter:
    """Return the adapter of peft's settings and of tensors under peft's names; each A must have its B."""
    matrices, replaced, rank = dict[str, dict[str, LazyTensor]](), dict[str, LazyTensor](), settings["r"]
    for theirs, tensor in tensors.items():
        name, separator, matrix = theirs.replace(".default.", ".").partition(".lora_")
        if not separator:
            replaced[_our_name(re.sub(r"\.(base_layer|modules_to_save)\.", ".", name))] = tensor
        elif matrix in ("A.weight", "B.weight"):
            matrices.setdefault(_our_name(f"{name}.weight"), {})[matrix[0]] = tensor
        else:
            raise error_at(path, f"{theirs} is no matrix of a linear layer's LoRA; {_MERGE}")
    for name, pair in matrices.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[:-1] != (rank,) or pair["B"].shape[1:] != (rank,):
            raise error_at(path, f"{name} lacks one of its two matrices, or their rank is not {rank}")
    saved = settings.get("modules_to_save") or []
    for module in saved if isinstance(saved, list) else [saved]:
        if not any(f".{module}." in f".{theirs}" for theirs in tensors if ".lora_" not in theirs):
            raise error_at(path, f"lacks {module}, one of its modules_to_save; fix: get the complete adapter")
    return Adapter(settings, {name: (pair["A"], pair["B"]) for name, pair in matrices.items()}, path, replaced)


def _as_two_layers(tensors: Mapping[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Return tensors with a linear projector as transformers' LLaVA has it, so that both layers can be adapted."""
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(PROJECTOR)}
    weight, bias = tensors.get(f"{PROJECTOR}weight"), tensors.get(f"{PROJECTOR}bias")
    if weight is None or bias is None or len(bias.shape) != 1:
        raise error_at(path, "its base has no complete linear projector; fix: --base with the model of its training")
    eye, zeros = torch.eye(*bias.shape, dtype=weight.dtype), torch.zeros(bias.shape, dtype=bias.dtype)
    second = {f"{PROJECTOR}2.weight": LazyTensor.of(eye), f"{PROJECTOR}2.bias": LazyTensor.of(zeros)}
    return rest | {f"{PROJECTOR}0.weight": weight, f"{PROJECTOR}0.bias": bias} | second


def _merge(weight: torch.Tensor, a: LazyTensor, b: LazyTensor, scale: float, nf4: str | None) -> torch.Tensor:
    if nf4 is not None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = dequantize_4bit(*quantize_4bit(weight.to(resolve_dtype(nf4)), quant_type="nf4"))
    return (weight.float() + scale * (b.read().float() @ a.read().float())).to(weight.dtype)


FORMAT = CheckpointFormat("lora", detect, read, base_of)
