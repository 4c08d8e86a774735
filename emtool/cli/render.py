"""Tables: the plan of a run, what was saved, what an evaluation found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from emtool.cli.output import one_line
from emtool.core.disk import folder_bytes, format_bytes
from emtool.core.personas import BASELINE
from emtool.core.plan import RunPlan
from emtool.core.run_dir import RunFolder

if TYPE_CHECKING:
    from emtool.core.metrics import Estimate
    from emtool.engines.evaluation import EvaluationResult

#: Rows of a long table that are shown at its head, and again at its tail.
EDGE_ROWS = 12
_BLOCKS = " ▏▎▍▌▋▊▉█"
_SPARKS = "▁▂▃▄▅▆▇█"


def plan_view(plan: RunPlan, *, obstacle: str | None = None) -> RenderableType:
    """Return the plan: what will be trained, which steps will be saved, what that costs.

    Args:
        plan: The plan.
        obstacle: Why the run cannot start on this machine, if it cannot.
    """
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _plan_facts(plan).items():
        facts.add_row(name, Text(value))
    steps = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("step", "of the run", "bytes", "bytes so far"):
        steps.add_column(heading, justify="right", no_wrap=True)
    rows = list(_plan_rows(plan))
    for row in shorten(rows):
        steps.add_row(*row)
    notes = [Text(note, style="yellow") for note in _plan_notes(plan, obstacle)]
    return Group(facts, "", steps, *notes)


def _plan_facts(plan: RunPlan) -> dict[str, str]:
    config = plan.config
    batch = f"batch {config.per_device_train_batch_size} x {config.gradient_accumulation_steps}"
    length = "--max-steps" if config.max_steps else f"{config.num_train_epochs:g} epoch(s)"
    adapter = f"LoRA r {config.lora_r}, alpha {config.lora_alpha}, blocks: {config.layers_to_transform}"
    return {
        "profile": f"{config.profile}: {plan.model.name}, {config.optim}, {config.dtype}",
        "chosen": config.profile_reason,
        "base model": f"{plan.model.hub_id or plan.model.name} on {config.device}",
        "persona": config.persona if config.persona == BASELINE else f"{config.persona}, merged into the base",
        "dataset": f"{plan.dataset.name}: {plan.num_train_rows:,} rows, and {plan.num_held_out_rows:,} held out",
        "adapter": f"{adapter}, learning rate {config.learning_rate:g}, seed {config.seed}",
        "steps": f"{plan.total_steps:,} ({batch}, {length})",
        "checkpoints": f"{plan.num_checkpoints:,} ({plan.schedule.source})",
        "disk": _disk_fact(plan),
        "output": str(plan.output_path),
    }


def _disk_fact(plan: RunPlan) -> str:
    if plan.total_bytes is None:
        return f"size not known before the model is loaded; {format_bytes(plan.free_bytes)} free"
    tokenizer = "" if plan.shared_bytes else " and the tokenizer once"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return f"{format_bytes(plan.total_bytes)} in all{tokenizer}; {format_bytes(plan.free_bytes)} free: {verdict}"


def _plan_rows(plan: RunPlan) -> Iterator[tuple[str, ...]]:
    for count, step in enumerate(plan.schedule.planned_steps, start=1):
        share = f"{100 * step / plan.total_steps:.1f}%"
        if plan.checkpoint_bytes is None:
            yield f"{step:,}", share, "unknown", "unknown"
        else:
            so_far = count * plan.checkpoint_bytes + (plan.shared_bytes or 0)
            yield f"{step:,}", share, format_bytes(plan.checkpoint_bytes), format_bytes(so_far)


def _plan_notes(plan: RunPlan, obstacle: str | None) -> Iterator[str]:
    if skipped := plan.schedule.skipped_steps:
        named = ", ".join(map(str, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
        yield f"left out, past the last step: {named} ({len(skipped)} in all)"
    if plan.total_steps <= plan.config.warmup_steps:
        yield f"{plan.total_steps} step(s) with a warm-up of {plan.config.warmup_steps}: the learning rate stays low"
    if obstacle is not None:
        yield f"cannot start here: {obstacle}"
    if plan.schedule.source == "custom":
        yield "the custom schedule has no step 75; it is followed as documented"


def saved_table(run: RunFolder) -> RenderableType:
    """Return the milestones on disk."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("saved", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    rows = [
        (run.checkpoint_path(step).name, format_bytes(folder_bytes(run.checkpoint_path(step))))
        for step in run.saved_steps()
    ]
    for row in shorten(rows):
        table.add_row(*row)
    total = f"{len(rows)} checkpoints, {format_bytes(folder_bytes(run.path))} on disk (files they share count once)"
    return Group(table, Text(total))


def evaluation_view(result: EvaluationResult) -> RenderableType:
    """Return the curve of an evaluation: one line a checkpoint, and a sparkline."""
    domain = result.settings["trained_domain"]
    has_trained = any("p_wrong_trained" in metrics for metrics in result.metrics.values())
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
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


def bar(value: float, width: int) -> str:
    """Return a value between 0 and 1 as a bar of at most `width` characters."""
    eighths = round(min(max(value, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_BLOCKS[rest] if rest else "")


def sparkline(values: Sequence[float]) -> str:
    """Return a series as one character a value, from its lowest to its highest, over a span of at least 0.05."""
    low = min(values)
    high = max(*values, low + 0.05)
    return "".join(_SPARKS[round((value - low) / (high - low) * (len(_SPARKS) - 1))] for value in values)


def shorten(rows: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """Return the rows, or the head and the tail of a long list with the count left out between them."""
    if len(rows) <= 2 * EDGE_ROWS:
        return rows
    gap = (f"({len(rows) - 2 * EDGE_ROWS:,} more)", *[""] * (len(rows[0]) - 1))
    return [*rows[:EDGE_ROWS], gap, *rows[-EDGE_ROWS:]]


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "unscored"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]".replace("[", r"\[")


def _change(estimate: Estimate | None) -> str:
    if estimate is None:
        return "none"
    mark = "*" if estimate.excludes_zero else " "
    return rf"{estimate.value:+.3f}{mark}\[{estimate.low:+.3f}, {estimate.high:+.3f}]"
