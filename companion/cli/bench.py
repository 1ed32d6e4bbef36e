"""`llava bench`: the benchmarks of the folder benchmarks/."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.run import BENCHMARKS, add_options, call, load, passed
from companion.cli.arguments import Commands, Result, command, group, table


def _without_cases(result: Result) -> str:
    return table({key: value for key, value in result.items() if key != "cases"})


def _run(args: argparse.Namespace) -> Result:
    return call(args.benchmark, args)


def add(commands: Commands, words: Sequence[str]) -> None:
    """Add the commands; only the benchmark that is called is imported, for its options."""
    into = group(commands, "bench", "measure speed against other implementations", "llava bench generate")
    for name, benchmark in BENCHMARKS.items():
        example, failed = f"llava bench {name}", lambda result: not passed(result)
        new = command(into, name, benchmark.text, example, _run, _without_cases, failed)
        new.set_defaults(benchmark=name)
        if list(words[:2]) == ["bench", name]:
            add_options(new, load(name))
