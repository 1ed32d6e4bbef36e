"""Alarms of a run: each names the likely cause and the fix. They stop nothing."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_core import runtime
from llava_core.config import RunConfig, load_experiment
from llava_core.runtime import DataError, display_path

if TYPE_CHECKING:
    import torch

    from llava_core.train.loader import StepBatch
    from llava_core.train.preflight import Preflight

UNCHANGED_AFTER = 20  # optimizer steps
SAMPLED = 2**16  # weights per part
ZERO_NORMS = 3  # steps in a row
FEWEST_SAMPLES = 8  # of a batch whose supervised share is compared
PURE_BF16_RATE = 1e-4
Weights = Callable[[], Mapping[str, "torch.Tensor"]]


def precision_warning(config: RunConfig) -> str | None:
    """Why bf16 weights would not learn at the run's learning rate, or None; for the start and for a dry run."""
    train = config.experiment.train
    if train.precision != "pure_bf16" or train.learning_rate >= PURE_BF16_RATE:
        return None
    return (
        f"train.precision is pure_bf16 and train.learning_rate {train.learning_rate:g}: below {PURE_BF16_RATE:g} most "
        "updates are smaller than half the distance of two bf16 numbers and are lost; fix: train.precision=mixed_bf16"
    )


class Alarms:
    """Checks of the rows that a run logs, on the rank that logs them; each alarm is given once.

    Args:
        weights: this rank's part of the trained weights by name, as the optimizer updates them (the fp32 ones).
        preflight: tokens and supervised tokens of all samples.
        steps: optimizer steps of the run.
        first: steps that an earlier process has done.
    """

    def __init__(self, config: RunConfig, weights: Weights, preflight: Preflight, steps: int, first: int = 0) -> None:
        self.config, self.weights, self.first = config, weights, first
        self.given: set[str] = set()
        self.zero_norms = 0
        self.before = _sampled(weights())
        lengths, supervised = preflight.lengths, preflight.supervised
        self.share = supervised.sum() / lengths.sum()
        # standard deviation of a batch's share, times the square root of its number of samples
        self.spread = float(np.std(supervised - self.share * lengths) / lengths.mean())
        self.band = reference_band(config, steps)
        self.losses: list[float] = []

    def check(self, step: int, row: Mapping[str, Any], batch: StepBatch) -> list[str]:
        """The messages after optimizer step `step` (from 1), of its logged row and this rank's batch."""
        names = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        found = {
            "precision": precision_warning(self.config),
            "finite": f"{', '.join(names)} not finite; fix: lower train.learning_rate" if names else None,
            "weights": self._unchanged(step), "supervised": self._supervised(batch),
            "gradient": self._no_gradient(row, batch), "loss": self._outside_band(step, row),
        }  # fmt: skip
        new = {name: f"step {step}: {text}" for name, text in found.items() if text and name not in self.given}
        self.given |= new.keys()
        return list(new.values())

    def _unchanged(self, step: int) -> str | None:
        if step != self.first + UNCHANGED_AFTER:
            return None
        after, messages = _sampled(self.weights()), []
        for part, values in self.before.items():
            changed = float((after[part] != values).double().mean())
            if changed < 0.5:
                cause = precision_warning(self.config) or (
                    "it has no gradient, or its updates are lost in rounding; fix: check train.trainable, "
                    "train.learning_rate and train.precision"
                )
                messages.append(f"{changed:.1%} of the weights of {part} changed in {UNCHANGED_AFTER} steps: {cause}")
        self.before = {}
        return "; ".join(messages) or None

    def _supervised(self, batch: StepBatch) -> str | None:
        share = batch.supervised / max(1, batch.tokens)
        far = abs(share - self.share) > 0.01 + 8 * self.spread / math.sqrt(max(1, batch.samples))
        if batch.samples < FEWEST_SAMPLES or not (share == 0 or share > 0.95 or far):
            return None
        return (
            f"{share:.1%} of the batch's tokens are supervised, of all samples' {self.share:.1%}; likely cause: the "
            "label mask does not fit the template; fix: look at `supervised_text` of the batch's samples"
        )

    def _no_gradient(self, row: Mapping[str, Any], batch: StepBatch) -> str | None:
        train = self.config.experiment.train
        learns = "language_model" in train.trainable or any(r.images is not None for r in batch.rows)
        self.zero_norms = self.zero_norms + 1 if row["grad_norm"] == 0 and learns else 0
        if self.zero_norms < ZERO_NORMS:
            return None
        return (
            f"the gradient norm was 0 in {ZERO_NORMS} steps in a row; likely cause: the loss does not depend on the "
            "trained weights; fix: check train.trainable and the projector"
        )

    def _outside_band(self, step: int, row: Mapping[str, Any]) -> str | None:
        self.losses.append(row["loss"])
        first, low, high = self.band.get(step, (step, 0.0, 0.0))
        n = step - first
        if not 0 < n <= len(self.losses) or low <= (mean := sum(self.losses[-n:]) / n) <= high:
            return None
        return (
            f"loss {mean:.4f} (mean of {n} steps) is outside of the reference runs' {low:g} to {high:g}; likely cause: "
            "other data, base models or code; fix: compare the SHA-256 in environment.json"
        )


def reference_band(config: RunConfig, steps: int) -> dict[int, tuple[int, float, float]]:
    """{step: (first, low, high)}: the mean loss of the steps after `first` up to `step` lies from `low` to `high`.

    From `configs/reference_curves/EXPERIMENT.SCALE.csv`; empty if there is none, or if a field but the seed was
    overridden.
    """
    name, scale = config.experiment.name, config.scale.name
    path = runtime.ROOT / "configs" / "reference_curves" / f"{name}.{scale}.csv"
    seed = {"train.seed": config.experiment.train.seed}
    if not path.is_file() or load_experiment(name, scale, seed).run_id != config.run_id:
        return {}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    try:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]
        return {round(r["end"] * steps): (round(r["begin"] * steps), r["low"], r["high"]) for r in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{display_path(path)}: no table of begin,end,low,high ({error!r}); fix: correct or remove it"
        ) from error


def _sampled(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """At most `SAMPLED` evenly spaced weights of the projector and of the language model, copied to the CPU.

    Without word embeddings: those of tokens that do not occur have no gradient.
    """
    import torch  # here: `llava train --dry-run` reads this file for its warning

    parts: dict[str, list[torch.Tensor]] = {}
    for name, weight in weights.items():
        if "embed_tokens" not in name:
            parts.setdefault(name.split(".")[0], []).append(weight.detach().flatten())
    sampled = {}
    for part, tensors in parts.items():
        stride = max(1, math.ceil(sum(map(len, tensors)) / SAMPLED))
        sampled[part] = torch.cat([values[stride - 1 :: stride] for values in tensors]).cpu()
    return sampled


def find_non_finite(
    loss_of: Callable[[int], torch.Tensor],
    gradient_norm: Callable[[torch.Tensor], float],
    indices: Sequence[int],
    count: int,
) -> list[int]:
    """Which of this rank's samples `indices` have a loss or gradient that is not finite by itself.

    Every rank makes `count` passes, the greatest number of samples of a rank. `gradient_norm` discards the gradient;
    its norm over all ranks is also not finite for the samples that other ranks compute at the same time.
    """
    found = []
    for k in range(count):
        index = indices[k] if k < len(indices) else indices[-1] if indices else 0
        loss = loss_of(index)
        finite = math.isfinite(float(loss.detach()))
        if loss.requires_grad:
            finite &= math.isfinite(gradient_norm(loss))
        if not finite and k < len(indices):
            found.append(index)
    return found
