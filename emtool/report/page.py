"""The page of a report: one file that needs nothing else, and trusts nothing that models wrote."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from emtool import __version__
from emtool.core.cache import cache_path
from emtool.core.run_dir import replace_file
from emtool.report.charts import HEIGHT, QUESTIONS, Drawn, config_of
from emtool.report.curves import CHARTS, TRAINING_LOG, Point
from emtool.report.packing import pack_answers
from emtool.report.pictures import vega_lite_version
from emtool.report.report_run import ReportRun

#: What tells a page of emtool's from others.
MADE_BY = "Made by emtool"

_ASSETS = Path(__file__).parents[1] / "assets" / "report"


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table of numbers.

    Attributes:
        name: The run.
        headings: Of its columns.
        rows: Its rows as HTML.
    """

    name: str
    headings: Sequence[str]
    rows: Markup


def render_page(runs: Sequence[ReportRun], drawn: Sequence[Drawn]) -> str:
    """Return the page: HTML with its styles, scripts, charts and answers inside.

    Whatever comes from files is escaped, or stands as data that no browser takes for markup; the page's policy lets
    only its own scripts run, by their hashes, and nothing load. The same files give the same page.

    Args:
        runs: What was read of the runs.
        drawn: Their charts.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_ASSETS), autoescape=True, undefined=StrictUndefined)
    style, script = ((_ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    vega = _vega()
    assert not any(mark in code for code in (vega, script) for mark in ("</script", "<!--", "\r", "\0"))
    names = [run.name for run in runs]
    answers = [(index, answer) for index, run in enumerate(runs) for answer in run.answers]
    return environment.get_template("page.html").render(
        title=" and ".join(names) if len(names) < 3 else f"{len(names)} runs",
        policy=_policy(scripts=[vega, script], style=style),
        runs=runs,
        facts=_facts(runs),
        charts=[chart for chart in drawn if not chart.name.startswith(QUESTIONS)],
        heat_maps=[chart for chart in drawn if chart.name.startswith(QUESTIONS)],
        tables=[_numbers(run) for run in runs],
        num_answers=f"{len(answers):,}",
        left_out=[(run.name, len(run.answers), run.num_answers) for run in runs if len(run.answers) < run.num_answers],
        made_by=f"{MADE_BY} {__version__}",
        chart_data=_data_block(_chart_data(drawn)),
        packed=pack_answers(names, answers) if answers else None,
        style=style,
        vega=vega,
        script=script,
    )


@cache
def _vega() -> str:
    """Return Vega-Embed with all that it needs, as one script.

    Making it takes seconds, and of one version of vl-convert it is always the same: it is kept in emtool's cache.
    """
    import vl_convert

    kept = cache_path("vega", f"vega-embed-{version('vl-convert-python')}-{vega_lite_version()}.js")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return kept.read_bytes().decode("utf-8")
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vega_lite_version())
    # Without a place to keep it, it is made each time.
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Several reports may be made at once.
        own = kept.with_name(f"{kept.name}.{os.getpid()}")
        replace_file(own, bundle.encode("utf-8"))
        own.replace(kept)
    return bundle


def _policy(*, scripts: Sequence[str], style: str) -> str:
    """Return the page's Content-Security-Policy: its own scripts and styles by their hashes, and nothing else."""
    hashes = " ".join(_source_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_source_hash(style)}; base-uri 'none'; form-action 'none'"
    )


def _source_hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def _data_block(value: object) -> str:
    """Return JSON that can stand in a script element, whatever texts are in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _chart_data(drawn: Sequence[Drawn]) -> dict[str, Any]:
    charts = [{"name": chart.name, "spec": {"height": HEIGHT, **chart.spec, "width": "container"}} for chart in drawn]
    return {"config": config_of(ink="currentColor", background=None), "charts": charts}


def _facts(runs: Sequence[ReportRun]) -> list[tuple[str, list[str]]]:
    """Return each fact with its value of every run; what a run does not say is empty."""
    words = dict.fromkeys(word for run in runs for word, _ in run.facts)
    by_run = [dict(run.facts) for run in runs]
    return [(word, [facts.get(word, "") for facts in by_run]) for word in words]


def _numbers(run: ReportRun) -> _Table:
    """Return the curves of a run as a table, a row a checkpoint; the training log is far longer, and left out."""
    names = [name for name, chart in CHARTS.items() if name in run.curves and chart.source != TRAINING_LOG]
    by_step: dict[int, dict[str, str]] = {}
    for name in names:
        for point in run.curves[name]:
            by_step.setdefault(point.step, {})[name] = _cell(point)
    empty = '<td data-value=""></td>'
    rows = (
        f'<tr><th scope="row">{step}</th>{"".join(cells.get(name, empty) for name in names)}</tr>'
        for step, cells in sorted(by_step.items())
    )
    html = Markup("\n".join(rows))  # noqa: S704 - of numbers alone
    return _Table(name=run.name, headings=[CHARTS[name].title for name in names], rows=html)


def _cell(point: Point) -> str:
    """Return a point of a curve as HTML, made here: there may be ten thousand rows, and numbers need no escaping."""
    interval = "" if point.low is None else f' <span class="interval">[{point.low:.4g}, {point.high:.4g}]</span>'
    return f'<td data-value="{point.value!r}">{point.value:.4g}{interval}</td>'
