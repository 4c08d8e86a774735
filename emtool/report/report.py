"""Reports: the page and the pictures of one or several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.run_dir import RunFolder, replace_file
from emtool.report.charts import MAX_RUNS, draw_charts
from emtool.report.page import MADE_BY, render_page
from emtool.report.pictures import draw_pictures
from emtool.report.report_run import MAX_ANSWERS, ReportRun, read_run, shown_text

PAGE, PICTURES = "report.html", "plots"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report that was written.

    Attributes:
        page_path: The page.
        page_bytes: Its size.
        pictures: Files of the pictures.
        runs: What was read of the runs.
    """

    page_path: Path
    page_bytes: int
    pictures: Sequence[Path]
    runs: Sequence[ReportRun]


def write_report(runs: Sequence[RunFolder], folder: Path) -> Report:
    """Write `report.html` and `plots/` of runs, each file whole or not at all.

    Args:
        runs: One or several evaluated runs.
        folder: Where they are written.

    Raises:
        ConfigError: If there are none, more than can be told apart, or one twice, or the folder is taken.
        CheckpointError: If a run has nothing to show, or a file cannot be written.
    """
    if not 1 <= len(runs) <= MAX_RUNS:
        raise ConfigError(f"a report takes 1 to {MAX_RUNS} runs, whose lines can be told apart, not {len(runs)}")
    paths = [run.path.resolve() for run in runs]
    if twice := [run.path for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1]:
        raise ConfigError(f"{twice[0]} is named more than once")
    most = MAX_ANSWERS // len(runs)
    found = [read_run(run, name=name, max_answers=most) for run, name in zip(runs, _names(paths), strict=True)]
    drawn = draw_charts(found)
    page = render_page(found, drawn).encode("utf-8")
    _check_free(folder, runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / PAGE, page)
        pictures = draw_pictures(drawn, folder / PICTURES)
    except OSError as error:
        raise CheckpointError(f"cannot write the report in {folder}: {error.strerror}") from error
    return Report(page_path=folder / PAGE, page_bytes=len(page), pictures=pictures, runs=found)


def _check_free(folder: Path, runs: Sequence[RunFolder]) -> None:
    """Refuse a folder that is another run's, or has a page that no report wrote.

    Raises:
        ConfigError: Says which.
    """
    is_run = RunFolder(path=folder).manifest_path.exists()
    if is_run and folder.resolve() not in [run.path.resolve() for run in runs]:
        raise ConfigError(f"{folder} is another run's folder; choose another with --output")
    page = folder / PAGE
    if page.is_file() and MADE_BY.encode() not in page.read_bytes():
        raise ConfigError(f"{page} was not made by emtool; it is not overwritten, choose another folder with --output")


def _names(paths: Sequence[Path]) -> list[str]:
    """Return what names each run: its folder's name, with as much of the path before it as tells equal ones apart."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        common = Path(os.path.commonpath(paths))
        names = [path.relative_to(common).as_posix() for path in paths]
    shown = [shown_text(name) for name in names]
    # Names can still look alike: long ones are cut, and marks that cannot be shown are left out.
    return [name if shown.count(name) == 1 else f"{index}: {name}" for index, name in enumerate(shown, start=1)]
