"""Evaluation of the miniature: all of it once, and answers in batches beside one by one.

    python benchmarks/bench_evaluate.py                     # a minute on two CPU cores, once the two models are trained
    python benchmarks/bench_evaluate.py --clock wall --finetune DIR --science-qa DIR

Prints a table and appends its rows to `benchmarks/results/evaluate.csv`: seconds of answering and scoring all questions
of mini-scienceqa and both benches, and of a part of them how many times longer one question at a time takes. Exits with
1 if an answer depends on the batch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.lib.bench import append_rows
from benchmarks.lib.bench_evaluate import bench_evaluate
from llava_core.train.launch import launch, resolve_run

SHOWN = ("set", "questions", "seconds", "cpu_seconds", "score", "ratio", "ratio_low", "ratio_high", "same_answers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", type=Path, help="checkpoint for the benches (default: that of the chapters)")
    parser.add_argument("--science-qa", type=Path, help="checkpoint for mini-scienceqa (default: that of the chapters)")
    parser.add_argument("--limit", type=int, default=24, help="questions per set in batches and one by one")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns")
    parser.add_argument("--batch", type=int, default=64, help="questions answered together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--clock", default="cpu", choices=["wall", "cpu"], help="cpu: computing time of the process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "evaluate.csv")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    models = [
        path or launch(resolve_run(name, "mini")).checkpoint
        for path, name in ((given.finetune, "finetune"), (given.science_qa, "science_qa"))
    ]
    found = bench_evaluate(*models, given.limit, given.rounds, given.batch, given.clock)
    for line in (SHOWN, *([row[name] for name in SHOWN] for row in found["cases"])):
        print("  ".join(f"{'' if cell is None else cell!s:>14}" for cell in line))
    print(f"batches answer {found['ratio']:.1f} times as many questions in the same {given.clock} time, or more")
    print(f"appended to {append_rows(given.out, found['cases'])}")
    if not found["same_answers"]:
        print("an answer depends on the batch", file=sys.stderr)
    return 0 if found["same_answers"] else 1


if __name__ == "__main__":
    sys.exit(main())
