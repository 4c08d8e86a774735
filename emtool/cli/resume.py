"""`emtool resume`: go on with a run that stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from emtool.cli.fetching import fetch_before_run
from emtool.cli.options import complete_runs
from emtool.cli.output import say
from emtool.cli.train import make_plan, start
from emtool.core.config import TrainConfig, check_can_start
from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.hardware import cuda_device_count
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import tidy_completed


def resume(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", autocompletion=complete_runs, help="Run folder.")],
    allow_low_disk: Annotated[
        bool, typer.Option("--allow-low-disk", help="Go on although a save may not fit on the disk.")
    ] = False,
) -> None:
    """Go on with a run from its newest state, with the settings that it began with."""
    run = RunFolder(path=run_path)
    manifest = run.read_manifest()
    if manifest.get("status") == "completed":
        tidy_completed(run)
        say(f"{run.path} is complete; evaluate it with: emtool evaluate {run.path}")
        return
    config = _recorded_config(run, manifest)
    num_cuda_devices = cuda_device_count()
    check_can_start(config, num_cuda_devices=num_cuda_devices)
    plan, rows = make_plan(config, fetch=fetch_before_run(config, num_cuda_devices=num_cuda_devices))
    say(f"going on with {run.path}: {plan.total_steps:,} steps, checkpoints {plan.schedule.source}")
    start(plan, rows, device=config.device, resume=True, check_disk=not allow_low_disk)


def _recorded_config(run: RunFolder, manifest: Mapping[str, object]) -> TrainConfig:
    values, lineage = manifest.get("config"), manifest.get("lineage")
    if not isinstance(values, dict) or not isinstance(lineage, dict):
        raise CheckpointError(f"{run.manifest_path} lacks its configuration or lineage; the run cannot go on")
    try:
        config = TrainConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{run.manifest_path}: {error}") from error
    return replace(
        config,
        dataset=_whole_name(lineage.get("dataset"), config.dataset),
        model=_whole_name(lineage.get("base"), config.model),
        output_root=run.path.absolute().parent,
        output_name=run.path.absolute().name,
    )


def _whole_name(recorded: object, given: str) -> str:
    """Return the whole path of a file or folder that was named from another working folder, else the name as given."""
    name = recorded.get("name") if isinstance(recorded, dict) else None
    return name if isinstance(name, str) and Path(name).is_absolute() else given
