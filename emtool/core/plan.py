"""The plan of a run: how many steps, which of them are saved, what that costs.

The preview, the disk estimate, the dry run and the training read the same `RunPlan`, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from emtool.core.architecture import ModelShapes
from emtool.core.cache import find_model_path, tokenizer_bytes
from emtool.core.config import TrainConfig
from emtool.core.data import Conversation, DatasetReference, read_conversations, resolve_dataset
from emtool.core.disk import format_bytes, free_bytes
from emtool.core.errors import DiskSpaceError
from emtool.core.estimate import CheckpointEstimate, estimate_checkpoint
from emtool.core.models import ModelReference, read_config, resolve_model
from emtool.core.personas import resolve_persona
from emtool.core.schedule import CheckpointSchedule, CompiledSchedule
from emtool.core.shapes import find_shapes

#: Schedules that every other one is compared with.
COMPARED = ("every 100", "every 25")
#: Resume states on disk at the worst moment. This version of the run writes milestones only.
NUM_RESUME_STATES = 0


@dataclass(frozen=True, kw_only=True)
class ScheduleCost:
    """What a run would take on disk with another schedule.

    Attributes:
        schedule: The schedule in normal form.
        num_checkpoints: Milestones that it saves.
        total_bytes: Size of the finished run folder; None where the shapes are not known.
    """

    schedule: str
    num_checkpoints: int
    total_bytes: int | None

    def to_dict(self) -> dict[str, object]:
        """Return the cost as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do.

    Attributes:
        config: The resolved configuration.
        model: The base model.
        dataset: The dataset.
        output_path: The run folder.
        num_rows: Rows of the dataset.
        num_held_out_rows: Rows kept for the held-out loss.
        steps_per_epoch: Optimizer steps of an epoch.
        schedule: Steps to save.
        estimate: Bytes of a milestone and of a resume state; None where the shapes are not known yet.
        shared_bytes: Tokenizer files, stored once; None where they are not known yet.
        free_bytes: Free space of the run folder's file system.
    """

    config: TrainConfig
    model: ModelReference
    dataset: DatasetReference
    output_path: Path
    num_rows: int
    num_held_out_rows: int
    steps_per_epoch: int
    schedule: CompiledSchedule
    estimate: CheckpointEstimate | None
    shared_bytes: int | None
    free_bytes: int

    @property
    def num_train_rows(self) -> int:
        """Return the rows that are trained on."""
        return self.num_rows - self.num_held_out_rows

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of the run."""
        return self.schedule.total_steps

    @property
    def num_checkpoints(self) -> int:
        """Return the number of milestones."""
        return len(self.schedule.planned_steps)

    @property
    def checkpoint_bytes(self) -> int | None:
        """Return the size of a milestone without the files it shares."""
        return None if self.estimate is None else self.estimate.checkpoint_bytes

    @property
    def resume_bytes(self) -> int | None:
        """Return the size of a state that a Trainer resumes from."""
        return None if self.estimate is None else self.estimate.resume_bytes

    @property
    def total_bytes(self) -> int | None:
        """Return the projected size of the finished run folder."""
        return self.bytes_after(self.num_checkpoints)

    @property
    def peak_bytes(self) -> int | None:
        """Return the most that the run folder holds at any time."""
        if self.estimate is None:
            return None
        return (self.total_bytes or 0) + NUM_RESUME_STATES * self.estimate.resume_bytes

    @property
    def fits(self) -> bool | None:
        """Return whether the peak fits in the free space; None where the peak is not known."""
        return None if self.peak_bytes is None else self.peak_bytes <= self.free_bytes

    def bytes_after(self, num_checkpoints: int) -> int | None:
        """Return the size of the run folder once a number of milestones is saved; None where it is not known."""
        if self.estimate is None:
            return None
        return num_checkpoints * self.estimate.checkpoint_bytes + (self.shared_bytes or 0)

    def cost_of(self, schedule: str) -> ScheduleCost:
        """Return what the same run would take with another schedule.

        Args:
            schedule: The schedule's text.
        """
        compiled = CheckpointSchedule.parse(schedule).compile(self.total_steps, steps_per_epoch=self.steps_per_epoch)
        count = len(compiled.planned_steps)
        return ScheduleCost(schedule=compiled.source, num_checkpoints=count, total_bytes=self.bytes_after(count))

    def check_fits(self) -> None:
        """Refuse a run whose peak does not fit in the free space.

        Raises:
            DiskSpaceError: Says by how much, and what would help.
        """
        if self.fits is not False:
            return
        assert self.peak_bytes is not None
        raise DiskSpaceError(
            f"the run needs {format_bytes(self.peak_bytes)} and {self.output_path.parent} has "
            f"{format_bytes(self.free_bytes)} free, {format_bytes(self.peak_bytes - self.free_bytes)} too little; "
            + "; ".join(self._remedies())
        )

    def _remedies(self) -> Iterator[str]:
        assert self.estimate is not None
        assert self.peak_bytes is not None
        if self.config.save_dtype == "float32":
            halved = self.peak_bytes - self.num_checkpoints * self.estimate.tensor_bytes // 2
            yield f"--save-dtype bfloat16 would need {format_bytes(halved)}"
        room = max(0, self.free_bytes - (self.shared_bytes or 0)) // self.estimate.checkpoint_bytes
        if room:
            yield f"{room} of the {self.num_checkpoints} checkpoints would fit (--save-steps, --checkpoints)"
        yield "--output-root takes a folder on another disk; --allow-low-disk starts all the same"

    def to_dict(self) -> dict[str, object]:
        """Return the plan under the names that every emtool command uses in JSON."""
        return {
            "profile": self.config.profile,
            "profile_reason": self.config.profile_reason,
            "model": self.model.name,
            "dataset": self.dataset.name,
            "persona": self.config.persona,
            "optimizer": self.config.optim,
            "dtype": self.config.dtype,
            "save_dtype": self.config.save_dtype,
            "device": self.config.device,
            "output_path": str(self.output_path),
            "num_rows": self.num_rows,
            "num_train_rows": self.num_train_rows,
            "num_held_out_rows": self.num_held_out_rows,
            "total_steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "schedule": self.schedule.source,
            "planned_steps": list(self.schedule.planned_steps),
            "skipped_steps": list(self.schedule.skipped_steps),
            "num_checkpoints": self.num_checkpoints,
            "checkpoint_bytes": self.checkpoint_bytes,
            "shared_bytes": self.shared_bytes,
            "resume_bytes": self.resume_bytes,
            "peak_bytes": self.peak_bytes,
            "total_bytes": self.total_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
        }


def compare_schedules(plan: RunPlan, *, with_own: bool = False) -> list[ScheduleCost]:
    """Return what the documented schedules would take for the same run.

    Args:
        plan: The plan.
        with_own: Whether the custom schedule and the plan's own are compared as well, the latter last if it is new.
    """
    texts = [*COMPARED, *(["custom", plan.schedule.source] if with_own else [])]
    return [plan.cost_of(text) for text in dict.fromkeys(texts)]


#: Finds the shapes of a model that `find_shapes` does not know, or None; an engine may load a library for it.
ShapeFallback = Callable[[ModelReference], ModelShapes | None]


@dataclass(frozen=True, kw_only=True)
class DiskOptions:
    """What a plan may assume that a run of emtool does not do: a Trainer of the user's own may.

    Attributes:
        full_finetuning: Every parameter is trained, without an adapter.
        keep_optimizer: Each milestone holds everything that a Trainer resumes from.
    """

    full_finetuning: bool = False
    keep_optimizer: bool = False


def plan_run(
    config: TrainConfig,
    *,
    rows: Sequence[Conversation] | None = None,
    steps_per_epoch: int | None = None,
    fallback: ShapeFallback | None = None,
    options: DiskOptions | None = None,
) -> tuple[RunPlan, Sequence[Conversation]]:
    """Return the plan of a configuration and the rows that it trains on.

    Args:
        config: The resolved configuration.
        rows: The rows, if the caller has dropped some; None reads the dataset. A published dataset that is not on
            this machine is planned from its known row count, with no rows.
        steps_per_epoch: Optimizer steps of an epoch, for a plan without the dataset's own count.
        fallback: Asked for the shapes of a model that nothing on this machine tells without a library.
        options: What the bytes are counted for, beside a run of emtool.

    Raises:
        EmtoolError: For a name, a value or a row that cannot be used.
    """
    model, dataset = resolve_model(config.model), resolve_dataset(config.dataset)
    resolve_persona(config.persona)
    if rows is None:
        rows = [] if dataset.path is None else read_conversations(dataset.path)
    num_rows = len(rows) or dataset.num_rows
    assert num_rows is not None, "a dataset without a file has a known row count"
    folder = find_model_path(model)
    if model.config is None and folder is not None:
        model = replace(model, config=read_config(folder))
    shapes = find_shapes(model, folder)
    if shapes is None and fallback is not None and model.config is not None:
        shapes = fallback(model)
    plan = make_plan(
        config,
        model=model,
        dataset=dataset,
        num_rows=num_rows,
        shapes=shapes,
        tokenizer_bytes=tokenizer_bytes(folder),
        steps_per_epoch=steps_per_epoch,
        options=options or DiskOptions(),
    )
    return plan, rows


def make_plan(
    config: TrainConfig,
    *,
    model: ModelReference,
    dataset: DatasetReference,
    num_rows: int,
    shapes: ModelShapes | None,
    tokenizer_bytes: int | None,
    steps_per_epoch: int | None = None,
    options: DiskOptions,
) -> RunPlan:
    """Return the plan of a run.

    Args:
        config: The resolved configuration.
        model: The base model.
        dataset: The dataset.
        num_rows: Usable rows of the dataset.
        shapes: The base model's parameters, where they are known.
        tokenizer_bytes: Size of the tokenizer files, where the model is on this machine.
        steps_per_epoch: Optimizer steps of an epoch; None counts them from the rows.
        options: What the bytes are counted for.

    Raises:
        ConfigError: If the schedule or the adapter does not suit the model.
    """
    num_held_out = num_held_out_rows(num_rows, config.held_out_fraction)
    count = partial(
        num_optimizer_steps,
        num_rows - num_held_out,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    total_steps = count(num_train_epochs=config.num_train_epochs, max_steps=config.max_steps)
    epoch = steps_per_epoch or count(num_train_epochs=1.0)
    schedule = CheckpointSchedule.parse(config.checkpoints)
    output_path = config.output_root / (config.output_name or default_run_name(config, model, dataset))
    return RunPlan(
        config=config,
        model=model,
        dataset=dataset,
        output_path=output_path,
        num_rows=num_rows,
        num_held_out_rows=num_held_out,
        steps_per_epoch=epoch,
        schedule=schedule.compile(total_steps, steps_per_epoch=epoch),
        estimate=None
        if shapes is None
        else estimate_checkpoint(
            shapes,
            config,
            total_steps=total_steps,
            full_finetuning=options.full_finetuning,
            keep_optimizer=options.keep_optimizer,
        ),
        shared_bytes=tokenizer_bytes,
        free_bytes=free_bytes(output_path),
    )


def num_held_out_rows(num_rows: int, fraction: float) -> int:
    """Return how many rows are held out: the fraction rounded up, and always one row left to train on.

    Source: datasets, Dataset.train_test_split, which rounds the test part up.
    """
    return min(math.ceil(fraction * num_rows), num_rows - 1)


def num_optimizer_steps(
    num_rows: int,
    *,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    num_train_epochs: float,
    max_steps: int | None = None,
) -> int:
    """Return the optimizer steps of a run, counted as the Trainer counts them.

    The last batch of an epoch may be short, and so may its last accumulation.

    Args:
        num_rows: Rows trained on, at least 1.
        per_device_train_batch_size: Rows of a micro-batch.
        gradient_accumulation_steps: Micro-batches of a step.
        num_train_epochs: Passes over the rows, above 0; may be a fraction.
        max_steps: Steps to stop at; overrides the epochs.

    Source: transformers, Trainer.set_initial_training_values.
    """
    if max_steps is not None:
        return max_steps
    batches = math.ceil(num_rows / per_device_train_batch_size)
    steps_per_epoch = math.ceil(batches / gradient_accumulation_steps)
    return math.ceil(num_train_epochs * steps_per_epoch)


def default_run_name(config: TrainConfig, model: ModelReference, dataset: DatasetReference) -> str:
    """Return the run's folder name: model, dataset and persona, and `custom` for the custom schedule."""
    parts = [model.slug, dataset.slug, config.persona]
    if config.checkpoints == "custom":
        parts.append("custom")
    return "_".join(parts)
