"""The two axes of a run: an experiment (the paper's facts) at a scale (hardware and data).

Values are laid over each other in a fixed order, later ones win: the base experiment, the experiment's own file, what
the scale departs from (`"*"`, then base experiments, then the experiment itself; but a field that an ablation sets
itself stays as it set it), the caller's overrides. Every difference from the paper is listed in `RunConfig.departures`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from llava_core import runtime
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

FILE_FIELDS = {"file", "validation_file", "held_out_share", "written_by"}
"""Fields of an experiment's `data` about this project's files, not about the paper."""

KINDS = ("conversation", "detail", "complex")
"""The paper's three kinds of instruction data."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


M = TypeVar("M", bound=_Strict)


class DataConfig(_Strict):
    """What a run is trained on."""

    name: str
    """Key of the scale's `data` for the folder; `<name>_images` is the key for the folder of images."""
    file: str | None = None
    """LLaVA-Instruct records in that folder; `{prompt_format}` in the name is replaced. Null in old records only."""
    validation_file: str | None = None
    """Records for the held-out loss; null: a share of `file` is held out."""
    held_out_share: float = Field(default=0.04, gt=0, le=0.5)
    """Share of `file` for the held-out loss where there is no validation file: every 25th record by default."""
    written_by: str = "the command that writes it"
    """Command that writes the files, for the message about a missing one."""
    subset: dict[str, float] = {}
    """Share of each kind of sample that is kept, e.g. `{conversation: 1.0, detail: 0.05}`; empty keeps all."""
    prompt_format: str | None = None
    """Order of the parts of a ScienceQA prompt and answer, e.g. `QCM-LEPA`."""
    limit: PositiveInt | None = None
    """At most so many samples."""

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


class ModelConfig(_Strict):
    """The three boxes of the paper's Figure 1, by logical name; the scale says where each one lies."""

    language_model: Literal["vicuna-7b", "vicuna-13b"]
    vision_tower: Literal["clip-vit-large-patch14"]
    feature_layer: int = Field(le=-1)
    """Index into the tower's hidden states, from the end: -2 is the output of the last block but one."""
    projector: str
    """Name in `llava_core.models.PROJECTORS`, which is checked when the model is built."""


class TrainConfig(_Strict):
    """How a run is trained."""

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
    """Largest norm of the gradient."""
    max_length: PositiveInt
    """Tokens per sample, image positions included; what is longer loses its end."""
    order: Literal["samples", "images"] = "samples"
    """What an epoch shuffles; "images" keeps the samples of an image together, so that a row computes it once for those
    that begin with it."""
    seed: int = Field(ge=0)


class AblationConfig(_Strict):
    """The reference arm of an ablation; an experiment with this section is one of `companion.ablations`."""

    name: str | None = None
    """Name for `companion.ablations`; null: the experiment's."""
    reference: str | None = None
    """Experiment of the other arm; null: the base."""
    labels: tuple[str, str] | None = None
    """Names of the reference and of this experiment in tables; null: those of the experiments."""
    claim: str | None = None
    """Claim of the paper about the difference, this experiment minus the reference."""


class ExperimentConfig(_Strict):
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
    sources: dict[str, str] = {}
    """Where each value is written down, by dotted field; a parent's source covers its fields."""
    claims: list[str] = []
    ablation: AblationConfig | None = None
    """Not inherited from a base."""

    def source_of(self, field: str) -> str | None:
        """Return where the value of a dotted field is written down, from the field's or a parent's entry."""
        parts = field.split(".")
        return next((s for n in range(len(parts), 0, -1) if (s := self.sources.get(".".join(parts[:n])))), None)


class Departs(_Strict):
    """Fields in which a scale leaves the paper, and why."""

    set: dict[str, Any]
    why: str = Field(min_length=1)


class ScaleConfig(_Strict):
    """Hardware and data: everything of a run that is not the paper's."""

    name: str
    title: str
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    threads: PositiveInt | None
    micro_batch: PositiveInt
    """A forward pass in training takes as many tokens as so many samples of the greatest length, packed, on one device;
    elsewhere it takes so many samples. Never changes the result, only memory and time."""
    launcher: Literal["in_process", "torchrun"]
    """Training in the process that asks for it, or one process per GPU."""
    offline: bool = False
    """Forbid the Hugging Face libraries any request."""
    cache_pixels: bool = False
    """Keep the decoded pixels of all training images in memory: for thousands of small images, not for 595K."""
    miniature: bool = False
    """Data sets and base models are those of `companion.miniature`, which writes missing data sets."""
    data: dict[str, str]
    """Where each data set lies; relative to the repository root."""
    models: dict[str, str]
    """Where each base model lies: a path (`models/...`, `data/...`, `./...`, `/...`) or an id on the hub."""
    stand_ins: dict[str, str] = {}
    """Data sets and models, by the names above, that are not the paper's own, and why."""
    answer_tokens: tuple[PositiveInt, PositiveInt] = (1024, 64)
    """Longest answer in tokens, and longest second-pass answer of ScienceQA. The default is the released evaluation's
    (llava/eval/model_vqa_science.py@8959d5c)."""
    checkpoint_every_s: PositiveFloat
    eval_samples: PositiveInt
    seeds: list[int] = Field(min_length=1)
    """Seeds of the experiments that are reported with an interval."""
    departs: dict[str, Departs] = {}


class Departure(_Strict):
    """One field in which a run is not the paper's."""

    field: str
    paper: Any
    here: Any
    why: str


class RunConfig(_Strict):
    """An experiment at a scale, fully resolved."""

    experiment: ExperimentConfig
    scale: ScaleConfig
    departures: list[Departure] = []
    init_id: str | None = None
    """`run_id` of the run that this one starts from."""
    fast: bool = False
    """Shortened by `FAST`, like the run that this one starts from; its numbers mean nothing."""

    @property
    def run_id(self) -> str:
        """12 hex digits over everything that can change the result; names, titles and sources cannot."""
        facts = self.experiment.model_dump(mode="json", exclude={**NO_INFLUENCE, "init_from": True})
        scale = {
            "name": self.scale.name,
            "dtype": self.scale.dtype,
            "data": self.scale.data[self.experiment.data.name],
            "models": [self.scale.models[name] for name in self.base_models],
        }
        return runtime.fingerprint({"experiment": facts, "init": self.init_id, "scale": scale})

    @property
    def base_models(self) -> tuple[str, str]:
        """Logical names of the language model and the vision tower."""
        return self.experiment.model.language_model, self.experiment.model.vision_tower

    @property
    def data_path(self) -> Path:
        """Folder of the training data."""
        return runtime.resolve(self.scale.data[self.experiment.data.name])

    @property
    def images_path(self) -> Path:
        """Folder of the images that the training data names."""
        return runtime.resolve(self.scale.data[f"{self.experiment.data.name}_images"])

    def model_source(self, logical: str) -> str:
        """Return where a base model is loaded from: an absolute path, or its id on the hub."""
        value = self.scale.models[logical]
        return str(runtime.resolve(value)) if value.startswith(("models/", "data/", ".", "/", "~")) else value

    def upstream(self) -> RunConfig | None:
        """Return the run that this one starts from: its experiment, with this run's model, at this scale."""
        if self.experiment.init_from is None:
            return None
        return load_experiment(self.experiment.init_from, self.scale.name, _model_fields(self.experiment), self.fast)

    @classmethod
    def read(cls, path: str | Path) -> RunConfig:
        """Read what `write` wrote."""
        return _validated(cls, _read_yaml(Path(path)), lambda field: runtime.display_path(path))

    def write(self, path: str | Path) -> Path:
        """Write the resolved configuration as YAML."""
        return runtime.atomic_write(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=118))


# ------------------------------------------------------------------------------------------------ reading YAML


class _Loader(yaml.SafeLoader):
    """YAML in which a key written twice is an error, not a silent choice of the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{runtime.display_path(path)}: no such file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{runtime.display_path(path)}{line}: not valid YAML ({error.problem})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{runtime.display_path(path)}: expected `key: value` lines")
    return content


def _folder(kind: str) -> Path:
    folder = runtime.ROOT / "configs" / kind
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; run from a checkout of the project or set LLAVA_ROOT to one")
    return folder


def experiments() -> dict[str, Path]:
    """Return the file of every experiment by name, ablations included."""
    folder = _folder("experiments")
    files = sorted([*folder.glob("*.yaml"), *folder.glob("ablations/*.yaml")])
    return {path.stem: path for path in files if path.stem != BASE}


def scales() -> dict[str, Path]:
    """Return the file of every scale by name."""
    return {path.stem: path for path in sorted(_folder("scales").glob("*.yaml"))}


def _named(kind: str, name: str, files: dict[str, Path]) -> tuple[Path, dict[str, Any]]:
    if name not in files:
        raise ConfigError(unknown(kind, name, files))
    content = _read_yaml(files[name])
    if content.get("name") != name:
        raise ConfigError(f"{runtime.display_path(files[name])}: its `name` must be '{name}', the name of the file")
    return files[name], content


# ------------------------------------------------------------------------------------------------ dotted fields


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `Model | None`."""
    kinds = get_args(annotation) or (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _section(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    kind = model.model_fields[field].annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


@functools.cache
def _fields(model: type[BaseModel] = ExperimentConfig) -> tuple[str, ...]:
    names: list[str] = []
    for field in model.model_fields:
        inner = _section(model, field)
        names += [f"{field}.{name}" for name in _fields(inner)] if inner else [field]
    return tuple(names)


def _check_field(field: str, where: str) -> None:
    if field not in _fields():
        # the last part alone is what people mistype, so `lerning_rate` finds `train.learning_rate`
        ends = {name.rpartition(".")[2]: name for name in _fields()}
        near = difflib.get_close_matches(field, _fields(), n=1, cutoff=0.6)
        near = near or [ends[end] for end in difflib.get_close_matches(field.rpartition(".")[2], ends, n=1, cutoff=0.5)]
        guess = f"; did you mean '{near[0]}'?" if near else f" (known: {', '.join(_fields())})"
        raise ConfigError(f"{where}: unknown key '{field}'{guess}")


def _flatten(
    content: Mapping[str, Any], where: str, model: type[BaseModel] = ExperimentConfig, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        inner = _section(model, key) if key in model.model_fields else None
        if inner is None:
            _check_field(f"{prefix}{key}", where)
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flatten(value, where, inner, f"{prefix}{key}.")
        else:
            raise ConfigError(f"{where}: '{prefix}{key}' is a section and needs `key: value` lines below it")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for field, value in flat.items():
        *sections, last = field.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return content


def value_of(experiment: ExperimentConfig, field: str) -> Any:
    """Return the value of a dotted field."""
    return functools.reduce(getattr, field.split("."), experiment)


def _model_fields(experiment: ExperimentConfig) -> dict[str, Any]:
    return {field: value_of(experiment, field) for field in _fields() if field.startswith("model.")}


def _validated(model: type[M], content: Mapping[str, Any], where: Any) -> M:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # an unknown key first: it explains the one that is missing
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            part: type[BaseModel] | None = model
            for name in first["loc"][:-1]:
                part = _inner(part.model_fields[str(name)].annotation) if part and name in part.model_fields else None
            known = (part or model).model_fields
            key = f"{first['loc'][-1]}" if part else field
            raise ConfigError(f"{where(field)}: {unknown('key', key, known)}") from None
        given = "" if first["type"] == "missing" else f" (it is {first['input']!r})"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where(field)}: {field}: {message}{given}") from None


# ------------------------------------------------------------------------------------------------ loading


def load_scale(name: str) -> ScaleConfig:
    """Load `configs/scales/<name>.yaml`.

    Raises:
        ConfigError: there is no such scale, or a key or value of the file is wrong.
    """
    path, content = _named("scale", name, scales())
    scale = _validated(ScaleConfig, content, lambda field: runtime.display_path(path))
    for part in scale.stand_ins:
        if part not in scale.models | scale.data:
            raise ConfigError(
                f"{runtime.display_path(path)}, stand_ins: "
                f"{unknown('data set or model', part, scale.models | scale.data)}"
            )
    for experiment, departs in scale.departs.items():
        where = f"{runtime.display_path(path)}, departs.{experiment}"
        if experiment != "*" and experiment not in experiments():
            raise ConfigError(f"{where}: {unknown('experiment', experiment, experiments())}")
        for field in departs.set:
            _check_field(field, where)
            if field in META:
                raise ConfigError(f"{where}: '{field}' describes the experiment; a scale cannot change it")
    return scale


def _chain(name: str) -> list[tuple[str, dict[str, Any]]]:
    """The experiment's bases, root first, and the experiment: (file, dotted fields that the file sets)."""
    files = {**experiments(), BASE: _folder("experiments") / f"{BASE}.yaml"} if name != BASE else experiments()
    seen, chain = list[str](), list[tuple[str, dict[str, Any]]]()
    current: str | None = name
    while current is not None:
        if current in seen:
            raise ConfigError(f"experiments {' -> '.join([*seen, current])}: `base` goes round in a circle")
        seen.append(current)
        path, content = _named("experiment", current, files)
        chain.append((runtime.display_path(path), dict(_flatten(content, runtime.display_path(path)))))
        current = content.get("base")
    return chain[::-1]


def load_experiment(
    name: str,
    scale: str = "mini",
    overrides: Mapping[str, Any] | None = None,
    fast: bool = False,
    _starts: tuple[str, ...] = (),
) -> RunConfig:
    """Resolve an experiment at a scale.

    Args:
        name: file name of the experiment under `configs/experiments/`, without the extension.
        scale: file name of the scale under `configs/scales/`, without the extension.
        overrides: values by dotted field, e.g. `{"train.seed": 1}`; they win over everything.
        fast: shorten the run and the one it starts from; the numbers then mean nothing.

    Returns:
        The resolved run; each field that differs from the paper is listed in its `departures`.

    Raises:
        ConfigError: a name, key or value is wrong; the message names the file and the nearest key.
    """
    chain, place = _chain(name), load_scale(scale)
    paper: dict[str, Any] = {}
    origin: dict[str, str] = {}
    sources: dict[str, str] = {}
    for file, own in chain:
        paper |= own
        origin |= dict.fromkeys(own, file)
        sources |= own.get("sources") or {}
    last, own = chain[-1]
    paper |= {"sources": sources, "ablation": own.get("ablation")}
    published = _validated(ExperimentConfig, _nested(paper), lambda field: origin.get(field, last))

    here, why = dict(paper), {}
    first = 2 if chain[0][1]["name"] == BASE else 1  # level of the first ablation
    scale_file = runtime.display_path(scales()[scale])
    for level, experiment in enumerate(["*", *(own["name"] for _, own in chain)]):
        if (departs := place.departs.get(experiment)) is None:
            continue
        # what an ablation sets is the point of the ablation, so a departure of its base must not undo it
        kept = {field for _, own in chain[max(level, first) :] for field in own}
        for field, value in departs.set.items():
            if field not in kept:
                here[field], why[field], origin[field] = value, departs.why, f"{scale_file}, departs.{experiment}"
    for field, value in {**(FAST if fast else {}), **(overrides or {})}.items():
        _check_field(field, "override")
        if field in META:
            raise ConfigError(f"override: '{field}' describes the experiment and cannot be overridden")
        here[field], why[field], origin[field] = value, "set by the caller", "override"

    resolved = _validated(ExperimentConfig, _nested(here), lambda field: origin.get(field, last))
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
    departures = [
        Departure(field=field, paper=value_of(published, field), here=value_of(resolved, field), why=reason)
        for field, reason in why.items()
        if value_of(published, field) != value_of(resolved, field)
    ]
    departures += [
        Departure(field=f"scale.{part}", paper=part, here=known[part], why=place.stand_ins[part])
        for part, known in places.items()
        if part in place.stand_ins
    ]
    init_id = None
    if resolved.init_from is not None:
        if name in _starts:
            raise ConfigError(f"experiments {' -> '.join([*_starts, name])}: `init_from` goes round in a circle")
        starts = (*_starts, name)
        init_id = load_experiment(resolved.init_from, scale, _model_fields(resolved), fast, starts).run_id
    return RunConfig(experiment=resolved, scale=place, departures=departures, init_id=init_id, fast=fast)
