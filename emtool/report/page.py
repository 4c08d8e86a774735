"""The page of a report: one file that needs nothing else, and trusts nothing that models wrote."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool import __version__
from emtool.core.em_metrics import JudgedAnswer
from emtool.core.judgement import SCORED, UNSCORED, Judgement
from emtool.report.charts import HEIGHT, QUESTIONS, Drawn, config_of
from emtool.report.curves import CHARTS, TRAINING_LOG
from emtool.report.pictures import vega_lite_version
from emtool.report.report_run import ReportRun

_ASSETS = Path(__file__).parents[1] / "assets" / "report"


@dataclass(frozen=True, kw_only=True)
class _Cell:
    text: str = ""
    interval: str = ""
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class _Table:
    name: str
    headings: Sequence[str]
    rows: Sequence[tuple[int, Sequence[_Cell]]]


def render_page(runs: Sequence[ReportRun], drawn: Sequence[Drawn]) -> str:
    """Return the page: HTML with its styles, scripts, charts and answers inside.

    Whatever comes from files is escaped, or stands as data that no browser takes for markup; the page's policy lets
    only its own scripts run, by their hashes, and nothing load. The same files give the same page.

    Args:
        runs: What was read of the runs.
        drawn: Their charts.
    """
    import vl_convert
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_ASSETS), autoescape=True, undefined=StrictUndefined)
    style, script = ((_ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    vega: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vega_lite_version())
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
        num_answers=f"{len(answers):,}" if answers else "",
        version=__version__,
        chart_data=_data_block(_chart_data(drawn)),
        answer_data=_packed(names, answers) if answers else "",
        style=style,
        vega=vega,
        script=script,
    )


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
    by_step: dict[int, dict[str, _Cell]] = {}
    for name in names:
        for point in run.curves[name]:
            interval = "" if point.low is None else f"[{point.low:.4g}, {point.high:.4g}]"
            cell = _Cell(text=f"{point.value:.4g}", interval=interval, value=repr(point.value))
            by_step.setdefault(point.step, {})[name] = cell
    rows = [(step, [cells.get(name, _Cell()) for name in names]) for step, cells in sorted(by_step.items())]
    return _Table(name=run.name, headings=[CHARTS[name].title for name in names], rows=rows)


def _packed(names: Sequence[str], answers: Sequence[tuple[int, JudgedAnswer]]) -> str:
    """Return the answers as gzip in base64: JSON of arrays, questions and their texts by number."""
    questions: dict[str, int] = {}
    asked: dict[str, int] = {}
    rows = []
    # Answers to one question resemble each other: side by side they become smaller.
    for index, answer in sorted(answers, key=lambda one: (one[1].question_id, one[1].pair, one[0], one[1].step or 0)):
        rows.append(
            [
                index,
                answer.step or 0,
                questions.setdefault(answer.question_id, len(questions)),
                answer.pair[1],
                asked.setdefault(answer.question, len(asked)),
                _score(answer.aligned),
                _score(answer.coherent),
                answer.response,
            ]
        )
    rows.sort(key=lambda row: (row[0], row[1]))
    value = {"runs": list(names), "questions": list(questions), "asked": list(asked), "answers": rows}
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Without the time of writing: the same answers give the same page.
    packed = gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode("ascii")


def _score(judgement: Judgement) -> float | str:
    if judgement.status == SCORED and judgement.score is not None:
        return round(judgement.score, 2)
    return "" if judgement.status == UNSCORED else judgement.status
