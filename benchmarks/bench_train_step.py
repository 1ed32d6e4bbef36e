"""A training step beside transformers' own LLaVA in a plain padded loop, saving by saving.

python benchmarks/bench_train_step.py --model 135m --stage 2 --per-image 2
python benchmarks/bench_train_step.py --model mini --stage 1 --savings head features packed shared fused
python benchmarks/bench_train_step.py --model 7b --stage 1 --device cuda --dtype bfloat16 --clock wall
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.lib import bench_train_step as bench
from benchmarks.lib.bench import report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", choices=["mini", *bench.SIZES])
    parser.add_argument("--stage", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--samples", type=int, help="of an optimizer step (default: 16 at mini, 8 elsewhere)")
    parser.add_argument("--per-image", type=int, default=1, help="samples of one image")
    parser.add_argument("--savings", nargs="+", default=[bench.ALL], choices=list(bench.SAVINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", default="cpu", choices=["cpu", "wall"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--peer", default=bench.PEER, choices=[bench.PEER])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_step.csv")
    given = parser.parse_args()
    for stage in given.stage:
        rows = bench.bench_step(
            given.model, stage, given.samples, given.per_image, given.rounds, given.clock, given.savings, given.dtype,
            given.device, given.memory,
        )  # fmt: skip
        report(rows, bench.COLUMNS, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
