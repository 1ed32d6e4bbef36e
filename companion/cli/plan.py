"""`llava plan`: what a command will cost."""

from __future__ import annotations

import argparse

from companion.cli.arguments import Commands, Result, command, given, group, positive
from companion.cli.data import asking, requests


def _generate(args: argparse.Namespace) -> Result:
    from companion.teacher.plan import plan

    jobs, _ = requests(args)
    return plan((job[2] for job in jobs), args.client, args.cassette, args.price, args.concurrency)


def _train(args: argparse.Namespace) -> Result:
    from companion.planner import plan_train
    from llava_core.config import load_experiment

    config = load_experiment(args.experiment, args.scale, dict(args.set))
    return plan_train(config, **given(args, "gpu", "gpus", "kind", "samples", "price"))


def _show_train(result: Result) -> str:
    from companion.planner import plan_text

    return plan_text(result)


def add(commands: Commands) -> None:
    example = "llava plan train finetune --scale a100x8 --gpu H100-80"
    into = group(commands, "plan", "estimate the cost of a command", example)
    text = "estimate requests, tokens, USD and hours of `llava generate`; nothing is sent"
    example_generate = "llava plan generate --annotations caps_boxes.jsonl --model gpt-4o --client batch"
    new = command(into, "generate", text, example_generate, _generate)
    new.choice("--client", ["record", "batch"], "record", "single requests, or batches at half the price")
    asking(new, ", which cost nothing")

    text = "estimate memory, disk, hours and USD of `llava train`; exit code 1 for a run that does not fit"
    new = command(into, "train", text, example, _train, _show_train, lambda plan: not plan["fits"])
    new.option("experiment", "EXPERIMENT", "a file of configs/experiments, without its extension")
    new.scale()
    new.assignments("another value for one field")
    new.option("--gpu", "NAME", "a GPU of companion/planner.yaml (default: this machine's, or A100-80)")
    new.option("--gpus", "N", "instead of the scale's processes", type=int)
    new.option("--engine", "KIND", "none, ddp, fsdp2, zero2 or zero3, instead of the scale's", dest="kind")
    new.option("--samples", "N", "training samples (default: those on this machine, or the paper's)", type=int)
    new.option("--price", "USD", "per GPU and hour", type=positive)
