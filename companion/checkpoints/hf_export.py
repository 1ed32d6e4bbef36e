"""The writer of transformers' `LlavaForConditionalGeneration`: weights, configuration, processor and chat template.

The files are read by transformers 4.51 to 5 (`make interop`), so some values are there under two names.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from string import Template as TextTemplate
from typing import Any

import torch
from PIL import Image

from llava_core.checkpoints.describe import DESCRIPTION_KEY, Checkpoint
from llava_core.checkpoints.files import contained_file, error_at, has_file
from llava_core.checkpoints.formats import hf
from llava_core.checkpoints.formats.common import EMBEDDINGS
from llava_core.checkpoints.formats.names import export_tensors
from llava_core.checkpoints.tensors import LazyTensor, write_tensors
from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES, Template
from llava_core.data.images import ImageProcessor
from llava_core.runtime import fingerprint, write_json

_ROWS_MULTIPLE = 64  # the word embeddings are padded to a multiple of it, as in the hub's checkpoints


def write_hf(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    """Write weights, configuration and processor, so that `from_pretrained` needs no code of ours."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    description = checkpoint.description
    if checkpoint.tokenizer is None or description.image is None or description.vision_tower is None:
        raise error_at(checkpoint.path, "without tokenizer and image settings no processor can be written")
    size, patch = (description.vision_tower[k] for k in ("image_size", "patch_size"))
    tokenizer = _write_processor(checkpoint, folder, patch)
    rows = -(-max(len(tokenizer), description.language_model["vocab_size"]) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    dtype = str(checkpoint.tensors[EMBEDDINGS[0]].dtype).removeprefix("torch.")  # the tower's may differ
    tensors = {}
    for name, tensor in export_tensors(checkpoint, hf.RULES).items():
        if name in EMBEDDINGS:
            tensor = tensor.map(lambda table: _pad_rows(table, rows), (rows, *tensor.shape[1:]))
        tensors[name] = tensor
        if name == "multi_modal_projector.linear_1.bias" and description.projector == "linear":
            (width,) = tensor.shape
            tensors["multi_modal_projector.linear_2.weight"] = LazyTensor.of(torch.eye(width, dtype=tensor.dtype))
            tensors["multi_modal_projector.linear_2.bias"] = LazyTensor.of(torch.zeros(width, dtype=tensor.dtype))
    write_tensors(folder, tensors, shard_bytes)
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "dtype": dtype, "torch_dtype": dtype,
        "text_config": {
            **description.language_model, **rope_fields(description.language_model), "vocab_size": rows,
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[description.language_model["model_type"]]],
        },
        "vision_config": description.vision_tower, "pad_token_id": tokenizer.pad_token_id,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_MARKER),
        "image_seq_length": (size // patch) ** 2, "vision_feature_layer": description.feature_layer,
        "vision_feature_select_strategy": "default", "multimodal_projector_bias": True,
        "projector_hidden_act": "linear" if description.projector == "linear" else "gelu",
        "tie_word_embeddings": description.tied,
        DESCRIPTION_KEY: {
            "description": description.to_dict(), "vocabulary": description.language_model["vocab_size"], "rows": rows,
            "chat_template": fingerprint(tokenizer.chat_template),
        },
    }  # fmt: skip
    write_json(folder / "config.json", config)


def _pad_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Append the mean row: the mean of all logits is never the largest, so greedy answers do not change."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)]) if rows > len(table) else table


def rope_fields(language_model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that stand for `rope_parameters` before transformers 5, which would take its defaults else."""
    rope = {k: v for k, v in (language_model.get("rope_parameters") or {}).items() if v is not None}
    named = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    kind = rope.pop("rope_type", "default")  # transformers up to 4.42 wants it as `type`, and no third key
    return named | ({"rope_scaling": {"type": kind, **rope}} if kind != "default" else {})


def _write_processor(checkpoint: Checkpoint, folder: Path, patch: int) -> Any:
    """Write all but weights and configuration; return the tokenizer with image and padding token."""
    assert checkpoint.tokenizer is not None
    usage = checkpoint.description.usage
    tokenizer = checkpoint.open_tokenizer()
    if not tokenizer.is_fast:
        raise error_at(checkpoint.tokenizer, "no fast tokenizer, which a processor of transformers needs")
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([IMAGE_MARKER], special_tokens=True)
    template = TEMPLATES.get(usage.get("template", "v0"))
    adds_bos = _only_bos(tokenizer)
    text, shown = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("\n", f"{IMAGE_MARKER}\n"))
    gap = "" if shown[1:] == text else " "  # LLaMA's tokenizer has a dummy prefix there only if it is a `legacy` one
    tokenizer.chat_template = usage.get("chat_template") or chat_template(template, usage, not adds_bos, gap)
    _write_tokenizer(tokenizer, folder)
    (folder / hf.ORIGINAL_TOKENIZER).mkdir()
    checkpoint.copy_tokenizer(folder / hf.ORIGINAL_TOKENIZER)
    if has_file(checkpoint.tokenizer, "tokenizer.model"):  # llama.cpp prefers it
        shutil.copyfile(contained_file(checkpoint.tokenizer, "tokenizer.model"), folder / "tokenizer.model")
    image = preprocessor_config(ImageProcessor.from_dict(checkpoint.description.image or {}))
    write_json(folder / "preprocessor_config.json", image | {"processor_class": "LlavaProcessor"})
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": patch, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": IMAGE_MARKER,
    }  # fmt: skip
    write_json(folder / "processor_config.json", processor)
    (folder / "chat_template.jinja").write_bytes(tokenizer.chat_template.encode())
    write_json(folder / "chat_template.json", {"chat_template": tokenizer.chat_template})  # for processors of 2024
    stops = [tokenizer.eos_token_id]
    stop_ids = tokenizer(template.stop, add_special_tokens=False)["input_ids"] if template.stop else []
    if len(stop_ids) == 1 and stop_ids[0] not in stops:  # longer stops need `stop_strings` when generating
        stops += stop_ids
    ends = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    ends = {name: value for name, value in ends.items() if value is not None}
    write_json(folder / "generation_config.json", {**ends, "do_sample": False})
    return tokenizer


def _only_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer adds a BOS token to a text; it no longer adds anything else, such as EOS."""
    from tokenizers.processors import TemplateProcessing

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    text, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    adds = text[:1] != whole[:1] == [bos[1]]
    if whole != [bos[1]] * adds + text:
        parts = [bos[0]] * adds + ["$A"]
        processor = TemplateProcessing(single=parts, pair=[*parts, "$B:1"], special_tokens=[bos] * adds)
        tokenizer.backend_tokenizer.post_processor = processor
    return adds


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a fast tokenizer for all versions of transformers, whose settings of the same class differ."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {name: getattr(tokenizer, name) for name in names}
    settings: dict[str, Any] = {name: str(token) for name, token in tokens.items() if token is not None}
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = tokenizer.added_tokens_decoder.items()
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left",  # any other class changes tokenizer.json
        "model_input_names": ["input_ids", "attention_mask"], "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(k): {name: getattr(token, name) for name in fields} for k, token in added},
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)


def preprocessor_config(image: ImageProcessor) -> dict[str, Any]:
    """Return the `preprocessor_config.json` of transformers that gives the same pixels (with its PIL backend).

    Crop and resize are a CLIPImageProcessor; pad is a LlavaImageProcessor, whose `do_pad` means a square canvas.
    """
    square = {"height": image.size, "width": image.size}
    return {
        "image_processor_type": "LlavaImageProcessor" if image.mode == "pad" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        **({"do_pad": True} if image.mode == "pad" else {}),
        "do_resize": True,
        "size": {"shortest_edge": image.size} if image.mode == "crop" else square,
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": image.mode == "crop",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def chat_template(template: Template, usage: dict[str, Any], bos: bool = True, after_image: str = "") -> str:
    """Return a conversation template as Jinja, which renders messages as `Template.render` does.

    Args:
        usage: the checkpoint's `system` message, `image_position` and `image_delimiters`.
        bos: whether the text begins with the BOS token, because the tokenizer adds none.
        after_image: what makes the tokenizer begin a new text after an image, which is no token to our templates.
    """
    start, end = usage.get("image_delimiters") or ("", "")
    tight, reply = template.tight_images, " " if template.bridge else ""
    if start and template.encoder is None:
        after_image = ""  # the end delimiter is a token
    if template.encoder is not None:  # a prompt of the code of v0
        options = getattr(template.encoder, "keywords", {})
        tight = options.get("strip", True)
        bridge, reply = ("###Assistant:", " ") if options.get("role", True) else ("###", "Assistant: ")
        template = replace(template, opening="{system}###Human: ", opening_next="Human: ", bridge=bridge, closing="###")
    quote = repr  # Python's and Jinja's string literals agree on these texts
    position, system = usage.get("image_position", "data"), usage.get("system")
    text = "text" if position == "data" else "text.strip('\\n')"
    first = (template.image_side if position in ("data", "random") else position) == "first"
    ends = not first and not template.bridge  # nothing follows the image
    newline, image = "" if tight else "\n", f"{start}{IMAGE_MARKER}{end}{'' if ends else after_image}"
    bridge = quote(template.bridge)
    sides = ("opening", f"{text} + {bridge}") if first else (f"opening + {text}", bridge)
    if tight:
        sides = f"({sides[0]}).rstrip()", f"({sides[1]}).lstrip()"
    shown = quote(image + newline if first else newline + image)
    before, has_system, after = template.opening.partition("{system}")
    jinja = Path(__file__).with_name("hf_chat_template.txt").read_text(encoding="utf-8").rstrip()
    return TextTemplate(jinja).substitute(
        bos="{{- bos_token if bos_token is defined and bos_token else '' -}}\n" if bos else "",
        system=quote(template.system if system is None else system),
        opening=f"{quote(before)} + ns.system + {quote(after)}" if has_system else quote(before),
        opening_next=quote(template.opening_next),
        asked=f"{sides[0]} + {shown} * images + {sides[1]}",
        bridge=bridge,
        reply=quote(reply),
        closing=quote(template.closing) + (" + eos_token" if template.eos else ""),
    )
