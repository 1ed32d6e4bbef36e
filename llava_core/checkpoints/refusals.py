"""Folders and files that are recognised but not read: what they are, and the way to weights that are."""

from __future__ import annotations

import os
from pathlib import Path

from llava_core.checkpoints.files import error_at, has_file, read_config
from llava_core.checkpoints.tensors import files_with_weights, has_weights

_PARTS = ("language_model", "vision_tower", "tokenizer")  # folders in a checkpoint
_OTHER_MODELS = {
    "llava_next": "LLaVA-NeXT, which encodes several crops of an image",
    "llava_next_video": "LLaVA-NeXT-Video, which encodes crops and frames",
    "llava_onevision": "LLaVA-OneVision, which encodes crops and frames with SigLIP",
    "vipllava": "ViP-LLaVA, which projects five layers of its vision tower",
    "video_llava": "Video-LLaVA, which has a second tower for videos",
}  # fmt: skip
_OTHER = "a vision-language model of another architecture"
_ZERO = "DeepSpeed's ZeRO shards; fix: in their folder, `python zero_to_fp32.py . pytorch_model.bin` joins them"
_FSDP = "FSDP's shards; fix: `accelerate merge-weights SHARDS MODEL` joins them; copy configuration and tokenizer, too"
_WITHOUT_WEIGHTS = {  # patterns of file names in a folder without a model's weights
    "adapter_config.json": "settings of an adapter without its weights; fix: copy adapter_model.safetensors here, too",
    "pytorch_model_fsdp.bin": "weights under FSDP's name; fix: rename it to pytorch_model.bin",
    "zero_to_fp32.py": _ZERO,
    "global_step*": _ZERO,
    "*_states.pt": _ZERO,
    "*.distcp": _FSDP,
    "pytorch_model_fsdp_*": _FSDP,
    "*.gguf": "llama.cpp's format, which is not read here; fix: take the model as safetensors",
    "checkpoint-*": "the output of a Trainer, without weights of its own; fix: name one of its checkpoint-N folders",
}  # fmt: skip


def refuse(path: Path) -> None:
    """Raise a CheckpointError for a folder or file that no format reads, if it is known what it is."""
    entries = [path]
    if path.is_dir():
        entries = _entries(path)
        if has_file(path, "config.json"):
            _refuse_config(path)
        if has_weights(path) or any(entry.name.startswith(("adapter_model.", "mm_projector.bin")) for entry in entries):
            return
    for pattern, what in _WITHOUT_WEIGHTS.items():
        if found := next((entry for entry in entries if entry.match(pattern)), None):
            raise error_at(found, what)
    if path.is_dir() and has_file(path, "config.json") and not files_with_weights(path):
        raise error_at(path, "a configuration without weights; fix: download *.safetensors or *.bin, too")


def _entries(folder: Path) -> list[Path]:
    try:
        os.stat(f"{folder}/.")  # fails if the folder may be listed and its files may not be opened
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise error_at(folder, f"cannot be read ({error.strerror}); fix: change its permissions") from None
    for entry in entries:
        if entry.name in _PARTS and entry.is_symlink():
            raise error_at(entry, "is a link to a folder; refused; fix: copy the folder")
    return entries


def _refuse_config(folder: Path) -> None:
    config, where = read_config(folder, "config.json"), folder / "config.json"
    model_type = str(config.get("model_type"))
    if model_type in _OTHER_MODELS or ("vision_config" in config and model_type != "llava"):
        what = _OTHER_MODELS.get(model_type, _OTHER)
        raise error_at(where, f"{model_type} is {what}; fix: take a LLaVA of model_type llava, v0 to 1.5")
    if has_file(folder, "adapter_config.json"):  # after QLoRA the field says how the base was trained, not stored
        return
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, dict) else {}):
        for name in ("quantization_config", "quantization"):
            if fields.get(name):
                method = fields[name].get("quant_method", "MLX") if isinstance(fields[name], dict) else fields[name]
                raise error_at(where, f"quantised weights ({method}); fix: take the model in 16 or 32 bits")
