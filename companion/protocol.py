"""The plan of the ablations, `configs/protocol.yaml`: what is measured, on how much, and when a difference counts.

`Protocol.protocol_hash` stands in every record, so a verdict shows which plan it follows.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from companion.paper.claims import all_claims
from llava_core import runtime
from llava_core.config import ExperimentConfig, experiments, load_experiment
from llava_core.config_files import StrictModel, check_field, read_yaml, validated
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, display_path, fingerprint

Subset = Literal["all", "image", "no image"]


class ArmPlan(StrictModel):
    """A variant: an experiment and the fields in which it differs from it."""

    experiment: str
    set: dict[str, Any] = Field(default_factory=dict)
    """Values by dotted field, as in `load_experiment`."""
    claim: str | None = None
    """Claim of the paper about this arm minus the reference."""
    control: bool = False
    """Outside the family of Holm's correction; explains another arm and gets no verdict."""
    rate_of: str | None = None
    """Label of the arm whose learning rate this one takes; else it is tuned by itself."""


class SpeedPlan(StrictModel):
    """Learning speed: steps to an accuracy, from the checkpoints that `train.snapshots` keeps."""

    target: PositiveFloat
    """Accuracy in percent."""
    questions: PositiveInt
    """The first test problems, which each checkpoint answers."""
    claim: str | None = None
    """Claim about the sign of log2(steps of the other arm / steps of the reference)."""


class AblationPlan(StrictModel):
    quantity: Literal["accuracy", "relative score"] = "accuracy"
    arms: dict[str, ArmPlan] = Field(default_factory=dict)
    """By label, the reference first; in the file it may be left out for the two arms of an experiment's `ablation`."""
    more_arms: dict[str, ArmPlan] = Field(default_factory=dict)
    """Arms besides those two."""
    subset: Subset = "all"
    """The problems whose difference gets the verdict."""
    control_subset: Subset | None = None
    """Problems on which no difference is expected; shown."""
    unit: Literal["seed", "base model"] = "seed"
    """What counts as an independent repetition."""
    base_models: PositiveInt = 1
    """Base models per size: the seed at place k of the plan starts from number k modulo this."""
    speed: SpeedPlan | None = None
    bench: str | None = None
    """The bench of a relative score, a key of the scale's `data`."""
    seeds: list[int] | None = None
    questions: PositiveInt | None = None
    margin: PositiveFloat | None = None
    smallest_effect: PositiveFloat | None = None
    budget: dict[str, Any] = Field(default_factory=dict)
    """Filled in from the plan's."""

    @model_validator(mode="after")
    def _bench_for_a_relative_score(self) -> AblationPlan:
        if (self.quantity == "relative score") != (self.bench is not None):
            raise ValueError("`quantity: relative score` and `bench` belong together")
        return self

    @property
    def reference(self) -> str:
        return next(iter(self.arms))

    def tuned_arm(self, arm: ArmPlan) -> ArmPlan:
        """Return the arm whose learning rate an arm takes."""
        return self.arms[arm.rate_of] if arm.rate_of else arm

    def base_model(self, seed: int) -> int:
        """Return the number of the base models that a seed starts from; 0 for a seed that is not in the plan."""
        seeds = self.seeds or []
        return seeds.index(seed) % self.base_models if seed in seeds else 0


class Protocol(StrictModel):
    scale: str
    seeds: list[int] = Field(min_length=2)
    questions: PositiveInt
    margin: PositiveFloat
    smallest_effect: PositiveFloat
    exclusions: list[str]
    budget: dict[str, Any] = Field(default_factory=dict)
    """Values by dotted field of the arms that are compared by accuracy, at the plan's scale, before their own `set`."""
    learning_rates: list[PositiveFloat] = Field(min_length=1)
    tuning_seed: int
    ablations: dict[str, AblationPlan]

    @property
    def family(self) -> list[str]:
        """The comparisons of Holm's correction, as `ABLATION: ARM` and `ABLATION: learning speed`."""
        names = []
        for name, plan in self.ablations.items():
            names += [f"{name}: {arm}" for arm, own in list(plan.arms.items())[1:] if not own.control]
            names += [f"{name}: {SPEED}"] if plan.speed else []
        return names

    def plan(self, name: str) -> AblationPlan:
        if name not in self.ablations:
            raise ConfigError(unknown("ablation", name, self.ablations))
        return self.ablations[name]

    def protocol_hash(self, name: str) -> str:
        """12 hex digits over all that the plan says about an ablation; comments do not count."""
        common = self.model_dump(
            mode="json", include={"scale", "exclusions", "budget", "learning_rates", "tuning_seed"}
        )
        return fingerprint({**common, "seeds": self.seeds, "ablation": self.plan(name).model_dump(mode="json")})


SPEED = "learning speed"


def declared_ablations() -> dict[str, AblationPlan]:
    """Return the ablations that an experiment's file declares in its section `ablation`: its reference and itself.

    Raises:
        ConfigError: two have one name, a reference or a claim does not exist, or an arm is not evaluated on ScienceQA.
    """
    files, result = experiments(), dict[str, AblationPlan]()
    for experiment, path in files.items():
        config = load_experiment(experiment).experiment
        if (section := config.ablation) is None:
            continue
        name, reference = section.name or experiment, section.reference or config.base
        where = f"{display_path(path)}, ablation"
        if reference is None or reference not in files:
            raise ConfigError(f"{where}: {unknown('reference experiment', str(reference), files)}")
        if name in result:
            raise ConfigError(f"{where}: another ablation has the name '{name}'; choose a different name")
        if section.claim is not None and section.claim not in all_claims():
            raise ConfigError(f"{where}: {unknown('claim', section.claim, all_claims())}")
        if config.data.name != "scienceqa":
            raise ConfigError(f"{where}: arms are compared by ScienceQA accuracy; set `base: science_qa`")
        first, second = section.labels or (reference, experiment)
        arms = {first: ArmPlan(experiment=reference), second: ArmPlan(experiment=experiment, claim=section.claim)}
        result[name] = AblationPlan(arms=arms)
    return result


def load_protocol() -> Protocol:
    """Load `configs/protocol.yaml`, every arm and every default filled in.

    The two arms of `declared_ablations` need no entry; one that the file does not name has the defaults of the plan.

    Raises:
        ConfigError: an unknown key, experiment, field or claim; the message names the file and the key.
    """
    path = runtime.ROOT / "configs" / "protocol.yaml"
    file = display_path(path)
    content = validated(Protocol, read_yaml(path), file)
    if content.tuning_seed in content.seeds:
        raise ConfigError(f"{file}: tuning_seed {content.tuning_seed} is one of seeds; take another")
    declared, plans = declared_ablations(), {}
    for name in [*content.ablations, *(name for name in declared if name not in content.ablations)]:
        plan, where = content.ablations.get(name, AblationPlan()), f"{file}, ablations.{name}"
        arms = {**(plan.arms or (declared[name].arms if name in declared else {})), **plan.more_arms}
        if len(arms) < 2:
            raise ConfigError(f"{where}: needs `arms`, at least two, or an experiment with the `ablation` name {name}")
        for label, arm in arms.items():
            _check_arm(arm, f"{where}.{label}", content.scale)
            if arm.rate_of and arm.rate_of not in arms:
                raise ConfigError(f"{where}.{label}: {unknown('arm for rate_of', arm.rate_of, arms)}")
        if plan.speed and plan.speed.claim and plan.speed.claim not in all_claims():
            raise ConfigError(f"{where}.speed: {unknown('claim', plan.speed.claim, all_claims())}")
        plans[name] = plan.model_copy(update={
            "arms": arms, "more_arms": {}, "seeds": plan.seeds or content.seeds,
            "questions": plan.questions or content.questions, "margin": plan.margin or content.margin,
            "smallest_effect": plan.smallest_effect or content.smallest_effect,
            "budget": content.budget if plan.bench is None else {},
        })  # fmt: skip
    return content.model_copy(update={"ablations": plans})


def _check_arm(arm: ArmPlan, where: str, scale: str) -> None:
    if arm.experiment not in experiments():
        raise ConfigError(f"{where}: {unknown('experiment', arm.experiment, experiments())}")
    for field in arm.set:
        check_field(ExperimentConfig, field, f"{where}.set")
    load_experiment(arm.experiment, scale, arm.set)
    if arm.claim is not None and arm.claim not in all_claims():
        raise ConfigError(f"{where}: {unknown('claim', arm.claim, all_claims())}")
