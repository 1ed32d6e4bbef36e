"""`llava convert`, `delta` and `inspect`."""

from __future__ import annotations

import argparse

from companion.cli.arguments import Commands, Parser, Result, command, group, options, positive, table

FORMATS = ("llava", "hf", "original", "mmpretrain", "projector")
ANY_FORMAT = "folder or file of any format"


def _convert(args: argparse.Namespace) -> Result:
    from companion.checkpoints.convert import convert

    shard = int(args.shard_gb * 1e9)
    return convert(
        args.source, args.target, args.to, options(args), dict(args.set), shard, args.verify, args.keep_adapter
    )


def _delta(args: argparse.Namespace) -> Result:
    from companion.checkpoints import delta

    work = delta.make if args.make else delta.apply
    return work(args.base, args.source, args.out, int(args.shard_gb * 1e9), args.dry_run)


def _inspect(args: argparse.Namespace) -> Result:
    from companion.checkpoints.inspection import inspect

    return inspect(args.path, options(args), dict(args.set))


def _show_inspection(result: Result) -> str:
    fields = {**{k: v for k, v in result.items() if k not in ("facts", "notes", "problems")}, **result["facts"]}
    lines = [table({key: value for key, value in fields.items() if value not in (None, [], {})})]
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join([*lines, *(f"error: {problem}" for problem in result["problems"])])


def _shards(parser: Parser) -> None:
    parser.option("--shard-gb", "GB", "largest weights file (default: 5)", type=positive, default=5)


def add(commands: Commands) -> None:
    example = "llava convert llava-v1.5-7b data/llava-hf --to hf"
    new = command(commands, "convert", "write a checkpoint in another format, and compare", example, _convert)
    new.path("source", "SRC", ANY_FORMAT)
    new.path("target", "DST", "a new folder")
    new.add_argument("--to", choices=FORMATS, required=True, help="the format to write")
    new.bases()
    _shards(new)
    new.switch("--keep-adapter", "with --to hf: do not merge the adapter, but write it for peft, into DST/adapter")
    new.switch("--verify", "with --to hf: run both models and compare every module")
    new.assumptions()

    delta = {
        "make": (
            "subtract a base language model", "a checkpoint in the format 'original'", "a new folder, for the delta",
            "llava delta make --base llama-7b --out data/LLaVA-7b-delta LLaVA-7b",
        ),
        "apply": (
            "add a base language model to a delta", "the delta", "a new folder, in the format 'original'",
            "llava delta apply --base llama-7b --out data/LLaVA-7b LLaVA-7b-delta-v0",
        ),
    }  # fmt: skip
    into = group(commands, "delta", "make or apply delta weights", delta["apply"][-1])
    for name, (text, source, out, example) in delta.items():
        new = command(into, name, text, example, _delta)
        new.path("source", "DIR", source)
        new.option("--base", "DIR", "the base language model", required=True)
        new.path("--out", "DIR", out, required=True)
        new.switch("--dry-run", "list what would be done with each tensor")
        _shards(new)
        new.set_defaults(make=name == "make")

    example = "llava inspect runs/finetune/mini/ID/checkpoint"
    text, unsound = "describe a checkpoint", lambda result: bool(result["problems"])
    new = command(commands, "inspect", text, example, _inspect, _show_inspection, unsound)
    new.path("path", "DIR", ANY_FORMAT)
    new.bases()
    new.assumptions()
