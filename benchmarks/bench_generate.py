"""Greedy generation, ours beside transformers' `LlavaForConditionalGeneration.generate`, on the same random weights.

    python benchmarks/bench_generate.py                             # about two minutes on two CPU cores
    python benchmarks/bench_generate.py --threads 1 --clock cpu     # on a machine that does other things, too
    python benchmarks/bench_generate.py --model smollm2-135m

Prints a table and appends one row per case to `benchmarks/results/generate.csv`. A ratio above 1 means that ours is
faster; a memory ratio below 1 that ours needs less. Exits with 1 if the two did not write the same tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.lib.bench import append_rows
from benchmarks.lib.bench_generate import SHAPES, bench_generate

SHOWN = ("batch", "prompt", "new_tokens", "ours", "peer", "ratio", "ratio_low", "ratio_high", "peak_memory_ratio")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=SHAPES.names(), help="shape of the language model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows generated together, per case")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that each row writes")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: computing time of the process")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "auto"])
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generate.csv")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = bench_generate(
        given.model, given.batches, given.new_tokens, given.rounds, given.device, not given.no_memory, given.clock
    )
    print(f"{given.model} on {found['device']}, {found['cases'][0]['threads']} threads; ours and peer in tokens/s")
    table = [SHOWN, *([str(row[name]) for name in SHOWN] for row in found["cases"])]
    for line in table:
        print("  ".join(f"{cell:>{max(len(name), 7)}}" for cell, name in zip(line, SHOWN, strict=True)))
    print(f"appended to {append_rows(given.out, found['cases'])}")
    if not found["same_tokens"]:
        print("the two did not write the same tokens", file=sys.stderr)
    return 0 if found["same_tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
