"""Kept features of the frozen tower beside running it.

python benchmarks/bench_features.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.lib import bench_parts
from benchmarks.lib.bench import report
from companion import miniature


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="135m", choices=["mini", "135m"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "features.csv")
    given = parser.parse_args()
    miniature.ensure()
    return report(bench_parts.bench_features(given.model), bench_parts.COLUMNS, given.out)


if __name__ == "__main__":
    sys.exit(main())
