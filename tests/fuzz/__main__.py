"""Run the fuzzer: `python -m tests.fuzz --seconds 60 --seed 0 [--only NAME]`; exits with 1 if a case fails.

A failure prints the seed of its case, and `--only NAME --seed SEED --cases 1` repeats it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

from . import checkpoints, data
from .case import Target, run_case

TARGETS: dict[str, Target] = {"checkpoints": checkpoints.TARGET, "data": data.TARGET}
"""Kinds of inputs. A new one is a module with a `Target` and an entry here."""


def fuzz(name: str, seed: int, cases: int | None, seconds: float, keep: Path | None = None) -> tuple[int, int]:
    """Run cases of one kind of input until their number or the time is reached; return their and the failures' number.

    Args:
        seed: of the first case; each next one has the next seed.
        keep: folder for the inputs of failed cases.
    """
    end, failures, done = time.monotonic() + seconds, 0, 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        sound = TARGETS[name].prepare(Path(folder, "sound"))
        for number in itertools.count() if cases is None else range(cases):
            if time.monotonic() > end:
                break
            done += 1
            failure = run_case(TARGETS[name], sound, seed + number, Path(folder, "case"), keep)
            if failure is not None:
                failures += 1
                sys.stdout.write(f"{name} --seed {seed + number}: {failure}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{name}: {done} cases, {failures} failures\n")
    return done, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=TARGETS, help="one kind of input (default: all, in equal shares of the time)")
    parser.add_argument("--seconds", type=float, default=60, help="for all kinds together (default: 60)")
    parser.add_argument("--cases", type=int, help="most cases of each kind (default: as many as there is time for)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case (default: 0)")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of failed cases")
    args = parser.parse_args()
    names = [args.only] if args.only else list(TARGETS)
    results = [fuzz(name, args.seed, args.cases, args.seconds / len(names), args.keep) for name in names]
    return int(any(failures for _, failures in results))


if __name__ == "__main__":
    sys.exit(main())
