"""Ablations: two arms that differ in one field, several seeds each, and the difference of their ScienceQA accuracy.

An ablation is one file of configs/experiments/ablations: `base`, the changed field, and an `ablation` section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from companion.data_tools.scienceqa import load_problems
from companion.evaluation.science_qa import right_answers
from companion.evaluation.statistics import paired_bootstrap, seeds_and_items, seeds_interval, wilson
from companion.figures import check
from companion.paper.claims import all_claims, claim
from companion.paper.ledger import published_ablation
from companion.paper.verdict import Verdict, verdict_of_interval
from companion.results import science_result
from llava_core.config import META, RunConfig, experiments, load_experiment, load_scale
from llava_core.record import RunRecord
from llava_core.registry import unknown
from llava_core.runtime import ConfigError, display_path
from llava_core.train.launch import launch, resolve_run


@dataclass
class Arm:
    """One variant: its values per seed (in points) and its runs."""

    name: str
    experiment: str
    values: list[float] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    records: list[RunRecord] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> list[float] | None:
        """95 % t interval of the mean over seeds, clipped to 0 to 100; None for one seed."""
        ends = seeds_interval(self.values)["interval"]
        return ends and [max(0.0, ends[0]), min(100.0, ends[1])]


def run_arms(
    arms: Sequence[tuple[str, str]],
    metric: Callable[[RunRecord], float],
    scale: str = "mini",
    fast: bool = False,
    seeds: Sequence[int] | None = None,
) -> list[Arm]:
    """Train and measure every arm, a pair (label, experiment), with every seed; the first is the reference.

    `metric` returns the value of a finished run in points. `fast` is one seed and the `--fast` budget; without `seeds`
    they are the scale's.
    """
    chosen = list(seeds if seeds is not None else load_scale(scale).seeds)[: 1 if fast else None]
    trained = [Arm(name, experiment) for name, experiment in arms]
    for seed in chosen:  # all arms of a seed first: an interrupted chapter has complete comparisons
        for arm in trained:
            record = launch(resolve_run(arm.experiment, scale, fast, train__seed=seed))
            arm.values.append(metric(record))
            arm.runs.append(record.run_id)
            arm.records.append(record)
    return trained


def difference(reference: Arm, other: Arm) -> dict[str, Any]:
    """Return the mean difference, other minus reference, paired by seed, with its 95 % t interval, in points."""
    result = seeds_interval([b - a for a, b in zip(reference.values, other.values, strict=True)])
    return {"effect": result["mean"], "interval": result["interval"], "n_seeds": result["n"]}


@dataclass(frozen=True)
class Ablation:
    """Two arms, each as (label, experiment), and the paper's claim about their difference in ScienceQA accuracy."""

    reference: tuple[str, str]
    other: tuple[str, str]
    claim: str | None = None


def ablations() -> dict[str, Ablation]:
    """Return the ablations by name: every experiment whose file has an `ablation` section.

    Raises:
        ConfigError: two have one name, a reference or a claim does not exist, or an arm is not evaluated on ScienceQA.
    """
    files, result = experiments(), dict[str, Ablation]()
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
        labels = section.labels or (reference, experiment)
        result[name] = Ablation((labels[0], reference), (labels[1], experiment), section.claim)
    return result


def ablation(name: str) -> Ablation:
    """Return one ablation; an unknown name is a ConfigError."""
    known = ablations()
    if name not in known:
        raise ConfigError(unknown("ablation", name, known))
    return known[name]


NORMAL_95 = 1.96  # standard errors of the 95 % interval of a normal distribution
FAST_PROBLEMS = 48  # test problems of a `--fast` run


def published_difference(name: str) -> dict[str, Any] | None:
    """Return the paper's difference with its standard error, as `ledger.published_ablation`, or None.

    A |z| of at least 1.96 is significant at 5 %.
    """
    known = ablation(name).claim
    return published_ablation(known) if known else None


def difference_check(what: str, published: Any, result: Mapping[str, Any], note: str = "") -> dict[str, Any]:
    """Return the row of the results table for a difference: `effect`, `interval` or `widest`, and `verdict`."""
    row = check(what, published, result.get("widest") or result["interval"] or result["effect"], None, note)
    return {**row, "verdict": Verdict(result["verdict"])}


def verdict_check(name: str, result: Mapping[str, Any], note: str = "") -> dict[str, Any]:
    """Return the row for a difference that is a claim of the ledger."""
    known = claim(name)
    return {**difference_check(known.text, known.value_text, result, note), "id": name, "place": known.place}


def ablate(name: str, scale: str = "mini", fast: bool = False, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Train and evaluate both arms of an ablation; arguments as in `run_arms`.

    Returns:
        `arms` (the reference first), `effect`, `interval` over seeds (None for one), `n_seeds`, `question_interval`
        (over questions), `both_interval` (over seeds and questions), `widest` (the union of the three, None for one
        seed), `published` (as `published_difference`), `verdict` (by the widest: two seeds may agree by chance).
    """
    chosen, limit = ablation(name), FAST_PROBLEMS if fast else None
    arms = run_arms(
        (chosen.reference, chosen.other), lambda run: float(science_result(run, limit)["accuracy"]), scale, fast, seeds
    )
    change = difference(*arms)
    first, second = (question_scores(arm, limit) for arm in arms)
    bootstraps = paired_bootstrap(np.mean(first, 0), np.mean(second, 0)), seeds_and_items(first, second)
    over_questions, over_both = ([100 * end for end in result["interval"]] for result in bootstraps)
    ends = [*over_questions, *over_both, *(change["interval"] or ())]
    widest = [min(ends), max(ends)] if change["interval"] else None
    return {
        "arms": arms,
        **change,
        "question_interval": over_questions,
        "both_interval": over_both,
        "published": published_difference(name),
        "widest": widest,
        "verdict": verdict_of_interval(widest, claim(chosen.claim).direction if chosen.claim else None),
    }


_MEANING = {
    "agrees": "The measured difference has the paper's sign, and its interval excludes zero.",
    "disagrees": "The measured difference has the opposite sign of the paper's, and its interval excludes zero.",
    "not resolved": "Over seeds or over questions the interval of the difference contains zero.",
    "shown only": "The paper has no claim about this difference.",
}


def explain(result: Mapping[str, Any], fast: bool = False) -> str:
    """Return a sentence on the result of `ablate`, and on arms that are not above a blind guess."""
    n, arms = result["n_seeds"], result["arms"]
    problems = load_problems(arms[0].records[0].config.data_path, "test")[: FAST_PROBLEMS if fast else None]
    chance = 100 * sum(1 / len(p.choices) for p in problems) / len(problems)
    meaning = "There is one seed only." if n == 1 else _MEANING[result["verdict"]]
    text = f"**{result['verdict'].capitalize()}.** {meaning} ({n} {'seed' if n == 1 else 'seeds'} per arm)"
    right = [round(arm.mean * len(problems) / 100) for arm in arms]
    blind = [arm.name for arm, k in zip(arms, right, strict=True) if 100 * wilson(k, len(problems))[0] <= chance]
    if len(blind) == len(arms):
        return f"{text} No arm is above a blind guess ({chance:.1f} %): at this scale the claim cannot be tested."
    return f"{text} Not above a blind guess ({chance:.1f} %): {blind[0]}." if blind else text


def question_scores(arm: Arm, limit: int | None = None) -> list[list[float]]:
    """Return for each seed of an arm and each test problem whether its answer is right (seeds, problems), 0 or 1."""
    problems = load_problems(arm.records[0].config.data_path, "test")[:limit]
    answers = [science_result(record, limit)["answers"] for record in arm.records]
    return [[float(right) for right in right_answers(problems, own)] for own in answers]


def arm_settings(arms: Sequence[tuple[str, str]], scale: str = "mini") -> list[dict[str, Any]]:
    """Return the settings that differ between the arms' runs, or between the runs that these start from."""
    runs = {name: load_experiment(experiment, scale) for name, experiment in arms}
    rows = []
    starts = {name: first for name, run in runs.items() if (first := run.upstream()) is not None}
    for stage, configs in (("this run", runs), ("the run it starts from", starts)):
        if len(configs) < len(runs):
            continue  # one arm has no stage 1; `starts from stage 1` has this difference
        flat = {name: _settings(config) for name, config in configs.items()}
        for setting in sorted({key for settings in flat.values() for key in settings}):
            values = {name: settings.get(setting) for name, settings in flat.items()}
            if len({repr(value) for value in values.values()}) > 1:
                rows.append({"in": stage, "setting": setting, **{n: str(v) for n, v in values.items()}})
    return rows


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run by dotted field, and whether it starts from another run."""
    flat: dict[str, Any] = {"starts from stage 1": config.experiment.init_from is not None}
    for section, content in config.experiment.model_dump(exclude={*META, "init_from"}).items():
        fields = content if isinstance(content, dict) else {"": content}
        flat |= {f"{section}.{field}".rstrip("."): value for field, value in fields.items()}
    return flat
