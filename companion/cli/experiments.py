"""`llava reproduce`, `claims`, `evidence` and `train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from companion.cli.arguments import Commands, Result, command, given, group, names, table
from llava_core.runtime import display_path, rank, user_path


def _reproduce(args: argparse.Namespace) -> Result:
    from companion.book import pipeline

    chosen = given(args, "scale", "fast", "only", "start", "dry_run", "book")
    return pipeline.reproduce(**chosen, parameters=dict(args.parameter))


def _show_notebooks(result: Result) -> str:
    lines = [f"{notebook['status']:10}  {notebook['name']}" for notebook in result["notebooks"]]
    return "\n".join([*lines, f"book: {result['book'] or 'not built'}"])


def _claims(args: argparse.Namespace) -> Result:
    from companion.paper.ledger import claim_rows

    return {"claims": claim_rows(args.ids, args.kind)}


def _show_claims(result: Result) -> str:
    from companion.figures import cell_text
    from companion.paper.ledger import HOW

    lines = []
    for row in result["claims"]:
        here = " ".join(cell_text(row[key]) for key in ("measured", "interval") if row[key] is not None)
        lines.append(f"{row['id']:34} {row['published']:28} {row['evidence']:14} {here:30} {row['verdict']}".rstrip())
        lines += [f"{'':34} flag: {row['flag']}"] if row["flag"] else []
        lines += [f"{'':34} bundle: {line}" for line in row["bundles"]]
    if unread := [row for row in result["claims"] if "LLAVA_REFERENCE" in row["note"]]:
        lines.append(f"{len(unread)} claims are recomputed from released files that are not here: {HOW}")
    return "\n".join(lines)


def _pack(args: argparse.Namespace) -> Result:
    from companion.evidence import pack
    from llava_core.record import RunRecord

    return pack(RunRecord(user_path(args.record)), Path(args.out).expanduser())


def _check(args: argparse.Namespace) -> Result:
    from companion.evidence import check

    return check(user_path(args.bundle))


def _show_bundle(result: Result) -> str:
    facts = {key: value for key, value in result.items() if key not in ("claims", "checks")}
    lines = [
        table(facts),
        *(f"{'ok' if row['ok'] else 'FAILED':8} {row['name']:14} {row['message']}" for row in result["checks"]),
    ]
    for row in result["claims"]:
        lines.append(f"{row['id']:34} paper {row['value']:g}, measured {row['measured']:.4g}: {row['verdict']}")
    return "\n".join(lines)


def _train(args: argparse.Namespace) -> Result:
    from llava_core.config import load_experiment
    from llava_core.train.launch import launch

    config = load_experiment(args.experiment, args.scale, dict(args.set), args.fast)
    if args.slurm or args.dry_run:
        from companion.train_preview import dry_run, slurm_script

        return {"script": slurm_script(config, dict(args.set), args.resume)} if args.slurm else dry_run(config)
    record = launch(config, resume=args.resume == "auto")
    if rank() > 0:
        raise SystemExit(0)  # rank 0 reports
    numbers = {key: record.summary.get(key) for key in ("final_loss", "samples_per_s")}
    return {"run": display_path(record.path), **numbers, "checkpoint": display_path(record.checkpoint)}


def _show_train(result: Result) -> str:
    from companion.train_preview import dry_run_text

    return result["script"] if "script" in result else dry_run_text(result) if "runs" in result else table(result)


def add(commands: Commands) -> None:
    example, text = "llava reproduce --only 20,21", "run the notebooks that are not up to date and build the book"
    new = command(commands, "reproduce", text, example, _reproduce, _show_notebooks, lambda r: bool(r["failed"]))
    new.scale()
    new.switch("--fast", "the shortest runs with every step")
    new.option("--only", "N,N", "only these notebooks, by number or name", type=names)
    new.option("--from", "N", "this notebook and all after it", dest="start")
    new.switch("--dry-run", "list what would run")
    new.assignments("another value for a parameter of the notebooks", "-p", "--parameter", metavar="NAME=VALUE")
    new.choice("--book", ["auto", "only", "no"], "auto", "build the book too, only, or not")

    text = "list the paper's numbers with evidence and measured values"
    new = command(commands, "claims", text, "llava claims --kind measured", _claims, _show_claims)
    new.option("ids", "ID", "only these claims", nargs="*")
    new.option("--kind", "KIND", "only claims with this kind of evidence, e.g. recomputed")

    into = group(commands, "evidence", "pack the evidence of a run, or check it", "llava evidence check run.zip")
    text, example = (
        "write what a reader needs to check a run, without weights",
        "llava evidence pack RECORD --out run.zip",
    )
    wrong = lambda result: not all(row["ok"] for row in result["checks"])  # noqa: E731
    new = command(into, "pack", text, example, _pack, _show_bundle, wrong)
    new.path("record", "RECORD", "the folder of a finished run, runs/EXPERIMENT/SCALE/ID")
    new.path(
        "--out", "DIR|ZIP", "a new folder, or a file that ends in .zip; `evidence/` is shown in the book", required=True
    )
    text = "check the hashes, configuration, metrics, scores and claims of a bundle"
    new = command(into, "check", text, "llava evidence check run.zip", _check, _show_bundle, wrong)
    new.path("bundle", "DIR|ZIP", "what `llava evidence pack` wrote")

    example, text = "llava train finetune --set train.seed=1", "train one experiment, after the one that it starts from"
    new = command(commands, "train", text, example, _train, _show_train, lambda r: bool(r.get("missing")))
    new.option("experiment", "EXPERIMENT", "a file of configs/experiments, without its extension")
    new.scale()
    new.assignments("another value for one field, of the scale with `scale.` before it")
    new.choice("--resume", ["auto", "never"], "auto", "resume, or start from the beginning")
    new.switch("--fast", "the shortest run with every step")
    new.switch("--dry-run", "print the resolved run, its plan and what is missing (then exit 1); loads no weights")
    new.switch("--slurm", "print an sbatch script of this run")
