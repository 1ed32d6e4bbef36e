"""The page *Reproduce it at your scale*: commands, and what runs took or are planned to take."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.book.notebooks import imported_code, read_state
from companion.figures import cell_text, markdown_safe, markdown_table
from llava_core.config import META, ExperimentConfig, RunConfig, load_experiment, load_scale
from llava_core.config_files import field_names, value_of
from llava_core.record import RunRecord
from llava_core.runtime import (
    ROOT,
    CompanionError,
    DataError,
    display_path,
    fingerprint,
    read_json,
    sha256_file,
    write_json,
)

EXPERIMENTS = ("pretrain", "finetune", "science_qa")
GPU = "A100-80"  # the paper's
CONFIGS = ROOT / "configs"
INTRODUCTION = """# Reproduce it at your scale

<p class="lead">The same notebooks at every scale: commands, time, memory and cost.</p>

The scale of this book's chapters has measured times. A scale of GPUs has the estimates of `llava plan train`, which are
made before anything is loaded. `llava plan train finetune --scale gpu --gpu RTX-4090` plans for another GPU, and says
what would fit where a run does not.
"""


def _span(low: float, high: float, digits: int) -> str:
    ends = dict.fromkeys(f"{end:,.{digits}f}" for end in (low, high))
    return " to ".join(ends)


def plan_rows(scales: Sequence[str], cache: Path) -> list[dict[str, Any]]:
    """Return a row of `llava plan train` per experiment and scale; `cache` keeps them until something changes."""
    from companion.planner import plan_train

    configs = {display_path(path): sha256_file(path) for path in sorted(CONFIGS.rglob("*.yaml"))}
    files = {file for scale in scales for name in EXPERIMENTS for file in load_experiment(name, scale).training_files}
    data = {str(file): file.stat().st_size if file.is_file() else None for file in sorted(files)}
    known = {"scales": list(scales), "experiments": list(EXPERIMENTS), "gpu": GPU, "data": data}
    made_with = fingerprint({**imported_code(["companion.planner"]), **configs, **known})
    with contextlib.suppress(DataError):
        if (stored := read_json(cache))["made_with"] == made_with:
            return list(stored["rows"])
    rows = []
    for scale in scales:
        for name in EXPERIMENTS:
            with contextlib.suppress(CompanionError):  # nothing is known about a data set that is not here
                plan = plan_train(load_experiment(name, scale), gpu=GPU)
                rows.append({"scale": scale, "experiment": name, **plan})
    write_json(cache, {"made_with": made_with, "rows": rows})
    return rows


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    return markdown_table([*rows[0]], (row.values() for row in rows))


def _planned(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return _table(
        [
            {
                "run": f"`{row['experiment']}`",
                "GPUs": f"{row['processes']} × {row['gpu']}",
                "steps": cell_text(row["steps"]),
                "GiB per GPU": f"{row['memory_gib']:.0f} of {row['limit_gib']:.0f}",
                "GiB on the host": f"{row['host_gib']:.0f}",
                "GiB on disk": f"{sum(row['disk_gib'].values()):.0f}",
                "hours": _span(row["hours_least"], row["hours"], 1),
                "USD": _span(row["usd_least"], row["usd"], 0),
            }
            for row in rows
        ]
    )


def _run_text(config: RunConfig) -> str:
    """The experiment of a run, and what its caller changed."""
    here, plain = config.experiment, load_experiment(config.experiment.name, config.scale.name, fast=config.fast)
    fields = [field for field in field_names(ExperimentConfig) if field.partition(".")[0] not in META]
    changes = {field: value_of(here, field) for field in fields}
    changes = {field: value for field, value in changes.items() if value != value_of(plain.experiment, field)}
    texts = [f"`{field}={value}`" for field, value in {**changes, **config.scale_overrides}.items()]
    return f"`{here.name}`" + (f" with {', '.join(texts)}" if texts else "")


def _assumed(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    """What the planned values of several runs assume; the part after a semicolon once, if they differ before it."""
    runs = dict[str, list[str]]()
    for row in rows:
        runs.setdefault(row["assumed"][what], []).append(f"`{row['experiment']}`")
    if len(runs) == 1:
        return markdown_safe(*runs)
    parts = [f"{', '.join(names)}: {markdown_safe(text.partition('; ')[0])}" for text, names in runs.items()]
    common = dict.fromkeys(markdown_safe(text.partition("; ")[2]) for text in runs)
    return "; ".join([*parts, *filter(None, common)])


def _measured(out: Path, present: Sequence[str]) -> list[str]:
    """The runs that the chapters used, each once, and the time of each chapter."""
    runs, chapters = dict[str, dict[str, str]](), []
    for name in present:
        for run in read_json(out / f"{name}.json").get("runs", []):
            with contextlib.suppress(CompanionError, OSError, KeyError):
                record = RunRecord(ROOT / run)
                summary, machine = record.summary, record.environment
                device = ", ".join(machine["gpus"]) or machine["cpu"]
                runs[run] = {
                    "run": _run_text(record.config),
                    "steps": cell_text(summary["steps"]),
                    "samples/s": cell_text(summary["samples_per_s"]),
                    "seconds": cell_text(round(summary["seconds"])),
                    "machine": markdown_safe(f"{device}, {machine['cores']} cores"),
                    "record": f"`{record.run_id}`",
                }
        seconds = read_state(out, name).get("seconds")
        if seconds is not None:
            chapters.append({"chapter": f"[{name}]({name}.ipynb)", "seconds": cell_text(round(seconds))})
    lines = []
    if runs:
        lines += ["Training runs of this book; a run that exists is not computed again.", "", *_table([*runs.values()])]
    if chapters:
        lines += ["Each chapter when it last ran, with what it trained then:", "", *_table(chapters)]
    return lines


def scales_page(out: Path, present: Sequence[str], scale: str) -> str:
    """Return the page for all scales; `scale` is that of the chapters in `out`, of which `present` have run."""
    names = [path.stem for path in sorted((CONFIGS / "scales").glob("*.yaml"))]
    names.sort(key=lambda name: (name != scale, load_scale(name).device == "cuda", load_scale(name).parallel.processes))
    on_gpu = [name for name in names if load_scale(name).device == "cuda"]
    plans = plan_rows(on_gpu, out / ".state" / "plans.json")
    lines, places = [INTRODUCTION], dict[str, dict[str, str]]()
    for name in names:
        hardware = load_scale(name)
        lines += [f"## {name}: {markdown_safe(hardware.title)}", "", "```bash"]
        if not hardware.miniature:
            lines += [f"llava plan train finetune --scale {name}", f"llava train finetune --scale {name} --dry-run"]
            for key, value in {**hardware.data, **hardware.models}.items():
                places.setdefault(key, {"data or model": f"`{key}`"})[f"at {name}"] = f"`{value}`"
        lines += [f"make reproduce SCALE={name}", "```", ""]
        if name == scale:
            lines += _measured(out, present)
        if own := [row for row in plans if row["scale"] == name]:
            lines += _planned(own)
            for what in ("hours", "usd"):
                basis = re.sub(r"(--[a-z]+)", r"`\1`", _assumed(own, what))
                lines += [f"*{what.replace('usd', 'USD')}*: {basis}", ""]
        elif name != scale:
            lines += ["No time of a whole run is known at this scale.", ""]
    heads = {head: "" for row in places.values() for head in row}
    lines += ["## Data and base models", "", "The miniature's are generated, or part of the repository. The others you"]
    lines += ["fetch, to these folders or under these names:", "", *_table([heads | row for row in places.values()])]
    return "\n".join(lines)
