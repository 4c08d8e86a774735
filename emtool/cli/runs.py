"""`emtool runs`: the run folders, one line each."""

from __future__ import annotations

from rich.text import Text

from emtool.cli.options import AsJson, OutputRoot, output_root_of
from emtool.cli.output import data, one_line, print_json, say
from emtool.cli.render import plain_table
from emtool.core.disk import format_bytes
from emtool.core.run_list import RunSummary, list_runs


def runs(output_root: OutputRoot = None, as_json: AsJson = False) -> None:
    """List the run folders: name, status, step, checkpoints, size."""
    root = output_root_of(output_root)
    found = list_runs(root)
    if as_json:
        print_json([run.to_dict() for run in found])
    elif found:
        data().print(_table(found))
    else:
        say(f"no runs in {root}; start one with: emtool train --custom-checkpoints")


def _table(found: list[RunSummary]) -> object:
    table = plain_table()
    table.add_column("run", overflow="fold")
    table.add_column("status")
    for heading in ("step", "checkpoints", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in found:
        planned = "" if run.num_planned is None else f" of {run.num_planned:,}"
        total = "" if run.total_steps is None else f" of {run.total_steps:,}"
        table.add_row(
            Text(one_line(run.name)),
            Text(one_line(run.problem or run.status), style="" if run.status == "completed" else "yellow"),
            "none" if run.last_step is None else f"{run.last_step:,}{total}",
            f"{run.num_checkpoints:,}{planned}",
            format_bytes(run.num_bytes),
        )
    return table
