"""Intervals of any statistic of a set of items, by drawing the items again with replacement."""

from __future__ import annotations

from typing import Any

import numpy as np

SAMPLES = 2000


def draws(n: int, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Return how often each of n items counts (1 + samples, n): once each, then in every resample."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
    return np.vstack([np.ones(n, dtype=drawn.dtype), drawn]).astype(float)


def summary(values: np.ndarray) -> dict[str, Any]:
    """Return `{value, interval}` (95 %) of a statistic of all draws; both None where it is not defined."""
    defined = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(defined):
        return {"value": None, "interval": None}
    return {"value": float(values[0]), "interval": [float(end) for end in np.percentile(defined, [2.5, 97.5])]}
