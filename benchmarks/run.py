"""Run a benchmark, print its rows and append them to benchmarks/results/NAME.csv.

    python -m benchmarks.run train-step --model 135m --stage 2 --per-image 2
    python -m benchmarks.run attention --device cuda --shapes vicuna-7b --length 2048 --rows 4
    python -m benchmarks.run --all

A benchmark is a function that returns a dict: `cases` (a row per case) and the headline numbers. Its parameters are the
options of the command; their help is the docstring. `llava bench NAME` runs the same without storing the rows.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.runtime import ROOT
from llava_core.train.identity import source_fingerprint

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path(__file__).parent / "results"
TRAINING = ("llava_core/ops", "llava_core/models", "llava_core/data", "llava_core/train")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its module with the function `bench_NAME`, what is compared, and files or folders of that code."""

    module: str
    text: str
    code: tuple[str, ...]


BENCHMARKS = {
    "attention": Benchmark("attention", "attention over packed rows against a padded batch", ("llava_core/ops",)),
    "attention-cost": Benchmark(
        "attention_cost", "what the Triton kernel computes and moves, counted, and a roofline", ("llava_core/ops",)
    ),
    "captions": Benchmark("captions", "caption scores against pycocoevalcap", ("companion/evaluation/captions.py",)),
    "filter": Benchmark(
        "filter", "the CC3M filter at the paper's size",
        ("companion/data_tools/cc3m.py", "companion/data_tools/phrases.py"),
    ),
    "generate": Benchmark(
        "generate", "greedy generation against transformers", ("llava_core/models", "llava_core/ops")
    ),
    "letter-binding": Benchmark(
        "letter_binding", "letters of options learned from two initialisations",
        tuple(f"companion/miniature/{name}.py" for name in ("language_model", "school_texts", "training")),
    ),
    "loss": Benchmark("loss", "loss and gradients in chunks against all logits at once", ("llava_core/ops",)),
    "memory": Benchmark(
        "memory", "planned memory of a training run against the measured peak",
        ("companion/training_memory.py", *TRAINING),
    ),
    "shared-prefix": Benchmark(
        "shared_prefix", "a step with each image prefix once against the same packed rows with one per sample",
        (*TRAINING, "benchmarks/train_step.py"),
    ),
    "single-runs": Benchmark(
        "single_runs", "an ablation with many seeds: what one run per arm would have said", TRAINING
    ),
    "teacher-error": Benchmark("teacher_error", "hallucination of the model against errors of the teacher", TRAINING),
    "train-step": Benchmark(
        "train_step", "an optimizer step against transformers' own model in a padded loop", TRAINING
    ),
}  # fmt: skip


def load(name: str) -> Callable[..., dict[str, Any]]:
    """The function of a benchmark."""
    function: Callable[..., dict[str, Any]] = getattr(
        importlib.import_module(f"benchmarks.{BENCHMARKS[name].module}"), f"bench_{BENCHMARKS[name].module}"
    )
    return function


def code_of(name: str) -> str:
    """Return 12 hex digits over the code that a benchmark measures and its own module."""
    own = BENCHMARKS[name]
    places = [ROOT / place for place in (*own.code, f"benchmarks/{own.module}.py")]
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return source_fingerprint(files)


def stored_rows(name: str) -> pd.DataFrame:
    """Return the rows of benchmarks/results/NAME.csv; `code` says whether they are of the "present" or "older" code."""
    import pandas as pd

    rows = pd.read_csv(RESULTS / f"{BENCHMARKS[name].module}.csv")
    rows["code"] = rows["code"].eq(code_of(name)).map({True: "present", False: "older"})
    return rows


def add_options(parser: argparse.ArgumentParser, function: Callable[..., Any]) -> None:
    """Add an option for each parameter of a function: type and choices by its annotation, help by its docstring.

    CPU threads are an option of every benchmark: with as many as the cores, small products wait for each other.
    """
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    hints = typing.get_type_hints(function)
    texts = dict(re.findall(r"^ +(\w+): (.+)$", inspect.getdoc(function) or "", re.M))
    for name, parameter in inspect.signature(function).parameters.items():
        option, default, text = f"--{name.replace('_', '-')}", parameter.default, texts.get(name, "")
        if isinstance(default, bool):
            action = "store_false" if default else "store_true"
            option = f"--no-{name}" if default else option
            parser.add_argument(option, dest=name, action=action, help=text)
            continue
        kind, several = hints[name], False
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        if typing.get_origin(kind) is Sequence:
            kind, several = typing.get_args(kind)[0], True
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
        parser.add_argument(
            option, type=type(choices[0]) if choices else kind, choices=choices, nargs="+" if several else None,
            default=default, help=f"{text} (default: {default})",
        )  # fmt: skip


def call(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Call a benchmark with its parameters from parsed options, on `--threads` threads; rows get the column `code`."""
    import torch

    function, code = load(name), code_of(name)
    torch.set_num_threads(args.threads)
    result = function(**{name: getattr(args, name) for name in inspect.signature(function).parameters})
    return {**result, "cases": [{**row, "code": code} for row in result["cases"]]}


def passed(result: dict[str, Any]) -> bool:
    """Whether both sides of a benchmark computed the same."""
    return bool(result.get("same_tokens", result.get("same_scores", True)))


def run(name: str, words: Sequence[str]) -> bool:
    """Run one benchmark, print its rows and append them to its CSV file; returns `passed`."""
    import pandas as pd
    import torch

    from benchmarks.common import append_rows, circumstances

    function = load(name)
    parser = argparse.ArgumentParser(prog=f"benchmarks.run {name}", description=inspect.getdoc(function))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=RESULTS / f"{BENCHMARKS[name].module}.csv")
    add_options(parser, function)
    args = parser.parse_args(words)
    result = call(name, args)
    hidden = circumstances(torch.device("cpu"))
    print(pd.DataFrame(result["cases"]).drop(columns=hidden, errors="ignore").to_string(index=False))
    print(f"appended to {append_rows(args.out, result['cases'])}")
    return passed(result)


def main(words: Sequence[str]) -> int:
    """Run the named benchmark, or all."""
    if list(words) == ["--all"]:
        results = [run(name, []) for name in BENCHMARKS]
        return 0 if all(results) else 1
    if not words or words[0] not in BENCHMARKS:
        print(f"{__doc__}\nbenchmarks:\n" + "\n".join(f"  {n:14} {b.text}" for n, b in BENCHMARKS.items()))
        return 0 if list(words) in (["--help"], ["-h"]) else 2
    return 0 if run(words[0], words[1:]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
