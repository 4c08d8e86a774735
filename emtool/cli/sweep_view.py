"""A sweep as text: its cells before, its results after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from emtool.cli.output import one_line
from emtool.cli.render import plain_table, shorten
from emtool.core.disk import format_bytes
from emtool.core.evaluation_files import value_of
from emtool.core.evaluation_request import EvaluationRequest
from emtool.core.run_plan import RunPlan
from emtool.core.sweep_folder import CellState, checkpoint_metrics

#: What is shown of an evaluated cell: the first of these that every one of them has, else the first that one has.
SHOWN_METRICS = ("em_pct", "p_wrong_other", "p_wrong", "answer_words")


def plan_view(
    states: Sequence[CellState],
    plans: Sequence[RunPlan],
    *,
    launcher: Sequence[str] = (),
    request: EvaluationRequest | None = None,
    num_due: int = 0,
) -> RenderableType:
    """Return the cells, how far each is, and what they take.

    Args:
        states: The cells.
        plans: Their plans.
        launcher: What starts the training of each.
        request: How each is evaluated; None where it is not.
        num_due: How many are trained or evaluated now.
    """
    table = plain_table()
    for heading in ("cell", "status"):
        table.add_column(heading, overflow="fold")
    for heading in ("steps", "checkpoints", "disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [
        (
            state.cell.name,
            state.status,
            f"{plan.total_steps:,}",
            f"{plan.num_checkpoints:,}",
            "unknown" if plan.total_bytes is None else format_bytes(plan.total_bytes),
        )
        for state, plan in zip(states, plans, strict=True)
    ]
    for row in shorten(rows):
        table.add_row(*map(Text, row))
    known = [plan.total_bytes for plan in plans if plan.total_bytes is not None]
    total = f"{format_bytes(sum(known))} in all" if len(known) == len(plans) else "of unknown size"
    facts = f"{len(plans):,} {'run' if len(plans) == 1 else 'runs'} in {plans[0].output_path.parent}, {total}, "
    facts += f"{format_bytes(plans[0].free_bytes)} free"
    failed = sum(state.status == "failed" for state in states)
    notes = [Text(f"{failed} failed: --retry-failed begins them again", style="yellow")] if failed else []
    if request is not None and request.remote_judges and not request.judge_address.is_local:
        most = f"{request.max_cost:g} USD a cell, {num_due * request.max_cost:g} USD in all ([evaluate] max_cost)"
        notes.append(Text(f"judging may cost at most {most}", style="yellow"))
    if launcher:
        text = f"started by {one_line(' '.join(launcher))}: several processes take fewer steps than are counted here"
        notes.append(Text(text, style="dim"))
    return Group(table, "", Text(one_line(facts)), *notes)


def result_view(states: Sequence[CellState]) -> RenderableType:
    """Return how each cell ended, and its first and last value of one metric."""
    found = {state.cell.name: checkpoint_metrics(state.run) for state in states if state.status == "completed"}
    metric = _common_metric([entries for entries in found.values() if entries])
    table = plain_table()
    for heading in ("cell", "status"):
        table.add_column(heading, overflow="fold")
    if metric is not None:
        for heading in ("step", metric, "step ", f"{metric} [95%]"):
            table.add_column(heading, justify="right", no_wrap=True)
    for state in states:
        problem = f"failed: {one_line(state.problem or '')}" if state.status == "failed" else state.status
        cells = _ends(found.get(state.cell.name) or [], metric) if metric is not None else ()
        table.add_row(Text(state.cell.name), Text(problem, style="yellow" if state.problem else ""), *map(Text, cells))
    return table


def _common_metric(every: Sequence[Sequence[tuple[int, Mapping[str, object]]]]) -> str | None:
    known = [{metric for metric in SHOWN_METRICS if _value(entries[-1][1], metric) is not None} for entries in every]
    shared, some = set.intersection(*known) if known else set(), set().union(*known)
    return next((metric for metric in SHOWN_METRICS if metric in (shared or some)), None)


def _ends(entries: Sequence[tuple[int, Mapping[str, object]]], metric: str) -> tuple[str, ...]:
    """Return the first and the last value of a metric, the last with its interval."""
    if not entries:
        return ("", "", "", "")
    (first, before), (last, after) = entries[0], entries[-1]
    places = 1 if metric == "em_pct" else 3

    def shown(metrics: Mapping[str, object], name: str) -> str:
        value = _value(metrics, name)
        return "" if value is None else f"{value:.{places}f}"

    interval = f"{shown(after, metric)} [{shown(after, f'{metric}_low')}, {shown(after, f'{metric}_high')}]"
    return (f"{first:,}", shown(before, metric), f"{last:,}", interval)


def _value(metrics: Mapping[str, object], name: str) -> float | None:
    return value_of(metrics.get(name))
