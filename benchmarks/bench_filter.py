"""The CC3M filter at the paper's size.

    python benchmarks/bench_filter.py                            # some minutes on two CPU cores
    python benchmarks/bench_filter.py --only selection --captions 300000

`selection`: counting and selection of 3.3M captions whose phrases are kept, in seconds and MiB. `extraction`: noun
phrases beside a plain spaCy loop. `cores`: two processes beside one. `memory`: of few and of many captions. Prints a
table and appends one row per case to `benchmarks/results/filter.csv`; a ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.lib import bench_filter
from benchmarks.lib.bench import report
from companion import miniature
from llava_core.runtime import resolve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(bench_filter.CASES), choices=list(bench_filter.CASES))
    parser.add_argument("--captions", type=int, default=bench_filter.CAPTIONS, help="lines of the planted corpus")
    parser.add_argument("--corpus", type=Path, help="keep the planted corpus in this folder, or take it from there")
    parser.add_argument("--source", type=Path, help="captions to parse (default: the miniature's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "filter.csv")
    given = parser.parse_args()
    source = given.source or resolve("data/mini/mini-cc3m/Train_GCC-training.tsv")
    if given.source is None and set(given.only) != {"selection"}:
        miniature.ensure(only=["mini-cc3m"])
    rows = []
    for name in given.only:
        if name == "selection":
            rows += bench_filter.bench_selection(given.captions, given.corpus)
        else:
            rows += bench_filter.CASES[name](source)
    return report(rows, bench_filter.COLUMNS, given.out)


if __name__ == "__main__":
    sys.exit(main())
