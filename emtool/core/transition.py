"""When a series of checkpoints changes its level: the step, its interval, and whether the data support one at all.

The model is one change of level: a mean before it and another after it, over units (items, questions, layers) that were
each measured at every checkpoint. A gradual change has no such step; what is found then lies within it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emtool.core.errors import DataError
from emtool.core.metrics import LEVEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Shape suffixes: N units, T checkpoints, K places between two neighbouring ones (T - 1), R resamples.

#: Draws of the units for the interval, and of their signs for the test.
RESAMPLES = 2_000

#: With fewer units, no draw of signs can be as rare as 5%: 2 of 2**5 are 6%.
MIN_UNITS = 6
MIN_CHECKPOINTS = 3


@dataclass(frozen=True, kw_only=True)
class Transition:
    """A change of level in a series.

    Attributes:
        before: Saved step before the change, as estimated.
        after: The saved step after it: the change lies in (before, after].
        low: Saved step that the 95% interval of the change begins after.
        high: Saved step that it ends with.
        size: Mean of the checkpoints after the change less that of those before it, in the series' unit.
        p_value: How often a series without a change shows one at least as clear.
        num_units: Units that were measured at every checkpoint.
    """

    before: int
    after: int
    low: int
    high: int
    size: float
    p_value: float
    num_units: int

    @property
    def is_supported(self) -> bool:
        """Return whether the data support a change, at 5%."""
        return self.p_value <= 1 - LEVEL


def find_transition(series: Mapping[str, Mapping[int, float]], *, seed: int) -> Transition:
    """Return the change of level that a series most likely has, and how well the data support it.

    Each place between two checkpoints splits every unit's values into two means; their difference over its standard
    error says how clear a change there would be. The place is the one that explains most of the mean curve. Its
    interval spans the places that the data do not rule out: were the change there, the place found would explain as
    much more than it in at least 5% of resamples of the units. The test compares the clearest difference of all places
    with those under random signs of whole units. Both keep what the checkpoints of a unit share: its values at
    successive checkpoints need not be independent.

    Args:
        series: Unit to step to value. Steps that a unit lacks are left out for all.
        seed: Seed of the draws.

    Returns:
        The change; see `is_supported`.

    Raises:
        DataError: If there are too few checkpoints or units.

    Source: least squares for the place, Bai 1994 (Journal of Time Series Analysis 15(5)); its interval by inverting a
    bootstrapped test, Huskova and Kirch 2008 (Journal of Time Series Analysis 29(6)); random signs, the wild
    bootstrap of Wu 1986 (The Annals of Statistics 14(4)); the largest statistic of all places, Westfall and Young 1993.
    """
    import numpy as np

    steps, values_NT = _matrix(series)
    contrasts_NK = _contrasts(values_NT)
    random = np.random.default_rng(seed)
    place = int(_gains(values_NT.mean(axis=0)[None]).argmax())
    places = _possible_places(values_NT, random)
    return Transition(
        before=steps[place],
        after=steps[place + 1],
        low=steps[min(places)],
        high=steps[max(places) + 1],
        size=float(contrasts_NK[:, place].mean()),
        p_value=_p_value(contrasts_NK, random),
        num_units=len(values_NT),
    )


def _matrix(series: Mapping[str, Mapping[int, float]]) -> tuple[list[int], NDArray[Any]]:
    """Return the steps that every unit has, increasing, and the values of shape (N, T).

    Raises:
        DataError: If there are too few of either.
    """
    import numpy as np

    steps = sorted(set.intersection(*(set(values) for values in series.values()))) if series else []
    if len(series) < MIN_UNITS:
        raise DataError(f"{len(series)} unit(s) cannot tell a change from chance; at least {MIN_UNITS} are needed")
    if len(steps) < MIN_CHECKPOINTS:
        raise DataError(
            f"{len(steps)} checkpoint(s) with every unit cannot tell where a change is; at least {MIN_CHECKPOINTS} are "
            "needed"
        )
    return steps, np.array([[series[unit][step] for step in steps] for unit in sorted(series)], dtype=np.float64)


def _contrasts(values_NT: NDArray[Any]) -> NDArray[Any]:
    """Return each unit's mean after each place less its mean before it, shape (N, K)."""
    import numpy as np

    num_steps = values_NT.shape[1]
    before_K = np.arange(1, num_steps)
    sums_NK = values_NT.cumsum(axis=1)[:, :-1]
    total_N1 = values_NT.sum(axis=1, keepdims=True)
    contrasts_NK: NDArray[Any] = (total_N1 - sums_NK) / (num_steps - before_K) - sums_NK / before_K
    return contrasts_NK


def _gains(curves_RT: NDArray[Any]) -> NDArray[Any]:
    """Return by how much a change at each place lessens the squares of each curve around its mean, shape (R, K)."""
    import numpy as np

    num_steps = curves_RT.shape[1]
    before_K = np.arange(1, num_steps)
    gains_RK: NDArray[Any] = _contrasts(curves_RT) ** 2 * before_K * (num_steps - before_K) / num_steps
    return gains_RK


def _possible_places(values_NT: NDArray[Any], random: Any) -> list[int]:
    """Return the places that the data do not rule out; the best one is always among them."""
    import numpy as np

    num_units, num_steps = values_NT.shape
    curve_T = values_NT.mean(axis=0)
    gains_K = _gains(curve_T[None])[0]
    # What units do beside the mean curve; resamples of it have the spread of the mean, but for the usual correction.
    rest_NT = values_NT - values_NT.mean(axis=1, keepdims=True) - (curve_T - curve_T.mean())
    weights_RN = random.multinomial(num_units, np.full(num_units, 1 / num_units), size=RESAMPLES)
    noise_RT = weights_RN @ rest_NT / num_units * np.sqrt(num_units / (num_units - 1))
    possible = []
    for place in range(num_steps - 1):
        levels_T = np.where(np.arange(num_steps) <= place, curve_T[: place + 1].mean(), curve_T[place + 1 :].mean())
        drawn_RK = _gains(levels_T + noise_RT)
        excess_R = drawn_RK.max(axis=1) - drawn_RK[:, place]
        excess = gains_K.max() - gains_K[place]
        if (excess_R >= excess * (1 - 1e-12)).mean() > 1 - LEVEL or excess == 0:
            possible.append(place)
    return possible


def _p_value(contrasts_NK: NDArray[Any], random: Any) -> float:
    """Return how often random signs of the units show a change as clear as the clearest that is there."""
    signs_RN = random.choice([-1.0, 1.0], size=(RESAMPLES, len(contrasts_NK)))
    seen = _clearest(contrasts_NK.mean(axis=0)[None], contrasts_NK)[0]
    drawn_R = _clearest(signs_RN @ contrasts_NK / len(contrasts_NK), contrasts_NK)
    # The series itself is one of the draws: a p-value is never 0.
    return float((1 + (drawn_R >= seen * (1 - 1e-12)).sum()) / (1 + RESAMPLES))


def _clearest(means_RK: NDArray[Any], contrasts_NK: NDArray[Any]) -> NDArray[Any]:
    """Return the largest of the differences over their standard errors, shape (R,).

    Signs leave the sum of squares as it is, so it and the mean give the spread of every draw.
    """
    import numpy as np

    squares_K = (contrasts_NK**2).mean(axis=0)
    spread_RK = np.sqrt(np.clip(squares_K - means_RK**2, 0, None) / (len(contrasts_NK) - 1))
    ratios_RK = np.divide(np.abs(means_RK), spread_RK, out=np.where(means_RK == 0, 0.0, np.inf), where=spread_RK > 0)
    clearest_R: NDArray[Any] = ratios_RK.max(axis=1)
    return clearest_R


def step_series(rows: Sequence[Mapping[str, str]], *, unit: str, value: str) -> dict[str, dict[int, float]]:
    """Return a series from the rows of a table; cells without a finite number are left out.

    Args:
        rows: Rows with the column `step`.
        unit: Column that names the unit.
        value: Column of the value.

    Raises:
        DataError: If a column is missing or a step is no whole number.
    """
    import math

    found: dict[str, dict[int, float]] = {}
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in ("step", unit, value) if row.get(name) is None]:
            raise DataError(f"row {number} lacks {', '.join(missing)}")
        try:
            step = int(row["step"])
            score = float(row[value]) if row[value].strip() else math.nan
        except ValueError as error:
            raise DataError(f"row {number}: {error}") from error
        if math.isfinite(score):
            found.setdefault(row[unit], {})[step] = score
    return found
