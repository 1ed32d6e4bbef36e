"""Loss and gradients in chunks beside all logits at once.

python benchmarks/bench_loss.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.lib import bench_parts
from benchmarks.lib.bench import report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="supervised positions")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loss.csv")
    given = parser.parse_args()
    return report(bench_parts.bench_loss(given.rows, device=given.device), bench_parts.COLUMNS, given.out)


if __name__ == "__main__":
    sys.exit(main())
