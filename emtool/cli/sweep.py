"""`emtool sweep`: a grid of runs, trained and evaluated, one table and one report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from emtool.cli.arguments import as_arguments
from emtool.cli.fetching import fetch_before_run
from emtool.cli.options import AsJson, OutputRoot, output_root_of
from emtool.cli.output import data, print_json, progress, say
from emtool.cli.sweep_view import plan_view, result_view
from emtool.cli.train import make_plan, start
from emtool.cli.workers import Address, Workers, check_workers, make_pool, refuse_numbered_device, threads_of
from emtool.core.adapter import select_blocks
from emtool.core.config import check_can_start
from emtool.core.csv_text import csv_text
from emtool.core.data import file_sha256
from emtool.core.disk import format_bytes
from emtool.core.errors import (
    CheckpointError,
    ConfigError,
    DiskSpaceError,
    EmtoolError,
    PointedError,
)
from emtool.core.evaluation_request import EvaluationRequest, read_request, with_settings
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished
from emtool.core.finished import changed_contents, changed_settings
from emtool.core.hardware import cuda_device_count
from emtool.core.interrupts import repeatable
from emtool.core.jobs import Job, JobListener, JobOutcome, Pool, command_path
from emtool.core.judge_prices import price_of, unknown_price
from emtool.core.record_file import settings_id
from emtool.core.run_dir import replace_file
from emtool.core.run_lock import locked_sweep
from emtool.core.run_plan import RunPlan
from emtool.core.server_address import JUDGE_KEY_VARIABLE, read_key
from emtool.core.settings import Settings, file_layers
from emtool.core.steps import select_steps
from emtool.core.sweep import Cell, Sweep, read_sweep
from emtool.core.sweep_folder import CellState, SweepFolder, metric_rows

#: Options of `emtool evaluate` that belong to the sweep, or to no evaluation of a cell.
_NOT_IN_SWEEPS = (
    "run_path",
    "workers",
    "address",
    "output_root",
    "watch",
    "dry_run",
    "as_json",
    "base_model",
    "shard",
)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="What to vary: see docs/sweeps.md.")],
    output_root: OutputRoot = None,
    output_name: Annotated[str | None, typer.Option(help="Name of the sweep's folder. \\[default: the file's]")] = None,
    workers: Workers = None,
    address: Address = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Begin failed cells again.")] = False,
    allow_low_disk: Annotated[
        bool, typer.Option("--allow-low-disk", help="Start although the runs may not fit on the disk.")
    ] = False,
    cell: Annotated[
        str | None, typer.Option(help="Train this cell alone, in this process: for launchers and schedulers.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cells and what they take, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate every combination of a grid; what is finished is skipped, what was stopped goes on."""
    asked = read_sweep(file)
    folder = SweepFolder(path=output_root_of(output_root) / _name(output_name, file))
    if cell is not None:
        if dry_run or as_json or retry_failed or workers is not None or address is not None:
            raise ConfigError(
                "--cell trains one cell here: only --output-root, --output-name, --allow-low-disk go with it"
            )
        _train_cell(asked, asked.cell(cell), folder, check_disk=not allow_low_disk)
        return
    check_workers(workers, address)
    threads = threads_of(workers, address)
    evaluate = None if asked.evaluate is None else _evaluate_arguments(asked)
    request = None if evaluate is None else _request(evaluate, asked, folder, is_on_ray=workers is not None)
    _check_launcher(asked, is_elsewhere=address is not None)
    evaluation = None if request is None else _evaluation_id(asked, request)
    states = folder.states(asked, evaluation=evaluation)
    num_due = sum(_is_due(state, retry_failed=retry_failed) for state in states)
    _check_judges(request if num_due and address is None and not dry_run else None)
    plans = _plans(asked, folder, fetches=not dry_run, is_on_ray=workers is not None, is_elsewhere=address is not None)
    if request is not None:
        _check_evaluation_fits(asked, request, plans)
    view = plan_view(states, plans, launcher=asked.job.launcher, request=request, num_due=num_due)
    if dry_run:
        if as_json:
            print_json({"folder": str(folder.path), "cells": _as_json(states, plans)})
        else:
            data().print(view)
        return
    if not as_json:
        data().print(view)
    _check_unchanged(states, plans)
    if not allow_low_disk:
        _check_fits(states, plans, workers or 1)
    num_gpus = asked.job.num_gpus
    if num_gpus is None:
        num_gpus = float(any(plan.config.device == "cuda" for plan in plans))
    pool = make_pool(workers, address, num_cpus=asked.job.num_cpus, num_gpus=num_gpus)
    states, pages = _run(
        asked,
        folder,
        pool,
        evaluation=evaluation,
        is_due=partial(_is_due, retry_failed=retry_failed),
        job_of=partial(folder.job, asked, evaluate=evaluate, threads=threads, allow_low_disk=allow_low_disk),
    )
    if as_json:
        print_json({"folder": str(folder.path), "cells": _as_json(states, plans), "reports": list(map(str, pages))})
    else:
        data().print(result_view(states))
        say("\n".join(f"written: {path}" for path in (folder.table_path, *pages)))
    _fail_with(states, file)


def _run(
    asked: Sweep,
    folder: SweepFolder,
    pool: Pool,
    *,
    evaluation: str | None,
    is_due: Callable[[CellState], bool],
    job_of: Callable[[Cell], Job],
) -> tuple[list[CellState], list[Path]]:
    """Run the cells that are due, write the table and the reports, and return how the cells stand, and the pages."""
    folder.create()
    with locked_sweep(folder.path):
        folder.keep_file(asked)
        jobs = [job_of(state.cell) for state in folder.states(asked, evaluation=evaluation) if is_due(state)]
        with repeatable(), progress() as on_event:
            if jobs:
                outcomes = _Outcomes(folder, evaluation=evaluation, num_jobs=len(jobs), on_event=on_event)
                pool.run(jobs, JobListener(on_outcome=outcomes, on_begin=folder.begin, on_event=on_event))
        states = folder.states(asked, evaluation=evaluation)
        _write_table(folder, states)
        return states, _write_reports(folder, states)


def _name(given: str | None, file: Path) -> str:
    name = given or file.stem
    if Path(name).name != name or name in ("", ".", ".."):
        raise ConfigError(f"--output-name {name!r} is not one folder name")
    return name


def _is_due(state: CellState, *, retry_failed: bool) -> bool:
    return state.status in ("begun", "waiting") or (state.status == "failed" and retry_failed)


def _train_cell(asked: Sweep, cell: Cell, folder: SweepFolder, *, check_disk: bool) -> None:
    num_cuda_devices = cuda_device_count()
    settings = _settings(asked, cell, folder, num_cuda_devices)
    check_can_start(settings.config, num_cuda_devices=num_cuda_devices)
    plan, rows = make_plan(settings.config, fetch=fetch_before_run(settings.config, num_cuda_devices=num_cuda_devices))
    start(plan, rows, device=settings.device_option, resume=True, check_disk=check_disk)


def _plans(asked: Sweep, folder: SweepFolder, *, fetches: bool, is_on_ray: bool, is_elsewhere: bool) -> list[RunPlan]:
    """Return the plan of every cell; what no cell could start with is found here.

    Raises:
        EmtoolError: Names the cell.
    """
    num_cuda_devices, plans = cuda_device_count(), []
    for cell in asked.cells:
        try:
            settings = _settings(asked, cell, folder, num_cuda_devices)
            config = settings.config
            if is_elsewhere and config.profile_reason.startswith("auto"):
                raise ConfigError("name the profile in [train]: auto is another one where there are other devices")
            if is_elsewhere and settings.device_option == "auto":
                raise ConfigError("name the device in [train], cuda or cpu: auto is another one on other machines")
            if is_on_ray:
                refuse_numbered_device(settings.device_option, option="device")
            if fetches and not is_elsewhere:
                check_can_start(config, num_cuda_devices=num_cuda_devices)
            fetch = fetch_before_run(config, num_cuda_devices=num_cuda_devices) if fetches else None
            plans.append(make_plan(config, fetch=fetch)[0])
        except PointedError:
            raise
        except EmtoolError as error:
            raise type(error)(f"cell {cell.name}: {error}") from error
    return plans


def _settings(asked: Sweep, cell: Cell, folder: SweepFolder, num_cuda_devices: int) -> Settings:
    return asked.settings(cell, folder.path, layers=file_layers(), num_cuda_devices=num_cuda_devices)


def _evaluate_arguments(asked: Sweep) -> list[str]:
    """Return the options of every evaluation."""
    assert asked.evaluate is not None
    where = f"{asked.path}: [evaluate]"
    for name in _NOT_IN_SWEEPS:
        if name in asked.evaluate:
            raise ConfigError(f"{where} {name} does not go with a sweep")
    return as_arguments(_evaluate_command(), asked.evaluate, where=where, without=_NOT_IN_SWEEPS)


def _request(arguments: Sequence[str], asked: Sweep, folder: SweepFolder, *, is_on_ray: bool) -> EvaluationRequest:
    """Return the evaluation of a cell, checked as `emtool evaluate` checks it.

    Raises:
        ConfigError: If a value is not allowed.
    """
    try:
        context = _evaluate_command().make_context("evaluate", list(arguments))
        request = read_request(folder.run_of(asked.cells[0]), context.params)
        if is_on_ray:
            refuse_numbered_device(request.device_option, option="--device")
        if request.questions_url is None:
            request.read_questions()
        for judge in request.remote_judges:
            if price_of(judge.model, request.judge_address, given=request.judge_price) is None:
                raise unknown_price(f"what {judge.kind}:{judge.model} costs", option="judge_price = 'IN,OUT'")
    except typer.TyperException as error:
        raise ConfigError(f"{asked.path}: [evaluate]: {error.format_message()}") from error
    except EmtoolError as error:
        raise type(error)(f"{asked.path}: [evaluate]: {error}") from error
    return request


def _evaluation_id(asked: Sweep, request: EvaluationRequest) -> str:
    """Return what names the evaluation of every cell: its options, and the contents of the files that they name."""
    files = {str(path): file_sha256(path) for path in request.file_paths}
    return settings_id({"options": with_settings(asked.evaluate or {}), "files": files})


def _check_judges(request: EvaluationRequest | None) -> None:
    """Refuse judges that cannot be asked from this machine; None asks nobody.

    Raises:
        ConfigError: If a key is not set.
        MissingDependencyError: If a package is not installed.
    """
    if request is not None and request.remote_judges:
        read_key(request.judge_address, variable=JUDGE_KEY_VARIABLE, environment=os.environ)
        from emtool.engines.openai_client import import_openai

        import_openai()


def _evaluate_command() -> Any:
    from emtool.cli.app import load_command

    return load_command("evaluate")


def _check_launcher(asked: Sweep, *, is_elsewhere: bool) -> None:
    """Refuse a launcher that is not installed; on other machines it is looked for when a job starts.

    Raises:
        ConfigError: Names it.
    """
    if not asked.job.launcher or is_elsewhere:
        return
    command = asked.job.launcher[0]
    if shutil.which(command, path=command_path()) is None:
        raise ConfigError(f"{asked.path}: [job] launcher: there is no command {command!r} on this machine")


def _check_evaluation_fits(asked: Sweep, request: EvaluationRequest, plans: Sequence[RunPlan]) -> None:
    """Refuse steps that a cell will not save, and decoder blocks that its model lacks, as far as both are known.

    Raises:
        ConfigError: Names the cell.
    """
    layers = request.config.activation_layers
    for cell, plan in zip(asked.cells, plans, strict=True):
        try:
            # What a launcher's processes save is known when they run.
            if request.steps is not None and not asked.job.launcher:
                select_steps(request.steps, plan.schedule.planned_steps)
            if layers is not None and plan.num_blocks is not None:
                select_blocks(layers, plan.num_blocks, option="activation_layers")
        except EmtoolError as error:
            raise ConfigError(f"cell {cell.name}: {asked.path}, [evaluate]: {error}") from error


def _check_unchanged(states: Sequence[CellState], plans: Sequence[RunPlan]) -> None:
    """Refuse a sweep whose cells are there with other settings: their results would stand under the new ones.

    Raises:
        CheckpointError: Names the first of them.
    """
    hashes: dict[Path, str] = {}
    for state, plan in zip(states, plans, strict=True):
        if not state.run.manifest_path.exists():
            continue
        manifest, path = state.run.read_manifest(), plan.dataset.path
        changes = changed_settings(manifest, plan)
        if path is not None:
            # Cells have few datasets among them.
            hashes[path] = hashes.get(path) or file_sha256(path)
            changes += changed_contents(manifest, plan, hashes[path])
        if changes:
            raise CheckpointError(
                f"{state.run.path} holds a run of another configuration: {'; '.join(changes)}; choose another "
                "--output-name for the sweep, or remove the run"
            )


def _check_fits(states: Sequence[CellState], plans: Sequence[RunPlan], workers: int) -> None:
    """Refuse a sweep whose runs do not fit in the free space.

    Raises:
        DiskSpaceError: Says by how much.
    """
    due = [plan for state, plan in zip(states, plans, strict=True) if state.status == "waiting"]
    known = [(plan.total_bytes or 0, plan.peak_bytes or 0) for plan in due]
    needed = sum(total for total, _ in known) + workers * max((peak - total for total, peak in known), default=0)
    if due and needed > due[0].free_bytes:
        raise DiskSpaceError(
            f"{len(due)} runs need {format_bytes(needed)} and {due[0].output_path.parent} has "
            f"{format_bytes(due[0].free_bytes)} free; --output-root takes a folder on another disk; "
            "--allow-low-disk starts all the same"
        )


class _Outcomes:
    """Records how each job ended, and says so."""

    def __init__(self, folder: SweepFolder, *, evaluation: str | None, num_jobs: int, on_event: EventSink) -> None:
        self._folder = folder
        self._evaluation = evaluation
        self._on_event = on_event
        self._done = 0
        also = "" if evaluation is None else " and evaluate"
        on_event(PhaseStarted(name=f"cells: {num_jobs} to train{also}", total=num_jobs))

    def __call__(self, outcome: JobOutcome) -> None:
        self._folder.keep(outcome, evaluation=self._evaluation)
        self._done += 1
        said = f"{outcome.name}: done" if outcome.problem is None else f"{outcome.name}: {outcome.problem}"
        self._on_event(Notice(text=said, is_warning=outcome.problem is not None))
        self._on_event(StepFinished(step=self._done))


def _as_json(states: Sequence[CellState], plans: Sequence[RunPlan]) -> list[dict[str, object]]:
    return [
        {**state.to_dict(), "run": str(state.run.path), "plan": plan.to_dict()}
        for state, plan in zip(states, plans, strict=True)
    ]


def _write_table(folder: SweepFolder, states: Sequence[CellState]) -> None:
    try:
        replace_file(folder.table_path, csv_text(metric_rows(states)).encode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder.table_path}: {error.strerror}") from error


def _write_reports(folder: SweepFolder, states: Sequence[CellState]) -> list[Path]:
    """Write the report of the evaluated cells, as many on a page as can be told apart."""
    runs = [state.run for state in states if state.status == "completed"]
    if not runs:
        return []
    from emtool.report.charts import MAX_RUNS
    from emtool.report.report import write_report

    parts = [runs[begin : begin + MAX_RUNS] for begin in range(0, len(runs), MAX_RUNS)]
    if len(parts) == 1:
        return [write_report(runs, folder.path).page_path]
    return [
        write_report(part, folder.path / f"report-{number}").page_path for number, part in enumerate(parts, start=1)
    ]


def _fail_with(states: Sequence[CellState], file: Path) -> None:
    failed = [state for state in states if state.status == "failed"]
    stopped = [state.cell.name for state in states if state.status in ("begun", "waiting")]
    if stopped and not failed:
        raise CheckpointError(f"{len(stopped)} of {len(states)} cells were stopped; go on with: emtool sweep {file}")
    if failed:
        names = ", ".join(state.cell.name for state in failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise CheckpointError(
            f"{len(failed)} of {len(states)} cells failed: {names}; begin them again with: emtool sweep {file} "
            "--retry-failed"
        )
