"""The series of a run, read from the tables of its evaluation, and when each changes its level."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emtool.core.errors import CheckpointError, DataError, unknown_name
from emtool.core.evaluation_files import (
    ITEM_PROJECTION_TABLE,
    ITEM_TABLE,
    LAYER_TABLE,
    QUESTION_TABLE,
    TRANSITION_SUMMARY,
    read_rows,
    read_summary,
    settings_of,
)
from emtool.core.run_dir import FORMAT, RunFolder, write_json
from emtool.core.run_lock import locked_evaluation
from emtool.core.transition import Transition, find_transition, step_series


@dataclass(frozen=True, kw_only=True)
class SeriesSource:
    """Where the values of a series stand.

    Attributes:
        table: File in the evaluation folder, a row for each step and unit.
        unit: Column that names the unit: what the interval is over.
        made_by: Command that writes the table.
        column: Column of the value.
        is_other: Whether only items in domains that were not trained on count.
    """

    table: str
    unit: str
    made_by: str
    column: str
    is_other: bool = False


@dataclass(frozen=True, kw_only=True)
class RunTransitions:
    """When the series of a run change their level.

    Attributes:
        run: The run folder.
        seed: Seed of the draws.
        found: Series name to its change.
        problems: Series name to why none can be looked for.
    """

    run: RunFolder
    seed: int
    found: Mapping[str, Transition]
    problems: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return them as `transitions.json` holds them."""
        return {
            "format": FORMAT,
            "run": str(self.run.path),
            "settings": {"seed": self.seed, "units": {name: SERIES[name].unit for name in self.found}},
            "transitions": [
                {"series": name, "is_supported": change.is_supported, **asdict(change)}
                for name, change in self.found.items()
            ],
            "problems": dict(self.problems),
        }


def find_transitions(run: RunFolder, names: Sequence[str] | None, *, seed: int) -> RunTransitions:
    """Return when each series that is there changes its level.

    Args:
        run: The run folder.
        names: Keys of `SERIES` that must be there; None asks for none in particular.
        seed: Seed of the draws.

    Raises:
        ConfigError: If a name is unknown.
        CheckpointError: If no table is there, or one that was asked for by name is not.
        DataError: If a table cannot be read, or a change can be looked for in none of the series asked for.
    """
    for name in names or ():
        if name not in SERIES:
            raise unknown_name("series", name, SERIES)
    rows = {source.table: read_rows(run.evaluation_path / source.table) for source in SERIES.values()}
    there = [name for name, source in SERIES.items() if source.column in _columns(rows[source.table])]
    if not there and names is None:
        raise CheckpointError(
            f"{run.path} has no series to look for a change in; make some: emtool evaluate {run.path}"
        )
    for name in names or ():
        if name not in there:
            path, made_by = run.evaluation_path / SERIES[name].table, SERIES[name].made_by
            what = f"{path.name} without rows of {name}" if path.exists() else f"no {path.name}"
            raise CheckpointError(f"{run.path} has {what}; make it with: {made_by} {run.path}")
    trained = settings_of(read_summary(run)).get("trained_domain")
    found, problems = {}, {}
    for name in there:
        source = SERIES[name]
        kept = [row for row in rows[source.table] if not (source.is_other and row.get("domain") == trained)]
        try:
            series = step_series(kept, unit=source.unit, value=source.column)
            found[name] = find_transition(series, seed=seed)
        except DataError as error:
            problems[name] = str(error)
    chosen = there if names is None else names
    if not found.keys() & set(chosen):
        raise DataError("; ".join(f"{name}: {problems[name]}" for name in chosen))
    return RunTransitions(run=run, seed=seed, found=found, problems=problems)


def _columns(rows: Sequence[Mapping[str, str]]) -> Collection[str]:
    return rows[0].keys() if rows else ()


def write_transitions(run: RunFolder, found: RunTransitions) -> None:
    """Write `transitions.json`, whole or not at all.

    Raises:
        EmtoolError: If it cannot be written, or another process holds the evaluation.
    """
    with locked_evaluation(run):
        try:
            write_json(run.evaluation_path / TRANSITION_SUMMARY, found.to_dict())
        except OSError as error:
            raise run.write_error(error, "writing transitions") from error


def _judged(column: str) -> SeriesSource:
    return SeriesSource(
        table=QUESTION_TABLE, unit="question_id", made_by="emtool evaluate --judge JUDGE", column=column
    )


def _likelihood(column: str, *, is_other: bool = False) -> SeriesSource:
    return SeriesSource(table=ITEM_TABLE, unit="item", made_by="emtool evaluate", column=column, is_other=is_other)


def _geometry(column: str) -> SeriesSource:
    return SeriesSource(table=LAYER_TABLE, unit="layer", made_by="emtool geometry", column=column)


#: Each series; a name that ends in `_other` leaves out the items of the trained domain.
SERIES: dict[str, SeriesSource] = {
    "em_pct": _judged("em_pct"),
    "avg_aligned": _judged("avg_aligned"),
    "avg_coherent": _judged("avg_coherent"),
    "p_wrong_other": _likelihood("p_wrong", is_other=True),
    "p_wrong": _likelihood("p_wrong"),
    "margin_other": _likelihood("margin", is_other=True),
    "margin": _likelihood("margin"),
    "projection": SeriesSource(
        table=ITEM_PROJECTION_TABLE, unit="item", made_by="emtool direction apply DIRECTION", column="projection"
    ),
    "update_norm": _geometry("update_norm"),
    "speed": _geometry("speed"),
}
