"""One run tells you nothing: what an ablation of one run per arm would have said, from stored runs of many seeds.

`python -m benchmarks.run single-runs` trains the runs and stores a row for each in benchmarks/results/single_runs.csv.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.evaluation.statistics import seeds_interval, unpaired_difference
from companion.paper.ledger import published_ablation
from companion.protocol import load_protocol
from llava_core.runtime import ROOT, DataError, display_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD = ROOT / "benchmarks" / "results" / "single_runs.csv"
COMMAND = "python -m benchmarks.run single-runs"


def single_runs(ablation: str = "pretraining", record: Path = RECORD) -> dict[str, Any]:
    """Compare every run of one arm with every run of the other, as if each pair were all that an author has.

    Returns:
        `arms` (label -> accuracies, the reference first), `effect` (difference of the means, other minus reference, in
        points) and its `interval` over seeds; `differences` and `z` of all pairs, z as the paper's runs allow it (the
        questions as independent draws, unpaired); `wrong_sign`, the share of pairs in percent whose difference is 0 or
        has the sign against the effect; `papers`: claim -> z of the paper's own ablations; `budget`.

    Raises:
        DataError: no stored runs, or the arms have different seeds.
    """
    import pandas as pd

    if not record.is_file():
        raise DataError(f"{display_path(record)}: no stored runs; make them with `{COMMAND}`")
    rows = pd.read_csv(record)
    rows = rows[rows["ablation"] == ablation]
    if rows.empty:
        raise DataError(f"{display_path(record)}: no run of {ablation}; add `--ablation {ablation}` to `{COMMAND}`")
    budget = rows.iloc[-1][["problems", "epochs", "questions"]].astype(int).to_dict()
    for key, value in budget.items():
        rows = rows[rows[key] == value]
    rows = rows.drop_duplicates(["arm", "seed"], keep="last").sort_values("seed")  # a repeated call adds equal rows
    reference, other = list(load_protocol().plan(ablation).arms)[:2]
    first, second = (rows[rows["arm"] == label] for label in (reference, other))
    if first.empty or list(first["seed"]) != list(second["seed"]):
        raise DataError(f"{display_path(record)}: the arms of {ablation} have different seeds; run `{COMMAND}` again")
    n = budget["questions"]
    pairs = [(int(a), int(b)) for a, b in product(first["correct"], second["correct"])]
    over_seeds = seeds_interval([100 * (b - a) / n for a, b in zip(first["correct"], second["correct"], strict=True)])
    sign = 1 if over_seeds["mean"] > 0 else -1
    claims = [arm.claim for plan in load_protocol().ablations.values() for arm in plan.arms.values()]
    return {
        "ablation": ablation,
        "arms": {label: (100 * own["correct"] / n).tolist() for label, own in ((reference, first), (other, second))},
        "effect": over_seeds["mean"],
        "interval": over_seeds["interval"],
        "differences": [100 * (b - a) / n for a, b in pairs],
        "z": [unpaired_difference(a, n, b, n)["z"] for a, b in pairs],
        "wrong_sign": 100 * sum(sign * (b - a) <= 0 for a, b in pairs) / len(pairs),
        "papers": {claim: published_ablation(claim)["z"] for claim in claims if claim and claim.startswith("ablation")},
        "budget": budget,
    }


def single_runs_figure(result: Mapping[str, Any]) -> Figure:
    """Draw the z of all pairs of single runs, and those of the paper's ablations beside them."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    figure, ax = plt.subplots(figsize=(7.2, 3))
    sns.histplot(x=result["z"], binwidth=0.5, stat="percent", ax=ax)
    ax.axvline(0, linestyle="--", color="C6")
    top = ax.get_ylim()[1]
    for (claim, z), marker in zip(sorted(result["papers"].items(), key=lambda pair: pair[1]), "DsvoX^", strict=False):
        name = claim.removeprefix("ablation-").replace("-", " ")
        ax.plot(z, 1.07 * top, marker, color="C1", fillstyle="none", markeredgewidth=1.4, label=f"paper: {name}")
    reference, other = result["arms"]
    ax.set(xlabel=f"{other} minus {reference}, one run each, in standard errors", ylabel="pairs of runs (%)")
    ax.set(title=f"{result['wrong_sign']:.0f} % of the pairs have the wrong sign", ylim=(0, 1.15 * top))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure
