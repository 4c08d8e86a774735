"""Intervals of answers, which come in groups: those to one question resemble each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from emtool.core.metrics import LEVEL, MAX_DRAWS, MAX_KEPT_DRAWS, RESAMPLES, Estimate, chunk_sizes

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Resamples:
    """Resamples of whole questions: the same draws for every metric of some answers.

    Args:
        question_ids: The question of each answer.
        seed: Seed of the draws. The same seed and number of questions draw the same.

    Source: the cluster bootstrap, Davison and Hinkley 1997, Bootstrap Methods and their Application, section 3.8.
    """

    def __init__(self, question_ids: Sequence[str], seed: int) -> None:
        import numpy as np

        names = {name: number for number, name in enumerate(sorted(set(question_ids)))}
        # One question says nothing of the spread between questions.
        clusters = [names[name] for name in question_ids] if len(names) > 1 else range(len(question_ids))
        self._clusters: NDArray[Any] = np.asarray(clusters)
        self._sizes = np.bincount(self._clusters).astype(np.float64)
        self._seed = seed

    def means(self, columns: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
        """Return the mean of each column with its interval: in each resample, the sum over the number of answers."""
        import numpy as np

        values = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
        sums = [np.bincount(self._clusters, weights=column) for column in values.values()]
        num_clusters = len(self._sizes)
        draws = _draws if RESAMPLES * num_clusters <= MAX_KEPT_DRAWS else _draws.__wrapped__
        parts: list[NDArray[Any]] = [
            np.stack([weights @ row for row in sums]) / (weights @ self._sizes)
            for weights in draws(num_clusters, self._seed)
        ]
        ends = np.quantile(np.concatenate(parts, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
        return {
            name: _estimate(column, low=float(low), high=float(high))
            for (name, column), low, high in zip(values.items(), *ends, strict=True)
        }


@lru_cache(maxsize=8)
def _draws(num_clusters: int, seed: int) -> Iterable[NDArray[Any]]:
    """Return how often each resample holds each cluster, as arrays of shape (resamples, clusters).

    All checkpoints draw alike, so what fits in one array is drawn once; called without the cache, for many clusters, it
    holds a part at a time.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    even = np.full(num_clusters, 1 / num_clusters)
    sizes = chunk_sizes(RESAMPLES, most=max(1, MAX_DRAWS // num_clusters))
    parts = (random.multinomial(num_clusters, even, size=size).astype(np.float64) for size in sizes)
    return list(parts) if len(sizes) == 1 else parts


def _estimate(column: NDArray[Any], *, low: float, high: float) -> Estimate:
    """Return a mean with its interval; rounding alone can bring either beyond the other or beyond the values."""
    least, most = float(column.min()), float(column.max())
    value = min(max(float(column.mean()), least), most)
    return Estimate(value=value, low=max(min(low, value), least), high=min(max(high, value), most), n=len(column))
