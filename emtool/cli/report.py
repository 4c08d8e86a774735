"""`emtool report`: curves to look at, answers to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from emtool.cli.options import AsJson, OutputRoot, complete_runs, output_root_of
from emtool.cli.output import data, one_line, print_json, say
from emtool.core.disk import format_bytes
from emtool.core.evaluation_files import SUMMARY
from emtool.core.run_dir import RunFolder, newest_run


def report(
    run_paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=complete_runs,
            help="Evaluated runs; without any, the newest one is taken and named.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder to write to. \\[default: the run's; of several runs, report beside the first]",
        ),
    ] = None,
    output_root: OutputRoot = None,
    as_json: AsJson = False,
) -> None:
    """Write a page with the curves and the answers of runs, report.html, and its charts as pictures, plots/."""
    runs = [RunFolder(path=path) for path in run_paths or ()]
    if not runs:
        runs = [newest_run(output_root_of(output_root), having=f"evaluation/{SUMMARY}")]
        say(f"reporting on {runs[0].path}, the newest evaluated run")
    folder = output or (runs[0].path if len(runs) == 1 else runs[0].path.resolve().parent / "report")
    from emtool.report.report import write_report

    found = write_report(runs, folder)
    if as_json:
        print_json(
            {
                "page": str(found.page_path),
                "bytes": found.page_bytes,
                "pictures": [str(path) for path in found.pictures],
                "answers": {
                    str(run.run.path): {"shown": len(run.answers), "of": run.num_answers} for run in found.runs
                },
                "problems": {str(run.run.path): list(run.problems) for run in found.runs},
            }
        )
        return
    for run in found.runs:
        for problem in run.problems:
            data().print(Text(f"{run.name}: {one_line(problem)}", style="yellow"))
    shown = sum(len(run.answers) for run in found.runs)
    num_answers = sum(run.num_answers for run in found.runs)
    answers = f"{num_answers:,} answers" if shown == num_answers else f"{shown:,} of {num_answers:,} answers"
    what = f"{len(found.pictures) // 3} charts, {answers}, {format_bytes(found.page_bytes)}"
    data().print(Text(f"{found.page_path}: {what}; open it in a browser, it needs no network"))
    data().print(Text(f"{folder / 'plots'}: the charts as SVG, PNG and PDF"))
