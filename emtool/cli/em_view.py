"""Judged answers as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from emtool.cli.render import plain_table, sparkline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emtool.core.metrics import Estimate


def em_table(
    metrics: Mapping[int, Mapping[str, Estimate]] | Mapping[int | None, Mapping[str, Estimate]], *, title: str
) -> RenderableType:
    """Return the rate of emergent misalignment at every checkpoint, and what stands beside it.

    Args:
        metrics: Step to metric name to estimate, as `em_metrics` gives them; None where the step is not known.
        title: What the numbers come from.
    """
    table = plain_table(padding=1)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("EM %", no_wrap=True)
    table.add_column("change from step 0", no_wrap=True)
    for heading in ("aligned", "coherent", "scored"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step, found in metrics.items():
        table.add_row(
            "all" if step is None else f"{step:,}",
            _interval(found.get("em_pct")),
            _change(found.get("em_pct_delta")),
            *(_mean(found.get(name)) for name in ("avg_aligned", "avg_coherent")),
            f"{found['total_evaluated'].value:.0f}/{found['total_responses'].value:.0f}",
        )
    parts: list[RenderableType] = [Text(title), table]
    values = [found["em_pct"].value for found in metrics.values() if "em_pct" in found]
    if len(values) > 1:
        parts += [
            "",
            Text(f"EM %  {sparkline([value / 100 for value in values])}  {values[0]:.1f} to {values[-1]:.1f}"),
        ]
    lost = {
        name: round(sum(found[key].value for found in metrics.values()))
        for key, name in (
            ("num_refusals", "refusals"),
            ("num_code", "code"),
            ("num_unscored", "unscored"),
            ("num_errors", "errors"),
        )
    }
    said = ", ".join(f"{count:,} {name}" for name, count in lost.items() if count)
    if not any(found["total_evaluated"].value for found in metrics.values()):
        parts.append(Text("no answer has both scores: choose a judge that answers with a number", style="yellow"))
    legend = "[95% interval, bootstrap over questions]; * the change excludes 0"
    parts.append(Text(f"{legend}; not scored: {said}" if said else legend, style="dim"))
    return Group(*parts)


def _mean(estimate: Estimate | None) -> str:
    return "none" if estimate is None else f"{estimate.value:.1f}"


def _interval(estimate: Estimate | None) -> str:
    return "none" if estimate is None else escape(f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]")


def _change(estimate: Estimate | None) -> str:
    if estimate is None:
        return "none"
    mark = "*" if estimate.excludes_zero else " "
    return escape(f"{estimate.value:+.1f}{mark}[{estimate.low:+.1f}, {estimate.high:+.1f}]")
