"""A training run: from a plan to a folder of milestones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.config import TrainConfig
from emtool.core.data import Conversation
from emtool.core.datasets import read_dataset, resolve_dataset
from emtool.core.errors import DataError, Interrupted, ModelError
from emtool.core.events import EventSink, Notice, PhaseStarted, ignore_events
from emtool.core.interrupts import Requests, requested
from emtool.core.personas import resolve_persona
from emtool.core.reporters import check_reporter
from emtool.core.resume_interval import ResumeInterval
from emtool.core.run_dir import RunFolder, replace_file
from emtool.core.run_plan import RunPlan
from emtool.core.staging import STAGING_SUFFIX, copy_folder, remove_folder
from emtool.engines.checkpointing import CheckpointWriter, SaveNeeds
from emtool.engines.encoded_rows import encode_dataset, encode_rows
from emtool.engines.encoding import Encoded
from emtool.engines.fitting import build_trainer, scratch_folder, split_rows
from emtool.engines.likelihood import mean_log_probs
from emtool.engines.lineage import ComposedModel, compose_model
from emtool.engines.modeling import (
    BaseModel,
    adapter_config_json,
    add_lora,
    check_device,
    open_base,
    warn_of_slow_dtype,
)
from emtool.engines.persona_files import is_persona_here
from emtool.engines.processes import Processes, launched_processes
from emtool.engines.recording import OpenRun, recorded_run
from emtool.engines.reporting import begin_report, reporting
from emtool.engines.resuming import share_tokenizer
from emtool.engines.saving import RunCheckpoints
from emtool.engines.step_recorder import StepRecorder, recorded_seconds
from emtool.engines.tensor_files import encode_safetensors


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run left behind.

    Attributes:
        run: The run folder.
        saved_steps: Steps of its milestones.
        final_loss: Training loss of the last step.
        held_out_loss: Mean token loss on the held-out rows; None if none were held out.
        seconds: Time of the optimizer steps and saves, in seconds.
        lost: What is wrong with each planned milestone that is damaged or not there any more.
    """

    run: RunFolder
    saved_steps: list[int]
    final_loss: float
    held_out_loss: float | None
    seconds: float
    lost: Sequence[str] = ()


def usable_rows(config: TrainConfig, *, on_event: EventSink = ignore_events) -> list[Conversation]:
    """Return the dataset's rows that have a trained token within `max_length`; report how many were dropped.

    Raises:
        EmtoolError: If the model, the dataset or a row cannot be read, or no row is left.
    """
    dataset = resolve_dataset(config.dataset)
    rows = read_dataset(dataset)
    base = open_base(config.model, device=config.device, dtype=config.dtype, on_event=on_event)
    encoded = encode_rows(
        rows, tokenizer=base.tokenizer, max_length=config.max_length, template_compat=config.template_compat
    )
    kept = [row for row, result in zip(rows, encoded, strict=True) if result.num_labelled]
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
    resume: bool = False,
    check_disk: bool = True,
    on_event: EventSink = ignore_events,
) -> TrainResult:
    """Train a run as planned, from its beginning or from its newest state, and return what it left behind.

    Everything that can be refused is refused before the run folder is created. A signal to stop saves the state of the
    step in progress first.

    Args:
        plan: The plan; the run stops if the Trainer counts differently.
        rows: The dataset's rows, as many as the plan counts.
        command: The command line, for the manifest.
        resume: Whether a run folder that is there is gone on with.
        check_disk: Whether the run stops before a save that would not fit in the free space.
        on_event: Where progress is reported; the first of several processes reports.

    Raises:
        EmtoolError: For what a user can mend; `run.json` then says "failed" if the folder exists.
        Interrupted: On SIGINT or SIGTERM; `run.json` says "interrupted".
    """
    with requested() as requests, contextlib.ExitStack() as stack:
        config = plan.config
        check_device(config.device)
        check_reporter(config.report_to)
        assert len(rows) == plan.num_rows, "the rows differ from the plan"
        processes = launched_processes(config.device)
        assert processes.count == plan.num_processes, "the plan is for another number of processes"
        report = on_event if processes.is_first else ignore_events
        warn_of_slow_dtype(config.device, config.dtype, report)
        composed = _compose(plan, processes, report, resume=resume)
        encoded = encode_dataset(
            rows,
            tokenizer=composed.tokenizer,
            max_length=config.max_length,
            template_compat=config.template_compat,
        )
        if cut := sum(row.is_truncated for row in encoded):
            report(Notice(text=f"{cut} of {len(encoded)} rows were cut at --max-length {config.max_length}"))
        model = composed.with_persona(add_lora(composed.model, config, plan.model))
        processes.decide(lambda: stack.enter_context(reporting(config.report_to)))
        record = recorded_run(plan, composed.lineage, command, resume=resume, on_event=report)
        opened = processes.decide(lambda: stack.enter_context(record))
        writer = CheckpointWriter(
            run=RunFolder(path=plan.output_path),
            run_id=opened.run_id,
            schedule=plan.schedule.source,
            requires=composed.lineage,
            save_dtype=config.save_dtype,
            adapter_config=adapter_config_json(model),
            tokenizer_path=plan.output_path / f".tokenizer{STAGING_SUFFIX}",
            keeps_optimizer=config.keep_optimizer,
        )
        opened.results["trajectory_breaks"] = writer.trajectory_breaks
        if processes.is_first:
            stack.callback(remove_folder, writer.tokenizer_path)
            _keep_shared_files(writer, composed, opened.state)
        run = _Run(plan=plan, writer=writer, opened=opened, requests=requests, processes=processes, on_event=report)
        return _fit(run, model, composed.tokenizer, encoded, check_disk=check_disk)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a training in progress needs at hand."""

    plan: RunPlan
    writer: CheckpointWriter
    opened: OpenRun
    requests: Requests
    processes: Processes
    on_event: EventSink


def _compose(plan: RunPlan, processes: Processes, on_event: EventSink, *, resume: bool) -> ComposedModel:
    """Return the model that training starts from; what must be fetched or built is by the first process."""
    config, run = plan.config, RunFolder(path=plan.output_path)
    persona = resolve_persona(config.persona, plan.model, adapter=config.persona_adapter)
    recorded: Any = run.read_manifest().get("lineage") if resume and run.path.exists() else None

    def open_here(sink: EventSink) -> BaseModel:
        before = recorded.get("base") if isinstance(recorded, dict) else None
        return open_base(config.model, device=config.device, dtype=config.dtype, recorded=before, on_event=sink)

    def prepare() -> None:
        base = open_here(on_event)
        if persona is not None and processes.count > 1 and not is_persona_here(persona, base):
            raise ModelError(
                f"persona {persona.name!r} is not here for {base.reference.name} yet, which takes one process: run "
                f"'emtool persona build {persona.name} --model {config.model}' once, then this again"
            )

    processes.decide(prepare)
    base = open_here(ignore_events)
    return compose_model(base, persona, mode=config.persona_mode, recorded=recorded, on_event=on_event)


def _keep_shared_files(writer: CheckpointWriter, composed: ComposedModel, state: Path | None) -> None:
    """Put the tokenizer where all checkpoints link to it, and some of the merged weights into the run folder.

    A library writes the tokenizer into a scratch folder, and it is copied: what is linked to must be on disk, and a
    full disk must be an ordinary error.
    """
    run = writer.run
    try:
        with scratch_folder() as scratch:
            composed.tokenizer.save_pretrained(scratch)
            copy_folder(Path(scratch), writer.tokenizer_path)
        if state is not None:
            share_tokenizer(writer.tokenizer_path, state)
        if composed.merged_sample is not None and not run.merged_sample_path.exists():
            replace_file(run.merged_sample_path, encode_safetensors(composed.merged_sample))
    except OSError as error:
        raise run.write_error(error, "writing the tokenizer") from error


def _fit(run: _Run, model: Any, tokenizer: Any, encoded: Sequence[Encoded], *, check_disk: bool) -> TrainResult:
    plan, config, folder = run.plan, run.plan.config, run.writer.run
    train_rows, held_out = split_rows(encoded, num_held_out=plan.num_held_out_rows, seed=config.seed)
    checkpoints = RunCheckpoints(
        run.writer,
        plan.schedule,
        optim=config.optim,
        interval=ResumeInterval.parse(config.resume_every),
        requests=run.requests,
        processes=run.processes,
        needs=SaveNeeds.of(plan) if check_disk else None,
        on_event=run.on_event,
    )
    begun = recorded_seconds(folder)
    recorder = StepRecorder(folder if run.processes.is_first else None, on_event=run.on_event, seconds_before=begun)
    trainer = build_trainer(
        model, tokenizer=tokenizer, train_rows=train_rows, config=config, output_path=folder.path, callbacks=[recorder]
    )
    assert len(trainer.train_dataset) == plan.num_train_rows, "the Trainer has other rows than the plan"
    checkpoints.attach(trainer)
    run.processes.decide(lambda: begin_report(config.report_to, trainer, folder, run_id=run.opened.run_id))
    run.on_event(PhaseStarted(name="training", total=plan.total_steps))
    with checkpoints.deferring():
        trainer.train(resume_from_checkpoint=None if run.opened.state is None else str(run.opened.state))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    held_out_loss, lost = None, []
    if run.processes.is_first:
        lost = lost_milestones(run.writer, plan, final_step=trainer.state.global_step)
        try:
            held_out_loss = _held_out_loss(model, held_out, folder, run.on_event) if held_out else None
        except Interrupted:
            checkpoints.save_state()
            raise
        if run.requests.save:
            checkpoints.save_state()
        run.opened.results["held_out_loss"] = held_out_loss
    run.processes.wait()
    return TrainResult(
        run=folder,
        saved_steps=folder.saved_steps(),
        final_loss=float(losses[-1]),
        held_out_loss=held_out_loss,
        seconds=recorder.seconds,
        lost=lost,
    )


def lost_milestones(writer: CheckpointWriter, plan: RunPlan, *, final_step: int) -> list[str]:
    """Return what is wrong with the planned milestones up to the real final step; every file is hashed."""
    wanted = {step for step in plan.schedule.planned_steps if step <= final_step}
    if plan.schedule.has_final:
        wanted.add(final_step)
    return [problem for step in sorted(wanted) if (problem := writer.milestone_problem(step)) is not None]


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
