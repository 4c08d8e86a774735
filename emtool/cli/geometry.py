"""`emtool geometry`: how the adapter moved, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emtool.cli.inside_view import geometry_view
from emtool.cli.options import AsJson, OutputRoot, Steps, complete_runs, output_root_of
from emtool.cli.output import data, print_json, quiet_libraries, say
from emtool.core.evaluation_files import GEOMETRY_TABLE, LAYER_TABLE
from emtool.core.run_dir import RunFolder, newest_run


def geometry(
    run_path: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=complete_runs,
            help="Run folder; without it, the newest run is taken and named.",
        ),
    ] = None,
    steps: Steps = None,
    output_root: OutputRoot = None,
    as_json: AsJson = False,
) -> None:
    """Show how a run's adapter moved: norms, speed, turns, subspaces. No model is loaded."""
    run = RunFolder(path=run_path) if run_path is not None else newest_run(output_root_of(output_root))
    say(f"adapter of {run.path}")
    quiet_libraries()
    from emtool.engines.run_geometry import run_geometry

    result = run_geometry(run, steps=steps)
    if as_json:
        print_json(result.to_dict())
        return
    data().print(geometry_view(result.geometry))
    say(f"written to {run.evaluation_path}: {GEOMETRY_TABLE}, {LAYER_TABLE}")
