"""Saving on the schedule, in a Trainer of emtool's own or of anybody's."""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.schedule import CheckpointSchedule, CompiledSchedule
from emtool.core.staging import publish_folder

logger = logging.getLogger(__name__)


class ScheduledCheckpointCallback(TrainerCallback):
    """Saves at the steps of a checkpoint schedule, in any Hugging Face Trainer.

    Each `checkpoint-N` in the Trainer's `output_dir` holds what the Trainer itself saves, so that training with
    `resume_from_checkpoint=True` goes on from the newest. It is written beside and renamed when it is complete; nothing
    is rotated or overwritten. Set `save_strategy="no"` unless the Trainer should save at other steps as well.

        callback = ScheduledCheckpointCallback("init, every 25 until 150, final")
        trainer = Trainer(..., callbacks=[callback])
        callback.attach(trainer)
        trainer.train()

    `attach` is needed to save step 0, which is before the Trainer's first chance to save, to save the end of a run that
    stops early, and under FSDP or DeepSpeed, whose shards only the Trainer can gather.

    Args:
        schedule: The schedule or its text, see `emtool.core.schedule` for the forms; or one that is compiled for the
            number of steps that the Trainer will run.
        weights_only: Save the weights without optimizer, scheduler, random state and `trainer_state.json`. The
            checkpoints are smaller, by two thirds under AdamW, and training cannot resume from them:
            `resume_from_checkpoint` raises `FileNotFoundError` rather than start the optimizer anew.

    Raises:
        ConfigError: If the schedule's text cannot be read.
    """

    def __init__(
        self,
        schedule: str | CheckpointSchedule | CompiledSchedule = "custom",
        *,
        weights_only: bool = False,
    ) -> None:
        self.schedule = CheckpointSchedule.parse(schedule) if isinstance(schedule, str) else schedule
        self.weights_only = weights_only
        self.compiled: CompiledSchedule | None = None
        self.saved_steps: list[int] = []
        self._trainer: Trainer | None = None
        self._staged: _StagedSave | None = None

    def attach(self, trainer: Trainer) -> Self:
        """Give the callback its Trainer, and the Trainer its callback if it does not have it yet."""
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compile the schedule for the Trainer's own count of steps, and save step 0 if it is scheduled.

        Raises:
            ConfigError: If the schedule cannot be followed by this Trainer.
            CheckpointError: If a planned checkpoint is there already and training does not resume.
        """
        self.compiled = self._compile(args, state, kwargs.get("train_dataloader"))
        self._check(args, state)
        if state.global_step == 0 and 0 in self.compiled.planned_steps:
            self._save_now(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the step that has just ended if it is scheduled: the Trainer does so once it has logged the step."""
        assert self.compiled is not None
        if state.global_step not in self.compiled.planned_steps:
            return
        if not _is_kept(args, state):
            self._stage(args, state)
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publish what the Trainer has just saved."""
        self._publish(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the step at which training really ended, unless the schedule removes it."""
        assert self.compiled is not None
        step = state.global_step
        if not self.compiled.has_final or step in self.saved_steps:
            return
        if _checkpoint_path(args, state).exists():
            return
        if self._trainer is None:
            logger.warning("training ended at step %d, which is not saved: call attach(trainer) before training", step)
            return
        self._save_now(args, state)

    def _compile(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> CompiledSchedule:
        if isinstance(self.schedule, CheckpointSchedule):
            return self.schedule.compile(state.max_steps, steps_per_epoch=_steps_per_epoch(args, dataloader))
        if state.max_steps != self.schedule.total_steps:
            raise ConfigError(
                f"the schedule was compiled for {self.schedule.total_steps} steps and the Trainer will run "
                f"{state.max_steps}"
            )
        return self.schedule

    def _check(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.compiled is not None
        if self._trainer is None and state.global_step == 0 and 0 in self.compiled.planned_steps:
            raise ConfigError(
                f"schedule {self.compiled.source!r} saves step 0, before the Trainer's first chance to save: "
                "call callback.attach(trainer) before training, or add '!init' to the schedule"
            )
        if self._trainer is None and is_sharded(args):
            raise ConfigError(
                "this training is sharded (FSDP or DeepSpeed), and only the Trainer can gather the shards: "
                "call callback.attach(trainer) before training"
            )
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end looks for the Trainer's own checkpoints, and scheduled ones appear later: "
                "set it to False and choose among the scheduled checkpoints"
            )
        if args.save_total_limit is not None and args.save_strategy != "no":
            raise ConfigError(
                "save_total_limit makes the Trainer delete checkpoints, scheduled ones among them: leave it out, or "
                "set save_strategy='no'"
            )
        later = [step for step in self.compiled.planned_steps if step > 0]
        taken = [step for step in later if _checkpoint_path(args, state, step).exists()]
        if state.global_step == 0 and taken:
            raise CheckpointError(
                f"{args.output_dir} holds checkpoint-{taken[0]} of an earlier training ({len(taken)} planned steps are "
                "there): choose another output_dir, or train with resume_from_checkpoint=True"
            )

    def _save_now(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self._trainer is not None
        if _is_kept(args, state):
            return
        self._stage(args, state)
        self._trainer._save_checkpoint(self._trainer.model, trial=None)
        self._publish(args, state)

    def _stage(self, args: TrainingArguments, state: TrainerState) -> None:
        self._staged = _StagedSave(args, state.global_step, weights_only=self.weights_only)

    def _publish(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._staged is not None:
            self._staged.publish(args)
            self._staged = None
            self.saved_steps.append(state.global_step)


class _StagedSave:
    """One save of the Trainer, redirected into a hidden folder until it is complete.

    The Trainer writes to `args.output_dir`, so that is pointed at the staging folder and back. Its rotation then finds
    nothing to delete.
    """

    def __init__(self, args: TrainingArguments, step: int, *, weights_only: bool) -> None:
        self._output_dir, self._save_only_model = args.output_dir, args.save_only_model
        self._weights_only = weights_only
        self._target = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self._staging = Path(args.output_dir) / f".{self._target.name}.staging"
        if args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)
        args.distributed_state.wait_for_everyone()
        args.output_dir = str(self._staging)
        args.save_only_model = weights_only or self._save_only_model

    def publish(self, args: TrainingArguments) -> None:
        """Make the checkpoint appear under its name, once every process has written its part."""
        args.output_dir, args.save_only_model = self._output_dir, self._save_only_model
        args.distributed_state.wait_for_everyone()
        if not args.should_save:
            return
        written = self._staging / self._target.name
        if self._weights_only:
            # Without it, resuming fails with an error instead of starting the optimizer anew.
            (written / "trainer_state.json").unlink()
        # Saved while it named the staging folder.
        torch.save(args, written / "training_args.bin")
        publish_folder(written, self._target)
        for path in self._staging.iterdir():
            # TRL puts a model card beside the checkpoint.
            path.replace(Path(self._output_dir) / path.name)
        self._staging.rmdir()


def _checkpoint_path(args: TrainingArguments, state: TrainerState, step: int | None = None) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step if step is None else step}"


def _is_kept(args: TrainingArguments, state: TrainerState) -> bool:
    path = _checkpoint_path(args, state)
    if path.exists():
        logger.warning("%s is there already and is kept; another training needs another output_dir", path)
        return True
    return False


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    try:
        batches = len(dataloader)
    except TypeError:
        # An iterable dataset does not know its length; terms in epochs are then an error.
        return None
    accumulation: int = args.gradient_accumulation_steps
    return math.ceil(batches / accumulation)


def is_sharded(args: TrainingArguments) -> bool:
    """Return whether the parameters lie in pieces on several devices (FSDP or DeepSpeed)."""
    by_launcher = [os.environ.get(name, "false") for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")]
    return bool(args.fsdp) or args.deepspeed is not None or "true" in [value.lower() for value in by_launcher]
