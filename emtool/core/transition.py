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

# Shape suffixes: U units, N of them that are complete, T checkpoints, K places between two neighbouring ones (T - 1), R
# resamples.

#: Draws of the units for the interval, and of their signs for the test.
RESAMPLES = 2_000

#: With fewer units, no draw of signs can be as rare as 5%: 2 of 2**5 are 6%.
MIN_UNITS = 6
MIN_CHECKPOINTS = 3

#: More digits than a step has.
_MAX_DIGITS = 20

#: Differences below this share of the largest value are rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Transition:
    """A change of level in a series.

    Attributes:
        before: Saved step before the change, as estimated.
        after: The saved step after it: the change lies in (before, after].
        low: Saved step that the 95% interval of the change begins after.
        high: Saved step that it ends with.
        size: Mean of the checkpoints after the change less that of those before it, in the series' unit.
        p_value: How often a series without a change shows one at least as large.
        steps: Saved steps that were looked at, increasing.
        num_units: Units that were looked at: each has a value at all of these steps.
        left_out_steps: Steps that some unit, but not every unit looked at, has a value at.
        left_out_units: Units that lack values.
    """

    before: int
    after: int
    low: int
    high: int
    size: float
    p_value: float
    steps: Sequence[int]
    num_units: int
    left_out_steps: Sequence[int]
    left_out_units: Sequence[str]

    @property
    def is_supported(self) -> bool:
        """Return whether the data support a change, at 5%."""
        return self.p_value <= 1 - LEVEL


def find_transition(series: Mapping[str, Mapping[int, float]], *, seed: int) -> Transition:
    """Return the change of level that a series most likely has, and how well the data support it.

    A change at a place between two checkpoints splits the mean curve into two levels; its gain is by how much they
    lessen the curve's squares around its mean. The place is the one of the largest gain. Its interval spans the places
    that the data do not rule out: were the change there, the place found would gain as much more than it in at least 5%
    of resamples of the units. The test compares the largest gain with those under random signs of whole units, each as
    it deviates from its own mean. Both keep what the checkpoints of a unit share: its values at successive checkpoints
    need not be independent. The gain is not divided by its standard error, which is by chance the smallest where rare
    hits are: a series of such hits would show changes.

    Args:
        series: Unit to step to value, finite. Where values are missing, the step or the unit that lacks most is left
            out until none is.
        seed: Seed of the draws.

    Returns:
        The change; see `is_supported`.

    Raises:
        DataError: If there are too few checkpoints or units.

    Source: least squares for the place, Bai 1994 (Journal of Time Series Analysis 15(5)); its interval by inverting a
    bootstrapped test, Huskova and Kirch 2008 (Journal of Time Series Analysis 29(6)); random signs, Fisher 1935, The
    Design of Experiments; the largest statistic of all places, Westfall and Young 1993; the bootstrap of t, Hall 1988
    (The Annals of Statistics 16(3)).
    """
    import numpy as np

    all_steps = sorted({step for values in series.values() for step in values})
    cells_UT = np.array([[series[unit].get(step, np.nan) for step in all_steps] for unit in sorted(series)], ndmin=2)
    rows, columns = _complete(np.isfinite(cells_UT))
    steps = [all_steps[column] for column in columns]
    units = [sorted(series)[row] for row in rows]
    values_NT = cells_UT[np.ix_(rows, columns)]
    # In units of the largest value, so that no square is out of range.
    scale = float(np.abs(values_NT).max()) or 1.0
    values_NT = values_NT / scale
    values_NT -= values_NT.mean(axis=1, keepdims=True)
    random = np.random.default_rng(seed)
    place = int(_gains(values_NT.mean(axis=0)[None]).argmax())
    places = _possible_places(values_NT, random)
    return Transition(
        before=steps[place],
        after=steps[place + 1],
        low=steps[min(places)],
        high=steps[max(places) + 1],
        size=float(_contrasts(values_NT.mean(axis=0)[None])[0, place]) * scale,
        p_value=_p_value(values_NT, random),
        steps=steps,
        num_units=len(units),
        left_out_steps=sorted({step for values in series.values() for step in values} - set(steps)),
        left_out_units=sorted(set(series) - set(units)),
    )


def _complete(is_there_UT: NDArray[Any]) -> tuple[list[int], list[int]]:
    """Return the rows and columns that are left when those that lack most are left out until no cell is missing.

    Raises:
        DataError: If too few of either are left.
    """
    import numpy as np

    rows, columns = list(range(is_there_UT.shape[0])), list(range(is_there_UT.shape[1]))
    while True:
        if len(rows) < MIN_UNITS or not columns:
            raise DataError(
                f"{len(rows) if columns else 0} unit(s) with values cannot tell a change from chance; at least "
                f"{MIN_UNITS} are needed"
            )
        if len(columns) < MIN_CHECKPOINTS:
            raise DataError(
                f"{len(columns)} checkpoint(s) with a value of each of {len(rows)} units cannot tell where a change "
                f"is; at least {MIN_CHECKPOINTS} are needed"
            )
        is_lacking = ~is_there_UT[np.ix_(rows, columns)]
        if not is_lacking.any():
            return rows, columns
        # As shares: a unit has fewer cells than a checkpoint. Of equal ones the unit goes, there are more of them.
        of_rows, of_columns = is_lacking.mean(axis=1), is_lacking.mean(axis=0)
        if of_rows.max() >= of_columns.max():
            del rows[int(of_rows.argmax())]
        else:
            del columns[int(of_columns.argmax())]


def _contrasts(curves_RT: NDArray[Any]) -> NDArray[Any]:
    """Return each curve's mean after each place less its mean before it, shape (R, K)."""
    import numpy as np

    num_steps = curves_RT.shape[1]
    before_K = np.arange(1, num_steps)
    sums_RK = curves_RT.cumsum(axis=1)[:, :-1]
    total_R1 = curves_RT.sum(axis=1, keepdims=True)
    contrasts_RK: NDArray[Any] = (total_R1 - sums_RK) / (num_steps - before_K) - sums_RK / before_K
    return contrasts_RK


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
    rest_NT = values_NT - curve_T
    weights_RN = random.multinomial(num_units, np.full(num_units, 1 / num_units), size=RESAMPLES)
    noise_RT = weights_RN @ rest_NT / num_units * np.sqrt(num_units / (num_units - 1))
    possible = []
    for place in range(num_steps - 1):
        levels_T = np.where(np.arange(num_steps) <= place, curve_T[: place + 1].mean(), curve_T[place + 1 :].mean())
        drawn_RK = _gains(levels_T + noise_RT)
        excess_R = drawn_RK.max(axis=1) - drawn_RK[:, place]
        excess = gains_K.max() - gains_K[place]
        if (excess_R >= excess - _ROUNDING**2).mean() > 1 - LEVEL or excess <= _ROUNDING**2:
            possible.append(place)
    return possible


def _p_value(values_NT: NDArray[Any], random: Any) -> float:
    """Return how often a series without a change would show one as large: by random signs, and by a bootstrap of t.

    Signs hold for every place together, and for values however few or rare; where units move for good by unequal
    amounts they take a few that go far for a change, which t at the place found does less often. The larger one counts.
    """
    import numpy as np

    num_units = len(values_NT)
    gains_K = _gains(values_NT.mean(axis=0)[None])[0]
    seen = float(np.sqrt(gains_K.max()))
    signs_RN = random.choice([-1.0, 1.0], size=(RESAMPLES, num_units))
    drawn_R = np.sqrt(_gains(signs_RN @ values_NT / num_units).max(axis=1))
    by_signs = (drawn_R >= seen - _ROUNDING).sum()
    contrasts_N = _contrasts(values_NT)[:, int(gains_K.argmax())]
    centred_N = contrasts_N - contrasts_N.mean()
    weights_RN = random.multinomial(num_units, np.full(num_units, 1 / num_units), size=RESAMPLES)
    means_R = weights_RN @ centred_N / num_units
    spread_R = np.sqrt(np.clip(weights_RN @ centred_N**2 / num_units - means_R**2, 0, None))
    # |t*| >= |t|, without dividing by a spread that may be 0.
    by_t = (np.abs(means_R) * centred_N.std() >= abs(contrasts_N.mean()) * spread_R - _ROUNDING**2).sum()
    if centred_N.std() <= _ROUNDING:
        by_t = 0
    # The series itself is one of the draws: a p-value is never 0.
    return float((1 + max(by_signs, by_t)) / (1 + RESAMPLES))


def step_series(rows: Sequence[Mapping[str, str]], *, unit: str, value: str) -> dict[str, dict[int, float]]:
    """Return a series from the rows of a table; cells without a finite number are left out, their units are not.

    Args:
        rows: Rows with the column `step`.
        unit: Column that names the unit.
        value: Column of the value.

    Raises:
        DataError: If a column is missing, a step is no whole number, or two rows are of the same step and unit.
    """
    import math

    found: dict[str, dict[int, float]] = {}
    seen = set()
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in ("step", unit, value) if row.get(name) is None]:
            raise DataError(f"row {number} lacks {', '.join(missing)}")
        try:
            step = int(row["step"][:_MAX_DIGITS])
            score = float(row[value]) if row[value].strip() else math.nan
        except ValueError as error:
            raise DataError(f"row {number}: {error}") from error
        if len(row["step"]) >= _MAX_DIGITS:
            raise DataError(f"row {number}: step {row['step'][:_MAX_DIGITS]}... is no step")
        if (step, row[unit]) in seen:
            raise DataError(f"row {number} repeats step {step} of {unit} {row[unit]!r}")
        seen.add((step, row[unit]))
        values = found.setdefault(row[unit], {})
        if math.isfinite(score):
            values[step] = score
    return found
