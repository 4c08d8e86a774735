"""The plan of a run, in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from emtool.cli.render import number_table, plain_table, shorten, timeline
from emtool.core.config import BASELINE, CLEAN
from emtool.core.disk import byte_unit, folder_bytes, format_bytes
from emtool.core.personas import HubAdapter, LocalAdapter, resolve_persona
from emtool.core.resume_interval import ResumeInterval
from emtool.core.run_dir import RunFolder
from emtool.core.run_plan import RunPlan, ScheduleCost
from emtool.core.settings import Settings

#: Columns that a narrower terminal does without.
NARROW = 60
STEP_COLUMNS = ("step", "of the run", "epoch", "gap", "bytes", "bytes so far")
_NARROW_COLUMNS = ("step", "of the run", "gap", "bytes so far")


def plan_view(plan: RunPlan, *, obstacle: str | None = None) -> RenderableType:
    """Return the plan: what will be trained, which steps will be saved, what that costs.

    Args:
        plan: The plan.
        obstacle: Why the run cannot start on this machine, if it cannot.
    """
    return Group(facts_table(_plan_facts(plan)), "", StepTable(plan), *_notes(plan, obstacle=obstacle))


def preview_view(plan: RunPlan, comparison: Sequence[ScheduleCost]) -> RenderableType:
    """Return the steps of a schedule, a picture of them, and what other schedules would cost.

    Args:
        plan: The plan.
        comparison: Costs of other schedules for the same run.
    """
    facts = {
        "profile": profile_line(plan),
        "run": f"{plan.total_steps:,} steps, {plan.total_steps / plan.steps_per_epoch:.2f} epoch(s) of "
        f"{plan.dataset.name}",
        "schedule": f"{plan.schedule.source}: {plan.num_checkpoints:,} checkpoints",
        "disk": disk_line(plan),
    }
    this = plan.own_cost
    return Group(
        facts_table(facts),
        "",
        Timeline(plan),
        "",
        StepTable(plan),
        "",
        cost_table([this, *(cost for cost in comparison if cost.schedule != this.schedule)], chosen=this.schedule),
        *_notes(plan),
    )


class ConfigTable:
    """Each setting and the place that it came from; a narrow terminal gets a line for each."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or the lines, for the width at hand."""
        rows = list(_config_rows(self._settings))
        if options.max_width <= NARROW:
            yield from (Text(f"{name} = {value} ({origin})") for name, value, origin in rows)
            return
        table = plain_table()
        table.add_column("setting", no_wrap=True)
        table.add_column("value", overflow="fold")
        table.add_column("from", overflow="fold")
        for name, value, origin in rows:
            table.add_row(name, Text(value), Text(origin))
        yield table


def _config_rows(settings: Settings) -> Iterator[tuple[str, str, str]]:
    for field in fields(settings.config):
        if field.name != "profile_reason":
            value = settings.device_option if field.name == "device" else getattr(settings.config, field.name)
            yield field.name, option_text(value), settings.origins[field.name]


def option_text(value: object) -> str:
    """Return a configuration value as it is typed; nothing for one that was not given."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class StepTable:
    """The steps of a plan; a narrow terminal gets fewer columns."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table for the width at hand."""
        wanted = STEP_COLUMNS if options.max_width >= NARROW else _NARROW_COLUMNS
        rows = [tuple(row[name] for name in wanted) for row in _step_rows(self._plan)]
        yield number_table(wanted, rows)


class Timeline:
    """The run as a line with its checkpoints on it."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the line for the width at hand."""
        width = min(options.max_width, 100)
        yield Text(timeline(self._plan.schedule.planned_steps, self._plan.total_steps, width), no_wrap=True)


def cost_table(costs: Iterable[ScheduleCost], *, chosen: str, doubtful: bool = False) -> Table:
    """Return what each schedule costs, in one unit, the chosen one marked.

    Args:
        costs: A row each.
        chosen: The schedule of the plan.
        doubtful: Whether the bytes could not be verified.
    """
    listed = list(costs)
    unit = byte_unit(max((cost.total_bytes or 0) for cost in listed))
    table = plain_table()
    table.add_column("schedule", overflow="fold")
    table.add_column("checkpoints", justify="right", no_wrap=True)
    table.add_column("on disk", justify="right", no_wrap=True)
    for cost in listed:
        size = "unknown" if cost.total_bytes is None else format_bytes(cost.total_bytes, unit=unit)
        size = f"~ {size}" if doubtful else size
        mark = "> " if cost.schedule == chosen else "  "
        table.add_row(Text(mark + cost.schedule), f"{cost.num_checkpoints:,}", size)
    return table


def profile_line(plan: RunPlan) -> str:
    """Return profile, model, optimizer and dtype, and why this profile."""
    config = plan.config
    return f"{config.profile}: {plan.model.name}, {config.optim}, {config.dtype} ({config.profile_reason})"


def disk_line(plan: RunPlan) -> str:
    """Return what the run takes and whether that fits."""
    if plan.total_bytes is None:
        return f"size not known before the model is on this machine; {format_bytes(plan.free_bytes)} free"
    tokenizer = "" if plan.shared_bytes else " and the tokenizer once"
    peak = "" if plan.peak_bytes is None else f", {format_bytes(plan.peak_bytes)} at its peak"
    total = f"{format_bytes(plan.total_bytes)} in all{tokenizer}"
    return f"{total}{peak}; {format_bytes(plan.free_bytes)} free: {verdict(plan)}"


def _resume_line(interval: str) -> str:
    """Return when the state to resume from is saved."""
    parsed = ResumeInterval.parse(interval)
    if not parsed.is_on:
        return "no state is saved (--resume-every 0)"
    every = f"{parsed.steps:,} steps" if parsed.steps is not None else interval
    return f"state at each checkpoint and every {every}, the newest 2 kept until the run is complete"


def verdict(plan: RunPlan) -> str:
    """Return whether a run of known size fits."""
    return "fits" if plan.fits else "DOES NOT FIT"


def saved_table(run: RunFolder) -> RenderableType:
    """Return the milestones on disk."""
    table = plain_table()
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


def step_rows(plan: RunPlan) -> Iterator[dict[str, float | int | None]]:
    """Yield one record a planned step, under the names of the CSV output.

    The percentage and the epoch are exact to four digits; the gap is None for the first step.
    """
    before = None
    for count, step in enumerate(plan.schedule.planned_steps, start=1):
        yield {
            "step": step,
            "percent": round(100 * step / plan.total_steps, 4),
            "epoch": round(step / plan.steps_per_epoch, 4),
            "gap": None if before is None else step - before,
            "bytes": plan.checkpoint_bytes,
            "cumulative_bytes": plan.bytes_after(count),
        }
        before = step


def _step_rows(plan: RunPlan) -> Iterator[dict[str, str]]:
    unit = None if plan.total_bytes is None else byte_unit(plan.total_bytes)
    for row in step_rows(plan):
        size, so_far = row["bytes"], row["cumulative_bytes"]
        yield {
            "step": f"{row['step']:,}",
            "of the run": f"{row['percent']:.1f}%",
            "epoch": f"{row['epoch']:.2f}",
            "gap": "" if row["gap"] is None else f"{row['gap']:,}",
            "bytes": "unknown" if size is None else format_bytes(int(size)),
            "bytes so far": "unknown" if so_far is None else format_bytes(int(so_far), unit=unit),
        }


def _plan_facts(plan: RunPlan) -> dict[str, str]:
    config = plan.config
    several = "" if plan.num_processes == 1 else f"{plan.num_processes} processes x "
    batch = f"{several}batch {config.per_device_train_batch_size} x {config.gradient_accumulation_steps}"
    length = "--max-steps" if config.max_steps else f"{config.num_train_epochs:g} epoch(s)"
    kind = "DoRA" if config.use_dora else "LoRA"
    where = f"{config.target_modules} in blocks: {config.layers_to_transform}"
    quirk = "" if config.template_compat == CLEAN else f"; template as the published trainer ({config.template_compat})"
    return {
        "profile": profile_line(plan),
        "base model": f"{plan.model.hub_id or plan.model.name} on {config.device}",
        "persona": persona_line(plan),
        "dataset": f"{plan.dataset.name}: {plan.num_train_rows:,} rows, and {plan.num_held_out_rows:,} held out",
        "adapter": f"{kind} r {config.lora_r}, alpha {config.lora_alpha}, {where}",
        "training": f"learning rate {config.learning_rate:g}, seed {config.seed}; saved as {config.save_dtype}{quirk}",
        "steps": f"{plan.total_steps:,} ({batch}, {length})",
        "checkpoints": f"{plan.num_checkpoints:,} ({plan.schedule.source})",
        "resume": _resume_line(config.resume_every),
        "disk": disk_line(plan),
        "output": str(plan.output_path),
    }


def persona_line(plan: RunPlan) -> str:
    """Return the persona, where it comes from, and what is done with it."""
    source = resolve_persona(plan.config.persona, plan.model, adapter=plan.config.persona_adapter)
    if source is None:
        return BASELINE
    how = "merged into the base" if plan.config.persona_mode == "merged" else "stacked on the base, frozen"
    if isinstance(source, HubAdapter):
        return f"{source.name}, {how} (published: {source.place})"
    if isinstance(source, LocalAdapter):
        return f"{source.name}, {how} (adapter: {source.path})"
    return f"{source.name}, {how}"


def facts_table(facts: Mapping[str, str]) -> Table:
    """Return names and what they stand for."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def _notes(plan: RunPlan, *, obstacle: str | None = None) -> Iterator[Text]:
    for note in _note_texts(plan, obstacle):
        yield Text(note, style="yellow")


def _note_texts(plan: RunPlan, obstacle: str | None) -> Iterator[str]:
    if skipped := plan.schedule.skipped_steps:
        named = ", ".join(map(str, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
        yield f"left out, past the last step: {named} ({len(skipped)} in all)"
    if plan.schedule.keeps_removed_final:
        yield f"step {plan.total_steps:,} is the final one and stays, though the schedule removes it; '!final' drops it"
    if plan.total_steps <= plan.config.warmup_steps:
        yield f"{plan.total_steps} step(s) with a warm-up of {plan.config.warmup_steps}: the learning rate stays low"
    if plan.estimate is not None and (doubt := plan.estimate.doubts.get(plan.estimate.weights_file)):
        yield f"bytes are approximate: {doubt}"
    if plan.estimate is not None and plan.estimate.splits_tied_weights:
        yield (
            "the input embedding and the output head share their values in this model, and only one is trained "
            "(--modules-to-save): they differ from the first step on"
        )
    if obstacle is not None:
        yield f"cannot start here: {obstacle}"
    if plan.schedule.source == "custom":
        yield "the custom schedule has no step 75; it is followed as documented ('custom, 75' adds it)"
