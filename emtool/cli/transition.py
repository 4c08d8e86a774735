"""`emtool transition`: when in training a series changes its level."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emtool.cli.inside_view import transition_view
from emtool.cli.options import AsJson, OutputRoot, complete_runs, output_root_of
from emtool.cli.output import data, print_json, say
from emtool.core.config import MAX_SEED
from emtool.core.run_dir import RunFolder, newest_run
from emtool.core.run_series import find_transitions, write_transitions


def transition(
    run_path: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=complete_runs,
            help="Evaluated run; without it, the newest run is taken and named.",
        ),
    ] = None,
    series: Annotated[
        str | None,
        typer.Option(help="Series to show, joined by commas: em_pct,speed. \\[default: all that are there]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the bootstrap and of the test.")] = 0,
    output_root: OutputRoot = None,
    as_json: AsJson = False,
) -> None:
    """Find the saved steps between which each series of a run changes its level, and say where the data show none."""
    run = RunFolder(path=run_path) if run_path is not None else newest_run(output_root_of(output_root))
    names = None if series is None else series.split(",")
    found = find_transitions(run, names, seed=seed)
    write_transitions(run, found)
    if as_json:
        print_json(found.to_dict())
        return
    say(f"transitions of {run.path}")
    data().print(transition_view(found, names))
