"""The disk estimate, in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from emtool.cli.plan_view import NARROW, cost_table, facts_table, profile_line, verdict
from emtool.cli.render import plain_table
from emtool.core.disk import format_bytes
from emtool.core.estimate import CheckpointEstimate
from emtool.core.run_plan import RunPlan, ScheduleCost


def disk_view(plan: RunPlan, estimate: CheckpointEstimate, rows: Sequence[ScheduleCost]) -> RenderableType:
    """Return what schedules cost, what a checkpoint consists of, and whether the run fits.

    Args:
        plan: The plan.
        estimate: Its bytes.
        rows: What the plan's schedule and others cost.
    """
    notes = [Text(f"~ not verified: {name}: {doubt}", style="yellow") for name, doubt in estimate.doubts.items()]
    return Group(
        facts_table(_facts(plan, estimate)),
        "",
        cost_table(rows, chosen=plan.schedule.source, doubtful=estimate.weights_file in estimate.doubts),
        "",
        _Files("one checkpoint", _checkpoint_rows(plan, estimate)),
        "",
        _Files("the state to resume from", _resume_rows(plan, estimate)),
        "",
        facts_table(dict(_space(plan, estimate))),
        *notes,
    )


def _checkpoint_rows(plan: RunPlan, estimate: CheckpointEstimate) -> Iterator[tuple[str, str, str]]:
    doubtful = estimate.weights_file in estimate.doubts
    header = estimate.checkpoint[estimate.weights_file] - estimate.tensor_bytes
    yield "weights", _size(estimate.tensor_bytes, is_doubtful=doubtful), f"in {plan.config.save_dtype}"
    yield "header of their file", _size(header, is_doubtful=doubtful), estimate.weights_file
    yield from _file_rows(plan, estimate.checkpoint, estimate)
    if plan.shared_bytes is None:
        yield "tokenizer", "not counted", "not on this machine; stored once a run"
    else:
        once = "in every checkpoint" if estimate.has_own_tokenizer else "stored once a run, not once a checkpoint"
        yield "tokenizer", format_bytes(plan.shared_bytes), once


def _resume_rows(plan: RunPlan, estimate: CheckpointEstimate) -> Iterator[tuple[str, str, str]]:
    doubtful = estimate.weights_file in estimate.doubts
    yield "weights", _size(estimate.resume[estimate.weights_file], is_doubtful=doubtful), "in the dtype of training"
    yield from _file_rows(plan, estimate.resume, estimate)


def _file_rows(plan: RunPlan, files: Mapping[str, int], estimate: CheckpointEstimate) -> Iterator[tuple[str, str, str]]:
    named = {"optimizer.pt": ("optimizer", plan.config.optim), "scheduler.pt": ("scheduler", "learning rate")}
    named["rng_state.pth"] = ("random generators", "Python, numpy, torch")
    for name, (title, remark) in named.items():
        if name in files:
            yield title, _size(files[name], is_doubtful=name in estimate.doubts), remark
    small = [name for name in files if name not in named and name != estimate.weights_file]
    yield "small files", format_bytes(sum(files[name] for name in small)), ", ".join(small)
    total = _size(sum(files.values()), is_doubtful=any(name in estimate.doubts for name in files))
    yield "together", total, ""


def _facts(plan: RunPlan, estimate: CheckpointEstimate) -> dict[str, str]:
    config, count = plan.config, f"{estimate.num_trainable_parameters:,} parameters"
    if estimate.weights_file.startswith("adapter"):
        kind = "DoRA" if config.use_dora else "LoRA"
        trained = f"{kind} r {config.lora_r}, {config.target_modules} in blocks: {config.layers_to_transform}; {count}"
    else:
        trained = f"all {count}"
    return {
        "profile": profile_line(plan),
        "base model": f"{plan.model.hub_id or plan.model.name} (shapes from {estimate.shapes_source})",
        "trained": trained,
        "run": f"{plan.total_steps:,} steps",
    }


class _Files:
    """Parts of a folder and their bytes; a narrow terminal gets no remarks."""

    def __init__(self, title: str, rows: Iterable[tuple[str, str, str]]) -> None:
        self._title = title
        self._rows = list(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table for the width at hand."""
        has_remarks = options.max_width > NARROW
        table = plain_table()
        table.add_column(self._title, no_wrap=True, min_width=24)
        table.add_column("bytes", justify="right", no_wrap=True, min_width=11)
        if has_remarks:
            table.add_column("", overflow="fold", style="dim")
        for name, size, remark in self._rows:
            cells = (name, size, remark) if has_remarks else (name, size)
            table.add_row(*cells, style="bold" if name == "together" else "")
        yield table


def _space(plan: RunPlan, estimate: CheckpointEstimate) -> Iterator[tuple[str, str]]:
    doubtful = any(name in estimate.doubts for name in estimate.checkpoint)
    assert plan.total_bytes is not None
    assert plan.peak_bytes is not None
    yield "the run", f"{_size(plan.total_bytes, is_doubtful=doubtful)}: {plan.num_checkpoints:,} checkpoints"
    yield "at its peak", _size(plan.peak_bytes, is_doubtful=doubtful)
    yield "free", f"{format_bytes(plan.free_bytes)} for {plan.output_path.parent}: {verdict(plan)}"


def _size(count: int, *, is_doubtful: bool) -> str:
    return ("~ " if is_doubtful else "") + format_bytes(count)
