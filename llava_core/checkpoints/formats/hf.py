"""The format of transformers' `LlavaForConditionalGeneration`: configuration, processor and weights.

Its projector is always linear_1, activation, linear_2. The paper's single linear layer is exported exactly: activation
"linear" (the identity), linear_2 the identity matrix. Such a pair, and no other, is read as a linear projector.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from string import Template as TextTemplate
from typing import Any

import torch

from llava_core.checkpoints.configs import language_config, tower_config
from llava_core.checkpoints.describe import DESCRIPTION_KEY, MODEL_PARTS, USAGE_OF_V1, Checkpoint, Description, Options
from llava_core.checkpoints.files import error_at, has_file, read_config
from llava_core.checkpoints.formats.common import CheckpointFormat, check_supported, check_unchanged, new_checkpoint
from llava_core.checkpoints.formats.names import export_name, export_tensors, import_name
from llava_core.checkpoints.tensors import LazyTensor, open_folder, write_tensors
from llava_core.checkpoints.tokenizer import copy_tokenizer, open_tokenizer, tokenizer_folder
from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES, Template
from llava_core.data.images import ImageProcessor
from llava_core.runtime import DataError, write_json

RULES = (
    ("vision_tower.", "vision_tower.vision_model."),
    ("multi_modal_projector.0.", "multi_modal_projector.linear_1."),
    ("multi_modal_projector.2.", "multi_modal_projector.linear_2."),
    ("multi_modal_projector.", "multi_modal_projector.linear_1."),
    ("language_model.", "language_model."),
)
_RECENT_NAMES = (  # names in memory since transformers 4.52 and in files since 5 -> names in the hub's checkpoints
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("lm_head.", "language_model.lm_head."),
)
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "projector_hidden_act": (None, "gelu", "linear"),
    "vision_feature_select_strategy": (None, "default"),  # the class token is dropped
    "multimodal_projector_bias": (None, True),
}
_ROWS_MULTIPLE = 64  # the word embeddings are padded to a multiple of it, as in the hub's checkpoints
_EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_ORIGINAL_TOKENIZER = "tokenizer"  # sub-folder with the tokenizer as it was before image and padding tokens were added


def detect(path: Path) -> bool:
    if not path.is_dir() or not has_file(path, "config.json"):
        return False
    config = read_config(path, "config.json")
    return config.get("model_type") == "llava" and "text_config" in config


# ------------------------------------------------------------------------------------------------ reading


def read(path: Path, options: Options) -> Checkpoint:
    config = read_config(path, "config.json")
    where = path / "config.json"
    notes: list[str] = []
    check_supported(config, where, _SUPPORTED)
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise error_at(where, f"{part} is missing; fix: download config.json again")
    tensors = open_folder(path)
    rules: tuple[tuple[str, str], ...] = RULES
    if config.get("projector_hidden_act") == "linear":
        tensors = _without_identity(tensors, path)
        rules = (RULES[3], *RULES)
    stored = config.get(DESCRIPTION_KEY)
    if stored is None:
        description, tokenizer = _description(path, config, notes), tokenizer_folder(path)
    else:
        if not isinstance(stored, dict) or type(stored.get("vocabulary")) is not int:
            raise error_at(where, f"{DESCRIPTION_KEY} is not what this project writes; fix: remove it")
        description = Description.from_dict(stored.get("description", {}), where)
        check_unchanged(description, config, where, {"vision_feature_layer": description.feature_layer})
        check_unchanged(description, config["text_config"], where, {"vocab_size": stored.get("rows")})
        tokenizer = tokenizer_folder(path / _ORIGINAL_TOKENIZER) or tokenizer_folder(path)

    def rename(name: str) -> str:
        return import_name(export_name(name, _RECENT_NAMES), rules)

    checkpoint = new_checkpoint(FORMAT.name, path, tensors, rename, description, tokenizer, notes)
    if stored is not None:
        _drop_padding_rows(checkpoint, stored["vocabulary"])
    return checkpoint


def _drop_padding_rows(checkpoint: Checkpoint, rows: int) -> None:
    for name in _EMBEDDINGS:
        if name in checkpoint.tensors:
            table = checkpoint.tensors[name]
            checkpoint.tensors[name] = table.map(lambda t: t[:rows].clone(), (rows, *table.shape[1:]))


def _without_identity(tensors: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    second = {name: tensor for name, tensor in tensors.items() if ".linear_2." in f".{name}"}
    values = {name.rsplit(".", 1)[-1]: tensor.read() for name, tensor in second.items()}
    if set(values) != {"weight", "bias"}:
        raise error_at(path, "multi_modal_projector.linear_2 is missing; fix: get the complete file")
    matrix = values["weight"]
    if not torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype)) or values["bias"].any():
        raise error_at(path, "linear_1 and linear_2 without an activation between them; fix: multiply them into one")
    return {name: tensor for name, tensor in tensors.items() if name not in second}


def _description(path: Path, config: dict[str, Any], notes: list[str]) -> Description:
    """Return the description of a checkpoint that transformers or others exported."""
    where = path / "config.json"
    tower = tower_config(config["vision_config"])
    files = [name for name in ("preprocessor_config.json", "processor_config.json") if has_file(path, name)]
    settings = read_config(path, files[0]) if files else {}
    try:
        image = ImageProcessor.from_hf(settings.get("image_processor", settings)).to_dict()
    except DataError as error:
        raise error_at(path, f"image settings: {error}") from error
    tokens = (tower["image_size"] // tower["patch_size"]) ** 2
    length = config.get("image_seq_length", tokens)
    if length != tokens:
        raise error_at(where, f"image_seq_length is {length}, but the tower gives {tokens} tokens; fix: write {tokens}")
    notes.append("template v1 and image position first (those of LLaVA 1.5) assumed")
    return Description(
        language_model=language_config({"model_type": "llama"} | config["text_config"], where),
        vision_tower=tower,
        d_vision=tower["hidden_size"],
        projector="linear" if config.get("projector_hidden_act") == "linear" else "mlp2x_gelu",
        feature_layer=config.get("vision_feature_layer", -2),
        image=image,
        usage=dict(USAGE_OF_V1),
    )


# ------------------------------------------------------------------------------------------------ writing


def write(checkpoint: Checkpoint, folder: Path, shard_bytes: int) -> None:
    """Write weights, configuration and processor, so that `from_pretrained` needs no code of ours."""
    description = checkpoint.description
    if checkpoint.tokenizer is None or description.image is None or description.vision_tower is None:
        raise error_at(checkpoint.path, "without tokenizer and image settings no processor can be written")
    size, patch = (description.vision_tower[k] for k in ("image_size", "patch_size"))
    rows, image_id, pad_id = _write_processor(checkpoint, folder, patch)
    tensors = {}
    for name, tensor in export_tensors(checkpoint, RULES).items():
        if name in _EMBEDDINGS:
            tensor = tensor.map(lambda table: _pad_rows(table, rows), (rows, *tensor.shape[1:]))
        tensors[name] = tensor
        if name == "multi_modal_projector.linear_1.bias" and description.projector == "linear":
            (width,), dtype = tensor.shape, tensor.dtype
            tensors["multi_modal_projector.linear_2.weight"] = LazyTensor.of(torch.eye(width, dtype=dtype))
            tensors["multi_modal_projector.linear_2.bias"] = LazyTensor.of(torch.zeros(width, dtype=dtype))
    write_tensors(folder, tensors, shard_bytes)
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "dtype": str(checkpoint.tensors[_EMBEDDINGS[0]].dtype).removeprefix("torch."),  # the tower's may differ
        "text_config": description.language_model | {"vocab_size": rows},
        "vision_config": description.vision_tower, "image_token_index": image_id, "pad_token_id": pad_id,
        "image_seq_length": (size // patch) ** 2, "vision_feature_layer": description.feature_layer,
        "vision_feature_select_strategy": "default", "multimodal_projector_bias": True,
        "projector_hidden_act": "linear" if description.projector == "linear" else "gelu",
        "tie_word_embeddings": description.tied,
        DESCRIPTION_KEY: {
            "description": description.to_dict(), "vocabulary": description.language_model["vocab_size"], "rows": rows
        },
    }  # fmt: skip
    write_json(folder / "config.json", config)


def _pad_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Append the mean row: the mean of all logits is never the largest, so greedy answers do not change."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)]) if rows > len(table) else table


def _write_processor(checkpoint: Checkpoint, folder: Path, patch: int) -> tuple[int, int, int]:
    """Write tokenizer, image settings, chat template and generation settings; return embedding rows and two token ids.

    Returns:
        Rows of the padded word embeddings, id of the image token, id of the padding token.
    """
    assert checkpoint.tokenizer is not None
    language_model, usage = checkpoint.description.language_model, checkpoint.description.usage
    template = TEMPLATES.get(usage.get("template", "v0"))
    # `padding_side` is passed here because only arguments of the constructor are saved
    tokenizer = open_tokenizer(checkpoint.tokenizer, language_model, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([IMAGE_MARKER], special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / _ORIGINAL_TOKENIZER).mkdir()
    copy_tokenizer(checkpoint.tokenizer, folder / _ORIGINAL_TOKENIZER)
    image = ImageProcessor.from_dict(checkpoint.description.image or {}).to_hf()
    write_json(folder / "preprocessor_config.json", image | {"processor_class": "LlavaProcessor"})
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": patch, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": IMAGE_MARKER,
    }  # fmt: skip
    write_json(folder / "processor_config.json", processor)
    (folder / "chat_template.jinja").write_text(chat_template(template, usage), encoding="utf-8")
    stops = [tokenizer.eos_token_id]
    stop_ids = tokenizer(template.stop, add_special_tokens=False)["input_ids"] if template.stop else []
    if len(stop_ids) == 1 and stop_ids[0] not in stops:  # longer stops need `stop_strings` when generating
        stops += stop_ids
    ends = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    ends = {name: value for name, value in ends.items() if value is not None}
    write_json(folder / "generation_config.json", {**ends, "do_sample": False})
    rows = -(-max(len(tokenizer), language_model["vocab_size"]) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    return rows, int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER)), int(tokenizer.pad_token_id)


def chat_template(template: Template, usage: dict[str, Any]) -> str:
    """Return a conversation template as Jinja, for transformers' `apply_chat_template`.

    Args:
        template: of the checkpoint.
        usage: its `system` message, `image_position` and `image_delimiters`.

    Returns:
        Jinja text that renders messages as `Template.render` does, with images where the checkpoint was trained on.
    """
    start, end = usage.get("image_delimiters") or ("", "")
    image, newline = f"{start}{IMAGE_MARKER}{end}", "\n"
    if template.encoder is not None:  # the prompt of the v0 release, whose tokenizer lost white space around images
        mark = "###"
        template = replace(
            template, opening=f"{{system}}{mark}Human: ", opening_next="Human: ", bridge=f"{mark}Assistant:",
            closing=mark,
        )  # fmt: skip
        newline = ""
    position = usage.get("image_position", "data")
    first = (template.image_side if position in ("data", "random") else position) == "first"
    images = "{%- for _ in range(images) -%}{{- @ -}}{%- endfor -%}\n"
    before_system, _, after_system = template.opening.partition("{system}")
    if "{system}" not in template.opening:
        before_system = ""
    quote = repr  # Python's and Jinja's string literals agree on these texts
    jinja = Path(__file__).with_name("hf_chat_template.txt").read_text(encoding="utf-8").rstrip()
    return TextTemplate(jinja).substitute(
        system=quote(usage.get("system") or template.system),
        opening_before_system=quote(before_system),
        opening_after_system=quote(after_system),
        opening_next=quote(template.opening_next),
        images_before=images.replace("@", quote(image + newline)) if first else "",
        images_after="" if first else images.replace("@", quote(newline + image)),
        bridge=quote(template.bridge),
        space=quote(" " if template.bridge else ""),
        closing=quote(template.closing) + (" + eos_token" if template.eos else ""),
    )


FORMAT = CheckpointFormat(
    "hf", "transformers' LlavaForConditionalGeneration", detect, read, write, RULES, required_parts=MODEL_PARTS
)
