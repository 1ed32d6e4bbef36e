"""Ablations: train and measure the arms of the plan, each run once, and store the results as records.

An ablation is an entry of configs/protocol.yaml, or one file of configs/experiments/ablations: `base`, the changed
field, and an `ablation` section. `companion.ablation_records` derives intervals and verdicts from records.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from companion.ablation_records import (
    NO_RECORD,
    learning_rates,
    make_record,
    stale_reasons,
    write_learning_rates,
    write_record,
)
from companion.figures import cell_text, check
from companion.paper.ledger import published_ablation
from companion.paper.verdict import Verdict
from companion.protocol import AblationPlan, ArmPlan, load_protocol
from companion.results import bench_scores, science_curve, science_result
from llava_core.config import META, RunConfig, load_experiment, load_scale
from llava_core.record import RunRecord
from llava_core.runtime import display_path, resolve
from llava_core.train.launch import launch
from llava_core.train.processes import die_with_parent

NORMAL_95 = 1.96  # standard errors of the 95 % interval of a normal distribution
FAST_PROBLEMS = 48  # test problems of a `--fast` run
FAST_QUESTIONS = 9  # of a bench


@dataclass(frozen=True)
class Job:
    """A training run, and what is measured with it; equal jobs of several ablations are one."""

    experiment: str
    scale: str
    overrides: str  # JSON, so that jobs can be compared
    fast: bool
    measures: tuple[tuple[str, str | int | None], ...] = ()  # what, and of which bench or how many problems

    @property
    def config(self) -> RunConfig:
        return load_experiment(self.experiment, self.scale, json.loads(self.overrides), self.fast)


def arm_set(plan: AblationPlan, arm: ArmPlan, scale: str) -> dict[str, Any]:
    """Return the fields that an arm changes; the plan's budget is for the miniature only."""
    return {**(plan.budget if load_scale(scale).miniature else {}), **arm.set}


def arm_overrides(plan: AblationPlan, arm: ArmPlan, seed: int, scale: str, rate: float | None = None) -> dict[str, Any]:
    """Return the overrides of an arm's run: its own fields, the seed of both stages, base models, learning rate."""
    place = load_scale(scale)
    overrides = {**arm_set(plan, arm, scale), "train.seed": seed}
    if load_experiment(arm.experiment, scale, arm.set).experiment.init_from is not None:
        overrides["init.train.seed"] = seed
    if (base := plan.base_model(seed)) and place.miniature:  # elsewhere there is one model per size
        models = place.models
        names = [name for name in models if name.startswith("vicuna")]
        overrides["scale.models"] = {**models, **{name: f"{models[name]}-{base}" for name in names}}
    if rate is not None:
        overrides["train.learning_rate"] = rate
    return overrides


def tuned_rates(scale: str, fast: bool = False) -> dict[str, float]:
    """Return the learning rates that were chosen on val, by `arm_name`; empty at another scale and for `fast` runs."""
    protocol = load_protocol()
    return learning_rates(protocol) if scale == protocol.scale and not fast else {}


def arm_name(arm: ArmPlan) -> str:
    """Return the name of an arm among the learning rates: its experiment and its own fields."""
    return ", ".join([arm.experiment, *(f"{key}={value}" for key, value in sorted(arm.set.items()))])


def arm_job(
    plan: AblationPlan,
    arm: ArmPlan,
    seed: int,
    scale: str,
    fast: bool = False,
    rate: float | None = None,
    speed: bool = True,
) -> Job:
    limit = FAST_PROBLEMS if fast else None
    measures: list[tuple[str, str | int | None]] = [("accuracy", limit)]
    if plan.speed is not None and speed:
        measures.append(("curve", limit or plan.speed.questions))
    if plan.bench is not None:
        measures = [("bench", plan.bench)]
    overrides = arm_overrides(plan, arm, seed, scale, rate)
    return Job(arm.experiment, scale, json.dumps(overrides, sort_keys=True), fast, tuple(measures))


def measure(job: Job) -> dict[str, Any]:
    """Train a run, or reuse it, and return what is measured with it: `run`, `seconds`, and a key per measure."""
    record = launch(job.config)
    result: dict[str, Any] = {"run": display_path(record.path), "seconds": record.summary["seconds"]}
    for what, of in job.measures:
        if what == "accuracy":
            own = science_result(record, of if isinstance(of, int) else None)
            result[what] = {"value": own["accuracy"], "right": own["right"]}
        elif what == "validation":
            accuracy = record.config.experiment.data.name == "scienceqa"
            # a higher score is better
            score = science_result(record, split="val")["accuracy"] if accuracy else -record.summary["heldout_loss"]
            result[what] = {"value": score}
        elif what == "curve":
            result[what] = science_curve(record, int(of or 0))
        elif what == "bench":
            result[what] = bench_scores(record, str(of), FAST_QUESTIONS if job.fast else None)
    return result


def _merged(jobs: Sequence[Job]) -> dict[Job, Job]:
    """Each job and the one that measures all that is wanted of its run."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.experiment, job.scale, job.overrides, job.fast), []).append(job)
    result = dict[Job, Job]()
    for group in groups.values():
        measures = tuple(dict.fromkeys(m for job in group for m in job.measures))
        whole = Job(group[0].experiment, group[0].scale, group[0].overrides, group[0].fast, measures)
        result |= dict.fromkeys(group, whole)
    return result


def start_run(job: Job) -> None:
    """Train the run that a job's run starts from, if there is one."""
    if (upstream := job.config.upstream()) is not None:
        launch(upstream)


def run_jobs(jobs: Sequence[Job], processes: int = 1) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Measure jobs, with several processes where asked, and yield each with its result as soon as it is there.

    An interrupted call goes on where it was: `launch` and the evaluations reuse what has finished.
    """
    if processes == 1:
        for job in jobs:
            yield job, measure(job)
        return
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # read when a process starts; bars of several would mix
    try:
        # the runs of stage 1 first, each once: else a process waits for another's
        starts = {config.run_id: job for job in jobs if (config := job.config.upstream()) is not None}
        with ProcessPoolExecutor(processes, get_context("spawn"), die_with_parent) as pool:
            list(pool.map(start_run, starts.values()))
            waiting = {pool.submit(measure, job): job for job in jobs}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        os.environ.pop("TQDM_DISABLE")
        if bars is not None:
            os.environ["TQDM_DISABLE"] = bars


def ablate(
    names: Sequence[str],
    *,
    scale: str | None = None,
    seeds: Sequence[int] | int | None = None,
    fast: bool = False,
    processes: int = 1,
    brief: bool = False,
    store: bool = False,
    show: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Train and evaluate the arms of ablations, the runs that they share once; return their records by name.

    Args:
        seeds: these, or the first so many of the plan (default: all). All arms of a seed come before the next seed.
        fast: one seed and the budget of `--fast`.
        brief: without the arms that the plan marks as controls and without learning speeds.
        store: write each record to results/ablations as soon as its last run is measured.
        show: receives a line per finished run and ablation: the values by arm so far.
    """
    protocol = load_protocol()
    place = scale or protocol.scale
    rates = tuned_rates(place, fast)
    wanted: dict[tuple[str, str, int], Job] = {}
    chosen: dict[str, list[int]] = {}
    for name in names:
        plan = protocol.plan(name)
        planned = (plan.seeds or protocol.seeds)[: seeds if isinstance(seeds, int) else None]
        chosen[name] = (planned if seeds is None or isinstance(seeds, int) else list(seeds))[: 1 if fast else None]
        for seed in chosen[name]:
            for label, arm in plan.arms.items():
                if not (brief and arm.control):
                    rate = rates.get(arm_name(plan.tuned_arm(arm)))
                    wanted[name, label, seed] = arm_job(plan, arm, seed, place, fast, rate, speed=not brief)
    merged = _merged(list(wanted.values()))
    order = sorted(wanted, key=lambda key: chosen[key[0]].index(key[2]))
    jobs = list(dict.fromkeys(merged[wanted[key]] for key in order))
    results: dict[Job, dict[str, Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    for job, result in run_jobs(jobs, processes):
        results[job] = result
        clock = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - began))
        for name in names:
            keys = [key for key in wanted if key[0] == name]
            if show and any(merged[wanted[key]] == job for key in keys):
                done = {key: results[merged[wanted[key]]] for key in keys if merged[wanted[key]] in results}
                show(f"[{len(results)}/{len(jobs)}] {clock} {_table_row(name, done)}")
            if name not in records and all(merged[wanted[key]] in results for key in keys):
                measured = {key[1:]: results[merged[wanted[key]]] for key in keys}
                configs = {label: merged[wanted[name, label, chosen[name][0]]].config for _, label, _ in keys}
                records[name] = make_record(protocol, name, chosen[name], measured, configs, fast)
                if store and not write_record(records[name]) and show:
                    show(f"{name}: not stored, the stored record of the same plan has more seeds")
    return {name: records[name] for name in names}


def _table_row(name: str, done: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> str:
    """The values of the finished runs of an ablation, by arm, in percent."""
    values: dict[str, list[str]] = {}
    for (_, label, _), result in done.items():
        value = next((result[what]["value"] for what in ("accuracy", "bench") if what in result), float("nan"))
        values.setdefault(label, []).append(f"{value:.1f}")
    return f"{name:16} " + " | ".join(f"{label} {' '.join(found)}" for label, found in values.items())


def tune(names: Sequence[str], processes: int = 1, show: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train each arm at each learning rate of the plan, score it on held-out data, and store the best rates.

    ScienceQA arms are scored by accuracy on val, others by held-out loss; test is not read.
    """
    protocol = load_protocol()
    found: dict[str, dict[str, float]] = {}
    wanted: dict[Job, list[tuple[str, float]]] = {}
    for name in names:
        plan = protocol.plan(name)
        for arm in plan.arms.values():
            if arm.rate_of or load_experiment(arm.experiment, protocol.scale).experiment.stage == 1:
                continue
            for rate in protocol.learning_rates:
                overrides = arm_overrides(plan, arm, protocol.tuning_seed, protocol.scale, rate)
                text = json.dumps({**overrides, "train.snapshots": 0}, sort_keys=True)
                job = Job(arm.experiment, protocol.scale, text, False, (("validation", None),))
                asking = wanted.setdefault(job, [])
                if (arm_name(arm), rate) not in asking:
                    asking.append((arm_name(arm), rate))
    for job, result in run_jobs(list(wanted), processes):
        for arm_key, rate in wanted[job]:
            found.setdefault(arm_key, {})[f"{rate:g}"] = result["validation"]["value"]
            if show:
                show(f"{arm_key:60} learning rate {rate:<8g} {result['validation']['value']:.4g}")
    return write_learning_rates(protocol, found)


def freshness(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each ablation its `status`, fresh, stale or missing, and the `reasons`."""
    protocol, rows = load_protocol(), []
    for name in names:
        plan = protocol.plan(name)
        seed = (plan.seeds or protocol.seeds)[0]
        configs = {label: arm_job(plan, arm, seed, protocol.scale).config for label, arm in plan.arms.items()}
        reasons = stale_reasons(name, protocol, configs)
        status = "missing" if reasons == [NO_RECORD] else "stale" if reasons else "fresh"
        rows.append({"name": name, "status": status, "reasons": reasons})
    return rows


def show_on_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def records_of(record: dict[str, Any], label: str) -> list[RunRecord]:
    """Return the runs of an arm; they exist on the machine that made the record."""
    return [RunRecord(resolve(path)) for path in record["arms"][label]["runs"]]


def published_difference(plan: AblationPlan, label: str) -> dict[str, Any] | None:
    """Return the paper's difference of an arm of Table 8, as `ledger.published_ablation`, or None.

    A |z| of at least 1.96 is significant at 5 %.
    """
    known = plan.arms[label].claim
    return published_ablation(known) if known and plan.quantity == "accuracy" else None


def difference_check(what: str, published: Any, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of the results table for a difference: `effect`, `interval` or `widest`, and `verdict`."""
    row = check(what, published, result.get("widest") or result["interval"] or result["effect"], None)
    return {**row, "verdict": Verdict(result["verdict"])}


def arm_settings(plan: AblationPlan, scale: str = "mini") -> list[dict[str, Any]]:
    """Return the settings that differ between the arms' runs, or between the runs that these start from."""
    rates = tuned_rates(scale)
    runs = {}
    for name, arm in plan.arms.items():
        rate = rates.get(arm_name(plan.tuned_arm(arm)))
        tuned = {} if rate is None else {"train.learning_rate": rate}
        runs[name] = load_experiment(arm.experiment, scale, {**arm_set(plan, arm, scale), **tuned})
    rows = []
    starts = {name: first for name, run in runs.items() if (first := run.upstream()) is not None}
    for stage, configs in (("this run", runs), ("the run it starts from", starts)):
        if len(configs) < len(runs):
            continue  # one arm has no stage 1; `starts from stage 1` has this difference
        flat = {name: _settings(config) for name, config in configs.items()}
        for setting in sorted({key for settings in flat.values() for key in settings}):
            values = {name: settings.get(setting) for name, settings in flat.items()}
            if len({repr(value) for value in values.values()}) > 1:
                rows.append({"in": stage, "setting": setting, **{n: cell_text(v) for n, v in values.items()}})
    return rows


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run by dotted field, and whether it starts from another run."""
    flat: dict[str, Any] = {"starts from stage 1": config.experiment.init_from is not None}
    for section, content in config.experiment.model_dump(exclude={*META, "init_from"}).items():
        fields = content if isinstance(content, dict) else {"": content}
        flat |= {f"{section}.{field}".rstrip("."): value for field, value in fields.items()}
    return flat
