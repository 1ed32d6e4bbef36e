"""Base models: the language models and CLIP vision towers that checkpoints are built on, by folder or hub id."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from llava_core.checkpoints.configs import language_config, quiet_transformers, tower_config
from llava_core.checkpoints.files import error_at, has_file, read_config, verify_files
from llava_core.checkpoints.refusals import refuse
from llava_core.checkpoints.tensors import LazyTensor, open_folder, weight_files
from llava_core.checkpoints.tokenizer import open_tokenizer
from llava_core.data.images import ImageProcessor
from llava_core.runtime import ConfigError, DataError, fingerprint, sha256_file, user_path

_DOWNLOADS: ContextVar[bool] = ContextVar("downloads", default=True)
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_TEXT_HALF = ("text_model.", "text_projection", "visual_projection", "logit_scale")  # of a CLIP model


@contextmanager
def no_downloads() -> Iterator[None]:
    """Use only local copies of models of the hub."""
    token = _DOWNLOADS.set(False)
    try:
        yield
    finally:
        _DOWNLOADS.reset(token)


@cache
def _note_request(hub_id: str) -> None:
    """Say once that the hub is asked for a model, which a checkpoint of others may have named."""
    sys.stderr.write(f"note: {hub_id} is not a folder here, so the hub is asked for it\n")


def model_folder(source: str | Path) -> Path:
    """Return the folder of a model: the source itself, or the local copy of a hub id."""
    folder = user_path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    local = not _DOWNLOADS.get()
    if not (local or constants.HF_HUB_OFFLINE) and _HUB_ID.fullmatch(str(source)):
        _note_request(str(source))
    try:
        patterns = ["*.json", "*.model", "*.jinja", "merges.txt", "*.safetensors"]
        copy = Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=local))
        if not any(copy.glob("*.safetensors")):  # an old model without safetensors; its index may be here already
            snapshot_download(str(source), allow_patterns=["*.bin", "*.pth"], local_files_only=local)
        return copy
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        missing = isinstance(error, LocalEntryNotFoundError)
        reason = "it is not in the cache of the hub" if missing else f"the hub gives {type(error).__name__}"
        fix = "`hf download` it where the hub can be reached, and name the folder"
        if local or constants.HF_HUB_OFFLINE:
            fix += " (requests are off: `offline` of the scale, or HF_HUB_OFFLINE of the environment)"
        raise error_at(source, f"no such folder, and {reason}; fix: {fix}") from error


def checkpoint_path(source: str | Path) -> Path:
    """Return the path of a checkpoint: a folder or file that is here, else the local copy of a hub id "org/name"."""
    path = user_path(source)
    return path if path.exists() or not _HUB_ID.fullmatch(str(source)) else model_folder(source)


def base_hash(source: str) -> str:
    """Return what identifies a base model: `files:` and a hash of its weights, or `name:` and a hash of a hub id.

    Files are checked against the model's manifest. An id can be compared with another id, but not with files.
    """
    folder = user_path(source)
    if not folder.is_dir() and not Path(source).is_absolute():
        return f"name:{fingerprint(source)}"
    if not folder.is_dir() or (has_file(folder, "manifest.json") and "files" in read_config(folder, "manifest.json")):
        return f"files:{fingerprint(verify_files(folder))}"
    return f"files:{fingerprint({f.name: sha256_file(f) for f in weight_files(folder)})}"


def _checked_folder(source: str) -> Path:
    """Return the folder of a language model, after checks of its configuration."""
    folder = model_folder(source)
    refuse(folder)
    language_config(read_config(folder, "config.json"), folder)
    return folder


def tower_settings(source: str | Path) -> tuple[dict[str, Any], ImageProcessor]:
    """Return configuration and image settings of a CLIP model's vision tower, after checks."""
    folder = model_folder(source)
    config = read_config(folder, "config.json")
    model_type = config.get("model_type")
    if model_type not in ("clip", "clip_vision_model"):
        raise error_at(folder, f"model_type {model_type!r} is not a CLIP vision tower; fix: --vision-tower DIR")
    full = tower_config(config, folder)
    try:
        image = ImageProcessor.from_hf(read_config(folder, "preprocessor_config.json"))
    except DataError as error:
        raise error_at(folder, f"{error}") from error
    if image.size != (size := full["image_size"]):
        raise error_at(folder, f"images of {image.size} px for a tower of {size} px; fix: correct one")
    return full, image


def open_vision_tower(source: str | Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Return the tensors of a CLIP model's vision tower under our names, and our name -> its name there."""
    tensors, names = {}, {}
    for theirs, tensor in open_folder(model_folder(source)).items():
        name = f"vision_tower.{theirs.removeprefix('vision_model.')}"
        if not theirs.startswith(_TEXT_HALF) and not name.endswith("embeddings.position_ids"):
            tensors[name], names[name] = tensor, theirs
    return tensors, names


def load_language_model(source: str, dtype: torch.dtype, bits: Literal[4] | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a folder or hub id.

    With `bits`, the weights of its linear layers but the output layer are stored in 4 bits (NF4, by bitsandbytes).
    """
    from transformers import AutoModelForCausalLM

    folder = _checked_folder(source)
    options = {} if bits is None else {"quantization_config": _nf4(dtype)}
    with _loading(source, "language model"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    tokenizer = open_tokenizer(folder)
    check_no_missing_weights(source, info)
    for module in model.modules() if bits is not None else ():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            # else the first evaluation on a CPU packs the weights anew, with their scales rounded to bf16
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def map_language_model(source: str) -> tuple[Any, Any]:
    """Open a causal language model and its tokenizer; the weights stay on disk, mapped in the dtype of their files.

    For sharded training: ranks share the mapped pages, and each copies only what it keeps.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = _checked_folder(source)
    with _loading(source, "language model"), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    # old checkpoints store a buffer of the rotary embedding
    stored = {n: t.read() for n, t in open_folder(folder).items() if not n.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    try:
        _, unexpected = model.load_state_dict(stored, strict=False, assign=True)
    except RuntimeError as error:
        raise error_at(folder, f"does not fit its config.json: {str(error).splitlines()[-1].strip()}") from error
    if unexpected:
        raise error_at(folder, f"{unexpected[0]} is no weight of {type(model).__name__}; fix: check config.json")
    model.tie_weights()
    check_no_missing_weights(source, {"missing_keys": [n for n, p in model.named_parameters() if p.is_meta]})
    return model, open_tokenizer(folder)


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise ConfigError(f"train.adapters.bits: 4 needs {package}; fix: pip install {package}, or bits: null")
    # stored in the compute dtype, since FSDP shards only parameters of one dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip


def load_vision_tower(source: str, dtype: torch.dtype) -> tuple[Any, ImageProcessor]:
    """Load a CLIPVisionModel and its image settings from the folder or hub id of a CLIP model."""
    from transformers import CLIPVisionModel

    folder = model_folder(source)
    _, processor = tower_settings(folder)
    with _loading(source, "vision tower"):
        tower, info = CLIPVisionModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    check_no_missing_weights(source, info)
    return tower, processor


@contextmanager
def _loading(source: str, part: str) -> Iterator[None]:
    try:
        with quiet_transformers():  # its report lists each tensor of the text half as unexpected
            yield
    except (OSError, ValueError, SafetensorError) as error:
        raise error_at(source, f"{part} cannot be read: {str(error).splitlines()[0]}") from error


def check_no_missing_weights(source: str, info: dict[str, Any]) -> None:
    """Raise CheckpointError if transformers' loading info lists weights that would be randomly initialised."""
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise error_at(source, f"weights missing ({names} ...); they would start random; fix: get the complete file")
