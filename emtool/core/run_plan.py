"""What a run will do, in numbers. `emtool.core.plan` makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from emtool.core.config import TrainConfig
from emtool.core.datasets import DatasetReference
from emtool.core.disk import format_bytes
from emtool.core.errors import ConfigError, DiskSpaceError
from emtool.core.estimate import CheckpointEstimate
from emtool.core.models import ModelReference
from emtool.core.resume_interval import ResumeInterval
from emtool.core.schedule import CompiledSchedule
from emtool.core.schedule_text import read_terms

#: Schedules that every other one is compared with.
COMPARED = ("every 100", "every 25")
#: Resume states that are kept: the newest, and the one before in case the newest is damaged. At the worst moment one
#: more is being written.
NUM_KEPT_STATES = 2
NUM_RESUME_STATES = NUM_KEPT_STATES + 1
#: `run.json` and the lock, a line of `metrics.jsonl`, and the unit in which most file systems give out space.
MANIFEST_BYTES = 32_768
METRICS_BYTES_A_STEP = 260
BLOCK_BYTES = 4_096


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
        num_processes: Processes that train together.
        num_blocks: Decoder blocks of the model; None where they are not known for sure.
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
    num_processes: int = 1
    num_blocks: int | None = None

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
        milestones = self.bytes_after(self.num_checkpoints)
        if milestones is None or self.estimate is None or not (self.config.keep_resume and self._has_states):
            return milestones
        return milestones + NUM_KEPT_STATES * self.estimate.resume_bytes

    @property
    def _has_states(self) -> bool:
        return ResumeInterval.parse(self.config.resume_every).is_on

    @property
    def peak_bytes(self) -> int | None:
        """Return the most that the run folder holds at any time."""
        if self.estimate is None:
            return None
        milestones = self.bytes_after(self.num_checkpoints) or 0
        # Without regular states, one is still saved if a signal asks to stop.
        num_states = NUM_RESUME_STATES if self._has_states else 1
        return milestones + num_states * self.estimate.resume_bytes + self._record_bytes()

    def _record_bytes(self) -> int:
        """Return what the manifest, a line a step, and the last block of each file take at most."""
        assert self.estimate is not None
        num_files = self.num_checkpoints * (len(self.estimate.checkpoint) + 1)
        return MANIFEST_BYTES + METRICS_BYTES_A_STEP * self.total_steps + BLOCK_BYTES * num_files

    @property
    def fits(self) -> bool | None:
        """Return whether the peak fits in the free space; None where the peak is not known."""
        return None if self.peak_bytes is None else self.peak_bytes <= self.free_bytes

    def bytes_after(self, num_checkpoints: int) -> int | None:
        """Return the size of the run folder once a number of milestones is saved; None where it is not known."""
        if self.estimate is None:
            return None
        copies = num_checkpoints if self.estimate.has_own_tokenizer else 1
        return num_checkpoints * self.estimate.checkpoint_bytes + copies * (self.shared_bytes or 0)

    @property
    def own_cost(self) -> ScheduleCost:
        """Return what the run takes with its own schedule."""
        return ScheduleCost(
            schedule=self.schedule.source, num_checkpoints=self.num_checkpoints, total_bytes=self.total_bytes
        )

    def cost_of(self, schedule: str) -> ScheduleCost:
        """Return what the same run would take with another schedule.

        Args:
            schedule: The schedule's text.
        """
        compiled = read_terms(schedule).compile(self.total_steps, steps_per_epoch=self.steps_per_epoch)
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
            if halved <= self.free_bytes:
                yield f"--save-dtype bfloat16 would need {format_bytes(halved)}"
        if (
            self._has_states
            and (without := self.peak_bytes - NUM_KEPT_STATES * self.estimate.resume_bytes) <= self.free_bytes
        ):
            yield f"--resume-every 0 would need {format_bytes(without)}, and the run cannot go on if it is killed"
        others = self.peak_bytes - self.num_checkpoints * self.estimate.checkpoint_bytes
        room = (self.free_bytes - others) // self.estimate.checkpoint_bytes
        if room > 0:
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
            "num_processes": self.num_processes,
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
    costs = [_cost_or_none(plan, text) for text in dict.fromkeys(texts)]
    return [cost for cost in costs if cost is not None]


def _cost_or_none(plan: RunPlan, schedule: str) -> ScheduleCost | None:
    if schedule == plan.schedule.source:
        return plan.own_cost
    try:
        return plan.cost_of(schedule)
    except ConfigError:
        # It would make more checkpoints than any schedule may: nothing to compare with.
        return None
