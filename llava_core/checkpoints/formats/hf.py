"""The format of transformers' `LlavaForConditionalGeneration`: configuration, processor and weights.

Its projector is always linear_1, activation, linear_2. The paper's single linear layer is exported exactly: activation
"linear" (the identity), linear_2 the identity matrix. If a client trained linear_2, the two are multiplied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_core.checkpoints.chat_template import read_chat_template, usage_of_template
from llava_core.checkpoints.configs import language_config, tower_config
from llava_core.checkpoints.describe import DESCRIPTION_KEY, USAGE_OF_V1, Checkpoint, Description, Options
from llava_core.checkpoints.files import error_at, has_file, read_config
from llava_core.checkpoints.formats.common import (
    EMBEDDINGS,
    PROJECTOR,
    CheckpointFormat,
    check_supported,
    check_unchanged,
    new_checkpoint,
    one_layer,
)
from llava_core.checkpoints.formats.names import export_name, import_name
from llava_core.checkpoints.tensors import open_folder
from llava_core.checkpoints.tokenizer import tokenizer_folder
from llava_core.data.images import ImageProcessor
from llava_core.runtime import CheckpointError, DataError, fingerprint

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
ORIGINAL_TOKENIZER = "tokenizer"  # sub-folder with the tokenizer as it was before image and padding tokens were added


def detect(path: Path) -> bool:
    if not path.is_dir() or not has_file(path, "config.json"):
        return False
    config = read_config(path, "config.json")
    return config.get("model_type") == "llava" and "text_config" in config


def read(path: Path, options: Options) -> Checkpoint:
    config = read_config(path, "config.json")
    where = path / "config.json"
    notes: list[str] = []
    check_supported(config, where, _SUPPORTED)
    if isinstance(layers := config.get("vision_feature_layer"), list):
        raise error_at(where, f"vision_feature_layer is {layers!r}; fix: take a model that projects one layer")
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise error_at(where, f"{part} is missing; fix: download config.json again")
    tensors = open_folder(path)
    if config.get("tie_word_embeddings") is True and not any(name.endswith("lm_head.weight") for name in tensors):
        config["text_config"] = config["text_config"] | {"tie_word_embeddings": True}  # as in transformers 5
    stored = config.get(DESCRIPTION_KEY)
    if stored is None:
        description, tokenizer = _description(path, config, notes), tokenizer_folder(path)
    else:
        fields: dict[str, Any] = stored if isinstance(stored, dict) else {}
        vocabulary, rows = (fields.get(name) for name in ("vocabulary", "rows"))
        if type(vocabulary) is not int or type(rows) is not int or not 0 < vocabulary <= rows:
            raise error_at(where, f"{DESCRIPTION_KEY} is not what this project writes; fix: remove it")
        description = Description.from_dict(stored.get("description", {}), where)
        check_unchanged(config, where, {"vision_feature_layer": description.feature_layer})
        check_unchanged(config["text_config"], where, {"vocab_size": rows})
        asked = read_chat_template(path)
        if asked is not None and "chat_template" in stored:
            found = {"chat_template": fingerprint(asked)}
            check_unchanged(found, where, {"chat_template": stored["chat_template"]})
        tokenizer = tokenizer_folder(path / ORIGINAL_TOKENIZER) or tokenizer_folder(path)

    def rename(name: str) -> str:
        return import_name(export_name(name, _RECENT_NAMES), RULES)

    checkpoint = new_checkpoint(FORMAT.name, path, tensors, rename, description, tokenizer, notes)
    if description.projector == "linear":
        checkpoint.tensors = one_layer(checkpoint.tensors, path)
        for name in ("weight", "bias"):
            checkpoint.names[f"{PROJECTOR}{name}"] = checkpoint.names.pop(f"{PROJECTOR}0.{name}")
    if stored is not None:
        _drop_padding_rows(checkpoint, stored["vocabulary"], stored["rows"])
    return checkpoint


def _drop_padding_rows(checkpoint: Checkpoint, vocabulary: int, rows: int) -> None:
    for name in EMBEDDINGS:
        table = checkpoint.tensors.get(name)
        if table is not None and table.shape[:1] == (rows,):  # another shape is an error of `check`
            checkpoint.tensors[name] = table.map(lambda t: t[:vocabulary].clone(), (vocabulary, *table.shape[1:]))


def _description(path: Path, config: dict[str, Any], notes: list[str]) -> Description:
    where = path / "config.json"
    tower = tower_config(config["vision_config"], where)
    if has_file(path, "preprocessor_config.json"):
        settings = read_config(path, "preprocessor_config.json")
    elif has_file(path, "processor_config.json"):
        settings = read_config(path, "processor_config.json").get("image_processor", {})
    else:
        settings = {}
    if not settings:
        raise error_at(path, "no preprocessor_config.json, so its pixels are unknown; fix: copy it from its release")
    try:
        image = ImageProcessor.from_hf(settings).to_dict()
    except DataError as error:
        raise error_at(path, f"image settings: {error}") from error
    tokens = (tower["image_size"] // tower["patch_size"]) ** 2
    length = config.get("image_seq_length", tokens)
    if length != tokens:
        raise error_at(where, f"image_seq_length is {length}, but the tower gives {tokens} tokens; fix: write {tokens}")
    return Description(
        language_model=language_config({"model_type": "llama"} | config["text_config"], where),
        vision_tower=tower,
        d_vision=tower["hidden_size"],
        projector="linear" if config.get("projector_hidden_act") == "linear" else "mlp2x_gelu",
        feature_layer=config.get("vision_feature_layer", -2),
        image=image,
        usage=_usage(path, notes),
    )


def _usage(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the usage that the folder's chat template says; one of another family is only kept."""
    chat_template = read_chat_template(path)
    if chat_template is None:
        notes.append("template v1_hf assumed (llava-hf's, without a system message): the folder has no chat template")
        return USAGE_OF_V1 | {"template": "v1_hf"}
    try:
        usage = usage_of_template(chat_template, path)
        notes.append(f"template {usage['template']} and its image position: as the folder's chat template has them")
    except CheckpointError as error:
        usage = {}
        notes.append(f"template unknown: {error}; fix: --assume template=NAME, or ask with transformers' processor")
    return usage | {"chat_template": chat_template}


FORMAT = CheckpointFormat("hf", detect, read)
