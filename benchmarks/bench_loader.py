"""Making a batch beside the step that computes meanwhile.

python benchmarks/bench_loader.py
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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader.csv")
    given = parser.parse_args()
    miniature.ensure()
    return report(bench_parts.bench_loader(), bench_parts.COLUMNS, given.out)


if __name__ == "__main__":
    sys.exit(main())
