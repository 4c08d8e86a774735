"""The curve of an evaluation, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from emtool.cli.output import one_line
from emtool.cli.render import bar, plain_table, sparkline

if TYPE_CHECKING:
    from emtool.core.metrics import Estimate
    from emtool.engines.evaluation_result import EvaluationResult


def evaluation_view(result: EvaluationResult) -> RenderableType:
    """Return the curve of an evaluation: one line a checkpoint, and a sparkline."""
    domain = result.settings["trained_domain"]
    has_trained = any("p_wrong_trained" in metrics for metrics in result.metrics.values())
    table = plain_table(padding=1)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("p_wrong, other domains", no_wrap=True)
    table.add_column("0 to 1", no_wrap=True)
    table.add_column("change from step 0", no_wrap=True)
    if has_trained:
        table.add_column(escape(one_line(f"p_wrong, {domain}")), no_wrap=True)
    for step, metrics in result.metrics.items():
        other = metrics.get("p_wrong_other")
        shown = bar(other.value, 10) if other is not None else ""
        row = [f"{step:,}", _interval(other), shown, _change(metrics.get("p_wrong_other_delta"))]
        if has_trained:
            row.append(_interval(metrics.get("p_wrong_trained")))
        table.add_row(*row)
    values = [metrics["p_wrong_other"] for metrics in result.metrics.values() if "p_wrong_other" in metrics]
    if not values:
        return Group(table, Text("no checkpoint could be scored", style="yellow"))
    curve = sparkline([estimate.value for estimate in values])
    legend = (
        "p_wrong: probability given to the wrong of two matched answers; [95% interval, bootstrap over items]; "
        f"{values[0].n} items in other domains; * the change excludes 0"
    )
    summary = f"other domains  {curve}  {values[0].value:.3f} to {values[-1].value:.3f}"
    return Group(table, "", Text(summary), Text(legend, style="dim"))


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "unscored"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]".replace("[", r"\[")


def _change(estimate: Estimate | None) -> str:
    if estimate is None:
        return "none"
    mark = "*" if estimate.excludes_zero else " "
    return rf"{estimate.value:+.3f}{mark}\[{estimate.low:+.3f}, {estimate.high:+.3f}]"
