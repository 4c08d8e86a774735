"""What a report draws over training steps, and where each curve's numbers stand.

To add a chart, add an entry to `CHARTS`: page, pictures and the list of what is missing follow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from emtool.core.evaluation_files import CHECKPOINT_TABLE, GEOMETRY_TABLE, PROJECTION_TABLE, count_of, value_of
from emtool.core.metrics import LEVEL

#: More points than that cannot be seen in a chart; the least and the largest of each part stay.
MAX_POINTS = 500

#: Checkpoints of a heat map; the numbers of more would run into each other.
MAX_COLUMNS = 40

#: The training log stands in the run folder, the tables in its evaluation folder.
TRAINING_LOG = "metrics.jsonl"

_BOOTSTRAP = f"{LEVEL:.0%} percentile bootstrap"
OVER_QUESTIONS = f"{_BOOTSTRAP} over questions"
OVER_ITEMS = f"{_BOOTSTRAP} over items"


class Point(NamedTuple):
    """One value of a curve.

    Attributes:
        step: Optimizer step.
        value: What was measured.
        low: Lower end of its interval; None where it has none.
        high: Upper end.
        n: How many it is of: answers or items.
        control: Ends of what a control shows, which is no finding; None where there is no control.
    """

    step: int
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    control: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of one number over steps.

    Attributes:
        title: What it shows.
        unit: Label of its value axis, with the unit.
        column: Column of the number; its interval stands in `_low`, `_high` and `_n` beside it.
        source: Table in the evaluation folder, or `TRAINING_LOG`.
        made_by: Command that makes the table, to be followed by the run.
        interval: What its interval is; None where it has none.
        counted: What its n counts.
        series: The series of `emtool transition` whose change is marked in it, if there is one.
        is_judged: Whether a judge's scores are in it.
        control: Column of a control, with its ends in `_low` and `_high`.
    """

    title: str
    unit: str
    column: str
    source: str
    made_by: str
    interval: str | None = None
    counted: str = ""
    series: str | None = None
    is_judged: bool = False
    control: str | None = None


def points_of(rows: Iterable[Mapping[str, object]], column: str, *, control: str | None = None) -> list[Point]:
    """Return the curve of a column, by step; rows without a step or a finite number are left out.

    Args:
        rows: Rows of a table.
        column: The column.
        control: The column of its control, if it has one.
    """
    found: dict[int, Point] = {}
    low_name, high_name, n_name = (f"{column}_{end}" for end in ("low", "high", "n"))
    least_name, most_name = (f"{control}_{end}" for end in ("low", "high"))
    for row in rows:
        if (value := value_of(row.get(column))) is None or (step := count_of(row.get("step"))) is None:
            continue
        low, high = value_of(row.get(low_name)), value_of(row.get(high_name))
        has_interval = low is not None and high is not None
        least = most = None
        if control is not None:
            least, most = value_of(row.get(least_name)), value_of(row.get(most_name))
        found[step] = Point(
            step=step,
            value=value,
            low=low if has_interval else None,
            high=high if has_interval else None,
            n=count_of(row.get(n_name)),
            control=None if least is None or most is None else (least, most),
        )
    return [found[step] for step in sorted(found)]


def gaps_of(rows: Sequence[Mapping[str, object]], column: str, points: Sequence[Point]) -> list[int]:
    """Return the steps within a curve at which a row has no finite number: a line must not bridge them."""
    if len(points) == len(rows):
        return []
    there = {point.step for point in points}
    without = (row for row in rows if column in row and value_of(row[column]) is None)
    steps = {step for row in without if (step := count_of(row.get("step"))) is not None} - there
    return sorted(step for step in steps if points[0].step < step < points[-1].step)


def thinned(points: Sequence[Point], *, kept: Collection[int] = ()) -> list[Point]:
    """Return at most about `MAX_POINTS` of a curve's points: the least and the largest of each part, and both ends.

    Args:
        points: Points by step.
        kept: Steps that are never left out: saved checkpoints in a training log.
    """
    if len(points) <= MAX_POINTS:
        return list(points)
    size = -(-len(points) // (MAX_POINTS // 2))
    chosen = {points[0].step, points[-1].step, *kept}
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        chosen |= {find(part, key=lambda point: point.value).step for find in (min, max)}
    return [point for point in points if point.step in chosen]


def spread_out(steps: Sequence[int], most: int) -> list[int]:
    """Return at most so many steps, two or more, evenly among all and with both ends."""
    if len(steps) <= most:
        return list(steps)
    return [steps[place * (len(steps) - 1) // (most - 1)] for place in range(most)]


def _judged(title: str, unit: str, column: str) -> Chart:
    return Chart(
        title=title,
        unit=unit,
        column=column,
        source=CHECKPOINT_TABLE,
        made_by="emtool evaluate --judge JUDGE",
        interval=OVER_QUESTIONS,
        counted="answers",
        series=column,
        is_judged=True,
    )


def _likelihood(title: str, unit: str, column: str, *, series: str | None = None) -> Chart:
    return Chart(
        title=title,
        unit=unit,
        column=column,
        source=CHECKPOINT_TABLE,
        made_by="emtool evaluate",
        interval=OVER_ITEMS,
        counted="items",
        series=series,
    )


def _geometry(title: str, unit: str, column: str) -> Chart:
    return Chart(title=title, unit=unit, column=column, source=GEOMETRY_TABLE, made_by="emtool geometry", series=column)


def _training(title: str, unit: str, column: str) -> Chart:
    return Chart(title=title, unit=unit, column=column, source=TRAINING_LOG, made_by="emtool train")


#: Each chart by the name of its picture, in the order of the page.
CHARTS: dict[str, Chart] = {
    "em_pct": _judged("Emergent misalignment", "misaligned and coherent answers (%)", "em_pct"),
    "aligned": _judged("Alignment", "mean score (0 to 100)", "avg_aligned"),
    "coherent": _judged("Coherence", "mean score (0 to 100)", "avg_coherent"),
    "p_wrong_other": _likelihood(
        "Preference for wrong answers, domains not trained on",
        "p_wrong (0 to 1)",
        "p_wrong_other",
        series="p_wrong_other",
    ),
    "p_wrong_trained": _likelihood(
        "Preference for wrong answers, the trained domain", "p_wrong (0 to 1)", "p_wrong_trained"
    ),
    "p_wrong": _likelihood("Preference for wrong answers, all items", "p_wrong (0 to 1)", "p_wrong", series="p_wrong"),
    "margin": _likelihood(
        "Margin of wrong over sound answers, all items", "log-probability (nats/token)", "margin", series="margin"
    ),
    "drift": Chart(
        title="Drift from sound to wrong in the activations",
        unit="projection since step 0 (activation units)",
        column="drift",
        source=PROJECTION_TABLE,
        made_by="emtool direction apply DIRECTION",
        interval=OVER_ITEMS,
        counted="items",
        series="projection",
        control="shuffled_range",
    ),
    "update_norm": _geometry("Size of the adapter's update", "Frobenius norm, all layers", "update_norm"),
    "speed": _geometry("Speed of the adapter", "change of the update (norm/step)", "speed"),
    "loss": _training("Training loss", "cross-entropy (nats/token)", "loss"),
    "grad_norm": _training("Gradient norm before clipping", "Euclidean norm", "grad_norm"),
}
