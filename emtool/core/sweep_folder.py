"""The folder of a sweep: its runs, its file, and how each cell ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emtool.core.data import file_sha256
from emtool.core.errors import CheckpointError
from emtool.core.evaluation_files import SUMMARY, read_summary
from emtool.core.finished import is_completed
from emtool.core.jobs import Command, Job, JobOutcome, thread_variables
from emtool.core.run_dir import FORMAT, RunFolder, read_json, replace_file, write_json
from emtool.core.sweep import Cell, Sweep

#: The table of a sweep, and its record.
TABLE, RECORD = "sweep.csv", "sweep.json"

Status = Literal["completed", "failed", "begun", "waiting"]


@dataclass(frozen=True, kw_only=True)
class CellState:
    """How far a cell is.

    Attributes:
        cell: The cell.
        run: Its run folder, which may not exist yet.
        status: "completed": trained and evaluated as asked. "failed": its last job ended in an error. "begun": there is
            a run folder to go on with.
        problem: What went wrong, as one line.
    """

    cell: Cell
    run: RunFolder
    status: Status
    problem: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the state as JSON values."""
        values = dict(self.cell.shown)
        return {"name": self.cell.name, "values": values, "status": self.status, "problem": self.problem}


@dataclass(frozen=True, kw_only=True)
class SweepFolder:
    """A sweep's folder, which may not exist yet.

    Attributes:
        path: The folder; the runs are in it.
    """

    path: Path

    @property
    def file_path(self) -> Path:
        """Return the copy of the sweep file that its jobs read."""
        return self.path / f"{self.path.name}.toml"

    @property
    def record_path(self) -> Path:
        """Return the record of how cells ended."""
        return self.path / RECORD

    @property
    def table_path(self) -> Path:
        """Return the table of every cell's metrics."""
        return self.path / TABLE

    def run_of(self, cell: Cell) -> RunFolder:
        """Return the run folder of a cell."""
        return RunFolder(path=self.path / cell.name)

    def create(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            CheckpointError: If it cannot be made, or is a run's.
        """
        if RunFolder(path=self.path).manifest_path.exists():
            raise CheckpointError(f"{self.path} is a run; choose another --output-name")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self.path}: {error.strerror}") from error

    def keep_file(self, sweep: Sweep) -> None:
        """Put the sweep file into the folder. The caller holds the folder: jobs of its holder read the file.

        Raises:
            CheckpointError: If it cannot be written.
        """
        try:
            if sweep.path.resolve() != self.file_path.resolve():
                replace_file(self.file_path, sweep.path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot write in {self.path}: {error.strerror}") from error

    def states(self, sweep: Sweep, *, evaluation: str | None) -> list[CellState]:
        """Return how far each cell is, as its run folder and the record say.

        Args:
            sweep: The sweep.
            evaluation: What names the evaluation that is asked for; None where none is.

        Raises:
            CheckpointError: If the record is damaged.
        """
        known = self._recorded()
        return [self._state(cell, evaluation, known.get(cell.name)) for cell in sweep.cells]

    def _recorded(self) -> dict[str, Any]:
        if not self.record_path.exists():
            return {}
        record = read_json(self.record_path)
        entries = record.get("cells") if isinstance(record, dict) else None
        if not isinstance(entries, dict):
            raise CheckpointError(
                f"{self.record_path}, which says how cells ended, is damaged or cannot be read; without it every cell "
                "is looked at anew, and what is trained is kept"
            )
        return entries

    def _state(self, cell: Cell, evaluation: str | None, entry: object) -> CellState:
        run = self.run_of(cell)
        recorded = entry if isinstance(entry, dict) else {}
        is_evaluated = evaluation is None or (
            recorded.get("evaluation") == evaluation
            and bool(read_summary(run))
            and recorded.get("summary_sha256") == _summary_sha256(run)
        )
        if is_completed(run.path) and recorded.get("status") == "completed" and is_evaluated:
            return CellState(cell=cell, run=run, status="completed")
        if recorded.get("status") == "failed":
            return CellState(cell=cell, run=run, status="failed", problem=str(recorded.get("problem")))
        return CellState(cell=cell, run=run, status="begun" if run.path.exists() else "waiting")

    def begin(self, job: Job) -> None:
        """Forget how the last job of a cell ended, which begins anew: what stops it now is no failure of before.

        Raises:
            CheckpointError: If the record is damaged, or cannot be written.
        """
        known = self._recorded()
        if known.pop(job.name, None) is not None:
            self._write(known)

    def keep(self, outcome: JobOutcome, *, evaluation: str | None) -> None:
        """Record how the job of a cell ended, and which evaluation its run has now.

        Args:
            outcome: How it ended.
            evaluation: What names the evaluation that it was to make; None where it was to make none.

        Raises:
            CheckpointError: If the record is damaged, or cannot be written.
        """
        entry = {
            "status": "completed" if outcome.problem is None else "stopped" if outcome.was_stopped else "failed",
            "problem": outcome.problem,
            "evaluation": evaluation,
            "summary_sha256": _summary_sha256(RunFolder(path=self.path / outcome.name)),
        }
        self._write({**self._recorded(), outcome.name: entry})

    def _write(self, cells: Mapping[str, object]) -> None:
        try:
            write_json(self.record_path, {"format": FORMAT, "cells": cells})
        except OSError as error:
            raise CheckpointError(f"cannot write {self.record_path}: {error.strerror}") from error

    def job(
        self,
        sweep: Sweep,
        cell: Cell,
        *,
        evaluate: Sequence[str] | None,
        threads: int | None,
        allow_low_disk: bool = False,
    ) -> Job:
        """Return the job of a cell: train it or go on with it, then evaluate it.

        Args:
            sweep: The sweep.
            cell: The cell.
            evaluate: Options of `emtool evaluate`; None does not evaluate.
            threads: Threads that it may compute with; None leaves that to the libraries.
            allow_low_disk: Whether it starts although the run may not fit on the disk.
        """
        folder, run = self.path.absolute(), self.run_of(cell).path.absolute()
        where = ["--output-root", str(folder.parent), "--output-name", folder.name]
        if allow_low_disk:
            where.append("--allow-low-disk")
        file = str(self.file_path.absolute())
        commands = [Command(arguments=("sweep", file, "--cell", cell.name, *where), launcher=sweep.job.launcher)]
        if evaluate is not None:
            commands.append(Command(arguments=("evaluate", str(run), *evaluate)))
        return Job(
            name=cell.name,
            commands=tuple(commands),
            log_path=folder / "logs" / f"{cell.name}.log",
            folder=Path.cwd(),
            locked=(run, RunFolder(path=run).evaluation_path),
            environment=thread_variables(threads),
        )


def _summary_sha256(run: RunFolder) -> str | None:
    """Return what pins the last evaluation of a run; None where there is none."""
    path = run.evaluation_path / SUMMARY
    return file_sha256(path) if path.is_file() else None


def metric_rows(states: Sequence[CellState]) -> list[dict[str, object]]:
    """Return a row for each evaluated checkpoint of each cell: name, status, grid values, step, metrics.

    Numbers of a cell that is not completed may be of an evaluation that was asked for before.
    """
    rows: list[dict[str, object]] = []
    for state in states:
        for step, metrics in checkpoint_metrics(state.run):
            flat = {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}
            rows.append({"cell": state.cell.name, "status": state.status, **state.cell.shown, "step": step, **flat})
    return rows


def checkpoint_metrics(run: RunFolder) -> list[tuple[int, Mapping[str, object]]]:
    """Return the metrics of each evaluated checkpoint of a run, by step; nothing where there are none."""
    summary = read_summary(run) or {}
    entries = summary.get("checkpoints")
    found = []
    for entry in entries if isinstance(entries, list) else []:
        step, metrics = (entry.get("step"), entry.get("metrics")) if isinstance(entry, dict) else (None, None)
        if type(step) is int and isinstance(metrics, dict):
            found.append((step, metrics))
    return sorted(found, key=lambda pair: pair[0])
