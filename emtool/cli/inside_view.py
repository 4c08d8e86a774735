"""What goes on inside: geometry, directions and transitions as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from emtool.cli.output import one_line
from emtool.cli.render import plain_table, sparkline
from emtool.core.run_series import SERIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emtool.core.metrics import Estimate
    from emtool.core.run_series import RunTransitions
    from emtool.core.transition import Transition
    from emtool.engines.adapter_geometry import AdapterGeometry
    from emtool.engines.direction import Direction
    from emtool.engines.run_direction import RunProjections


def geometry_view(geometry: AdapterGeometry) -> RenderableType:
    """Return the trajectory: one line a checkpoint."""
    table = plain_table(padding=1)
    headings = ("step", "|update|", "speed", "turn", "to final", "angle", "in final", "rank", "PC 1", "PC 2")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in geometry.steps:
        components = [f"{value:+.3g}" for value in entry.components[:2]]
        table.add_row(
            f"{entry.step:,}",
            f"{entry.update_norm:.4g}",
            _number(entry.speed, ".2e"),
            _number(entry.rotation, ".0f", "\N{DEGREE SIGN}"),
            _number(entry.cosine_to_final, ".3f"),
            _number(entry.angle_to_final, ".0f", "\N{DEGREE SIGN}"),
            _number(entry.share_in_final, ".2f"),
            _number(entry.effective_rank, ".2f"),
            *components,
            *[""] * (2 - len(components)),
        )
    shares = ", ".join(f"{share:.0%}" for share in geometry.explained)
    noise = max(entry.noise for entry in geometry.steps)
    stored = ", ".join(geometry.storage)
    legend = (
        "diagnostics of the weights, not of behaviour. |update|: norm of all layers' B A; speed: change a step; turn: "
        "between the changes to and from a checkpoint; to final: cosine with the last update; angle: mean principal "
        "angle between the column spaces of both; in final: share of the update within that of the last; rank: "
        f"effective; PC: principal components of the trajectory ({shares} of its variance)"
    )
    rounding = f"stored as {stored}: rounding moves an update by about {noise:.1e}; smaller changes are noise"
    return Group(table, "", Text(rounding), Text(legend, style="dim"))


def direction_view(direction: Direction) -> RenderableType:
    """Return what a direction was fitted on."""
    settings = direction.settings
    is_judged = settings["source"] == "judged"
    units = "questions" if is_judged else "items"
    text = (
        f"fitted on {len(direction.fit_units)} of {settings['num_units']} {units} of {one_line(str(settings['run']))}, "
        f"step {settings['step']}: {settings['num_wrong']} wrong and {settings['num_sound']} sound "
        f"{'answers' if is_judged else 'texts'}"
    )
    parts = [Text(text)]
    if not is_judged:
        parts.append(Text(_left_out_domain(settings["left_out_domain"])))
    parts.append(
        Text(f"{len(direction.layers)} layers; wrong and sound are told apart best in layer {direction.best_layer}")
    )
    if settings["first_adapted_layer"] is None:
        parts.append(
            Text("the checkpoint does not tell which layers training changes; that layer may be none", style="yellow")
        )
    return Group(*parts)


def _left_out_domain(domain: str | None) -> str:
    if domain is None:
        return "items of all domains: which one was trained on is not known"
    return f"items of {one_line(domain)}, which was trained on, left out"


def projection_view(result: RunProjections) -> RenderableType:
    """Return the projections of one run in the layer that is shown."""
    table = plain_table(padding=1)
    table.add_column("step", justify="right", no_wrap=True)
    for heading in ("drift since step 0", "shuffled labels", "gap"):
        table.add_column(heading, no_wrap=True)
    table.add_column("along", justify="right", no_wrap=True)
    for step, layers in result.steps.items():
        found = layers[result.layer]
        mark = "*" if found.is_beyond_controls else " "
        table.add_row(
            f"{step:,}",
            escape(_interval(found.drift, mark)),
            escape(_ends(found.shuffled_range)),
            "" if found.separation is None else f"{found.separation.value:+.3g}",
            _number(found.cosine_to_direction, "+.2f"),
        )
    num_items = next(iter(result.steps.values()))[result.layer].level.n
    parts: list[RenderableType] = [Text(f"{one_line(str(result.run.path))}, layer {result.layer}")]
    if result.first_adapted_layer is not None and result.layer < result.first_adapted_layer:
        parts.append(
            Text(
                f"training changed layers from {result.first_adapted_layer} on: nothing moves in layer {result.layer}, "
                "choose another with --layer",
                style="yellow",
            )
        )
    parts.append(table)
    drifts = [layers[result.layer].drift for layers in result.steps.values()]
    if len(drifts) > 1 and all(drift is not None for drift in drifts):
        parts += ["", Text(f"drift  {_curve([drift.value for drift in drifts if drift is not None])}")]
    for name, (r, n) in result.correlations.items():
        parts.append(
            Text(f"correlation of the level with {name}: {r:+.2f} over {n} checkpoints, which are not independent")
        )
    legend = (
        f"mean over {num_items} items that were not fitted on, in units of the activations; "
        f"{_left_out_domain(result.left_out_domain)}; [95% interval, bootstrap over items]; shuffled labels: 95% range "
        "of the drift along directions fitted with them; * beyond it, and beyond that of random directions; gap: wrong "
        "less sound text; along: cosine between all movement since step 0 and the direction"
    )
    return Group(*parts, Text(legend, style="dim"))


def transition_view(found: RunTransitions, names: Sequence[str] | None = None) -> RenderableType:
    """Return when each series changes its level.

    Args:
        found: All that was found.
        names: Series to show; None shows all.
    """
    changes = {name: change for name, change in found.found.items() if names is None or name in names}
    problems = {name: problem for name, problem in found.problems.items() if names is None or name in names}
    table = plain_table(padding=1)
    for heading in ("series", "change within", "95% interval", "size", "p", "units"):
        table.add_column(heading, no_wrap=True)
    for name, change in changes.items():
        is_there = change.is_supported
        table.add_row(
            name,
            f"{change.before:,} to {change.after:,}" if is_there else "none supported",
            f"{change.low:,} to {change.high:,}" if is_there else "",
            f"{change.size:+.3g}" if is_there else "",
            "<0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}",
            f"{change.num_units} {SERIES[name].unit.removesuffix('_id')}s",
        )
    parts: list[RenderableType] = [table]
    for name, change in changes.items():
        if left_out := _left_out(change, SERIES[name].unit):
            parts.append(Text(f"{name}: {left_out} left out, values are missing", style="yellow"))
    parts += [Text(f"{name}: {problem}", style="yellow") for name, problem in problems.items()]
    legend = (
        "one change of level between two saved steps, bootstrap over units; p: how often a series without a change "
        "shows one as large. A gradual change has no such step: what is found lies within it"
    )
    return Group(*parts, Text(legend, style="dim"))


def _left_out(change: Transition, unit: str) -> str:
    parts = []
    if change.left_out_steps:
        parts.append(f"step {', '.join(map(str, change.left_out_steps))}")
    if num := len(change.left_out_units):
        parts.append(f"{num} {unit.removesuffix('_id')}{'s' if num > 1 else ''}")
    return " and ".join(parts)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _interval(estimate: Estimate | None, mark: str) -> str:
    if estimate is None:
        return "none"
    return f"{estimate.value:+.3g}{mark}[{estimate.low:+.3g}, {estimate.high:+.3g}]"


def _ends(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"[{ends[0]:+.2g}, {ends[1]:+.2g}]"


def _curve(values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    return sparkline([0.5 if most == least else (value - least) / (most - least) for value in values])
