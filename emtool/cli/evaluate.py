"""`emtool evaluate`: score every checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emtool.cli.evaluation_view import evaluation_view
from emtool.cli.options import Device, Dtype, OutputRoot, output_root_of
from emtool.cli.output import data, print_json, progress, quiet_libraries, say
from emtool.core.errors import CheckpointError
from emtool.core.hardware import select_device
from emtool.core.run_dir import RunFolder, newest_run


def evaluate(
    run_path: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Run folder; without it, the newest run is taken and named."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap intervals.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    output_root: OutputRoot = None,
    check_hashes: Annotated[
        bool, typer.Option("--check-hashes", help="Check the contents of every file first; sizes always are.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the summary to stdout as JSON.")] = False,
) -> None:
    """Score every checkpoint of a run: which of two matched answers does it find likelier?"""
    run = RunFolder(path=run_path) if run_path is not None else newest_run(output_root_of(output_root))
    run.read_manifest()
    say(f"evaluating {run.path}")
    used_device = select_device(device or "auto")
    quiet_libraries()
    from emtool.engines.evaluation import evaluate as evaluate_run

    with progress() as on_event:
        result = evaluate_run(
            run,
            seed=seed,
            device=used_device,
            dtype=None if dtype == "auto" else dtype,
            check_hashes=check_hashes,
            on_event=on_event,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        data().print(evaluation_view(result))
        say(f"written to {run.evaluation_path}: checkpoint_summary.csv, summary.json, item_scores.csv")
    if result.damaged:
        steps = ", ".join(map(str, result.damaged))
        raise CheckpointError(
            f"{len(result.damaged)} checkpoint(s) could not be scored: {steps}; see: emtool verify {run.path}"
        )
