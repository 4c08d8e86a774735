"""`emtool compare`: runs beside one another, with what tells them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from emtool.cli.options import AsJson, among, complete_runs
from emtool.cli.output import data, one_line, print_json, talk
from emtool.cli.render import plain_table, sparkline
from emtool.core.comparison import METRICS, Comparison, compare_runs, judged_metric
from emtool.core.metrics import Estimate
from emtool.core.run_dir import RunFolder


def compare(
    run_paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", autocompletion=complete_runs, help="Evaluated runs; all are compared with the first."
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            autocompletion=among(METRICS),
            help=f"{', '.join(METRICS)}. \\[default: em_pct where all are judged, else p_wrong_other]",
        ),
    ] = None,
    allow_unlike: Annotated[
        bool, typer.Option("--allow-unlike", help="Compare runs that were evaluated differently, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a metric of runs at every checkpoint: values, and differences from the first run with intervals."""
    found = compare_runs([RunFolder(path=path) for path in run_paths], metric=metric, is_unlike_allowed=allow_unlike)
    if found.unlike:
        warning = f"warning: the runs were evaluated differently: {'; '.join(found.unlike)}"
        talk().print(Text(one_line(warning), style="yellow"), soft_wrap=True)
    if as_json:
        print_json(found.to_dict())
        return
    data().print(comparison_view(found))


def comparison_view(found: Comparison) -> RenderableType:
    """Return a curve for every run, and a table for each further one."""
    letters = [chr(ord("A") + index) if index < 26 else str(index) for index in range(len(found.runs))]
    every = [estimate.value for values in found.values for estimate in values.values()]
    low, high = min(every), max(every)
    parts: list[RenderableType] = [Text(found.metric)]
    for letter, run, values in zip(letters, found.runs, found.values, strict=True):
        heights = [0.5 if high == low else (one.value - low) / (high - low) for _, one in sorted(values.items())]
        # Between the ends of all runs, so that the curves can be compared.
        parts.append(Text(f"{letter}  {sparkline([0.0, *heights, 1.0])[1:-1]}  {one_line(str(run.path))}"))
    is_judged = METRICS[found.metric] is judged_metric
    places = 1 if is_judged else 3
    for index, differences in enumerate(found.differences, start=1):
        table = plain_table(padding=1)
        table.add_column("step", justify="right", no_wrap=True)
        for heading in (letters[0], letters[index], f"{letters[index]} - {letters[0]}"):
            table.add_column(heading, no_wrap=True)
        table.add_column("pairs", justify="right", no_wrap=True)
        for step in sorted(found.values[0].keys() | found.values[index].keys()):
            cells = [_value(found.values[place].get(step), places) for place in (0, index)]
            difference = differences.get(step)
            pairs = "" if difference is None else f"{difference.n:,}"
            table.add_row(f"{step:,}", *map(Text, cells), Text(_difference(difference, places + 1)), pairs)
        parts += ["", table]
    legend = (
        f"[95% interval, bootstrap over {'questions' if is_judged else 'items'}]; differences are over pairs; * the "
        "interval excludes 0"
    )
    return Group(*parts, "", Text(legend, style="dim"))


def _value(estimate: Estimate | None, places: int) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.{places}f} [{estimate.low:.{places}f}, {estimate.high:.{places}f}]"


def _difference(estimate: Estimate | None, places: int) -> str:
    if estimate is None:
        return ""
    mark = "*" if estimate.excludes_zero else " "
    return f"{estimate.value:+.{places}f}{mark}[{estimate.low:+.{places}f}, {estimate.high:+.{places}f}]"
