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
    """

    table: str
    unit: str
    made_by: str


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
    """Return when each of some series changes its level.

    Args:
        run: The run folder.
        names: Keys of `SERIES`; None takes those that are there.
        seed: Seed of the draws.

    Raises:
        ConfigError: If a name is unknown.
        CheckpointError: If no table is there, or one that was asked for by name is not.
        DataError: If a table cannot be read.
    """
    for name in names or ():
        if name not in SERIES:
            raise unknown_name("series", name, SERIES)
    tables = {source.table for source in SERIES.values()}
    rows = {table: read_rows(run.evaluation_path / table) for table in sorted(tables)}
    there = [name for name, source in SERIES.items() if name in _columns(rows[source.table])]
    chosen = there if names is None else names
    if not chosen:
        raise CheckpointError(
            f"{run.path} has no series to look for a change in; make some: emtool evaluate {run.path}"
        )
    found, problems = {}, {}
    for name in chosen:
        source = SERIES[name]
        if not rows[source.table]:
            raise CheckpointError(f"{run.path} has no {source.table}; make it with: {source.made_by} {run.path}")
        if name not in _columns(rows[source.table]):
            problems[name] = f"{source.table} has no column {name}"
            continue
        try:
            found[name] = find_transition(step_series(rows[source.table], unit=source.unit, value=name), seed=seed)
        except DataError as error:
            problems[name] = str(error)
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


_JUDGED = SeriesSource(table=QUESTION_TABLE, unit="question_id", made_by="emtool evaluate --judge JUDGE")
_LIKELIHOOD = SeriesSource(table=ITEM_TABLE, unit="item", made_by="emtool evaluate")
_GEOMETRY = SeriesSource(table=LAYER_TABLE, unit="layer", made_by="emtool geometry")

#: Each series, by the name of its column.
SERIES: dict[str, SeriesSource] = {
    "em_pct": _JUDGED,
    "avg_aligned": _JUDGED,
    "avg_coherent": _JUDGED,
    "p_wrong": _LIKELIHOOD,
    "margin": _LIKELIHOOD,
    "projection": SeriesSource(table=ITEM_PROJECTION_TABLE, unit="item", made_by="emtool direction apply DIRECTION"),
    "update_norm": _GEOMETRY,
    "speed": _GEOMETRY,
}
