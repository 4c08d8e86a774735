"""When a run saves: milestones on the schedule, resume states at each milestone, by interval and on request."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emtool.core.errors import EmtoolError, Interrupted
from emtool.core.events import EventSink, Notice
from emtool.core.file_sizes import DTYPE_BYTES
from emtool.core.integrity import read_checkpoint
from emtool.core.interrupts import Requests
from emtool.core.optimizers import optimizer_state_bytes
from emtool.core.resume_interval import ResumeInterval
from emtool.core.schedule import CompiledSchedule
from emtool.engines.background import BackgroundWriter
from emtool.engines.callbacks import is_sharded
from emtool.engines.checkpointing import CheckpointWriter, SaveNeeds, Snapshot, Stall
from emtool.engines.fitting import RunTrainer
from emtool.engines.modeling import adapter_state
from emtool.engines.processes import Processes
from emtool.engines.snapshot import SnapshotBuffer, snapshot_bytes
from emtool.engines.tensor_files import describe
from emtool.engines.trainer_files import trainer_files


@dataclass(frozen=True, kw_only=True)
class _Due:
    """What is to be saved at the end of the step in progress, and the signal to stop after it."""

    milestone: bool = False
    resume: bool = False
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Agreed:
    """What any of the processes asks for."""

    stop: int | None
    save: bool


class _NothingLeftError(Exception):
    """The state that training resumes from is that of the last step: a Trainer would train one step more."""


class RunCheckpoints(TrainerCallback):
    """Saves the milestones and resume states of a run, beside the training.

    The Trainer asks for a save after it has logged the step: its `_save_checkpoint` calls `save`.

    Args:
        writer: Writes the folders; used by the first process only.
        schedule: The compiled schedule.
        optim: The optimizer's name.
        interval: How often a resume state is written besides those at milestones.
        requests: What signals have asked for.
        processes: The processes of this training.
        needs: Checked before each save; None does not check.
        on_event: Where progress is reported.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        schedule: CompiledSchedule,
        *,
        optim: str,
        interval: ResumeInterval,
        requests: Requests,
        processes: Processes,
        needs: SaveNeeds | None,
        on_event: EventSink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writer = writer
        self._schedule = schedule
        self._optim = optim
        self._interval = interval
        self._requests = requests
        self._processes = processes
        self._needs = needs
        self._on_event = on_event
        self._clock = clock
        self._background = BackgroundWriter()
        self._buffer: SnapshotBuffer | None = None
        self._trainer: RunTrainer | None = None
        self._due = _Due()
        self._stall = Stall()
        self._last_state_time = clock()
        self._last_state_step: int | None = None
        self._final_files: dict[str, bytes] | None = None
        self._is_stopping = False
        self._is_sharded = False

    def attach(self, trainer: RunTrainer) -> None:
        """Give it the Trainer whose optimizer, scheduler and random state are saved."""
        self._trainer = trainer
        trainer.checkpoints = self
        trainer.add_callback(self)
        self._is_sharded = is_sharded(trainer.args)

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Let signals wait for the step in progress while the block trains, and leave no save half done after it."""
        self._requests.is_deferring = True
        try:
            yield
        except _NothingLeftError:
            self.finish()
        except Interrupted:
            raise
        except BaseException:
            # What was begun is finished; what stopped the training matters more than its error.
            with contextlib.suppress(EmtoolError):
                self._background.wait()
            raise
        finally:
            self._requests.is_deferring = False
        if self._requests.stop is not None:
            # It came after the last step had asked for it.
            self.save_state()
            raise Interrupted(self._requests.stop)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Allocate the buffer; save step 0, or the milestone that a killed run did not reach.

        Raises:
            Interrupted: If a signal asked to stop.
        """
        assert state.max_steps == self._schedule.total_steps, (
            f"the plan has {self._schedule.total_steps} steps and the Trainer will run {state.max_steps}"
        )
        if self._processes.is_first and not self._is_sharded:
            self._buffer = self._make_buffer(args)
        self._last_state_time = self._clock()
        is_resumed = state.global_step > 0 or self._writer.run.resume_state_path(0).exists()
        self._last_state_step = state.global_step if is_resumed else None
        is_planned, stop = state.global_step in self._schedule.planned_steps, self._agree().stop
        if is_resumed and self._processes.is_first:
            self._continue_from(state.global_step)
        self._due = _Due(
            milestone=is_planned and self._writer.milestone_problem(state.global_step) is not None,
            resume=not is_resumed and (self._interval.is_on or stop is not None),
            stop=stop,
        )
        self.save()
        if state.global_step >= state.max_steps:
            raise _NothingLeftError

    def _continue_from(self, step: int) -> None:
        self._writer.continue_from(step)
        for earlier in self._schedule.planned_steps:
            if earlier < step and (problem := self._writer.milestone_problem(earlier)) is not None:
                text = f"{problem}; going on cannot make it again, and the run will end without it"
                self._on_event(Notice(text=text, is_warning=True))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the weights change only once they are copied."""
        if self._buffer is not None:
            begun = time.monotonic()
            self._buffer.wait()
            self._stall.seconds += time.monotonic() - begun

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say that a stop was understood, without waiting for the step to end."""
        self._announce_stop()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer for a save if one is due, and report those that are done.

        Raises:
            EmtoolError: If the save before this step failed.
        """
        self._announce_stop()
        failure = self._collect()
        step = state.global_step
        is_milestone = step in self._schedule.planned_steps
        is_due = self._interval.is_due(step=step, seconds=self._clock() - self._last_state_time)
        if self._requests.save:
            self._on_event(Notice(text=f"SIGUSR1: saving the state of step {step:,}"))
        agreed = self._agree(save=is_due, has_failed=failure is not None)
        if failure is not None:
            raise failure
        self._due = _Due(
            milestone=is_milestone,
            resume=agreed.save or agreed.stop is not None or (is_milestone and self._interval.is_on),
            stop=agreed.stop,
        )
        if self._due.milestone or self._due.resume:
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save where training really ended, keep its state until the run is complete, and wait for the writer.

        Raises:
            Interrupted: If a signal asked to stop.
        """
        step, stop = state.global_step, self._agree().stop
        if not self._is_sharded:
            # A state may be asked for later, when the processes no longer go in step.
            self._final_files = trainer_files(self._trainer, self._processes)
        self._due = _Due(
            milestone=self._schedule.has_final and step not in self._schedule.planned_steps,
            resume=(self._interval.is_on or stop is not None) and self._last_state_step != step,
            stop=stop,
        )
        self.save()
        self.finish()

    def save(self) -> None:
        """Save what is due for the Trainer's step; stop if that was asked for.

        Raises:
            Interrupted: After the state is on disk, if a signal asked to stop.
            EmtoolError: If this save cannot begin, or the one before it failed.
        """
        due, self._due = self._due, _Due()
        if due.milestone or due.resume:
            self._save(due)
        if due.stop is not None:
            self.finish()
            self._check_state()
            self._processes.wait()
            raise Interrupted(due.stop)

    def save_state(self) -> None:
        """Save a resume state now, whatever the interval, unless this step has one; return when it is on disk."""
        assert self._trainer is not None
        if self._last_state_step != self._trainer.state.global_step:
            self._due = _Due(resume=True)
            self.save()
        self.finish()

    def finish(self) -> None:
        """Return when everything that was begun is on disk.

        Raises:
            EmtoolError: If it could not be written.
        """
        self._background.wait()
        self._report()

    def _check_state(self) -> None:
        """Refuse to stop on a state that is not on disk as it was written."""
        if self._processes.is_first and self._last_state_step is not None:
            state = self._writer.run.resume_state_path(self._last_state_step)
            read_checkpoint(state, run_id=self._writer.run_id, only_recorded=True)

    def _save(self, due: _Due) -> None:
        assert self._trainer is not None
        step = self._trainer.state.global_step
        begun = time.monotonic()
        needs_optimizer = due.resume or self._writer.keeps_optimizer
        small_files = self._small_files() if needs_optimizer and not self._is_sharded else {}
        if due.resume:
            self._requests.save = False
            self._last_state_time, self._last_state_step = self._clock(), step
        if self._is_sharded:
            self._save_sharded(due)
            return
        if not self._processes.is_first:
            return
        self._background.wait()
        if self._needs is not None:
            needed = due.milestone * self._needs.milestone_bytes + due.resume * self._needs.resume_bytes
            self._writer.check_space(step, needed)
        assert self._buffer is not None
        tree = {
            "adapter": adapter_state(self._trainer.model),
            "optimizer": self._trainer.optimizer.state_dict() if needs_optimizer else None,
        }
        copies = self._buffer.begin(tree)
        self._stall = Stall(seconds=time.monotonic() - begun)
        snapshot = Snapshot(
            step=step,
            adapter=copies["adapter"],
            optimizer=copies["optimizer"],
            small_files=small_files,
            stall=self._stall,
        )
        self._background.start(lambda: self._write(snapshot, due))

    def _small_files(self) -> dict[str, bytes]:
        return self._final_files or trainer_files(self._trainer, self._processes)

    def _write(self, snapshot: Snapshot, due: _Due) -> None:
        """Make or await the copy, whatever follows: the next optimizer step waits for it. Then write."""
        assert self._buffer is not None
        self._buffer.finish()
        self._writer.write(snapshot, resume=due.resume, milestone=due.milestone)

    def _save_sharded(self, due: _Due) -> None:
        """Save with the Trainer's own method, which alone can gather the shards, into the staging folder."""
        trainer = self._trainer
        assert isinstance(trainer, RunTrainer)
        step = trainer.state.global_step
        staging = self._processes.decide(lambda: self._writer.stage(step))
        output_dir = trainer.args.output_dir
        try:
            trainer.args.output_dir = str(staging)
            trainer.save_by_itself()
        finally:
            trainer.args.output_dir = output_dir
        self._processes.wait()
        self._processes.decide(lambda: self._writer.publish_staged(step, resume=due.resume, milestone=due.milestone))
        self._report()

    def _make_buffer(self, args: TrainingArguments) -> SnapshotBuffer:
        assert self._trainer is not None
        adapter = describe(adapter_state(self._trainer.model))
        sizes = [tensor.size * DTYPE_BYTES[tensor.dtype] for tensor in adapter]
        if self._interval.is_on or self._writer.keeps_optimizer:
            sizes += optimizer_state_bytes(self._optim, adapter)
        return SnapshotBuffer(snapshot_bytes(sizes), is_pinned=args.device.type == "cuda")

    def _agree(self, *, save: bool = False, has_failed: bool = False) -> _Agreed:
        """Return what any process asks for; all of them stop at the same step or save at the same step."""
        wants = [self._requests.stop or 0, int(save or self._requests.save), int(has_failed)]
        stop, agreed_save, failed = self._processes.maximum(wants)
        if failed and not has_failed:
            raise SystemExit(1)
        return _Agreed(stop=stop or None, save=bool(agreed_save))

    def _collect(self) -> EmtoolError | None:
        try:
            self._background.check()
        except EmtoolError as error:
            return error
        finally:
            self._report()
        return None

    def _report(self) -> None:
        while self._writer.events:
            self._on_event(self._writer.events.pop(0))

    def _announce_stop(self) -> None:
        if self._requests.stop is not None and not self._is_stopping:
            self._is_stopping = True
            name = signal.Signals(self._requests.stop).name
            self._on_event(Notice(text=f"{name}: saving after this step, then stopping; Ctrl-C stops at once"))
