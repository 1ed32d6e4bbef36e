"""Attention forward and backward: our backends beside a padded batch, a dense mask and, on a GPU, FlexAttention.

    python benchmarks/bench_attention.py --threads 1 --clock cpu                        # minutes on a CPU
    python benchmarks/bench_attention.py --device cuda --shapes vicuna-7b llama-3.2-1b --length 2048 --rows 4

Rows of one sample, of several, and of several that share the tokens of their image. Prints a table and appends one row
per case, shape and candidate to `benchmarks/results/attention.csv`. A ratio above 1 means faster than the peer:
PyTorch's causal kernel (on a GPU, FlashAttention) for rows of one sample, the padded batch for the others. Exits with
an error if two candidates do not compute the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.lib.bench import append_rows
from benchmarks.lib.bench_attention import HEADS, bench_attention

SHOWN = ("case", "shape", "samples", "candidate", "ms", "low", "high", "peer", "ratio", "ratio_low", "ratio_high")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["128", "64"], choices=HEADS.names(), help="heads and their size"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: computing time of the process")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "auto"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention.csv")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = bench_attention(
        given.shapes, given.length, given.rows, given.rounds, given.device, given.clock, memory=False
    )
    table = [list(SHOWN), *([str(row[name]) for name in SHOWN] for row in found["cases"])]
    widths = [max(len(line[k]) for line in table) for k in range(len(SHOWN))]
    print(f"{found['device']}, {found['cases'][0]['threads']} threads; milliseconds of forward and backward")
    for line in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    print(f"appended to {append_rows(given.out, found['cases'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
