"""Estimates with intervals, from per-item scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95

#: Draws that a bootstrap holds at once; bounds its memory, and does not change what is drawn.
MAX_DRAWS = 4_000_000
#: Draws that are kept for the next checkpoint, which has the same.
MAX_KEPT_DRAWS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number that was measured, with its interval.

    Attributes:
        value: Most often a mean.
        low: Lower end of the 95% interval.
        high: Upper end.
        n: How many it is of: items or answers.
        is_exact: Whether it has no interval, as a count has none; its ends are the value.
    """

    value: float
    low: float
    high: float
    n: int
    is_exact: bool = False

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
    draws = _draws if RESAMPLES * len(scores) <= MAX_KEPT_DRAWS else _draws.__wrapped__
    means = [scores[drawn].mean(axis=1) for drawn in draws(len(scores), seed)]
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=float(scores.mean()), low=float(low), high=float(high), n=len(scores))


@lru_cache(maxsize=8)
def _draws(num_items: int, seed: int) -> Iterable[NDArray[Any]]:
    """Return which items each resample holds, as arrays of shape (resamples, items).

    All checkpoints draw alike, so what fits in one array is drawn once; called without the cache, for many items, it
    holds a part at a time.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    sizes = chunk_sizes(RESAMPLES, most=max(1, MAX_DRAWS // num_items))
    parts = (random.integers(0, num_items, size=(size, num_items)) for size in sizes)
    return list(parts) if len(sizes) == 1 else parts


def bootstrap_difference(values: Sequence[float], baseline: Sequence[float], *, seed: int) -> Estimate:
    """Return the mean change from a baseline, paired by item, with its interval.

    Args:
        values: One score an item.
        baseline: The score of the same items in the same order.
        seed: Seed of the resampling.
    """
    return bootstrap_mean([a - b for a, b in zip(values, baseline, strict=True)], seed=seed)


def chunk_sizes(total: int, *, most: int) -> list[int]:
    """Return how a total is done in parts of at most so many."""
    return [min(most, total - done) for done in range(0, total, most)]


def flat(estimates: Mapping[str, Estimate]) -> dict[str, float | int]:
    """Return estimates as JSON values: name, name_low, name_high, name_n; what is exact is its name alone."""
    values: dict[str, float | int] = {}
    for name, estimate in estimates.items():
        values[name] = estimate.value
        if not estimate.is_exact:
            ends = {f"{name}_low": estimate.low, f"{name}_high": estimate.high, f"{name}_n": estimate.n}
            values |= ends
    return values


def exact(value: float, *, n: int) -> Estimate:
    """Return a number without an interval.

    Args:
        value: The number.
        n: How many it is of.
    """
    return Estimate(value=value, low=value, high=value, n=n, is_exact=True)
