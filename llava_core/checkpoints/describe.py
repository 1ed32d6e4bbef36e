"""What an opened checkpoint is: configurations, projector, image settings, usage, and tensors that are not yet read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from llava_core.checkpoints.base_models import open_vision_tower, tower_settings
from llava_core.checkpoints.configs import language_config, part_shapes, tower_config
from llava_core.checkpoints.files import error_at
from llava_core.checkpoints.tensors import LazyTensor
from llava_core.checkpoints.tokenizer import copy_tokenizer, open_tokenizer
from llava_core.constants import IMAGE_MARKER
from llava_core.data.conversation import TEMPLATES, ImagePosition
from llava_core.data.images import ImageProcessor
from llava_core.models.projector import PROJECTORS
from llava_core.runtime import CheckpointError, ConfigError, DataError, display_path, write_json

DESCRIPTION_KEY = "llava_core"  # field of other formats' configuration files that holds our description
IMAGE_DELIMITERS = ["<im_start>", "<im_end>"]
USAGE_OF_V1 = {"template": "v1", "image_position": "first", "image_delimiters": None}  # LLaVA 1.0 to 1.5
MODEL_PARTS = ("vision_tower", "multi_modal_projector", "language_model")
_MOST_CHARACTERS = 100_000  # of a system message or a chat template
USAGE_FIELDS = ("template", "system", "image_position", "image_delimiters", "prompt_format", "feature_layer")
"""How a checkpoint is to be used. Its files may not say it, so a caller may set these."""


@dataclass(frozen=True)
class Options:
    """Folders or hub ids of models that a caller names: the language model of a projector or LoRA, another tower."""

    base: str | None = None
    vision_tower: str | None = None


@dataclass(frozen=True)
class Description:
    """What is needed to use a checkpoint, besides its tensors; model configurations are those of transformers.

    Attributes:
        vision_tower: None if only `tower_source` is known.
        tower_source: folder or hub id of the tower's settings, and of its weights if the checkpoint lacks them.
        d_vision: width of the tower's features.
        feature_layer: hidden state of the tower that is projected.
        image: settings of the `ImageProcessor`; None if the tower is unknown.
        usage: the other `USAGE_FIELDS`, and further manifest fields such as base models, run id, and the
            `chat_template` of a checkpoint in transformers' format.
    """

    language_model: dict[str, Any]
    vision_tower: dict[str, Any] | None = None
    tower_source: str | None = None
    d_vision: int = 0
    projector: str = "linear"
    feature_layer: int = -2
    image: dict[str, Any] | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-like dict for the configuration files of other formats; `usage` is stored as "facts"."""
        fields = dict(vars(self))
        fields["facts"] = fields.pop("usage")
        return fields

    @classmethod
    def from_dict(cls, stored: dict[str, Any], where: Path) -> Description:
        """Return the description of a dict that `to_dict` wrote; `where` names the file in errors."""
        types = {"language_model": dict, "projector": str, "feature_layer": int, "d_vision": int, "facts": dict}
        names = {*types, "vision_tower", "tower_source", "image"}
        if not isinstance(stored, dict) or set(stored) != names:
            raise error_at(where, f"its description has other fields than {sorted(names)}; fix: convert again")
        for name, kind in types.items():
            if type(stored[name]) is not kind:
                raise error_at(where, f"{name} is {stored[name]!r}, not of type {kind.__name__}")
        fields = {name: value for name, value in stored.items() if value is not None and name != "facts"}
        fields["language_model"] = language_config(stored["language_model"], where)
        if "vision_tower" in fields:
            fields["vision_tower"] = tower_config({"vision_config": fields["vision_tower"]}, where)
        if "image" in fields:
            fields["image"] = checked_image_settings(fields["image"], where)
        if "tower_source" in fields:
            fields["tower_source"] = str(fields["tower_source"])
        return cls(**fields, usage=stored["facts"])

    def with_usage(self, usage: Mapping[str, Any]) -> Description:
        """Replace some of `USAGE_FIELDS`."""
        unknown = sorted(set(usage) - set(USAGE_FIELDS))
        if unknown:
            raise CheckpointError(f"'{unknown[0]}' cannot be set; these can: {', '.join(USAGE_FIELDS)}")
        if "template" in usage:
            TEMPLATES.get(usage["template"])
        kept = dict(self.usage)
        if set(usage) & {"template", "system", "image_position", "image_delimiters"}:
            kept.pop("chat_template", None)  # it asks otherwise than the caller wants
        rest = {name: value for name, value in usage.items() if name != "feature_layer"}
        return replace(self, usage=kept | rest, feature_layer=usage.get("feature_layer", self.feature_layer))

    def with_tower_name(self, name: str) -> Description:
        """Record the folder or hub id of the vision tower in `usage`, unless it is there."""
        return replace(self, usage=self.usage | {"base": {"vision_tower": name, **self.usage.get("base", {})}})

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor, stored once."""
        return bool(self.language_model.get("tie_word_embeddings"))


def checked_image_settings(settings: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return image settings after a round trip through `ImageProcessor`, which refuses wrong ones."""
    try:
        return ImageProcessor.from_dict(dict(settings)).to_dict()
    except DataError as error:
        raise error_at(where, f"{error}") from error


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: W + scale * B A for some weights W of a model.

    Attributes:
        settings: peft's `adapter_config.json`.
        matrices: our name of W -> A (r, in) and B (out, r).
        path: file of the matrices.
        replaced: our name -> a tensor that was trained itself (peft's `modules_to_save`).
    """

    settings: dict[str, Any]
    matrices: dict[str, tuple[LazyTensor, LazyTensor]]
    path: Path
    replaced: dict[str, LazyTensor] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """An opened checkpoint of any format: a description, and tensors that stay on disk until used.

    Attributes:
        tensors: our name -> tensor, in the order of a forward pass.
        names: our name -> the format's own name.
        left_out: the format's name -> why the tensor is not used.
        notes: what was assumed because the files do not say it.
        uses_base: whether the language model is the base model that the caller named.
        adapter: an adapter that is not merged into `tensors`.
        added_tokens: tokens that the training added to the vocabulary of the folder `tokenizer`, in this order.
    """

    format: str
    path: Path
    description: Description
    tensors: dict[str, LazyTensor]
    names: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None
    notes: list[str] = field(default_factory=list)
    uses_base: bool = False
    adapter: Adapter | None = None
    added_tokens: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of `MODEL_PARTS` whose tensors the checkpoint has."""
        present = {name.split(".")[0] for name in self.tensors}
        return tuple(part for part in MODEL_PARTS if part in present)

    @property
    def parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(int(torch.Size(tensor.shape).numel()) for tensor in self.tensors.values())

    def open_tokenizer(self, **options: Any) -> Any:
        """Open the tokenizer, with `added_tokens`; `options` as in the function of this name.

        Raises:
            CheckpointError: as in the function, or for a token without a row of the word embeddings.
        """
        if self.tokenizer is None:
            raise error_at(self.path, "no tokenizer (tokenizer.json or tokenizer.model); fix: copy it from the base")
        tokenizer = open_tokenizer(self.tokenizer, **options)
        tokenizer.add_tokens(list(self.added_tokens), special_tokens=True)
        rows = self.description.language_model.get("vocab_size")
        # v0's released tokenizer has the padding token after the last row, transformers' processors also the marker
        never_embedded = (tokenizer.pad_token, IMAGE_MARKER)
        tokens = 1 + max((k for token, k in tokenizer.get_vocab().items() if token not in never_embedded), default=-1)
        if rows is not None and tokens > rows:
            problem = f"its tokenizer knows {tokens} tokens, the word embeddings have {rows} rows"
            raise error_at(self.path, f"{problem}; fix: use the tokenizer of these weights")
        return tokenizer

    def copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files, checked, into a folder; they are changed only if there are `added_tokens`."""
        tokenizer = self.open_tokenizer() if self.tokenizer is not None else None
        copy_tokenizer(self.tokenizer, folder)
        if self.added_tokens and tokenizer is not None:
            tokenizer.save_pretrained(folder)
            write_json(folder / "added_tokens.json", tokenizer.get_added_vocab())  # for the slow tokenizers of 2023

    def require(self, *parts: str) -> Checkpoint:
        """Return the checkpoint with these parts; a vision tower that is only named is opened."""
        if "vision_tower" in parts and "vision_tower" not in self.parts:
            return self._with_tower().require(*parts)
        for part in parts:
            if part not in self.parts:
                raise error_at(self.path, f"has no {part.replace('_', ' ')}; fix: --base with its language model")
        return self

    def _with_tower(self) -> Checkpoint:
        source, where = self.description.tower_source, self.path
        if source is None:
            raise error_at(where, "contains and names no vision tower; fix: --vision-tower DIR")
        try:
            config, image = tower_settings(source)
            tensors, names = open_vision_tower(source)
        except CheckpointError as error:
            raise error_at(where, f"its vision tower cannot be read: {error}") from error
        if config["hidden_size"] != self.description.d_vision:
            problem = (
                f"its projector does not take the width {config['hidden_size']} of the tower {display_path(source)}"
            )
            raise error_at(where, f"{problem}; fix: --vision-tower DIR")
        settings = self.description.image or image.to_dict()
        description = replace(self.description, vision_tower=config, tower_source=None, image=settings)
        named = description.with_tower_name(source)
        return replace(self, description=named, tensors=tensors | self.tensors, names=names | self.names)

    def in_forward_order(self) -> Checkpoint:
        """Return the checkpoint with its tensors in the order of a forward pass, unknown ones last."""
        try:
            expected = expected_shapes(self.description, self.parts)
        except CheckpointError:  # `check` reports it
            return self
        known = {name: self.tensors[name] for name in expected if name in self.tensors}
        return replace(self, tensors=known | self.tensors)


def expected_shapes(description: Description, parts: Iterable[str] = MODEL_PARTS) -> dict[str, tuple[int, ...]]:
    """Return our names and shapes of all tensors that a description implies, in the order of a forward pass."""
    projector = {
        "name": description.projector, "d_vision": description.d_vision,
        "d_model": description.language_model.get("hidden_size"),
    }  # fmt: skip
    configs = (description.vision_tower, projector, description.language_model)
    shapes: dict[str, tuple[int, ...]] = {}
    for part, config in zip(MODEL_PARTS, configs, strict=True):
        if part not in parts:
            continue
        if config is None:
            raise CheckpointError("the vision tower's configuration is unknown; fix: --vision-tower DIR")
        shapes |= {f"{part}.{name}": shape for name, shape in part_shapes(part, config).items()}
    if description.tied:
        shapes.pop("language_model.lm_head.weight", None)
    return shapes


def check(checkpoint: Checkpoint) -> None:
    """Check that exactly the expected tensors are present, in the expected shapes."""
    where = checkpoint.path
    check_usage(checkpoint)
    try:
        expected = expected_shapes(checkpoint.description, checkpoint.parts)
    except CheckpointError as error:
        raise error_at(where, f"{error}") from error
    if not checkpoint.tensors:
        raise error_at(where, "has no weights; fix: copy or download it again")
    for name, shape in expected.items():
        if name not in checkpoint.tensors:
            n = len(expected.keys() - checkpoint.tensors.keys())
            raise error_at(where, f"{name} is missing ({n} in all); fix: get the complete checkpoint")
        their_name, actual = checkpoint.names.get(name, name), checkpoint.tensors[name].shape
        if actual != shape:
            fix = "use the configuration that belongs to these weights"
            raise error_at(where, f"{their_name} has shape {actual}, its configuration says {shape}; fix: {fix}")
    for name in checkpoint.tensors:
        their_name = checkpoint.names.get(name, name)
        if name not in expected:
            raise error_at(where, f"{their_name} is unknown to the model; fix: convert it with the code of its version")


def check_usage(checkpoint: Checkpoint) -> None:
    """Check the types of a description's usage fields, and that the vision tower fits them."""
    description, where = checkpoint.description, checkpoint.path
    tower, usage = description.vision_tower, description.usage
    positions = get_args(ImagePosition)
    rules = {
        "base": ("names of base models", lambda v: isinstance(v, dict) and _all_text(v.values())),
        "base_hash": ("hashes of base models", lambda v: isinstance(v, dict)),
        "base_nf4": ("float32 or bfloat16", lambda v: v in ("float32", "bfloat16")),
        "system": ("text", lambda v: isinstance(v, str | None)),
        "prompt_format": ("text", lambda v: isinstance(v, str | None)),
        "chat_template": ("text", lambda v: isinstance(v, str)),
        "image_position": (str(positions), lambda v: v in positions),
        "image_delimiters": (
            "two tokens or null", lambda v: v is None or (isinstance(v, list) and len(v) == 2 and _all_text(v))
        ),
    }  # fmt: skip
    for name, (kind, valid) in rules.items():
        if name in usage and not valid(usage[name]):
            raise error_at(where, f"{name} is {usage[name]!r}, not {kind}")
        if isinstance(text := usage.get(name), str) and len(text) > _MOST_CHARACTERS:
            raise error_at(where, f"{name} has {len(text):,} characters; fix: write at most {_MOST_CHARACTERS:,}")
    try:
        PROJECTORS.get(description.projector)
        if "template" in usage:
            TEMPLATES.get(str(usage["template"]))
    except ConfigError as error:
        raise error_at(where, f"{error}; fix: correct its configuration") from error
    layer = description.feature_layer
    if type(layer) is not int:
        raise error_at(where, f"feature_layer is {layer!r}, not the number of a layer")
    if tower is not None:
        layers = tower["num_hidden_layers"]
        if not -layers - 1 <= layer <= layers:
            raise error_at(where, f"feature_layer is {layer!r}; the vision tower has {layers} layers")
        if description.image is not None and description.image["size"] != tower["image_size"]:
            raise error_at(where, f"images of {description.image['size']} px for a tower of {tower['image_size']} px")


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
