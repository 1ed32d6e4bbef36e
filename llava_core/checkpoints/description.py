"""What a checkpoint is, whatever layout it lies in: configurations, projector, template, image settings, tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch

from llava_core.checkpoints.tensors import Lazy, has_file, has_weights, numbered, open_folder, read_settings
from llava_core.data.conversation import TEMPLATES, ImagePosition
from llava_core.data.images import ImageProcessor
from llava_core.models.projector import PROJECTORS
from llava_core.runtime import CheckpointError, CompanionError, DataError, located, shown

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
MAX_LAYERS = 512  # more is a lie of the configuration, and building it would take for ever
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
USE_FACTS = ("template", "system", "image_position", "image_delimiters", "prompt_format", "feature_layer")
"""Facts about the use of a checkpoint that its files may not tell, so that a caller may set them."""


@dataclass(frozen=True)
class Description:
    """What has to be known to use a checkpoint, besides its tensors.

    Attributes:
        language_model: transformers' configuration of the language model, `model_type` included.
        vision_tower: transformers' CLIPVisionConfig; None where nothing says more than `tower_source`.
        tower_source: folder or hub id of a tower whose weights are not inside.
        d_vision: width of the tower's features.
        projector: name in `PROJECTORS`.
        feature_layer: hidden state of the tower that is projected.
        image: settings of the `ImageProcessor`; None where the tower is unknown.
        facts: template, system message, image position and delimiters, prompt format, run id and whatever else belongs
            into a manifest.
    """

    language_model: dict[str, Any]
    vision_tower: dict[str, Any] | None
    tower_source: str | None
    d_vision: int
    projector: str
    feature_layer: int
    image: dict[str, Any] | None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-like, for the configuration files of foreign layouts."""
        return {
            "language_model": self.language_model, "vision_tower": self.vision_tower, "tower_source": self.tower_source,
            "d_vision": self.d_vision, "projector": self.projector, "feature_layer": self.feature_layer,
            "image": self.image, "facts": self.facts,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, value: dict[str, Any], where: str) -> Description:
        """Inverse of `to_dict`; `where` names the file in errors."""
        names = set(cls.__dataclass_fields__)
        if not isinstance(value, dict) or set(value) != names:
            raise CheckpointError(f"{where}: its description has other fields than {sorted(names)}; fix: convert again")
        kinds = {"language_model": dict, "projector": str, "feature_layer": int, "d_vision": int, "facts": dict}
        for name, kind in kinds.items():
            if type(value[name]) is not kind:
                raise CheckpointError(f"{where}: {name} is {value[name]!r}, not of type {kind.__name__}")
        tower, image, source = value["vision_tower"], value["image"], value["tower_source"]
        try:
            checked = {
                "language_model": language_config(value["language_model"], where),
                "vision_tower": None if tower is None else tower_config({"vision_config": tower}),
                "image": None if image is None else ImageProcessor.from_dict(image).to_dict(),
                "tower_source": None if source is None else str(source),
            }
        except DataError as error:
            raise CheckpointError(f"{where}: {error}") from error
        return cls(**value | checked)

    def with_facts(self, facts: Mapping[str, Any]) -> Description:
        """The same with some facts replaced; names as in `USE_FACTS`."""
        unknown = sorted(set(facts) - set(USE_FACTS))
        if unknown:
            raise CheckpointError(f"'{unknown[0]}' cannot be set; these can: {', '.join(USE_FACTS)}")
        rest = {k: v for k, v in facts.items() if k != "feature_layer"}
        if "template" in rest:
            TEMPLATES.get(rest["template"])
        layer = facts.get("feature_layer", self.feature_layer)
        return replace(self, facts=self.facts | rest, feature_layer=layer)

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor, stored once."""
        return bool(self.language_model.get("tie_word_embeddings"))


@dataclass
class Opened:
    """A checkpoint of any layout, under our names, its tensors unread.

    Attributes:
        layout: name in `layouts.LAYOUTS`.
        path: the folder or file.
        description: see there.
        tensors: our name -> tensor, in the order of a forward pass.
        names: our name -> the layout's own name.
        left_out: the layout's name -> why it is not read.
        tokenizer: folder with the tokenizer's files, or None.
        notes: what was assumed because the files do not say it.
        uses_base: whether the language model came from the base model that the caller named.
    """

    layout: str
    path: Path
    description: Description
    tensors: dict[str, Lazy]
    names: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None
    notes: list[str] = field(default_factory=list)
    uses_base: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of vision tower, projector and language model are inside."""
        found = {name.split(".")[0] for name in self.tensors}
        return tuple(part for part in PARTS if part in found)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(int(torch.Size(t.shape).numel()) for t in self.tensors.values())

    def need(self, *parts: str) -> Opened:
        """The same with these parts inside: a tower that is only referred to is opened.

        Raises:
            CheckpointError: a part is neither inside nor can be found.
        """
        if "vision_tower" in parts and "vision_tower" not in self.parts:
            return self._with_tower().need(*parts)
        for part in parts:
            if part not in self.parts:
                raise CheckpointError(
                    f"{shown(self.path)}: holds no {part.replace('_', ' ')}; fix: name the language model it was "
                    "trained with (--base DIR)"
                )
        return self

    def _with_tower(self) -> Opened:
        if self.description.tower_source is None:
            raise CheckpointError(f"{shown(self.path)}: holds and names no vision tower; fix: --vision-tower DIR")
        config, image, tensors, names = open_tower(self.description.tower_source)
        description = replace(
            self.description, vision_tower=config, tower_source=None, image=self.description.image or image.to_dict()
        )
        if config["hidden_size"] != description.d_vision:
            raise CheckpointError(
                f"{shown(self.path)}: its projector takes features of width {description.d_vision}, the vision tower "
                f"{shown(self.description.tower_source)} gives {config['hidden_size']}; fix: --vision-tower DIR"
            )
        return replace(self, description=description, tensors=tensors | self.tensors, names=names | self.names)


# ------------------------------------------------------------------------------------------------ what must be there


@lru_cache(maxsize=8)
def _skeleton_shapes(kind: str, config: str) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

    settings = json.loads(config)
    with torch.device("meta"):  # shapes alone: a 13B model takes a second and no memory
        if kind == "vision_tower":
            model = CLIPVisionModel(CLIPVisionConfig.from_dict(settings))
        elif kind == "language_model":
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        else:
            model = PROJECTORS.get(settings["name"])(settings["d_vision"], settings["d_model"])
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def expected(description: Description, parts: Iterable[str] = PARTS) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of all tensors that a description asks for.

    Args:
        description: of the checkpoint.
        parts: of `PARTS`.

    Raises:
        CheckpointError: the configuration is impossible.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in PARTS:
        if part not in parts:
            continue
        settings: dict[str, Any] | None = {
            "vision_tower": description.vision_tower,
            "language_model": description.language_model,
            "multi_modal_projector": {
                "name": description.projector, "d_vision": description.d_vision,
                "d_model": description.language_model.get("hidden_size"),
            },
        }[part]  # fmt: skip
        if settings is None:
            raise CheckpointError("the vision tower's configuration is unknown; fix: --vision-tower DIR")
        layers = settings.get("num_hidden_layers", 1)
        if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
            raise CheckpointError(f"{part}: num_hidden_layers is {layers!r}, not 1 to {MAX_LAYERS}")
        try:
            found = _skeleton_shapes(part, json.dumps(settings, sort_keys=True))
        except CompanionError:
            raise
        except Exception as error:  # a configuration can be wrong in any way that transformers' code can fail
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{part}: its configuration is impossible ({reason[:200]})") from error
        shapes |= {f"{part}.{name}": shape for name, shape in found.items()}
    if description.tied:
        shapes.pop("language_model.lm_head.weight", None)
    return shapes


def check(opened: Opened) -> None:
    """Make sure that exactly the expected tensors are there, in the expected shapes.

    Raises:
        CheckpointError: the first tensor, in the order of a forward pass, that is missing, unknown or of another shape.
    """
    try:
        wanted = expected(opened.description, opened.parts)
    except CheckpointError as error:
        raise CheckpointError(f"{shown(opened.path)}: {error}") from error
    if not opened.tensors:
        raise CheckpointError(f"{shown(opened.path)}: holds no weights; fix: copy or download it again")
    check_facts(opened)
    for name, shape in wanted.items():
        if name not in opened.tensors:
            n = len(wanted.keys() - opened.tensors.keys())
            raise CheckpointError(
                f"{shown(opened.path)}: {name} is missing ({n} in all); it would start random; fix: get the checkpoint "
                "whole"
            )
        if opened.tensors[name].shape != shape:
            raise CheckpointError(
                f"{shown(opened.path)}: {opened.names.get(name, name)} has shape {opened.tensors[name].shape}, its "
                f"configuration says {shape}; fix: use the configuration that belongs to these weights"
            )
    for name in opened.tensors:
        if name not in wanted:
            raise CheckpointError(
                f"{shown(opened.path)}: {opened.names.get(name, name)} is unknown to the model; it would be lost; "
                "fix: convert it with the code of its own version first"
            )


def check_facts(opened: Opened) -> None:
    """Make sure that what a description says about the use of the weights can be true.

    Raises:
        CheckpointError: a fact of another type, or one that the vision tower contradicts.
    """
    description, where = opened.description, shown(opened.path)
    tower, facts = description.vision_tower, description.facts
    named = facts.get("base", {})
    if not isinstance(named, dict) or not all(isinstance(source, str) for source in named.values()):
        raise CheckpointError(f"{where}: base is {named!r}, not names of base models")
    if not isinstance(facts.get("base_hash", {}), dict):
        raise CheckpointError(f"{where}: base_hash is {facts['base_hash']!r}, not hashes of base models")
    for name in ("system", "prompt_format"):
        if not isinstance(facts.get(name), str | None):
            raise CheckpointError(f"{where}: {name} is {facts[name]!r}, not text")
    if facts.get("template") is not None:
        TEMPLATES.get(str(facts["template"]))
    if str(facts.get("image_position", "data")) not in get_args(ImagePosition):
        raise CheckpointError(f"{where}: image_position is {facts['image_position']!r}, not {get_args(ImagePosition)}")
    pair = facts.get("image_delimiters")
    if pair is not None and not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
        raise CheckpointError(f"{where}: image_delimiters is {pair!r}, not two tokens or null")
    layer = description.feature_layer
    if type(layer) is not int:
        raise CheckpointError(f"{where}: feature_layer is {layer!r}, not a number of a layer")
    if tower is not None:
        layers = tower["num_hidden_layers"]
        if not -layers - 1 <= layer <= layers:
            raise CheckpointError(f"{where}: feature_layer is {layer!r}; the vision tower has {layers} layers")
        if description.image is not None and description.image["size"] != tower["image_size"]:
            raise CheckpointError(
                f"{where}: images of {description.image['size']} px for a tower of {tower['image_size']} px"
            )


def in_order(opened: Opened) -> Opened:
    """The same with its tensors in the order of a forward pass."""
    try:
        order = {name: k for k, name in enumerate(expected(opened.description, opened.parts))}
    except CheckpointError:
        order = {}
    ranked = sorted(opened.tensors, key=lambda n: (order.get(n, len(order)), [str(p) for p in numbered(n)]))
    return replace(opened, tensors={name: opened.tensors[name] for name in ranked})


# ------------------------------------------------------------------------------------------------ folders of parts


_DOWNLOADS: ContextVar[bool] = ContextVar("downloads", default=True)


@contextmanager
def no_downloads() -> Iterator[None]:
    """Take models of the hub from their local copies alone."""
    token = _DOWNLOADS.set(False)
    try:
        yield
    finally:
        _DOWNLOADS.reset(token)


def folder_of(source: str | Path) -> Path:
    """The folder of a model: itself, or the hub's copy of an id.

    Raises:
        CheckpointError: neither is there.
    """
    folder = located(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        local = not _DOWNLOADS.get()
        kinds = ["*.json", "*.model", "*.safetensors"]
        copy = Path(snapshot_download(str(source), allow_patterns=kinds, local_files_only=local))
        if not has_weights(copy):  # an old model: only where there are no safetensors
            snapshot_download(str(source), allow_patterns=["*.bin"], local_files_only=local)
        return copy
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: no such folder, and the hub's copy cannot be had ({type(error).__name__}); fix: download it "
            "and name its folder"
        ) from error


def open_tower(source: str | Path) -> tuple[dict[str, Any], ImageProcessor, dict[str, Lazy], dict[str, str]]:
    """Configuration, image settings, tensors and their names of a CLIP vision tower, from a CLIP model's folder or id.

    The text half of a CLIP model is left out.
    """
    folder = folder_of(source)
    config = read_settings(folder, "config.json")
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        raise CheckpointError(
            f"{shown(folder)}: its model_type is {config.get('model_type')!r}, not a CLIP vision tower; fix: "
            "--vision-tower DIR"
        )
    tensors, names = {}, {}
    for theirs, tensor in open_folder(folder).items():
        bare = theirs.removeprefix("vision_model.")
        text_half = theirs.startswith(("text_model.", "text_projection", "visual_projection", "logit_scale"))
        if not text_half and not bare.endswith("embeddings.position_ids"):
            tensors[f"vision_tower.{bare}"], names[f"vision_tower.{bare}"] = tensor, theirs
    settings = tower_config(config)
    return settings, tower_images(folder, settings["image_size"]), tensors, names


def tower_images(folder: Path, size: int) -> ImageProcessor:
    """Image settings that lie beside a vision tower.

    Args:
        folder: of the tower.
        size: pixels that the tower takes.
    """
    try:
        image = ImageProcessor.from_hf(read_settings(folder, "preprocessor_config.json"))
    except DataError as error:
        raise CheckpointError(f"{shown(folder)}: {error}") from error
    if image.size != size:
        raise CheckpointError(f"{shown(folder)}: images of {image.size} px for a tower of {size} px; fix: correct one")
    return image


def tower_config(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' complete CLIPVisionConfig out of a CLIP model's or a tower's configuration."""
    from transformers import CLIPVisionConfig

    settings = config.get("vision_config", config)
    if not isinstance(settings, dict):
        raise CheckpointError(f"vision_config is {settings!r}, not an object; fix: download config.json again")
    full = _complete(CLIPVisionConfig, {k: v for k, v in settings.items() if k != "model_type"})
    for name in ("image_size", "patch_size"):
        if type(full[name]) is not int or full[name] < 1:
            raise CheckpointError(f"vision tower: {name} is {full[name]!r}, not a number of pixels")
    return full


def language_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """transformers' complete configuration of a language model.

    Args:
        config: as stored, `model_type` included; foreign fields are dropped.
        where: names the file in errors.

    Raises:
        CheckpointError: transformers knows no such model, or the values are impossible.
    """
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{where}: no language model of model_type {kind!r} is known; fix: check config.json")
    return _complete(CONFIG_MAPPING[kind], config, where)


def _complete(config_class: Any, settings: dict[str, Any], where: str = "vision tower") -> dict[str, Any]:
    known = {k: v for k, v in settings.items() if not k.startswith(("mm_", "_", "auto_map"))}
    words = known.get("vocab_size")
    vocabulary = words if isinstance(words, int) else 1 << 40
    for token in ("pad_token_id", "bos_token_id"):  # -1 in old configurations would index the last word
        if isinstance(known.get(token), int) and not 0 <= known[token] < vocabulary:
            known[token] = None
    try:
        full: dict[str, Any] = config_class.from_dict(known).to_dict()
    except Exception as error:  # huggingface's validators raise classes of their own
        raise CheckpointError(f"{where}: impossible configuration ({' '.join(str(error).split())[:200]})") from error
    plain = json.loads(json.dumps(full, default=str))
    defaults = config_class().to_dict()
    names = {k for k in plain if k in defaults and not k.startswith("_")} | {"model_type"}
    unused = {"transformers_version", "id2label", "label2id", "architectures", "dtype", "output_attentions"}
    return {k: plain[k] for k in sorted(names - unused)}


def tokenizer_folder(folder: Path) -> Path | None:
    """The folder if it holds a tokenizer."""
    return folder if has_file(folder, "tokenizer.json") or has_file(folder, "tokenizer.model") else None


def open_tokenizer(folder: Path, language_model: Mapping[str, Any], **options: Any) -> Any:
    """The tokenizer of a folder; never code of the folder's own.

    Args:
        folder: with the tokenizer's files.
        language_model: its configuration decides the class: the folder's own may name one that transformers gives
            another tokenizer ("llava" one that drops the leading word mark).
        options: of transformers' `from_pretrained`.

    Raises:
        CheckpointError: it cannot be read, or a package for it is missing.
    """
    from transformers import AutoConfig, AutoTokenizer

    from llava_core.checkpoints.checkpoint import quiet

    try:
        with quiet():
            config = AutoConfig.for_model(**language_model)
            return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, **options)
    except Exception as error:  # tokenizers raises bare Exceptions for damaged files
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{shown(folder)}: the tokenizer cannot be read ({reason})") from error
