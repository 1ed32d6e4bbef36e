"""The layouts in which LLaVA checkpoints lie on disk, each a record: how to know it, read it and write it.

Names are ours inside (`vision_tower.`, `multi_modal_projector.`, `language_model.`) and a layout's own outside; the
rules between them are renamed prefixes, so a map is as exact backwards as forwards. A layout is recognised by the
content of its files, never by a folder's name. One more layout is one more `Layout` record.
"""

from __future__ import annotations

import re
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava_core.registry import Registry
from llava_core.runtime import CheckpointError, shown, write_json
from llava_core.weights.description import (
    TOKENIZER_FILES,
    Description,
    Opened,
    folder_of,
    in_order,
    language_config,
    open_tokenizer,
    tokenizer_folder,
    tower_config,
    tower_images,
)
from llava_core.weights.tensors import (
    PICKLES,
    Lazy,
    ShardWriter,
    has_file,
    has_weights,
    inside,
    load_pickle,
    open_file,
    open_folder,
    read_settings,
    single_weights_file,
)

ASSUMED = {"template": "v1", "image_position": "first", "image_delimiters": None}  # LLaVA 1.0 to 1.5
BLOCK = "llava_core"  # where foreign configuration files keep our description
DELIMITERS = ["<im_start>", "<im_end>"]
_COMPUTED = {
    r"(^|\.)rotary_emb\.inv_freq$": "computed from the configuration",
    r"(^|\.)embeddings\.position_ids$": "a counter, not a weight",
}


@dataclass(frozen=True)
class Options:
    """What a caller adds to a checkpoint that does not hold everything.

    Attributes:
        base: folder or id of the language model that a projector, a LoRA or a `.pth` belongs to.
        vision_tower: folder or id of the tower, instead of the one that the checkpoint names.
    """

    base: str | None = None
    vision_tower: str | None = None


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints lie on disk.

    Attributes:
        name: as `llava convert --to` takes it.
        text: what it is, in a few words.
        found: whether a path is of this layout, by its content.
        read: opens it.
        write: writes an opened checkpoint into an empty folder; None for what is only read.
        rules: pairs (our prefix, the layout's prefix), the longest first.
        parts: what must be inside to write it; a vision tower may else be referred to.
        alone: whether nothing but `parts` is written.
    """

    name: str
    text: str
    found: Callable[[Path], bool]
    read: Callable[[Path, Options], Opened]
    write: Callable[[Opened, Path, int], None] | None = None
    rules: tuple[tuple[str, str], ...] = ()
    parts: tuple[str, ...] = ("multi_modal_projector", "language_model")
    alone: bool = False


LAYOUTS: Registry[Layout] = Registry("layout")


# ------------------------------------------------------------------------------------------------ names

_ORIGINAL = (
    ("multi_modal_projector.", "model.mm_projector."),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)
_MMPRETRAIN = tuple((ours, f"model.lang_encoder.{theirs}") for ours, theirs in _ORIGINAL)
_PROJECTOR_PREFIXES = (
    "base_model.model.model.mm_projector.", "model.mm_projector.", "mm_projector.", "multi_modal_projector.",
    "model.lang_encoder.model.mm_projector.",
)  # fmt: skip


def to_theirs(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A layout's name for ours."""
    for ours, theirs in rules:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def to_ours(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Our name for a layout's."""
    for ours, theirs in rules:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def renamed(
    tensors: Mapping[str, Lazy], rename: Callable[[str], str], where: Path
) -> tuple[dict[str, Lazy], dict[str, str], dict[str, str]]:
    """Tensors under our names, their former names, and what was left out with the reason."""
    ours: dict[str, Lazy] = {}
    names: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for theirs, tensor in tensors.items():
        reason = next((text for pattern, text in _COMPUTED.items() if re.search(pattern, theirs)), None)
        if reason:
            left_out[theirs] = reason
            continue
        name = rename(theirs)
        if name in ours:
            raise CheckpointError(f"{shown(where)}: {theirs} and {names[name]} are both {name}; remove one")
        ours[name], names[name] = tensor, theirs
    return ours, names, left_out


def untied(opened: Opened) -> Opened:
    """Drop an output embedding that repeats the input's, where the configuration says that they are one."""
    head, words = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    if not opened.description.tied or head not in opened.tensors or words not in opened.tensors:
        return opened
    if not torch.equal(opened.tensors[head].read(), opened.tensors[words].read()):
        raise CheckpointError(
            f"{shown(opened.path)}: its configuration ties the output embedding to the input's, but they differ; "
            'fix: set "tie_word_embeddings": false'
        )
    opened.left_out[opened.names.pop(head)] = "repeats the input embedding (tied)"
    return replace(opened, tensors={k: v for k, v in opened.tensors.items() if k != head})


# ------------------------------------------------------------------------------------------------ shared steps


def write_settings(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a part's configuration as `folder/config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))


def copy_tokenizer(opened: Opened, folder: Path) -> None:
    """Copy the tokenizer's files as they are."""
    for name in TOKENIZER_FILES if opened.tokenizer else ():
        if has_file(opened.tokenizer, name):  # type: ignore[arg-type]
            shutil.copyfile(inside(opened.tokenizer, name), folder / name)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the original releases


def mm_config(path: Path) -> dict[str, Any]:
    config = read_settings(path, "config.json") if path.is_dir() and has_file(path, "config.json") else {}
    return config if "mm_vision_tower" in config or "mm_hidden_size" in config else {}


def is_original(path: Path) -> bool:
    return bool(mm_config(path)) and has_weights(path) and not has_file(path, "adapter_config.json")


_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": (None, "patch"),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "square", "pad"),
    "mm_projector_type": (None, "linear", "mlp2x_gelu"),
}


def describe_original(path: Path, config: dict[str, Any], options: Options, notes: list[str]) -> Description:
    """Description of a checkpoint of the original code from its `config.json`."""
    where = shown(path / "config.json")
    if BLOCK in config:
        told = Description.from_dict(config[BLOCK], where)
        unchanged(told, config, where, {"mm_vision_select_layer": told.feature_layer, "mm_hidden_size": told.d_vision,
            "mm_projector_type": told.projector, "vocab_size": told.language_model["vocab_size"]})  # fmt: skip
        return replace(told, tower_source=options.vision_tower or told.tower_source)
    for name, values in _KNOWN_VALUES.items():
        if config.get(name) not in values:
            raise CheckpointError(
                f"{where}: {name} is {config[name]!r}; only {', '.join(map(str, values[1:]))} can be represented"
            )
    kind = str(config.get("model_type"))
    kinds = {"llava": "llama", "llava_llama": "llama", "llama": "llama", "llava_mistral": "mistral"}
    if kind not in kinds:
        raise CheckpointError(f"{where}: model_type {kind!r} is not of LLaVA's language models ({', '.join(kinds)})")
    layer = config.get("mm_vision_select_layer")
    if layer is None:
        notes.append("feature layer -2 (the paper's) assumed: config.json does not say it")
    width = config.get("mm_hidden_size", 1024)
    tower = options.vision_tower or config.get("mm_vision_tower")
    if type(width) is not int or not isinstance(tower, str | None):
        raise CheckpointError(f"{where}: mm_hidden_size {width!r} or mm_vision_tower {tower!r} is not of its type")
    delimiters = DELIMITERS if config.get("mm_use_im_start_end") else None
    template = _template_of(path, notes)
    before_1 = delimiters is not None or template == "v0_exact"
    facts: dict[str, Any] = {
        "template": template, "image_position": "last" if before_1 else "first", "image_delimiters": delimiters
    }  # fmt: skip
    era = "the releases before 1.0" if before_1 else "version 1.0 and later"
    notes.append(f"image position {facts['image_position']}, as the evaluation of {era} had it")
    return Description(
        language_config(config | {"model_type": kinds[kind]}, where), None,
        tower, width, config.get("mm_projector_type") or "linear", -2 if layer is None else layer,
        None, facts | {"image_mode": "pad" if config.get("image_aspect_ratio") == "pad" else "crop"},
    )  # fmt: skip


def unchanged(told: Description, config: Mapping[str, Any], where: str, fields: Mapping[str, Any]) -> None:
    """Make sure that a file which we wrote for others still says what our description in it says.

    Raises:
        CheckpointError: a field differs: others have changed the checkpoint since.
    """
    for name, value in fields.items():
        if config.get(name) != value:
            raise CheckpointError(
                f"{where}: {name} is {config.get(name)!r} and was {value!r} when it was exported; fix: remove "
                f"'{BLOCK}' from it, and what the other fields say will count"
            )


def _template_of(path: Path, notes: list[str]) -> str:
    """Template of a release: only the tokenizers of v0 open a sequence with the end token."""
    bos = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_settings(path, name).get("bos_token") if has_file(path, name) else None
        bos = bos or (found.get("content") if isinstance(found, dict) else found)
    template = "v0_exact" if bos == "</s>" else "v1"
    notes.append(f"template {template}: the tokenizer opens a sequence with {bos or 'nothing that its files name'}")
    return template


def with_tower_settings(description: Description, notes: list[str]) -> Description:
    """Fill in the tower's configuration and image settings from the tower that a checkpoint names, if it is here."""
    mode = description.facts.get("image_mode")
    facts = {k: v for k, v in description.facts.items() if k != "image_mode"}
    description = replace(description, facts=facts)
    if description.image is not None or description.tower_source is None:
        return description
    try:
        folder = folder_of(description.tower_source)
        config = tower_config(read_settings(folder, "config.json"))
        image = tower_images(folder, config["image_size"])
    except CheckpointError as error:
        notes.append(f"the vision tower is not here: {error}")
        return description
    notes.append(f"vision tower read from {shown(folder)}, which the files or the caller name")
    return replace(description, vision_tower=config, image=replace(image, mode=mode or image.mode).to_dict())


def open_renamed(
    layout: str, path: Path, tensors: dict[str, Lazy], rename: Callable[[str], str], description: Description,
    tokenizer: Path | None, notes: list[str],
) -> Opened:  # fmt: skip
    """Tensors under our names, with their description; a tower inside counts before one that is only named."""
    ours, names, left_out = renamed(tensors, rename, path)
    description = with_tower_settings(description, notes)
    if any(name.startswith("vision_tower.") for name in ours):
        if description.vision_tower is None:
            raise CheckpointError(f"{shown(path)}: a vision tower without configuration; fix: --vision-tower DIR")
        description = replace(description, tower_source=None)
    opened = Opened(layout, path, description, ours, names, left_out, tokenizer, notes)
    return in_order(untied(opened))


def from_original(name: str) -> str:
    return to_ours(name, _ORIGINAL)


def _read_original(path: Path, options: Options) -> Opened:
    notes: list[str] = []
    config = mm_config(path)
    description = describe_original(path, config, options, notes)
    tensors = open_folder(path)
    if not any("mm_projector" in name for name in tensors):
        raise CheckpointError(
            f"{shown(path)}: the projector (model.mm_projector...) is missing; the model would be blind; fix: get the "
            "checkpoint whole, or take its mm_projector.bin"
        )
    opened = open_renamed("original", path, tensors, from_original, description, tokenizer_folder(path), notes)
    if is_delta(opened.tensors):
        raise CheckpointError(
            f"{shown(path)}: these are delta weights (their norms are near zero), not a model; fix: `llava delta apply`"
        )
    return opened


def is_delta(tensors: Mapping[str, Lazy]) -> bool:
    """Whether weights of a LLaMA are differences: the scales of its norms, around one in a model, are near zero."""
    norms = [float(t.read().float().abs().mean()) for n, t in tensors.items() if n.endswith("norm.weight")]
    return bool(norms) and statistics.median(norms) < 0.05


def original_config(opened: Opened) -> dict[str, Any]:
    """`config.json` of the original code for an opened checkpoint; our whole description stands in it, too."""
    description = opened.description
    image = description.image or {}
    inside_tower = "vision_tower" in opened.parts
    tower = description.tower_source or description.facts.get("base", {}).get("vision_tower")
    kinds = {"llama": ("llava", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
    if description.language_model["model_type"] not in kinds:
        raise CheckpointError(
            f"{shown(opened.path)}: the original code has no {description.language_model['model_type']}; fix: --to hf"
        )
    kind, architecture = kinds[description.language_model["model_type"]]
    theta = (description.language_model.get("rope_parameters") or {}).get("rope_theta")
    return {
        **description.language_model, **({"rope_theta": theta} if theta else {}),
        "model_type": kind, "architectures": [architecture],
        "mm_vision_tower": tower,
        "mm_hidden_size": description.d_vision, "mm_projector_type": description.projector,
        "mm_vision_select_layer": description.feature_layer, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": bool(description.facts.get("image_delimiters")), "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if image.get("mode") == "pad" else "square", "use_mm_proj": True,
        "unfreeze_mm_vision_tower": inside_tower, BLOCK: description.to_dict(),
    }  # fmt: skip


def _write_original(opened: Opened, folder: Path, shard_bytes: int) -> None:
    write_json(folder / "config.json", original_config(opened))
    copy_tokenizer(opened, folder)
    named = {to_theirs(name, _ORIGINAL): tensor for name, tensor in opened.tensors.items()}
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in named.items():
        writer.add(name, tensor.read())
    writer.close()


# ------------------------------------------------------------------------------------------------ projector alone


def _projector_file(path: Path) -> Path | None:
    """File of a projector: the path itself, `mm_projector.bin`, or the only weights file of a folder."""
    if path.is_dir():
        if has_weights(path) or has_file(path, "adapter_config.json"):  # releases have mm_projector.bin beside the rest
            return None
        if has_file(path, "mm_projector.bin"):
            return path / "mm_projector.bin"
        file = single_weights_file(path)
    else:
        file = path if path.suffix in (".safetensors", *PICKLES) else None
    names = open_file(file) if file else {}
    blind = not any(n.startswith(_PROJECTOR_PREFIXES) for n in names) or any(".layers." in n for n in names)
    return None if blind else file


def _is_projector(path: Path) -> bool:
    return _projector_file(path) is not None


def open_language_model(source: str) -> Opened:
    """A plain language model (folder or hub id) under our names."""
    folder = folder_of(source)
    config = read_settings(folder, "config.json")
    description = Description(language_config(config, shown(folder)), None, None, 0, "linear", -2, None)
    ours, names, left_out = renamed(open_folder(folder), lambda name: f"language_model.{name}", folder)
    if not ours:
        raise CheckpointError(f"{shown(folder)}: holds no weights; fix: download the language model whole")
    opened = Opened("language model", folder, description, ours, names, left_out, tokenizer_folder(folder))
    return in_order(untied(opened))


def _read_projector(path: Path, options: Options) -> Opened:
    file = _projector_file(path)
    assert file is not None
    found = open_file(file)
    notes: list[str] = []
    projector, names, rest = {}, {}, {}
    for theirs, tensor in found.items():
        prefix = next((p for p in _PROJECTOR_PREFIXES if theirs.startswith(p)), None)
        if prefix:
            end = theirs[len(prefix) :].replace("linear_1.", "0.").replace("linear_2.", "2.")
            projector[f"multi_modal_projector.{end}"], names[f"multi_modal_projector.{end}"] = tensor, theirs
        else:
            rest[theirs] = tensor
    kind = "mlp2x_gelu" if "multi_modal_projector.0.weight" in projector else "linear"
    first = projector.get("multi_modal_projector.0.weight" if kind == "mlp2x_gelu" else "multi_modal_projector.weight")
    if first is None or len(first.shape) != 2:
        raise CheckpointError(f"{shown(file)}: no projector's weight among {', '.join(sorted(found)[:4])}")
    d_model, d_vision = first.shape
    config = mm_config(path) if path.is_dir() else {}
    base = open_language_model(options.base) if options.base else None
    if config:
        description = describe_original(path, config, options, notes)
    else:
        notes.append("template v1, image position first and feature layer -2 assumed: there is no config.json")
        description = Description(
            {"hidden_size": d_model}, None, options.vision_tower, d_vision, kind, -2, None, dict(ASSUMED)
        )  # fmt: skip
    if base is not None:
        width = base.description.language_model.get("hidden_size")
        if width != d_model:
            raise CheckpointError(
                f"{shown(file)}: a projector into width {d_model}, but {shown(base.path)} has {width}; fix: --base "
                "with the very language model that it was trained with"
            )
        facts = description.facts | {"base": {"language_model": str(options.base)}, "base_hash": {}}
        description = replace(description, language_model=base.description.language_model, facts=facts)
    description = with_tower_settings(description, notes)
    tensors = projector | (base.tensors if base else {})
    opened = Opened(
        "projector", path, description, tensors, names | (base.names if base else {}),
        tokenizer=base.tokenizer if base else tokenizer_folder(path) if path.is_dir() else None, notes=notes,
        uses_base=base is not None,
    )  # fmt: skip
    return _with_words(in_order(opened), rest, file)


def _with_words(opened: Opened, rest: dict[str, Lazy], file: Path) -> Opened:
    """Put trained word embeddings of a projector file (all rows, or the two of the image delimiters) into the model."""
    for theirs, rows in rest.items():
        if not theirs.endswith("embed_tokens.weight"):
            raise CheckpointError(f"{shown(file)}: {theirs} is no part of a projector file; it would be lost")
        key = "language_model.model.embed_tokens.weight"
        words = opened.tensors.get(key)
        if words is None:
            opened.left_out[theirs] = "word embeddings: they need the language model (--base)"
        elif words.shape == rows.shape:
            opened.tensors[key] = rows
            opened.names[key] = theirs
        elif rows.shape == (2, words.shape[1]) and opened.tokenizer is not None:
            places = [_token_id(opened.tokenizer, token, opened.description.language_model) for token in DELIMITERS]
            opened.tensors[key] = words.then(lambda table, p=places, r=rows: _put_rows(table, p, r.read()))  # type: ignore[misc]
            opened.description.facts["image_delimiters"] = DELIMITERS
        else:
            raise CheckpointError(
                f"{shown(file)}: its word embeddings are {rows.shape}, the base's {words.shape}; fix: --base with a "
                "language model (and tokenizer) whose vocabulary was extended as in training, or take the projector "
                "that was trained without image tokens"
            )
    return opened


def _put_rows(table: torch.Tensor, places: list[int], rows: torch.Tensor) -> torch.Tensor:
    table = table.clone()
    table[places] = rows.to(table.dtype)
    return table


def _token_id(folder: Path, token: str, language_model: dict[str, Any]) -> int:
    found = open_tokenizer(folder, language_model).get_vocab().get(token)
    if found is None:
        raise CheckpointError(f"{shown(folder)}: its tokenizer has no {token}; fix: take the checkpoint's own")
    return int(found)


def _write_projector(opened: Opened, folder: Path, shard_bytes: int) -> None:
    write_json(folder / "config.json", original_config(opened))
    named = {to_theirs(name, _ORIGINAL): tensor.read().clone() for name, tensor in opened.tensors.items()}
    torch.save(named, folder / "mm_projector.bin")


# ------------------------------------------------------------------------------------------------ mmpretrain


def _pth_of(path: Path) -> Path | None:
    if path.is_dir():
        file = None if has_weights(path) or has_file(path, "manifest.json") else single_weights_file(path)
        return _pth_of(file) if file else None
    return path if path.suffix in (".pth", ".pt", ".bin") and path.exists() else None


def _is_mmpretrain(path: Path) -> bool:
    file = _pth_of(path)
    return file is not None and any(name.startswith("model.lang_encoder.") for name in open_file(file))


def _read_mmpretrain(path: Path, options: Options) -> Opened:
    file = _pth_of(path)
    assert file is not None
    meta = load_pickle(file).get("meta")
    block = meta.get(BLOCK) if isinstance(meta, dict) else None
    tensors = open_file(file)
    notes: list[str] = []
    tokenizer = tokenizer_folder(path) if path.is_dir() else None
    if block is not None:
        description = Description.from_dict(block, shown(file))
        description = replace(description, tower_source=options.vision_tower or description.tower_source)
    elif options.base is None:
        raise CheckpointError(
            f"{shown(file)}: weights without a configuration; fix: --base DIR with config.json and tokenizer of its "
            "language model, and --vision-tower DIR"
        )
    else:
        folder = folder_of(options.base)
        config = language_config(read_settings(folder, "config.json"), shown(folder))
        tokenizer = tokenizer or tokenizer_folder(folder)
        mlp = any(".mm_projector.0." in name for name in tensors)
        width = next((t.shape[-1] for n, t in tensors.items() if re.search(r"mm_projector\.(0\.)?weight$", n)), 0)
        words = tensors.get("model.lang_encoder.model.embed_tokens.weight")
        config["vocab_size"] = words.shape[0] if words else config["vocab_size"]  # the delta's rows, not the base's
        notes.append("feature layer -2: how the weights were trained (mmpretrain itself reads the last layer)")
        notes.append("template v1 and image position first assumed")
        # mmpretrain's own pipeline resizes straight to a square, whatever the image's shape
        facts = {**ASSUMED, "image_delimiters": None if mlp else DELIMITERS, "image_mode": "resize"}
        description = Description(
            config, None, options.vision_tower, width, "mlp2x_gelu" if mlp else "linear", -2, None, facts
        )

    def rename(name: str) -> str:
        return to_ours(name, _MMPRETRAIN)

    opened = open_renamed("mmpretrain", path, tensors, rename, description, tokenizer, notes)
    return replace(opened, uses_base=block is None)


def _write_mmpretrain(opened: Opened, folder: Path, shard_bytes: int) -> None:
    copy_tokenizer(opened, folder)
    write_json(folder / "config.json", opened.description.language_model)  # of its lang_encoder
    named = {to_theirs(name, _MMPRETRAIN): tensor.read().contiguous() for name, tensor in opened.tensors.items()}
    torch.save({"meta": {BLOCK: opened.description.to_dict()}, "state_dict": named}, folder / "model.pth")


# ------------------------------------------------------------------------------------------------ registry

_PROJECTOR = Layout(
    "projector", "a projector alone, mm_projector.bin", _is_projector, _read_projector, _write_projector, _ORIGINAL,
    ("multi_modal_projector",), alone=True,
)  # fmt: skip
LAYOUTS.register("projector")(_PROJECTOR)
LAYOUTS.register("mmpretrain")(
    Layout("mmpretrain", "one .pth of mmpretrain", _is_mmpretrain, _read_mmpretrain, _write_mmpretrain, _MMPRETRAIN)
)
LAYOUTS.register("original")(
    Layout("original", "the original releases (v0, v1, 1.5)", is_original, _read_original, _write_original, _ORIGINAL)
)
