"""A training run: from a plan to a folder of milestones."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from emtool.core.config import TrainConfig
from emtool.core.data import Conversation, read_conversations, resolve_dataset
from emtool.core.errors import CheckpointError, DataError
from emtool.core.events import CheckpointSaved, EventSink, Notice, PhaseStarted, ignore_events
from emtool.core.interrupts import interruptible
from emtool.core.personas import resolve_persona
from emtool.core.run_dir import RunFolder
from emtool.core.run_plan import RunPlan
from emtool.engines.callbacks import ScheduledCheckpointCallback
from emtool.engines.checkpointing import MilestoneWriter
from emtool.engines.encoding import Encoded, encode_dataset, encode_row
from emtool.engines.fitting import build_trainer, split_rows
from emtool.engines.likelihood import mean_log_probs
from emtool.engines.lineage import compose_model
from emtool.engines.modeling import add_lora, check_device, open_base
from emtool.engines.recording import first_manifest, recorded_run
from emtool.engines.step_recorder import StepRecorder


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run left behind.

    Attributes:
        run: The run folder.
        saved_steps: Steps of its milestones.
        final_loss: Training loss of the last step.
        held_out_loss: Mean token loss on the held-out rows; None if none were held out.
        seconds: Time of the optimizer steps and saves, in seconds.
    """

    run: RunFolder
    saved_steps: list[int]
    final_loss: float
    held_out_loss: float | None
    seconds: float


def usable_rows(config: TrainConfig, *, on_event: EventSink = ignore_events) -> list[Conversation]:
    """Return the dataset's rows that have a trained token within `max_length`; report how many were dropped.

    Raises:
        EmtoolError: If the model, the dataset or a row cannot be read, or no row is left.
    """
    dataset = resolve_dataset(config.dataset)
    if dataset.path is None:
        raise DataError(f"dataset {dataset.name!r} is not on this machine; give a copy with --dataset FILE")
    rows = read_conversations(dataset.path)
    base = open_base(config.model, device=config.device, dtype=config.dtype, on_event=on_event)
    kept = [row for row in rows if encode_row(row, base.tokenizer, config.max_length).num_labelled]
    if not kept:
        raise DataError(f"{dataset.path}: no row has a trained token within --max-length {config.max_length}")
    if dropped := len(rows) - len(kept):
        on_event(Notice(text=f"dropped {dropped} of {len(rows)} rows without a trained token", is_warning=True))
    return kept


def train(
    plan: RunPlan,
    rows: Sequence[Conversation],
    *,
    command: Sequence[str],
    check_disk: bool = True,
    on_event: EventSink = ignore_events,
) -> TrainResult:
    """Train a run as planned and return what it left behind.

    Everything that can be refused is refused before the run folder is created.

    Args:
        plan: The plan; the run stops if the Trainer counts differently.
        rows: The dataset's rows, as many as the plan counts.
        command: The command line, for the manifest.
        check_disk: Whether the run stops before a save that would not fit in the free space.
        on_event: Where progress is reported.

    Raises:
        EmtoolError: For what a user can mend; `run.json` then says "failed" if the folder exists.
        Interrupted: On SIGINT or SIGTERM; `run.json` says "interrupted".
    """
    with interruptible():
        config = plan.config
        check_device(config.device)
        assert len(rows) == plan.num_rows, "the rows differ from the plan"
        base = open_base(config.model, device=config.device, dtype=config.dtype, on_event=on_event)
        encoded = encode_dataset(rows, tokenizer=base.tokenizer, max_length=config.max_length)
        if cut := sum(row.is_truncated for row in encoded):
            on_event(Notice(text=f"{cut} of {len(encoded)} rows were cut at --max-length {config.max_length}"))
        composed = compose_model(base, resolve_persona(config.persona), on_event=on_event)
        model = add_lora(composed.model, config, plan.model)
        run = RunFolder(path=plan.output_path)
        manifest = first_manifest(plan, composed.lineage, command)
        with recorded_run(run, manifest) as results, TemporaryDirectory(prefix=".tokenizer-", dir=run.path) as folder:
            composed.tokenizer.save_pretrained(folder)
            writer = MilestoneWriter(
                run=run,
                run_id=manifest["run_id"],
                schedule=plan.schedule.source,
                requires=composed.lineage,
                save_dtype=config.save_dtype,
                model=model,
                tokenizer_path=Path(folder),
                needed_bytes=plan.checkpoint_bytes if check_disk else None,
            )
            result = _fit(plan, writer, composed.tokenizer, encoded, on_event=on_event)
            results["held_out_loss"] = result.held_out_loss
        return result


def _fit(
    plan: RunPlan,
    writer: MilestoneWriter,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    *,
    on_event: EventSink,
) -> TrainResult:
    run, model, config = writer.run, writer.model, plan.config
    train_rows, held_out = split_rows(encoded, num_held_out=plan.num_held_out_rows, seed=config.seed)
    milestones = ScheduledCheckpointCallback(plan.schedule, save=lambda step: _save_milestone(writer, step, on_event))
    trainer = build_trainer(
        model,
        tokenizer=tokenizer,
        train_rows=train_rows,
        config=config,
        output_path=run.path,
        callbacks=[milestones, StepRecorder(run, on_event=on_event)],
    )
    assert len(trainer.train_dataset) == plan.num_train_rows, "the Trainer has other rows than the plan"
    on_event(PhaseStarted(name="training", total=plan.total_steps))
    begun = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - begun
    check_saved(run, plan, final_step=trainer.state.global_step)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return TrainResult(
        run=run,
        saved_steps=run.saved_steps(),
        final_loss=float(losses[-1]),
        held_out_loss=_held_out_loss(model, held_out, run, on_event) if held_out else None,
        seconds=seconds,
    )


def check_saved(run: RunFolder, plan: RunPlan, *, final_step: int) -> None:
    """Refuse a run that lacks a planned milestone.

    Raises:
        CheckpointError: If a planned step up to the real final one, or the final one itself, is not on disk.
    """
    wanted = {step for step in plan.schedule.planned_steps if step <= final_step}
    if plan.schedule.has_final:
        wanted.add(final_step)
    if missing := sorted(wanted - set(run.saved_steps())):
        raise CheckpointError(f"{run.path} lacks the planned checkpoints {missing}; the run is not complete")


def _save_milestone(writer: MilestoneWriter, step: int, on_event: EventSink) -> None:
    begun = time.monotonic()
    path = writer.write(step)
    seconds = time.monotonic() - begun
    writer.run.append_metrics({"step": step, "save_seconds": round(seconds, 4)})
    on_event(CheckpointSaved(step=step, path=path, seconds=seconds))


def _held_out_loss(model: Any, rows: Sequence[Encoded], run: RunFolder, on_event: EventSink) -> float | None:
    """Return the mean token loss on held-out rows; None, with a warning, where the model has diverged."""
    on_event(PhaseStarted(name=f"measuring the loss on {len(rows)} held-out rows"))
    means = mean_log_probs(model.eval(), rows)
    counts = [row.num_labelled for row in rows]
    loss = -sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    if not math.isfinite(loss):
        on_event(Notice(text=f"the held-out loss is {loss}: training has diverged", is_warning=True))
        return None
    run.append_metrics({"step": run.saved_steps()[-1], "held_out_loss": loss})
    return loss
