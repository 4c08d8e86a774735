"""The charts of a report, as Vega-Lite: the same for the page and for the pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair as alt

from emtool.report.curves import CHARTS, MAX_COLUMNS, MAX_POINTS, TRAINING_LOG, Chart, Point, thinned
from emtool.report.report_run import ReportRun

#: Lines that people with any kind of colour blindness can tell apart, on white and on near black: the first two are of
#: Okabe and Ito 2008 (Color Universal Design), each further one as far from those before as can be, in CIE L*a*b* as
#: seen with and without each deficiency. Dashes and symbols differ as well.
COLOURS = ("#0072B2", "#D55E00", "#A64DFF", "#CE7E8E", "#E60045", "#FF33EB", "#A63F73", "#009E73")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [4, 2], [3, 5], [1, 3])
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right")

#: More lines than that cannot be told apart.
MAX_RUNS = len(COLOURS)

#: Checkpoints of a run with symbols of full size.
MAX_SYMBOLS = 60

#: Name of the heat maps among charts and pictures.
QUESTIONS = "questions"

HEIGHT = 240


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A chart that is drawn.

    Attributes:
        name: What names it in the page, and its picture.
        title: What it shows.
        notes: What a reader must know: n, interval, judge, what is marked.
        spec: Vega-Lite, without size and colours of the page.
    """

    name: str
    title: str
    notes: Sequence[str]
    spec: Mapping[str, Any]


def draw_charts(runs: Sequence[ReportRun]) -> list[Drawn]:
    """Return every chart that one of the runs has data for, all over the same steps."""
    last = max((point.step for run in runs for points in run.curves.values() for point in points), default=0)
    drawn = [
        Drawn(
            name=name,
            title=chart.title,
            notes=_notes(name, chart, runs),
            spec=_curve_chart(name, chart, runs, last=max(last, 1)),
        )
        for name, chart in CHARTS.items()
        if any(name in run.curves for run in runs)
    ]
    maps = [_heat_map(run, alone=len(runs) == 1) for run in runs if run.rates]
    return drawn + _with_names_of_their_own(maps)


def _with_names_of_their_own(maps: Sequence[Drawn]) -> list[Drawn]:
    """Return charts that no two have one name: names of runs can differ in letters that a file's name does not take."""
    names = [chart.name for chart in maps]
    return [
        chart if names.count(chart.name) == 1 else replace(chart, name=f"{chart.name}-{number}")
        for number, chart in enumerate(maps, start=1)
    ]


def _curve_chart(name: str, chart: Chart, runs: Sequence[ReportRun], *, last: int) -> dict[str, Any]:
    """Return the runs' curves, each with its interval, its checkpoints and the bracket of its change."""
    names = [run.name for run in runs]
    legend = alt.Legend(title=None, orient="top", columns=1, labelLimit=250, symbolOpacity=1) if len(runs) > 1 else None
    colour = alt.Color("run:N", scale=alt.Scale(domain=names, range=list(COLOURS[: len(runs)])), legend=legend)
    dash = alt.StrokeDash("run:N", scale=alt.Scale(domain=names, range=list(_DASHES[: len(runs)])), legend=legend)
    shape = alt.Shape("run:N", scale=alt.Scale(domain=names, range=list(_SHAPES[: len(runs)])), legend=legend)
    axis = alt.Axis(tickCount=10, format=",d", labelFlush=False)
    step = alt.X("step:Q", title="optimizer step", scale=alt.Scale(domain=[0, last], nice=False), axis=axis)
    value = alt.Y("value:Q", title=chart.unit, scale=alt.Scale(zero=False))
    saved = {run.name: frozenset(run.saved_steps) for run in runs}
    rows = [
        {
            "run": run.name,
            "step": point.step,
            "value": point.value,
            **({} if point.low is None else {"low": point.low, "high": point.high}),
            **({} if point.n is None else {"n": point.n}),
            **({} if point.control is None else {"least": point.control[0], "most": point.control[1]}),
            "is_saved": chart.source != TRAINING_LOG or point.step in saved[run.name],
        }
        for run in runs
        for point in _drawn_points(name, chart, run)
    ]
    rows += [{"run": run.name, "step": step} for run in runs for step in run.gaps.get(name, ())[:MAX_POINTS]]
    curves = alt.Chart()
    # Bands of many runs lie above one another.
    fade = max(1.0, len(runs) / 2) ** 0.5
    layers: list[alt.Chart] = _brackets(name, runs, colour, fade=fade)
    if any("least" in row for row in rows):
        controls = curves.transform_filter("isValid(datum.least)")
        ends = [alt.Y(f"{end}:Q", title=chart.unit) for end in ("least", "most")]
        layers.append(controls.mark_area(opacity=0.07 / fade).encode(x=step, y=ends[0], y2="most:Q", color=colour))
        edge = controls.mark_line(strokeWidth=1, strokeDash=[1, 3])
        layers += [edge.encode(x=step, y=end, color=colour) for end in ends]
    if any("low" in row for row in rows):
        band = curves.transform_filter("isValid(datum.low)").mark_area(opacity=0.16 / fade)
        layers.append(band.encode(x=step, y=alt.Y("low:Q", title=chart.unit), y2="high:Q", color=colour))
    is_log = chart.source == TRAINING_LOG
    layers.append(
        curves.mark_line(strokeWidth=1 if is_log else 2).encode(x=step, y=value, color=colour, strokeDash=dash)
    )
    # Of many checkpoints the symbols would hide the line.
    num_symbols = max(Counter(row["run"] for row in rows if row.get("is_saved")).values(), default=0)
    points = curves.transform_filter("datum.is_saved && isValid(datum.value)").mark_point(
        filled=True, size=55 if num_symbols <= MAX_SYMBOLS else 8, opacity=1
    )
    layers.append(
        points.encode(x=step, y=value, color=colour, shape=shape, tooltip=_tooltip(rows, several=len(runs) > 1))
    )
    return _layered(layers, rows, description=f"{chart.title}, {chart.unit}, by optimizer step")


def _drawn_points(name: str, chart: Chart, run: ReportRun) -> list[Point]:
    is_log = chart.source == TRAINING_LOG and len(run.saved_steps) <= MAX_POINTS
    return thinned(run.curves.get(name, ()), kept=run.saved_steps if is_log else ())


def _tooltip(rows: Sequence[Mapping[str, Any]], *, several: bool) -> list[alt.Tooltip]:
    fields = [alt.Tooltip("step:Q", format=","), alt.Tooltip("value:Q", format=".4~g")]
    for field, form in (("low", ".4~g"), ("high", ".4~g"), ("least", ".4~g"), ("most", ".4~g"), ("n", ",")):
        if any(field in row for row in rows):
            title = {"least": "shuffled low", "most": "shuffled high"}.get(field, field)
            fields.append(alt.Tooltip(f"{field}:Q", format=form, title=title))
    return [alt.Tooltip("run:N"), *fields] if several else fields


def _brackets(name: str, runs: Sequence[ReportRun], colour: alt.Color, *, fade: float) -> list[alt.Chart]:
    """Return the brackets of the changes as bands, and their intervals as wider, lighter ones."""
    found = [(run.name, run.brackets[name]) for run in runs if name in run.brackets]
    if not found:
        return []
    rows = [{"run": run, "from": one.before, "to": one.after} for run, one in found]
    wide = [{"run": run, "from": one.low, "to": one.high} for run, one in found]
    return [
        alt.Chart(alt.InlineData(values=values))
        .mark_rect(opacity=opacity / fade, clip=True)
        .encode(x=alt.X("from:Q"), x2=alt.X2("to:Q"), color=colour)
        for values, opacity in ((wide, 0.07), (rows, 0.14))
    ]


def _notes(name: str, chart: Chart, runs: Sequence[ReportRun]) -> list[str]:
    """Return what a reader of a chart must know: what is counted, what the bands are, what is left out."""
    points = [point for run in runs for point in run.curves.get(name, ())]
    notes = []
    if counts := [point.n for point in points if point.n is not None]:
        notes.append(f"n = {_spread(counts)} {chart.counted} a checkpoint")
    if chart.interval and any(point.low is not None for point in points):
        notes.append(f"band: {chart.interval}")
    if any(point.control is not None for point in points):
        notes.append(
            "wide, light band: 95% of directions fitted with shuffled labels; what lies within it is no finding"
        )
    if chart.source == TRAINING_LOG:
        notes.append("every optimizer step; symbols: saved checkpoints; no interval, one training")
    elif not chart.interval:
        notes.append("exact, no interval; a diagnostic of the weights, not of behaviour")
    return notes + _notes_of_runs(name, chart, runs, num_points=len(points))


def _notes_of_runs(name: str, chart: Chart, runs: Sequence[ReportRun], *, num_points: int) -> list[str]:
    """Return what a reader must know of the runs in a chart."""
    notes = []
    shown = [run for run in runs if name in run.curves]
    if chart.is_judged and (judges := sorted({run.judge for run in shown if run.judge})):
        notes.append(f"judge: {', '.join(judges)}")
    if chart.control is not None:
        layers = sorted({run.projection_layer for run in shown if run.projection_layer is not None})
        notes.append(f"decoder block {', '.join(map(str, layers))}")
    if any(name in run.brackets for run in runs):
        notes.append("upright band: bracket of the change, lighter its 95% interval")
    if num_left_out := num_points - sum(len(_drawn_points(name, chart, run)) for run in shown):
        notes.append(f"{num_points - num_left_out:,} of {num_points:,} points drawn: least and largest of each part")
    if num_gaps := sum(len(run.gaps.get(name, ())) for run in shown):
        notes.append(f"{num_gaps:,} steps without a finite value: the line is broken there")
    if lacking := [run.name for run in runs if name not in run.curves]:
        notes.append(f"no data: {', '.join(lacking)}")
    return notes


def _spread(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _heat_map(run: ReportRun, *, alone: bool) -> Drawn:
    """Return the EM rate of each question at each checkpoint of a run."""
    rows = [{"step": rate.step, "question": rate.question_id, "em": rate.em_pct, "n": rate.n} for rate in run.rates]
    cells = alt.Chart().encode(
        x=alt.X("step:O", title="optimizer step", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("question:N", title=None, sort=None, axis=alt.Axis(labelLimit=170)),
        tooltip=[
            alt.Tooltip("question:N"),
            alt.Tooltip("step:Q", format=","),
            alt.Tooltip("em:Q", title="EM %", format=".1f"),
            alt.Tooltip("n:Q", title="scored answers", format=","),
        ],
    )
    shades = cells.mark_rect().encode(
        color=alt.Color("em:Q", title="EM %", scale=alt.Scale(domain=[0, 100], scheme="blues"))
    )
    numbers = cells.mark_text(fontSize=10).encode(
        text=alt.Text("em:Q", format=".0f"),
        color=alt.condition("datum.em > 55", alt.value("#ffffff"), alt.value("#1a1a1a")),
    )
    title = "Emergent misalignment by question" + ("" if alone else f", {run.name}")
    counted = _spread([rate.n for rate in run.rates])
    notes = [f"misaligned and coherent answers (%), n = {counted} scored answers a cell, no interval"]
    if run.num_rated_steps > MAX_COLUMNS:
        notes.append(f"{MAX_COLUMNS} of {run.num_rated_steps:,} checkpoints drawn, evenly among them")
    if run.judge:
        notes.append(f"judge: {run.judge}")
    height = max(60, 24 * len({rate.question_id for rate in run.rates}))
    spec = _layered([shades, numbers], rows, height=height, description=title)
    return Drawn(name=f"{QUESTIONS}_{_file_part(run.name)}", title=title, notes=notes, spec=spec)


def _layered(layers: Sequence[alt.Chart], rows: Sequence[Mapping[str, Any]], **properties: Any) -> dict[str, Any]:
    """Return the specification of layers over the same rows, which Altair would copy and check value by value."""
    spec = alt.layer(*layers, data=alt.InlineData(values=[])).properties(**properties).to_dict()
    spec["datasets"][spec["data"]["name"]] = list(rows)
    return spec


def _file_part(name: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)[
        :80
    ]


def config_of(*, ink: str, background: str | None) -> dict[str, Any]:
    """Return Vega-Lite's settings of colours and letters.

    Args:
        ink: Colour of text and axes; "currentColor" follows the page.
        background: Colour behind; None is transparent.
    """
    quiet = {"labelColor": ink, "titleColor": ink, "labelFont": "sans-serif", "titleFont": "sans-serif"}
    axis = {**quiet, "domainColor": ink, "tickColor": ink, "gridColor": ink, "gridOpacity": 0.12, "domainOpacity": 0.5}
    title = {"color": ink, "subtitleColor": ink, "font": "sans-serif", "subtitleFont": "sans-serif", "anchor": "start"}
    return {
        "background": background or "transparent",
        "view": {"stroke": None},
        "axis": {**axis, "titleFontWeight": "normal", "labelOverlap": True},
        "legend": {**quiet, "symbolStrokeWidth": 0},
        "title": {**title, "fontSize": 14, "subtitleFontSize": 11, "subtitlePadding": 4, "offset": 8},
    }
