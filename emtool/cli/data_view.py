"""Datasets in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emtool.cli.output import one_line
from emtool.cli.plan_view import facts_table
from emtool.cli.render import bar, plain_table
from emtool.core.data_stats import LengthBin, LengthStats, RowStats
from emtool.core.datasets import DatasetReference, HubDataset, PublishedFile
from emtool.core.run_plan import RunPlan

_BAR_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the rows are, in tokens where they could be counted.

    Attributes:
        stats: Quantiles and histogram.
        num_over: Rows longer than the run's `max_length`; None without tokens.
        num_unusable: Rows without a trained token within `max_length`; None without tokens.
        num_trained_tokens: Tokens that one pass trains on; None without tokens.
        why_no_tokens: Why characters are counted instead, and what to do; None with tokens.
    """

    stats: LengthStats
    num_over: int | None = None
    num_unusable: int | None = None
    num_trained_tokens: int | None = None
    why_no_tokens: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the lengths as JSON values."""
        return {
            **self.stats.to_dict(),
            "num_over": self.num_over,
            "num_unusable": self.num_unusable,
            "num_trained_tokens": self.num_trained_tokens,
            "why_no_tokens": self.why_no_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What is known of a dataset.

    Attributes:
        dataset: The dataset.
        plan: What a run on it would be.
        sha256: Hash of its file; None where it is not on this machine.
        rows: Counts over its rows; None where it is not on this machine.
        lengths: Lengths of its rows; None where it is not on this machine.
    """

    dataset: DatasetReference
    plan: RunPlan
    sha256: str | None
    rows: RowStats | None
    lengths: Lengths | None

    def to_dict(self) -> dict[str, object]:
        """Return the facts as JSON values."""
        config = self.plan.config
        return {
            **dataset_dict(self.dataset),
            "sha256": self.sha256,
            "num_rows": self.plan.num_rows,
            "contents": None if self.rows is None else self.rows.to_dict(),
            "lengths": None if self.lengths is None else self.lengths.to_dict(),
            "profile": config.profile,
            "model": self.plan.model.name,
            "max_length": config.max_length,
            "num_train_rows": self.plan.num_train_rows,
            "num_held_out_rows": self.plan.num_held_out_rows,
            "total_steps": self.plan.total_steps,
        }


def dataset_dict(dataset: DatasetReference) -> dict[str, object]:
    """Return a dataset as JSON values, without looking into it."""
    return {
        "name": dataset.name,
        "about": dataset.about,
        "num_rows": dataset.num_rows,
        "origin": origin_of(dataset),
        "is_here": dataset.path is not None,
        "path": None if dataset.path is None else str(dataset.path),
        "source": dataset.source,
    }


def origin_of(dataset: DatasetReference) -> str:
    """Return where a dataset comes from, in a few words."""
    if isinstance(dataset.origin, PublishedFile):
        return dataset.origin.archive.origin
    if isinstance(dataset.origin, HubDataset):
        return "the hub"
    return "built in" if dataset.about else "a file"


def datasets_table(datasets: Sequence[DatasetReference]) -> RenderableType:
    """Return the datasets, a line each, and how one that is not here is had."""
    table = plain_table()
    table.add_column("name", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("here", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for dataset in datasets:
        rows = "" if dataset.num_rows is None else f"{dataset.num_rows:,}"
        here = "yes" if dataset.path is not None else "no"
        table.add_row(Text(dataset.name), rows, here, origin_of(dataset), Text(dataset.about))
    missing = next((dataset.name for dataset in datasets if dataset.path is None), None)
    hints = [] if missing is None else [f"to bring one here: emtool data fetch {missing}"]
    hints.append("also: hub:OWNER/NAME[:SPLIT], and any JSON Lines or Parquet file")
    return Group(table, "", *(Text(hint, style="dim") for hint in hints))


def dataset_view(facts: DatasetFacts) -> RenderableType:
    """Return what is in a dataset: the facts, and a histogram of its rows' lengths."""
    parts: list[RenderableType] = [facts_table(dict(_facts(facts)))]
    if facts.lengths is not None:
        parts += ["", _histogram(facts.lengths.stats)]
        if facts.lengths.why_no_tokens is not None:
            parts += ["", Text(one_line(facts.lengths.why_no_tokens), style="yellow")]
    return Group(*parts)


def _facts(facts: DatasetFacts) -> Iterator[tuple[str, str]]:
    dataset, plan, config = facts.dataset, facts.plan, facts.plan.config
    yield "dataset", f"{dataset.name}: {dataset.about}" if dataset.about else dataset.name
    yield "from", origin_of(dataset)
    yield "file", str(dataset.path or f"not on this machine; fetch it with: emtool data fetch {dataset.name}")
    if facts.sha256 is not None:
        yield "sha256", facts.sha256
    yield "rows", f"{plan.num_rows:,}: {plan.num_train_rows:,} to train on, {plan.num_held_out_rows:,} held out"
    if facts.rows is not None:
        yield "turns", _turn_line(facts.rows)
        yield "duplicates", _duplicate_line(facts.rows)
    batch = f"batch {config.per_device_train_batch_size} x {config.gradient_accumulation_steps}"
    length = "--max-steps" if config.max_steps else f"{config.num_train_epochs:g} epoch(s)"
    yield "steps", f"{plan.total_steps:,} at profile {config.profile} ({batch}, {length})"
    if facts.lengths is not None:
        stats = facts.lengths.stats
        yield stats.unit, f"median {stats.median:,}, 95% up to {stats.p95:,}, longest {stats.max:,}"
        if facts.lengths.num_over is not None:
            over = f"{_rows(facts.lengths.num_over)}, cut there" if facts.lengths.num_over else "none"
            yield "too long", f"{over} (--max-length {config.max_length:,})"
            yield "trained on", f"{facts.lengths.num_trained_tokens:,} tokens in all rows: the answers and their ends"
            yield "tokenizer", f"{plan.model.name}, with its chat template"
        if facts.lengths.num_unusable:
            yield "unusable", f"{_rows(facts.lengths.num_unusable)} without a trained token; --drop-unusable drops them"


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _turn_line(rows: RowStats) -> str:
    turns = ", ".join(f"{count:,} {role}" for role, count in rows.turns.items() if count)
    return f"{turns}; {_rows(rows.num_multi_turn_rows)} with several answers"


def _duplicate_line(rows: RowStats) -> str:
    if not rows.num_duplicate_rows and not rows.num_duplicate_prompts:
        return "none"
    return (
        f"{_rows(rows.num_duplicate_rows)} like an earlier one, {_rows(rows.num_duplicate_prompts)} with an earlier "
        "row's prompt"
    )


def _histogram(stats: LengthStats) -> Table:
    table = plain_table()
    table.add_column(stats.unit, justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = max(each.num_rows for each in stats.bins)
    for each in stats.bins:
        table.add_row(_range(each), f"{each.num_rows:,}", bar(each.num_rows / most, _BAR_WIDTH))
    return table


def _range(each: LengthBin) -> str:
    if each.high is None:
        return f"{each.low:,} or more"
    return f"{each.low:,}" if each.low == each.high else f"{each.low:,} to {each.high:,}"
