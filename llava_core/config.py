"""The two axes of a run: an experiment (the paper's facts) at a scale (hardware and data).

Values are laid over each other in a fixed order, later ones win: the base experiment, the experiment's own file, what
the scale departs from (`"*"`, then base experiments, then the experiment itself; but a field that an ablation sets
itself stays as it set it), the caller's overrides. Every difference from the paper is listed in `RunConfig.departures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from llava_core import runtime
from llava_core.config_files import (
    StrictModel,
    check_field,
    field_names,
    flatten,
    nested,
    read_yaml,
    validated,
    value_of,
)
from llava_core.registry import unknown
from llava_core.runtime import ConfigError

META = ("name", "base", "title", "sources", "claims", "ablation")
"""Fields of an experiment that describe it and do not change what is computed."""

NO_INFLUENCE: dict[str, Any] = dict.fromkeys(META, True) | {"data": {"written_by"}}
"""What `model_dump(exclude=...)` leaves out of an experiment for its settings that can change the result."""

FAST = {"data.limit": 96, "train.epochs": 1}
"""What a fast run overrides: enough to prove that every step runs, far too little to learn."""

BASE = "base"
"""The file of the values that the experiments share; not an experiment itself."""

KINDS = ("conversation", "detail", "complex")
"""The paper's three kinds of instruction data."""


class DataConfig(StrictModel):
    """What a run is trained on."""

    name: str
    """Key of the scale's `data` for the folder; `<name>_images` is the key for the folder of images."""
    file: str | None = None
    """LLaVA-Instruct records in that folder; `{prompt_format}` in the name is replaced. Null in old records only."""
    validation_file: str | None = None
    """Records for the held-out loss; null: a share of `file` is held out."""
    held_out: float = Field(default=0, ge=0)
    """Records of `file` that are kept from training for the held-out loss: a share below 1, or a number of them."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What a sample does that cannot be trained on: stop the run before its first step, or leave it out, counted."""
    written_by: str = "the command that writes it"
    """Command that writes the files, for the message about a missing one."""
    subset: dict[str, float] = Field(default_factory=dict)
    """Share of each kind of sample that is kept, e.g. `{conversation: 1.0, detail: 0.05}`; empty keeps all."""
    prompt_format: str | None = None
    """Order of the parts of a ScienceQA prompt and answer, e.g. `QCM-LEPA`."""
    limit: PositiveInt | None = None

    @field_validator("held_out")
    @classmethod
    def _share_or_count(cls, held_out: float) -> float:
        if 0.5 < held_out < 1 or (held_out >= 1 and held_out % 1):
            raise ValueError("a share of up to 0.5, or a whole number of records")
        return held_out

    @field_validator("subset")
    @classmethod
    def _known_kinds(cls, subset: dict[str, float]) -> dict[str, float]:
        for kind, share in subset.items():
            if kind not in KINDS:
                raise ValueError(unknown("kind of instruction data", kind, KINDS))
            if not 0 < share <= 1:
                raise ValueError(f"the share of '{kind}' must lie above 0 and up to 1; leave the kind out for none")
        # the full mix and no choice are one thing, and must be one run
        return {} if subset == dict.fromkeys(KINDS, 1.0) else subset

    @property
    def files(self) -> list[str]:
        """Names of the training file and, if there is one, of the validation file."""
        if self.file is None:
            raise ConfigError("data.file is not set; fix: name a file of LLaVA-Instruct records in the experiment")
        names = [self.file, *([self.validation_file] if self.validation_file else [])]
        return [name.replace("{prompt_format}", str(self.prompt_format)) for name in names]


class ModelConfig(StrictModel):
    """The parts of the model by logical name; the scale says where each one is."""

    language_model: Literal["vicuna-7b", "vicuna-13b"]
    vision_tower: Literal["clip-vit-large-patch14"]
    feature_layer: int = Field(le=-1)
    """Index into the tower's hidden states, from the end: -2 is the output of the last block but one."""
    projector: str
    """Name in `llava_core.models.PROJECTORS`, which is checked when the model is built."""


class AdapterConfig(StrictModel):
    """LoRA adapters (peft) on every linear layer of the decoder, trained instead of the language model's weights."""

    r: PositiveInt
    alpha: PositiveFloat
    dropout: float = Field(default=0.0, ge=0, lt=1)
    bits: Literal[4] | None = None
    """QLoRA: the frozen weights are stored in 4 bits (NF4); null keeps them in the compute dtype."""


class TrainConfig(StrictModel):
    trainable: list[Literal["projector", "language_model"]] = Field(min_length=1)
    learning_rate: PositiveFloat
    epochs: PositiveInt
    global_batch: PositiveInt
    """Samples per optimizer step, over all devices and micro-batches."""
    schedule: Literal["cosine"]
    warmup_ratio: float = Field(ge=0, lt=1)
    weight_decay: NonNegativeFloat
    betas: tuple[float, float]
    eps: PositiveFloat
    grad_clip: PositiveFloat
    max_length: PositiveInt
    """Tokens per sample with image positions; later turns beyond it are dropped, a first turn beyond it is refused."""
    order: Literal["samples", "images"] = "samples"
    """What an epoch shuffles; "images" keeps the samples of an image together, so that a packed row shares it."""
    seed: int = Field(ge=0)
    precision: Literal["float32", "mixed_bf16", "pure_bf16"]
    """mixed_bf16: trained weights and optimizer state in fp32, everything else and the arithmetic in bf16."""
    adapters: AdapterConfig | None = None
    snapshots: int = Field(default=0, ge=0)
    """Checkpoints at equal distances for a learning curve, in `snapshots/<step>`; the last one is `checkpoint`."""

    @model_validator(mode="after")
    def _adapters_need_a_language_model(self) -> TrainConfig:
        if self.adapters is not None and "language_model" not in self.trainable:
            raise ValueError("adapters belong to the language model, which train.trainable does not name")
        return self


class AblationConfig(StrictModel):
    """The reference arm of an ablation; an experiment with this section is one of `companion.ablations`."""

    name: str | None = None
    """Name for `companion.ablations`; null: the experiment's."""
    reference: str | None = None
    """Experiment of the other arm; null: the base."""
    labels: tuple[str, str] | None = None
    """Names of the reference and of this experiment in tables; null: those of the experiments."""
    claim: str | None = None
    """Claim of the paper about the difference, this experiment minus the reference."""


class ExperimentConfig(StrictModel):
    """The paper's facts about one training run."""

    name: str
    base: str | None = None
    title: str
    stage: Literal[1, 2]
    init_from: str | None
    """Experiment whose result this one starts from (its projector); null: a fresh projector."""
    data: DataConfig
    model: ModelConfig
    template: str
    image_position: Literal["data", "first", "last", "random"]
    train: TrainConfig
    sources: dict[str, str] = Field(default_factory=dict)
    """Where each value is written down, by dotted field; a parent's source covers its fields."""
    claims: list[str] = Field(default_factory=list)
    ablation: AblationConfig | None = None
    """Not inherited from a base."""

    def source_of(self, field: str) -> str | None:
        """Return where the value of a dotted field is written down, from the field's or a parent's entry."""
        parts = field.split(".")
        return next((s for n in range(len(parts), 0, -1) if (s := self.sources.get(".".join(parts[:n])))), None)


class Departs(StrictModel):
    """Fields in which a scale leaves the paper, and why."""

    set: dict[str, Any]
    why: str = Field(min_length=1)


class ParallelConfig(StrictModel):
    """How the processes (ranks) of a run share its work; the result does not depend on it."""

    kind: Literal["none", "ddp", "fsdp2", "zero2", "zero3"]
    """none: one process; ddp: replicated weights; fsdp2: PyTorch's fully_shard; zero2, zero3: DeepSpeed."""
    processes: PositiveInt | Literal["gpus"] = 1
    """Processes per node; "gpus": one for each GPU."""
    nodes: PositiveInt = 1
    offload: bool = False
    """fsdp2, zero2, zero3: keep the optimizer state (fsdp2: the weights, too) in the memory of the CPU."""
    timeout_s: PositiveFloat = 1800
    """Longest wait of a rank for the others."""

    @model_validator(mode="after")
    def _possible(self) -> ParallelConfig:
        if self.kind == "none" and (self.processes != 1 or self.nodes != 1):
            raise ValueError("kind 'none' is a single process; set processes: 1 and nodes: 1, or another kind")
        if self.offload and self.kind in ("none", "ddp"):
            raise ValueError(f"kind '{self.kind}' cannot offload; use fsdp2, zero2 or zero3")
        return self


class StatesConfig(StrictModel):
    """The saved states that an interrupted run resumes from."""

    every_s: PositiveFloat
    keep: PositiveInt = 2
    """The newest states that are kept: an older one replaces one that is damaged."""


class ScaleConfig(StrictModel):
    """Hardware and data: everything of a run that is not the paper's."""

    name: str
    title: str
    device: Literal["auto", "cpu", "cuda"]
    threads: PositiveInt | None
    row_tokens: PositiveInt
    """Tokens of a packed row, which one forward and backward pass computes; does not change the result."""
    parallel: ParallelConfig
    activation_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Recompute activations in the backward pass; auto: a single process from its first out-of-memory error on, sharded
    engines and several processes always."""
    states: StatesConfig
    offline: bool = False
    """Forbid the Hugging Face libraries any request."""
    cache_pixels: bool = False
    """Keep the decoded pixels of all training images in memory: for thousands of small images, not for 595K."""
    miniature: bool = False
    """Missing data sets are written by `companion.miniature`."""
    data: dict[str, str]
    """Where each data set lies; relative to the repository root."""
    models: dict[str, str]
    """Where each base model lies: a path (`models/...`, `data/...`, `./...`, `/...`) or an id on the hub."""
    stand_ins: dict[str, str] = Field(default_factory=dict)
    """Data sets and models, by the names above, that are not the paper's own, and why."""
    answer_tokens: tuple[PositiveInt, PositiveInt] = (1024, 64)
    """Maximum tokens of an answer and of a second pass (Source: llava/eval/model_vqa_science.py@8959d5c)."""
    eval_samples: PositiveInt
    """Greatest number of held-out samples whose loss is computed."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Where the metrics are also logged."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of the experiments that are reported with an interval."""
    departs: dict[str, Departs] = Field(default_factory=dict)


class Departure(StrictModel):
    """One field in which a run is not the paper's."""

    field: str
    paper: Any
    here: Any
    why: str


class RunConfig(StrictModel):
    """An experiment at a scale, fully resolved."""

    experiment: ExperimentConfig
    scale: ScaleConfig
    departures: list[Departure] = Field(default_factory=list)
    init_id: str | None = None
    """`run_id` of the run that this one starts from."""
    scale_overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the scale that the caller set, by dotted name."""
    init_overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the run that this one starts from that the caller set, by dotted name."""
    fast: bool = False
    """Shortened by `FAST`, like the run that this one starts from; its numbers mean nothing."""

    @property
    def run_id(self) -> str:
        """12 hex digits over what changes the weights, but the folder of the images; names and sources do not count."""
        facts = self.experiment.model_dump(mode="json", exclude={**NO_INFLUENCE, "init_from": True})
        scale = {
            "name": self.scale.name,
            "data": self.scale.data[self.experiment.data.name],
            "models": [self.scale.models[name] for name in self.base_models],
        }
        return runtime.fingerprint({"experiment": facts, "init": self.init_id, "scale": scale})

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of the arithmetic, in training and in evaluation."""
        return "float32" if self.experiment.train.precision == "float32" else "bfloat16"

    @property
    def base_models(self) -> tuple[str, str]:
        return self.experiment.model.language_model, self.experiment.model.vision_tower

    @property
    def data_path(self) -> Path:
        return runtime.resolve(self.scale.data[self.experiment.data.name])

    @property
    def training_files(self) -> list[Path]:
        """The files of records that the run reads; their checksums are part of its record's id."""
        return [self.data_path / name for name in self.experiment.data.files]

    @property
    def images_path(self) -> Path:
        return runtime.resolve(self.scale.data[f"{self.experiment.data.name}_images"])

    def model_source(self, logical: str) -> str:
        """Return where a base model is loaded from: an absolute path, or its id on the hub."""
        value = self.scale.models[logical]
        return str(runtime.resolve(value)) if value.startswith(("models/", "data/", ".", "/", "~")) else value

    def upstream(self) -> RunConfig | None:
        """Return the run that this one starts from: its experiment, with this run's model, at this scale."""
        if self.experiment.init_from is None:
            return None
        overrides = _upstream_overrides(self.experiment, self.scale_overrides, self.init_overrides)
        return load_experiment(self.experiment.init_from, self.scale.name, overrides, self.fast)

    @classmethod
    def read(cls, path: str | Path) -> RunConfig:
        """Read what `write` wrote."""
        return validated(cls, read_yaml(Path(path)), runtime.display_path(path))

    def write(self, path: str | Path) -> Path:
        return runtime.atomic_write(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=118))


def _folder(kind: str) -> Path:
    folder = runtime.ROOT / "configs" / kind
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; run from a checkout of the project or set LLAVA_ROOT to one")
    return folder


def experiments() -> dict[str, Path]:
    """Return the file of every experiment by name, ablations included; two files of one name are a ConfigError."""
    found: dict[str, Path] = {}
    for path in sorted(_folder("experiments").rglob("*.yaml")):
        if first := found.get(path.stem):
            names = f"{runtime.display_path(first)} and {runtime.display_path(path)}"
            raise ConfigError(f"{names}: two experiments of one name; fix: rename or remove one")
        found[path.stem] = path
    found.pop(BASE, None)
    return found


def scales() -> dict[str, Path]:
    return {path.stem: path for path in sorted(_folder("scales").glob("*.yaml"))}


def _read_named(kind: str, name: str, files: dict[str, Path]) -> tuple[str, dict[str, Any]]:
    """The path for messages and the content of a file that is found by name."""
    if name not in files:
        raise ConfigError(unknown(kind, name, files))
    file, content = runtime.display_path(files[name]), read_yaml(files[name])
    if content.get("name") != name:
        raise ConfigError(f"{file}: its `name` must be '{name}', the name of the file")
    return file, content


def load_scale(name: str, overrides: Mapping[str, Any] | None = None) -> ScaleConfig:
    """Load `configs/scales/<name>.yaml`; an unknown scale or a wrong key or value is a ConfigError.

    `overrides` are values by dotted field, e.g. `{"parallel.kind": "zero3"}`.
    """
    file, content = _read_named("scale", name, scales())
    if overrides:
        for field in overrides:
            check_field(ScaleConfig, field, "override scale")
        content = nested({**flatten(ScaleConfig, content, file), **overrides})
        file = f"{file} with overrides"
    scale = validated(ScaleConfig, content, file)
    known = scale.models | scale.data
    for part in scale.stand_ins:
        if part not in known:
            raise ConfigError(f"{file}, stand_ins: {unknown('data set or model', part, known)}")
    for experiment, departs in scale.departs.items():
        where = f"{file}, departs.{experiment}"
        if experiment != "*" and experiment not in experiments():
            raise ConfigError(f"{where}: {unknown('experiment', experiment, experiments())}")
        _check_settable(departs.set, where, "a scale cannot change it")
    return scale


def _check_settable(fields: Iterable[str], where: str, rule: str) -> None:
    for field in fields:
        check_field(ExperimentConfig, field, where)
        if field in META:
            raise ConfigError(f"{where}: '{field}' describes the experiment; {rule}")


class _Layer(NamedTuple):
    """Values by dotted field that are laid over those of earlier layers, where they come from, and their reason."""

    origin: str
    values: dict[str, Any]
    why: str = ""


def _experiment_layers(name: str) -> list[_Layer]:
    """The files of an experiment's bases, root first, and its own."""
    files = {**experiments(), BASE: _folder("experiments") / f"{BASE}.yaml"} if name != BASE else experiments()
    seen, layers = list[str](), list[_Layer]()
    current: str | None = name
    while current is not None:
        if current in seen:
            raise ConfigError(f"experiments {' -> '.join([*seen, current])}: `base` goes round in a circle")
        seen.append(current)
        file, content = _read_named("experiment", current, files)
        layers.insert(0, _Layer(file, flatten(ExperimentConfig, content, file)))
        current = content.get("base")
    own = layers[-1].values
    own["ablation"] = own.get("ablation")  # not inherited
    own["sources"] = {field: s for layer in layers for field, s in (layer.values.get("sources") or {}).items()}
    return layers


def _scale_layers(scale: ScaleConfig, file: str, experiment_layers: list[_Layer]) -> list[_Layer]:
    """What a scale departs from: in every experiment, then in the bases, then in the experiment itself."""
    first_ablation = 2 if experiment_layers[0].values["name"] == BASE else 1
    names = ["*", *(layer.values["name"] for layer in experiment_layers)]
    layers = []
    for level, name in enumerate(names):
        if name in scale.departs:
            departs = scale.departs[name]
            # what an ablation sets is the point of the ablation, so a departure of its base must not undo it
            kept = {field for layer in experiment_layers[max(level, first_ablation) :] for field in layer.values}
            values = {field: value for field, value in departs.set.items() if field not in kept}
            layers.append(_Layer(f"{file}, departs.{name}", values, departs.why))
    return layers


def _resolve(layers: list[_Layer], file: str) -> ExperimentConfig:
    """The experiment that the layers give; `file` is its own, for errors."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for layer in layers:
        values |= layer.values
        origin |= dict.fromkeys(layer.values, layer.origin)
    return validated(ExperimentConfig, nested(values), file, origin)


def published_experiment(name: str) -> ExperimentConfig:
    """Return an experiment with the paper's values, which no scale has changed."""
    layers = _experiment_layers(name)
    return _resolve(layers, layers[-1].origin)


def _upstream_overrides(
    experiment: ExperimentConfig, of_scale: Mapping[str, Any], of_init: Mapping[str, Any]
) -> dict[str, Any]:
    """What the run that this one starts from has in common with it (its model, the scale's overrides), and its own."""
    fields = [field for field in field_names(ExperimentConfig) if field.startswith("model.")]
    shared = {field: value_of(experiment, field) for field in fields}
    return shared | {f"scale.{field}": value for field, value in of_scale.items()} | dict(of_init)


def _check_precision(train: TrainConfig, parallel: ParallelConfig, file: str) -> None:
    full = "language_model" in train.trainable and train.adapters is None
    if train.precision == "mixed_bf16" and full and parallel.kind in ("none", "ddp"):
        raise ConfigError(
            f"{file}: train.precision mixed_bf16 of all weights needs an engine with fp32 and bf16 weights, which "
            f"parallel.kind '{parallel.kind}' is not; fix: fsdp2 (also for one process), zero2 or zero3"
        )
    if train.precision == "pure_bf16" and parallel.kind.startswith("zero"):
        raise ConfigError(
            f"{file}: DeepSpeed keeps fp32 weights beside bf16 ones, so train.precision pure_bf16 does not fit "
            f"parallel.kind '{parallel.kind}'; fix: mixed_bf16"
        )


def load_experiment(
    name: str,
    scale: str = "mini",
    overrides: Mapping[str, Any] | None = None,
    fast: bool = False,
    _starts: tuple[str, ...] = (),
) -> RunConfig:
    """Resolve an experiment at a scale; the names are those of files under `configs/`, without the extension.

    Args:
        overrides: values by dotted field, e.g. `{"train.seed": 1}`; they win over everything. `scale.` before a name
            means a field of the scale: `{"scale.parallel.kind": "zero3"}`; `init.` one of the run that this one starts
            from: `{"init.train.seed": 1}`.
        fast: shorten the run and the one it starts from; the numbers then mean nothing.

    Raises:
        ConfigError: a name, key or value is wrong; the message names the file and the nearest key.
    """
    given = dict(overrides or {})
    of_scale, of_init = (
        {field.removeprefix(prefix): given.pop(field) for field in list(given) if field.startswith(prefix)}
        for prefix in ("scale.", "init.")
    )
    paper, place = _experiment_layers(name), load_scale(scale, of_scale)
    file, scale_file = paper[-1].origin, runtime.display_path(scales()[scale])
    published = _resolve(paper, file)
    _check_settable(given, "override", "it cannot be overridden")
    changes = _scale_layers(place, scale_file, paper)
    changes.append(_Layer("override", {**(FAST if fast else {}), **given}, "set by the caller"))
    resolved = _resolve([*paper, *changes], file)

    places: dict[str, dict[str, str]] = {
        resolved.data.name: place.data,
        f"{resolved.data.name}_images": place.data,
        resolved.model.language_model: place.models,
        resolved.model.vision_tower: place.models,
    }
    for part, known in places.items():
        if part not in known:
            kind = "data" if known is place.data else "models"
            raise ConfigError(f"{scale_file}: '{part}', which '{name}' needs, has no path in its `{kind}`")
    _check_precision(resolved.train, place.parallel, file)
    reasons = {field: layer.why for layer in changes for field in layer.values}
    departures = [
        Departure(field=field, paper=value_of(published, field), here=value_of(resolved, field), why=why)
        for field, why in reasons.items()
        if value_of(published, field) != value_of(resolved, field)
    ]
    departures += [
        Departure(field=f"scale.{part}", paper=part, here=known[part], why=place.stand_ins[part])
        for part, known in places.items()
        if part in place.stand_ins
    ]
    init_id = None
    if of_init and resolved.init_from is None:
        raise ConfigError(f"override init.{next(iter(of_init))}: {name} starts from no other run; leave it out")
    if resolved.init_from is not None:
        starts = (*_starts, name)
        if name in _starts:
            raise ConfigError(f"experiments {' -> '.join(starts)}: `init_from` goes round in a circle")
        first = _upstream_overrides(resolved, of_scale, of_init)
        init_id = load_experiment(resolved.init_from, scale, first, fast, starts).run_id
    return RunConfig(
        experiment=resolved, scale=place, departures=departures, init_id=init_id, scale_overrides=of_scale,
        init_overrides=of_init, fast=fast,
    )  # fmt: skip
