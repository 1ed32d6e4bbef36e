"""`llava ablate`."""

from __future__ import annotations

import argparse
from typing import Any

from companion.cli.arguments import Commands, Result, command
from llava_core.runtime import ConfigError, display_path


def _ablate(args: argparse.Namespace) -> Result:
    from companion import ablation_records as stored
    from companion import ablations
    from companion.protocol import load_protocol

    protocol = load_protocol()
    names = list(protocol.ablations) if args.all else [args.name]
    plans = {name: protocol.plan(name) for name in names}
    if args.check:
        return {"records": ablations.freshness(names)}
    if args.tune:
        return dict(ablations.tune(names, args.jobs, ablations.show_on_stderr))
    fewest = min(len(plan.seeds or []) for plan in plans.values())
    if args.seeds is not None and not 0 < args.seeds <= fewest:
        raise ConfigError(f"--seeds {args.seeds}: configs/protocol.yaml has {fewest} seeds")
    records = ablations.ablate(
        names, seeds=args.seeds, fast=args.fast, processes=args.jobs, store=not args.fast, show=ablations.show_on_stderr
    )
    results = {}
    for name, record in records.items():
        result = stored.analyse(record, protocol)
        first = result["differences"][list(plans[name].arms)[1]]
        main = {key: first[key] for key in ("effect", "interval", "verdict")}
        results[name] = {"ablation": name, **main, **result}
        if not args.fast:
            results[name]["record"] = display_path(stored.record_path(name))
    return {"ablations": results} if args.all else results[args.name]


def _show(result: Result) -> str:
    if "records" in result:
        return "\n".join(f"{row['name']:20} {row['status']:8} {'; '.join(row['reasons'])}" for row in result["records"])
    if "grid" in result:
        return "\n".join(f"{arm:60} {row['best']:g}" for arm, row in result["arms"].items())
    parts = result["ablations"].values() if "ablations" in result else [result]
    return "\n\n".join(_show_one(part) for part in parts)


def _show_one(result: dict[str, Any]) -> str:
    from companion.figures import cell_text

    lines = [f"{result['ablation']}: {len(result['seeds'])} seeds, {result['n']} questions ({result['subset']})"]
    for row in result["arms"]:
        lines.append(f"  {row['arm']:36} {row['mean']:6.2f}   {', '.join(f'{v:.1f}' for v in row['values'])}")
    if result["chance"] is not None:
        lines.append(f"  {'blind guess, look-up table':36} {result['chance']:6.2f}   {result['lookup_table']:.2f}")
    rows = {**result["differences"], **({"learning speed (log2)": result["speed"]} if result["speed"] else {})}
    for label, row in rows.items():
        lines.append(f"  {label:36} {row['effect']:+6.2f}   {cell_text(row['interval'])}   {row['verdict']}")
    lines += [f"  less than the plan: {', '.join(result['shortfall'])}"] if result["shortfall"] else []
    return "\n".join(lines)


def add(commands: Commands) -> None:
    text = "train and evaluate the arms of ablations with several seeds, and store records"
    example = "llava ablate cot_order --seeds 5 --jobs 2"
    stale = lambda result: any(row["status"] != "fresh" for row in result.get("records", []))  # noqa: E731
    new = command(commands, "ablate", text, example, _ablate, _show, stale)
    which = new.add_mutually_exclusive_group(required=True)
    which.add_argument("name", metavar="NAME", nargs="?", help="an ablation of configs/protocol.yaml")
    which.add_argument("--all", action="store_true", help="every ablation; runs that several need are trained once")
    new.option("--seeds", "K", "the first K seeds of the plan (default: all)", type=int)
    new.number("--jobs", 1, "processes, each with one run")
    new.switch("--tune", "choose the learning rate of each arm on held-out data, from the grid of the plan")
    new.switch("--check", "list the stored records that do not belong to the present plan, code, models and data")
    new.switch("--fast", "one seed and the shortest run with every step; stores no record")
