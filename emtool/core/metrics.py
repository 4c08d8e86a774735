"""Estimates with intervals, from per-item scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over items with its interval.

    Attributes:
        value: The mean.
        low: Lower end of the 95% interval.
        high: Upper end.
        n: Items.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Return whether the interval lies wholly on one side of 0."""
        return self.low > 0 or self.high < 0


def sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-value)) without overflow."""
    import math

    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))


def bootstrap_mean(values: Sequence[float], *, seed: int) -> Estimate:
    """Return the mean of the values with a percentile bootstrap interval over items.

    The same seed and number of items draw the same resamples, so intervals of paired series move together.

    Args:
        values: One score an item, at least one.
        seed: Seed of the resampling.

    Source: Efron 1979, The Annals of Statistics 7(1), the percentile method; 10,000 resamples, 95%.
    """
    import numpy as np

    assert values, "an estimate needs at least one item"
    scores = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(scores), size=(RESAMPLES, len(scores)))
    means = scores[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=float(scores.mean()), low=float(low), high=float(high), n=len(scores))


def bootstrap_difference(values: Sequence[float], baseline: Sequence[float], *, seed: int) -> Estimate:
    """Return the mean change from a baseline, paired by item, with its interval.

    Args:
        values: One score an item.
        baseline: The score of the same items in the same order.
        seed: Seed of the resampling.
    """
    return bootstrap_mean([a - b for a, b in zip(values, baseline, strict=True)], seed=seed)


def flat(estimates: Mapping[str, Estimate]) -> dict[str, float | int]:
    """Return estimates as JSON values: name, name_low, name_high, name_n."""
    values: dict[str, float | int] = {}
    for name, estimate in estimates.items():
        values |= {
            name: estimate.value,
            f"{name}_low": estimate.low,
            f"{name}_high": estimate.high,
            f"{name}_n": estimate.n,
        }
    return values
