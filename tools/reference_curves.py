"""Write configs/reference_curves/EXPERIMENT.SCALE.csv from the finished runs of an experiment over seeds.

    llava train pretrain --set train.seed=1     (and further seeds, with no other override)
    python tools/reference_curves.py pretrain finetune science_qa

The run is divided into tenths. `low` and `high` are the mean loss of a tenth over the seeds, times 1 - 4 s and 1 + 4 s;
s is the relative standard deviation over the seeds, pooled over the tenths. There is no curve for the paper's scale,
because the loss values of its runs are not published.
"""

from __future__ import annotations

import argparse

import numpy as np

from llava_core.config import load_experiment
from llava_core.record import RunRecord
from llava_core.runtime import ROOT, atomic_write

PARTS, MULTIPLE, FEWEST_SEEDS = 10, 4, 3


def curves(name: str, scale: str) -> dict[int, np.ndarray]:
    """Mean loss of each part of the run, by seed."""
    found = {}
    for summary in sorted(ROOT.glob(f"runs/{name}/{scale}/*/summary.json")):
        record = RunRecord(summary.parent)
        seed = record.config.experiment.train.seed
        if record.config.run_id == load_experiment(name, scale, {"train.seed": seed}).run_id:
            losses = np.array([row["loss"] for row in record.metrics() if "loss" in row])
            edges = [round(k / PARTS * len(losses)) for k in range(1, PARTS)]
            found[seed] = np.array([part.mean() for part in np.split(losses, edges)])
    return found


def table(name: str, scale: str, found: dict[int, np.ndarray]) -> str:
    values = np.stack(list(found.values()))
    mean, relative = values.mean(0), values / values.mean(0)
    s = float(np.sqrt(relative.var(0, ddof=1).mean()))
    seeds = ", ".join(map(str, sorted(found)))
    head = f"# {name} at {scale}: bounds of the mean loss of the steps from `begin` to `end`, fractions of the run.\n"
    head += f"# Mean over the seeds {seeds}, times 1 -/+ {MULTIPLE} x {s:.4f} (tools/reference_curves.py)\n"
    lines = [
        f"{k / PARTS:g},{(k + 1) / PARTS:g},{m * (1 - MULTIPLE * s):.4f},{m * (1 + MULTIPLE * s):.4f}\n"
        for k, m in enumerate(mean)
    ]
    return head + "begin,end,low,high\n" + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+")
    parser.add_argument("--scale", default="mini")
    arguments = parser.parse_args()
    for name in arguments.experiments:
        found = curves(name, arguments.scale)
        if len(found) < FEWEST_SEEDS:
            raise SystemExit(f"{name}: {len(found)} finished seeds at {arguments.scale}; train at least {FEWEST_SEEDS}")
        path = ROOT / "configs" / "reference_curves" / f"{name}.{arguments.scale}.csv"
        atomic_write(path, table(name, arguments.scale, found))


if __name__ == "__main__":
    main()
