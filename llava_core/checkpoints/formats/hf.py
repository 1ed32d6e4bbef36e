"""The layout of transformers' `LlavaForConditionalGeneration`: configuration, processor and weights.

Its projector is always linear_1, activation, linear_2. The paper's single linear goes out exactly: activation "linear"
(the identity), linear_2 the identity matrix; such a pair, and no other, comes in as a linear projector again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_core.checkpoints.description import (
    PARTS,
    Description,
    Opened,
    language_config,
    open_tokenizer,
    tokenizer_folder,
    tower_config,
)
from llava_core.checkpoints.formats.common import (
    ASSUMED,
    BLOCK,
    LAYOUTS,
    Layout,
    Options,
    copy_tokenizer,
    open_renamed,
    to_ours,
    to_theirs,
    unchanged,
)
from llava_core.checkpoints.tensors import Lazy, ShardWriter, has_file, open_folder, read_settings
from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES, Template
from llava_core.data.images import ImageProcessor
from llava_core.runtime import CheckpointError, DataError, shown, write_json

RULES = (
    ("vision_tower.", "vision_tower.vision_model."),
    ("multi_modal_projector.0.", "multi_modal_projector.linear_1."),
    ("multi_modal_projector.2.", "multi_modal_projector.linear_2."),
    ("multi_modal_projector.", "multi_modal_projector.linear_1."),
    ("language_model.", "language_model."),
)
_LATER = (  # names in memory since transformers 4.52 and those that 5.x saves -> those of the hub's checkpoints
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("lm_head.", "language_model.lm_head."),
)
_MULTIPLE = 64  # rows of the word embeddings are filled up to a multiple of it, as the hub's checkpoints have them
_EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_ORIGINAL_TOKENIZER = "tokenizer"  # sub-folder with the tokenizer as it was before image and padding tokens were added


def _found(path: Path) -> bool:
    if not path.is_dir() or not has_file(path, "config.json"):
        return False
    config = read_settings(path, "config.json")
    return config.get("model_type") == "llava" and "text_config" in config


# ------------------------------------------------------------------------------------------------ in


def _read(path: Path, options: Options) -> Opened:
    config = read_settings(path, "config.json")
    where = shown(path / "config.json")
    notes: list[str] = []
    linear = config.get("projector_hidden_act", "gelu") == "linear"
    _only_what_we_compute(config, where)
    tensors = open_folder(path)
    if linear:
        tensors = _without_identity(tensors, path)
    told = config.get(BLOCK)
    if told is not None:
        if not isinstance(told, dict) or type(told.get("vocabulary")) is not int:
            raise CheckpointError(f"{where}: {BLOCK} is not what this project writes; fix: remove it")
        description = Description.from_dict(told.get("description", {}), where)
        unchanged(description, config, where, {"vision_feature_layer": description.feature_layer})
        unchanged(description, config["text_config"], where, {"vocab_size": told.get("rows")})
        rows, tokenizer = told["vocabulary"], tokenizer_folder(path / _ORIGINAL_TOKENIZER) or tokenizer_folder(path)
    else:
        description, rows, tokenizer = _describe(path, config, linear, notes), None, tokenizer_folder(path)
    rules = (RULES[3], *RULES) if linear else RULES

    def rename(name: str) -> str:
        return to_ours(to_theirs(name, _LATER), rules)

    opened = open_renamed("hf", path, tensors, rename, description, tokenizer, notes)
    if rows is not None:
        for name in _EMBEDDINGS:
            if name in opened.tensors:
                full = opened.tensors[name]
                opened.tensors[name] = full.then(lambda t: t[:rows].clone(), (rows, *full.shape[1:]))
    return opened


def _only_what_we_compute(config: dict[str, Any], where: str) -> None:
    layer, act = config.get("vision_feature_layer", -2), config.get("projector_hidden_act", "gelu")
    strategy = config.get("vision_feature_select_strategy", "default")
    bias = config.get("multimodal_projector_bias", True)
    known = {
        "vision_feature_layer": (layer, isinstance(layer, int), "a single layer"),
        "projector_hidden_act": (act, act in ("gelu", "linear"), "gelu or linear"),
        "vision_feature_select_strategy": (strategy, strategy == "default", "default (class token dropped)"),
        "multimodal_projector_bias": (bias, bias is True, "true"),
    }
    for name, (value, good, wanted) in known.items():
        if not good:
            raise CheckpointError(f"{where}: {name} is {value!r}; only {wanted} can be represented")
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"{where}: {part} is missing; fix: download config.json again")


def _without_identity(tensors: dict[str, Lazy], path: Path) -> dict[str, Lazy]:
    second = {name: t for name, t in tensors.items() if ".linear_2." in f".{name}"}
    values = {name.rsplit(".", 1)[-1]: t.read() for name, t in second.items()}
    if set(values) != {"weight", "bias"}:
        raise CheckpointError(f"{shown(path)}: multi_modal_projector.linear_2 is missing; fix: get it whole")
    matrix = values["weight"]
    if not torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype)) or values["bias"].any():
        raise CheckpointError(
            f"{shown(path)}: two linear layers without an activation between them, the second not the identity, are no "
            "projector of LLaVA; fix: multiply them into one first"
        )
    return {name: tensor for name, tensor in tensors.items() if name not in second}


def _describe(path: Path, config: dict[str, Any], linear: bool, notes: list[str]) -> Description:
    """Description of a checkpoint that others exported."""
    where = shown(path / "config.json")
    text = {"model_type": "llama"} | config["text_config"]
    tower = tower_config(config["vision_config"])
    settings: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if has_file(path, name) and not settings:
            settings = read_settings(path, name)
            settings = settings.get("image_processor", settings)
    try:
        image = ImageProcessor.from_hf(settings).to_dict()
    except DataError as error:
        raise CheckpointError(f"{shown(path)}: image settings: {error}") from error
    tokens = (tower["image_size"] // tower["patch_size"]) ** 2
    if config.get("image_seq_length", tokens) != tokens:
        raise CheckpointError(
            f"{where}: image_seq_length is {config['image_seq_length']}, but the tower gives {tokens} tokens; fix: "
            f"write {tokens} there"
        )
    notes.append("template v1 and image position first (those of LLaVA 1.5) assumed")
    return Description(
        language_config(text, where), tower, None, tower["hidden_size"], "linear" if linear else "mlp2x_gelu",
        config.get("vision_feature_layer", -2), image, dict(ASSUMED),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ out


def _write(opened: Opened, folder: Path, shard_bytes: int) -> None:
    description = opened.description
    if opened.tokenizer is None or description.image is None or description.vision_tower is None:
        raise CheckpointError(f"{shown(opened.path)}: without tokenizer and image settings no processor can be written")
    size, patch = (description.vision_tower[k] for k in ("image_size", "patch_size"))
    rows, image_id, pad_id = _write_processor(opened, folder, patch)
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in opened.tensors.items():
        value = tensor.read()
        writer.add(to_theirs(name, RULES), _filled_up(value, rows) if name in _EMBEDDINGS else value)
        if name == "multi_modal_projector.bias":  # the linear projector's last tensor: the identity follows
            writer.add("multi_modal_projector.linear_2.weight", torch.eye(len(value), dtype=value.dtype))
            writer.add("multi_modal_projector.linear_2.bias", torch.zeros_like(value))
    writer.close()
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "dtype": str(opened.tensors[_EMBEDDINGS[0]].dtype).removeprefix("torch."),  # the tower's may be another
        "text_config": description.language_model | {"vocab_size": rows},
        "vision_config": description.vision_tower, "image_token_index": image_id, "pad_token_id": pad_id,
        "image_seq_length": (size // patch) ** 2, "vision_feature_layer": description.feature_layer,
        "vision_feature_select_strategy": "default", "multimodal_projector_bias": True,
        "projector_hidden_act": "linear" if description.projector == "linear" else "gelu",
        "tie_word_embeddings": description.tied,
        BLOCK: {"description": description.to_dict(), "vocabulary": description.language_model["vocab_size"],
            "rows": rows},
    }  # fmt: skip
    write_json(folder / "config.json", config)


def _filled_up(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows added as the mean of the others: the mean of all logits is never the largest, so no answer changes."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)]) if rows > len(table) else table


def _write_processor(opened: Opened, folder: Path, patch: int) -> tuple[int, int, int]:
    """Write tokenizer, image settings, chat template and generation settings; rows of the vocabulary, two token ids."""
    assert opened.tokenizer is not None
    facts = opened.description.facts
    template = TEMPLATES.get(facts.get("template", "v0"))
    # the side is given here, not set later: only what a tokenizer was made with is saved
    tokenizer = open_tokenizer(opened.tokenizer, opened.description.language_model, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([IMAGE_MARKER], special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / _ORIGINAL_TOKENIZER).mkdir()
    copy_tokenizer(opened, folder / _ORIGINAL_TOKENIZER)
    image = ImageProcessor.from_dict(opened.description.image or {}).to_hf()
    write_json(folder / "preprocessor_config.json", image | {"processor_class": "LlavaProcessor"})
    facts_of_processor = {
        "processor_class": "LlavaProcessor", "patch_size": patch, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": IMAGE_MARKER,
    }  # fmt: skip
    write_json(folder / "processor_config.json", facts_of_processor)
    (folder / "chat_template.jinja").write_text(chat_template(template, facts), encoding="utf-8")
    stops = [tokenizer.eos_token_id]
    stop_ids = tokenizer(template.stop, add_special_tokens=False)["input_ids"] if template.stop else []
    if len(stop_ids) == 1 and stop_ids[0] not in stops:  # longer stops need `stop_strings` when generating
        stops += stop_ids
    ends = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    ends = {name: value for name, value in ends.items() if value is not None}
    write_json(folder / "generation_config.json", {**ends, "do_sample": False})
    needed = max(len(tokenizer), opened.description.language_model["vocab_size"])
    rows = -(-needed // _MULTIPLE) * _MULTIPLE
    return rows, int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER)), int(tokenizer.pad_token_id)


def chat_template(template: Template, facts: dict[str, Any]) -> str:
    """A template as Jinja, for transformers' `apply_chat_template`.

    Args:
        template: of the checkpoint.
        facts: its `system` message, `image_position` and `image_delimiters`.

    Returns:
        Jinja text that renders messages as `Template.render` does; images stand where the checkpoint has them.
    """
    start, end = facts.get("image_delimiters") or ("", "")
    image, line = f"{start}{IMAGE_MARKER}{end}", "\n"
    if template.encoder is not None:  # the prompt of the v0 release, whose tokenizer lost white space beside images
        mark = "###"
        template = replace(
            template, opening=f"{{system}}{mark}Human: ", opening_next="Human: ", bridge=f"{mark}Assistant:",
            closing=mark,
        )  # fmt: skip
        line = ""
    system = facts.get("system") or template.system
    q = repr  # Python's and Jinja's string literals agree on what occurs here
    before, after = (f"{{{{- {q(image + line)} -}}}}", f"{{{{- {q(line + image)} -}}}}")
    position = facts.get("image_position", "data")
    first = (template.image_side if position in ("data", "random") else position) == "first"
    opening_first, opening_rest = template.opening.split("{system}") if "{system}" in template.opening else ("", "")
    space = " " if template.bridge else ""
    return (
        "{%- set ns = namespace(first=true, system=" + q(system) + ") -%}\n"
        "{%- for message in messages if message['role'] == 'system' -%}\n"
        "{%- set ns.system = message['content'] if message['content'] is string "
        "else message['content'][0]['text'] -%}\n"
        "{%- endfor -%}\n"
        "{{- bos_token if bos_token is defined and bos_token else '' -}}\n"
        "{%- for message in messages if message['role'] != 'system' -%}\n"
        "{%- set text = message['content'] if message['content'] is string else message['content'] "
        "| selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') -%}\n"
        "{%- set images = 0 if message['content'] is string else message['content'] "
        "| selectattr('type', 'equalto', 'image') | list | length -%}\n"
        "{%- if message['role'] == 'user' -%}\n"
        "{%- if ns.first -%}{{- " + q(opening_first) + " + ns.system + " + q(opening_rest) + " -}}"
        "{%- else -%}{{- " + q(template.opening_next) + " -}}{%- endif -%}\n"
        "{%- set ns.first = false -%}\n"
        + ("{%- for _ in range(images) -%}" + before + "{%- endfor -%}\n" if first else "")
        + "{{- text -}}\n"
        + ("" if first else "{%- for _ in range(images) -%}" + after + "{%- endfor -%}\n")
        + "{{- " + q(template.bridge) + " -}}\n"
        "{%- else -%}\n"
        "{{- " + q(space) + " + text + " + q(template.closing) + (" + eos_token" if template.eos else "") + " -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}"
    )  # fmt: skip


LAYOUTS.register("hf")(Layout("hf", "transformers' LlavaForConditionalGeneration", _found, _read, _write, RULES, PARTS))
