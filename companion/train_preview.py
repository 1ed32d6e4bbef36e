"""What `llava train` shows before it trains: the resolved run, its plan, what is missing, a SLURM script."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from llava_core import runtime
from llava_core.config import META, ExperimentConfig, RunConfig
from llava_core.config_files import field_names, value_of
from llava_core.runtime import CompanionError, display_path
from llava_core.train.processes import ranks_of, ranks_per_node

GIB = 2**30
Missing = dict[str, str]


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Describe a run, and first the one that it starts from, before any weight is loaded.

    Returns:
        runs: of each its fields with sources, departures, batch, models, plan (None and `no_plan` where there is no
        plan) and warnings; missing: `what` and `fix` of all that a start would stop at.
    """
    chain = [config]
    while (first := chain[0].upstream()) is not None:
        chain.insert(0, first)
    runs, missing = [], list[Missing]()
    for run in chain:
        plan, no_plan = _plan(run)
        runs.append(_resolved(run) | {"plan": plan, "no_plan": no_plan})
        missing += [item for item in _missing(run, plan) if item not in missing]
    needed = sum(sum(run["plan"]["disk_gib"].values()) for run in runs if run["plan"])
    free = shutil.disk_usage(runtime.ROOT).free / GIB
    if needed > free:
        what = f"{needed:.0f} GiB on disk; {free:.0f} GiB are free"
        missing.append({"what": what, "fix": "free some space"})
    return {"runs": runs, "missing": missing}


def _resolved(config: RunConfig) -> dict[str, Any]:
    from llava_core.train.alarms import precision_warning

    experiment, ranks = config.experiment, ranks_of(config)
    reasons = {departure.field: departure for departure in config.departures}
    fields = []
    for name in field_names(ExperimentConfig):
        if name.partition(".")[0] in META:
            continue
        row = {"field": name, "value": value_of(experiment, name), "source": experiment.source_of(name)}
        if name in reasons:
            row |= {"paper": reasons[name].paper, "why": reasons[name].why}
        fields.append(json.loads(json.dumps(row, default=lambda value: value.model_dump(mode="json"))))
    batch = experiment.train.global_batch
    warning = precision_warning(config)
    return {
        "run": f"{experiment.name} at {config.scale.name}", "fields": fields,
        "departures": [departure.model_dump(mode="json") for departure in config.departures],
        "batch": {
            "global_batch": batch, "ranks": ranks, "samples_per_rank": batch // ranks,
            "row_tokens": config.scale.row_tokens,
        },
        "parallel": config.scale.parallel.model_dump(mode="json"),
        "models": {name: _model_state(config, name) for name in config.base_models},
        "warnings": [warning] if warning else [],
    }  # fmt: skip


def _model_state(config: RunConfig, name: str) -> dict[str, str]:
    """Where a base model comes from, and whether it is on this machine."""
    from llava_core.checkpoints.base_models import model_folder, no_downloads
    from llava_core.checkpoints.tensors import has_weights

    source = config.model_source(name)
    local = not source.startswith("/")
    try:
        with no_downloads():
            found = has_weights(model_folder(source))
    except CompanionError:
        found = False
    absent = "to be downloaded" if local and not config.scale.offline else "missing"
    return {"source": display_path(source), "state": "on disk" if found else absent}


def _plan(config: RunConfig) -> tuple[dict[str, Any] | None, str | None]:
    from companion.planner import plan_train

    try:
        return plan_train(config), None
    except CompanionError as error:
        return None, str(error)


def _missing(config: RunConfig, plan: Mapping[str, Any] | None) -> Iterator[Missing]:
    """What a start of this run would stop at."""
    import torch

    data, train, scale = config.experiment.data, config.experiment.train, config.scale
    for path in config.training_files:
        if not path.exists():
            yield {"what": display_path(path), "fix": f"run {data.written_by}, which writes it"}
    if not config.images_path.is_dir():
        fix = (
            f"run {data.written_by}" if scale.miniature else f"put the images there, or change data.{data.name}_images"
        )
        yield {"what": display_path(config.images_path), "fix": fix}
    for name in config.base_models:
        state = _model_state(config, name)
        if state["state"] == "missing":
            yield {"what": f"{name}: {state['source']}", "fix": f"put it there, or name its folder in models.{name}"}
    adapters = train.adapters
    packages = [
        *(["deepspeed"] if scale.parallel.kind in ("zero2", "zero3") else []),
        *(["peft"] if adapters else []), *(["bitsandbytes"] if adapters and adapters.bits else []), *scale.trackers,
    ]  # fmt: skip
    for package in packages:
        if importlib.util.find_spec(package) is None:
            yield {"what": f"the package {package}", "fix": f"pip install {package}"}
    if scale.device == "cuda":
        needed, count = ranks_per_node(scale.parallel), torch.cuda.device_count()
        if count < needed:
            yield {"what": f"{needed} GPUs; PyTorch sees {count}", "fix": "another machine or --scale"}
        sizes = [torch.cuda.get_device_properties(k).total_memory / GIB for k in range(min(count, needed))]
        if plan and sizes and plan["memory_gib"] > min(sizes):
            what = f"{plan['memory_gib']:.0f} GiB per GPU; the smallest here has {min(sizes):.0f}"
            yield {"what": what, "fix": "the plan lists what would fit"}
    if plan and not plan["fits"]:
        what = f"memory: {plan['memory_gib']:.0f} GiB per process of {plan['limit_gib']:.0f}"
        yield {"what": what, "fix": "the plan lists what would fit"}


def dry_run_text(result: Mapping[str, Any]) -> str:
    """A dry run for a terminal."""
    from companion.planner import plan_text

    lines = []
    for run in result["runs"]:
        lines += [run["run"], ""]
        for row in run["fields"]:
            origin = (
                f"not the paper's {json.dumps(row['paper'])}: {row['why']}" if "why" in row else row["source"] or ""
            )
            lines.append(f"  {row['field']:26} {json.dumps(row['value'], ensure_ascii=False):24} {origin}".rstrip())
        of_scale = [d for d in run["departures"] if d["field"].startswith("scale.")]
        lines += [f"  {d['field']:26} {d['here']:24} {d['why']}" for d in of_scale]
        lines += [f"  {name:26} {model['source']:24} {model['state']}" for name, model in run["models"].items()]
        batch, parallel = run["batch"], run["parallel"]
        plan = plan_text(run["plan"]) if run["plan"] else run["no_plan"]
        lines += [
            "",
            f"  {batch['global_batch']} samples per step = {batch['ranks']} ranks x {batch['samples_per_rank']}, "
            f"in rows of up to {batch['row_tokens']} tokens; engine: {parallel['kind']}",
            *(f"  warning: {text}" for text in run["warnings"]),
            *(f"  {line}" for line in plan.splitlines()),
            "",
        ]
    missing = [f"  {item['what']}; fix: {item['fix']}" for item in result["missing"]]
    return "\n".join([*lines, *(["missing:", *missing] if missing else ["nothing is missing"])])


def slurm_script(config: RunConfig, overrides: Mapping[str, Any], resume: str = "auto") -> str:
    """An sbatch script of a run with the caller's `overrides`, to submit at the repository's root."""
    parallel, local = config.scale.parallel, ranks_of(config) // config.scale.parallel.nodes
    experiment, words = config.experiment.name, ["llava", "train", config.experiment.name, "--scale", config.scale.name]
    for field, value in overrides.items():
        words += ["--set", f"{field}={json.dumps(value)}"]
    words += [*(["--fast"] if config.fast else []), *(["--resume", resume] if resume != "auto" else [])]
    gpus = f"\n#SBATCH --gpus-per-node={local}" if config.scale.device == "cuda" else ""
    return f"""#!/bin/bash
#SBATCH --job-name=llava-{experiment}
#SBATCH --nodes={parallel.nodes}
#SBATCH --ntasks-per-node={local}{gpus}
#SBATCH --cpus-per-task={config.scale.threads or 8}
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llava-{experiment}-%j.log
# SIGTERM comes 10 minutes before the time limit: the ranks save their state and exit with 75, and the job is requeued.
trap : TERM
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
srun --kill-on-bad-exit=1 --cpus-per-task=8 {shlex.join(words)}
status=$?
if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status\""""
