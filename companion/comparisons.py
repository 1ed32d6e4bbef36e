"""Comparisons of two arms by one interval rule: paired tests, equivalence, Holm's correction, learning speed, power.

A comparison has up to three standard errors: over seeds (Student's t of the paired differences), over questions
(clustered by image) and over both (their variances added). Its interval is the widest of the three and its p value the
largest. Tables 4 and 8 use this rule alike; it needs no resampling, so the same records give the same digits.
Source: clustered and paired standard errors as in arXiv 2411.00640, degrees of freedom of a sum of variances after
Satterthwaite, equivalence by two one-sided tests (TOST).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special, stats

from companion.evaluation.statistics import CONFIDENCE
from llava_core.runtime import DataError

ALPHA = 1 - CONFIDENCE
RESAMPLES = 1000  # of the questions, for the steps to an accuracy


class Error(NamedTuple):
    """A standard error with its degrees of freedom."""

    value: float
    freedom: float

    def half_width(self, confidence: float) -> float:
        return float(stats.t.ppf((1 + confidence) / 2, self.freedom)) * self.value

    def p_above(self, distance: float) -> float:
        """One-sided p of an estimate that lies `distance` above the value of the null hypothesis."""
        if self.value == 0:
            return float(distance <= 0)
        return float(stats.t.sf(distance / self.value, self.freedom))


@dataclass(frozen=True)
class Comparison:
    """A difference, second arm minus first, in points unless said otherwise.

    Attributes:
        values: the difference of each unit: a seed, or a base model.
        errors: by source of variation; without `seeds` (a single unit) there is no interval.
        n: questions.
    """

    effect: float
    values: tuple[float, ...]
    errors: Mapping[str, Error]
    n: int

    @property
    def has_interval(self) -> bool:
        return "seeds" in self.errors

    def interval_over(self, source: str, confidence: float = CONFIDENCE) -> list[float] | None:
        """Return the interval over `seeds`, `questions` or `both`."""
        if source not in self.errors:
            return None
        half = self.errors[source].half_width(confidence)
        return [self.effect - half, self.effect + half]

    def interval(self, confidence: float = CONFIDENCE) -> list[float] | None:
        """Return the widest interval; None for a single unit."""
        if not self.has_interval:
            return None
        half = max(error.half_width(confidence) for error in self.errors.values())
        return [self.effect - half, self.effect + half]

    @property
    def p(self) -> float:
        """Two-sided p of no difference; 1 for a single unit."""
        if not self.has_interval:
            return 1.0
        return min(1.0, 2 * max(error.p_above(abs(self.effect)) for error in self.errors.values()))

    def equivalence_p(self, margin: float) -> float:
        """p of a difference of at least `margin` in either direction (TOST); 1 for a single unit."""
        if margin <= 0:
            raise DataError(f"margin of equivalence {margin:g}: give a number above 0")
        if not self.has_interval:
            return 1.0
        return max(error.p_above(margin - abs(self.effect)) for error in self.errors.values())

    def summary(self) -> dict[str, Any]:
        """Return the numbers for tables and records."""
        sources = {f"over_{name}": self.interval_over(name) for name in ("seeds", "questions", "both")}
        return {
            "effect": self.effect, "interval": self.interval(), **sources, "p": self.p, "units": len(self.values),
            "n": self.n, "values": list(self.values),
        }  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """Scores of an arm (seeds, questions) and their weights; an arm's value is 100 x sum of scores / sum of weights.

    For an accuracy the scores are 0 or 1 and the weights 1. For a relative score they are those of the candidate and of
    the reference answer.
    """

    scores: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, scores: Any, weights: Any = None) -> Scores:
        own = np.atleast_2d(np.asarray(scores, dtype=float))
        return cls(own, np.ones_like(own) if weights is None else np.atleast_2d(np.asarray(weights, dtype=float)))

    def part(self, chosen: np.ndarray) -> Scores:
        """Return the scores of some questions."""
        return Scores(self.scores[:, chosen], self.weights[:, chosen])

    @property
    def values(self) -> np.ndarray:
        """The value of each seed (seeds,), in percent."""
        result: np.ndarray = 100 * self.scores.sum(1) / self.weights.sum(1)
        return result

    def influence(self) -> np.ndarray:
        """What each question adds to the deviation of an arm's mean value (questions,); the sum is 0."""
        totals = self.weights.sum(1, keepdims=True)
        ratios = self.scores.sum(1, keepdims=True) / totals
        result: np.ndarray = 100 * ((self.scores - ratios * self.weights) / totals).mean(0)
        return result


def _unit_means(values: np.ndarray, units: Sequence[Hashable] | None) -> np.ndarray:
    if units is None:
        return values
    if len(units) != len(values):
        raise DataError(f"{len(values)} seeds, but {len(units)} units; name the unit of each seed")
    names = list(dict.fromkeys(units))
    return np.array([values[[unit == name for unit in units]].mean() for name in names])


def _comparison(values: np.ndarray, effect: float, question_error: float, clusters: int, n: int) -> Comparison:
    errors = {"questions": Error(question_error, max(1, clusters - 1))}
    if len(values) > 1:
        seed_error, freedom = float(np.std(values, ddof=1)) / len(values) ** 0.5, len(values) - 1
        parts = seed_error**2, question_error**2
        below = parts[0] ** 2 / freedom + parts[1] ** 2 / max(1, clusters - 1)
        both = Error(sum(parts) ** 0.5, sum(parts) ** 2 / below if below else freedom)
        errors = {"seeds": Error(seed_error, freedom), **errors, "both": both}
    return Comparison(effect, tuple(float(value) for value in values), errors, n)


def _cluster_index(n: int, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, int]:
    """Return the number of each question's cluster (n,), and of how many."""
    names = list(range(n)) if clusters is None else list(clusters)
    _, index = np.unique([str(name) for name in names], return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    if len(names) != n or groups < 2:
        raise DataError(f"{n} questions in {groups} clusters; name the cluster of each question, at least two in all")
    return index, groups


def compare(
    first: Scores, second: Scores, clusters: Sequence[Hashable] | None = None, units: Sequence[Hashable] | None = None
) -> Comparison:
    """Compare two arms with the same seeds and questions.

    Args:
        clusters: the image of each question, whose answers are not independent; None: each question by itself.
        units: the independent unit of each seed, such as its base model, whose seeds are averaged; None: each seed.

    Raises:
        DataError: seeds or questions of the arms differ, or there are fewer than two clusters.
    """
    if first.scores.shape != second.scores.shape:
        raise DataError(
            f"arms of {first.scores.shape} and {second.scores.shape} seeds and questions; compare the same ones"
        )
    n = first.scores.shape[1]
    index, groups = _cluster_index(n, clusters)
    values = _unit_means(second.values - first.values, units)
    by_cluster = np.bincount(index, second.influence() - first.influence(), groups)
    error = float(np.sqrt(groups / (groups - 1) * (by_cluster**2).sum()))
    return _comparison(values, float(values.mean()), error, groups, n)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p values after Holm's correction for the whole family."""
    adjusted, largest = dict[str, float](), 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def single(arm: Scores, clusters: Sequence[Hashable] | None = None) -> Comparison:
    """Return the value of one arm with its interval by the same rule."""
    return compare(Scores(np.zeros_like(arm.scores), arm.weights), arm, clusters)


def beats(arm: Scores, baseline: float | Sequence[float], clusters: Sequence[Hashable] | None = None) -> bool:
    """Return whether an arm lies significantly above a baseline: a value in percent, or an expected score per question.

    The same rule as between two arms; a single seed cannot show it.
    """
    per_question = np.broadcast_to(np.asarray(baseline, dtype=float), arm.scores.shape[1:])
    scale = 100 if np.ndim(baseline) == 0 else 1
    result = compare(Scores.of(np.broadcast_to(per_question / scale, arm.scores.shape)), arm, clusters)
    interval = result.interval()
    return interval is not None and interval[0] > 0


# ------------------------------------------------------------------------------------------------ learning speed


def steps_to(steps: Sequence[int], accuracies: np.ndarray, target: float) -> np.ndarray:
    """Return the steps after which a curve first reaches `target`, between two checkpoints by linear interpolation.

    Args:
        steps: of the C checkpoints.
        accuracies: (..., C) in percent.

    A curve that stays below gets infinity; one that begins above gets the first step.
    """
    places = np.asarray(steps, dtype=float)
    reached = accuracies >= target
    k = reached.argmax(-1)
    before = np.maximum(k - 1, 0)
    low, high = (np.take_along_axis(accuracies, at[..., None], -1)[..., 0] for at in (before, k))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(k > 0, (target - low) / (high - low), 1.0)
    found = places[before] + share * (places[k] - places[before])
    return np.where(reached.any(-1), found, np.inf)


def compare_speed(
    steps: Sequence[int],
    first: np.ndarray,
    second: np.ndarray,
    target: float,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[Comparison, dict[str, Any]]:
    """Compare the steps that two arms need to `target` percent: log2 of second / first, paired by seed.

    Args:
        first, second: right answers (seeds, checkpoints, questions), 0 or 1.

    Returns:
        The comparison, and `first`, `second` (steps by seed, None where the target is not reached). An arm that does
        not reach it counts with its last step, so the ratio is then a lower (first: upper) bound.
    """
    if first.shape != second.shape or first.shape[1] != len(steps):
        raise DataError(
            f"curves of shape {first.shape} and {second.shape} at {len(steps)} checkpoints; compare equal ones"
        )
    n = first.shape[2]
    index, groups = _cluster_index(n, clusters)
    weights = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)[:, index]
    weights = np.vstack([np.ones((1, n)), weights]).astype(float)  # (1 + resamples, n)

    def needed(right: np.ndarray) -> np.ndarray:
        shares = 100 * np.einsum("scn,bn->bsc", right, weights) / weights.sum(1)[:, None, None]
        return steps_to(steps, shares, target)  # (1 + resamples, seeds)

    both = needed(first), needed(second)
    capped = [np.minimum(found, steps[-1]) for found in both]
    ratios = np.log2(capped[1] / capped[0])
    error = float(ratios[1:].mean(1).std(ddof=1))
    result = _comparison(ratios[0], float(ratios[0].mean()), error, groups, n)
    reached = [[float(step) if np.isfinite(step) else None for step in found[0]] for found in both]
    return result, dict(zip(("first", "second"), reached, strict=True))


# ------------------------------------------------------------------------------------------------ power


def simulated_arms(
    rng: np.random.Generator, seeds: int, n: int, effect: float, accuracy: float = 70.0
) -> tuple[Scores, Scores]:
    """Draw two arms whose expected accuracies differ by `effect` points.

    Questions have a difficulty (logits with the deviation 2) that both arms share; each run's accuracy deviates by one
    point.
    """
    logits = rng.normal(0, 2, n)

    def shifted(target: float) -> np.ndarray:
        shift = optimize.brentq(lambda shift: 100 * special.expit(logits + shift).mean() - target, -20, 20)
        result: np.ndarray = special.expit(logits + shift)
        return result

    arms = []
    for mean in (accuracy, accuracy + effect):
        runs = np.clip(mean + rng.normal(0, 1, seeds), 1, 99)
        arms.append(Scores.of(np.stack([rng.random(n) < shifted(run) for run in runs])))
    return arms[0], arms[1]


def power_table(
    seeds: Sequence[int], n: int, effects: Sequence[float], *, family: int = 1, draws: int = 200
) -> list[dict[str, Any]]:
    """Simulate the rule of `compare` and return a row per number of seeds: half-width, and the power at each effect.

    A difference counts as found if it has the right sign and p <= 0.05 / family, the first step of Holm's correction.
    """
    rows = []
    for count in seeds:
        rng, widths = np.random.default_rng(count), []
        row: dict[str, Any] = {"seeds": count, "questions": n}
        for effect in effects:
            found = 0
            for _ in range(draws):
                result = compare(*simulated_arms(rng, count, n, effect))
                ends = result.interval()
                widths.append((ends[1] - ends[0]) / 2 if ends else np.inf)
                found += result.p <= ALPHA / family and result.effect * effect > 0
            row[f"power at {effect:+g}"] = found / draws
        rows.append({**row, "half-width": float(np.median(widths))})
    return rows
