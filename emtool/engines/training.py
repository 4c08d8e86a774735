"""A training run: from a plan to a folder of milestones."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import emtool
from emtool.core.config import TrainConfig
from emtool.core.data import Conversation, file_sha256, read_conversations, resolve_dataset
from emtool.core.disk import folder_bytes
from emtool.core.errors import CheckpointError, DataError, Interrupted
from emtool.core.events import CheckpointSaved, EventSink, Notice, PhaseStarted, ignore_events
from emtool.core.personas import resolve_persona
from emtool.core.plan import RunPlan
from emtool.core.run_dir import RunFolder, append_record
from emtool.engines.callbacks import ScheduledCheckpointCallback, StepRecorder
from emtool.engines.checkpointing import MilestoneWriter
from emtool.engines.encoding import Encoded, encode_dataset, encode_row
from emtool.engines.fitting import build_trainer, split_rows
from emtool.engines.likelihood import mean_log_probs
from emtool.engines.lineage import ComposedModel, compose_model
from emtool.engines.modeling import add_lora, check_device, open_base

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "tokenizers")


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
    on_event: EventSink = ignore_events,
) -> TrainResult:
    """Train a run as planned and return what it left behind.

    Everything that can be refused is refused before the run folder is created.

    Args:
        plan: The plan; the run stops if the Trainer counts differently.
        rows: The dataset's rows, as many as the plan counts.
        command: The command line, for the manifest.
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
        run = RunFolder(path=plan.output_path)
        run.path.mkdir(parents=True)
        manifest = _first_manifest(plan, composed.lineage, command)
        run.write_manifest(manifest)
        try:
            result = _fit(plan, manifest, composed, encoded, on_event=on_event)
        except Interrupted as stop:
            _close(run, manifest, status="interrupted")
            kept = f"{len(run.saved_steps())} checkpoints are complete in {run.path}"
            raise Interrupted(stop.signum, kept) from stop
        except Exception as error:
            _close(run, manifest, status="failed", error=f"{type(error).__name__}: {error}")
            raise
        _close(run, manifest, status="completed", held_out_loss=result.held_out_loss)
        return result


def _fit(
    plan: RunPlan,
    manifest: dict[str, Any],
    composed: ComposedModel,
    encoded: Sequence[Encoded],
    *,
    on_event: EventSink,
) -> TrainResult:
    run = RunFolder(path=plan.output_path)
    config = plan.config
    train_rows, held_out = split_rows(encoded, num_held_out=plan.num_held_out_rows, seed=config.seed)
    model = add_lora(composed.model, config, plan.model)
    writer = MilestoneWriter(
        run=run,
        run_id=manifest["run_id"],
        schedule=plan.schedule.source,
        requires=composed.lineage,
        save_dtype=config.save_dtype,
        model=model,
        tokenizer=composed.tokenizer,
    )
    milestones = ScheduledCheckpointCallback(plan.schedule, save=lambda step: _save_milestone(writer, step, on_event))
    recorder = StepRecorder(run.metrics_path, on_event=on_event)
    trainer = build_trainer(
        model,
        tokenizer=composed.tokenizer,
        train_rows=train_rows,
        config=config,
        output_path=run.path,
        callbacks=[milestones, recorder],
    )
    assert len(trainer.train_dataset) == plan.num_train_rows, "the Trainer has other rows than the plan"
    on_event(PhaseStarted(name="training", total=plan.total_steps))
    begun = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - begun
    check_saved(run, plan, final_step=trainer.state.global_step)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    held_out_loss = None
    if held_out:
        on_event(PhaseStarted(name=f"measuring the loss on {len(held_out)} held-out rows"))
        held_out_loss = _mean_token_loss(model.eval(), held_out)
        append_record(run.metrics_path, {"step": trainer.state.global_step, "held_out_loss": held_out_loss})
    return TrainResult(
        run=run,
        saved_steps=run.saved_steps(),
        final_loss=float(losses[-1]) if losses else math.nan,
        held_out_loss=held_out_loss,
        seconds=seconds,
    )


def check_saved(run: RunFolder, plan: RunPlan, *, final_step: int) -> None:
    """Refuse a run that lacks a planned milestone.

    Raises:
        CheckpointError: If a planned step up to the real final one, or the final one itself, is not on disk.
    """
    wanted = {step for step in plan.schedule.planned_steps if step <= final_step} | {final_step}
    if missing := sorted(wanted - set(run.saved_steps())):
        raise CheckpointError(f"{run.path} lacks the planned checkpoints {missing}; the run is not complete")


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted` while the block runs, in the main thread."""

    def stop(signum: int, _frame: object) -> None:
        raise Interrupted(signum)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _save_milestone(writer: MilestoneWriter, step: int, on_event: EventSink) -> None:
    begun = time.monotonic()
    path = writer.write(step)
    seconds = time.monotonic() - begun
    append_record(writer.run.metrics_path, {"step": step, "save_seconds": round(seconds, 4)})
    on_event(CheckpointSaved(step=step, path=path, num_bytes=folder_bytes(path), seconds=seconds))


def _mean_token_loss(model: Any, rows: Sequence[Encoded]) -> float:
    means = mean_log_probs(model, rows)
    counts = [row.num_labelled for row in rows]
    return -sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)


def _first_manifest(plan: RunPlan, lineage: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    assert plan.dataset.path is not None
    dataset = {
        "name": plan.dataset.name,
        "sha256": file_sha256(plan.dataset.path),
        "domain": plan.dataset.domain,
    }
    return {
        "run_id": uuid.uuid4().hex,
        "status": "running",
        "plan": plan.to_dict(),
        "config": plan.config.to_dict(),
        "lineage": {**lineage, "dataset": dataset},
        "versions": {
            "emtool": emtool.__version__,
            "python": sys.version.split()[0],
            **{name: version(name) for name in PACKAGES},
        },
        "command": list(command),
        "started_at": _now(),
        "ended_at": None,
        "saved_steps": [],
    }


def _close(run: RunFolder, manifest: dict[str, Any], **fields: Any) -> None:
    run.write_manifest({**manifest, **fields, "ended_at": _now(), "saved_steps": run.saved_steps()})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
