"""What a milestone and a resume state hold, written from a snapshot while training goes on.

A folder appears complete or not at all, see `emtool.core.staging`. The resume state of a step is published before the
milestone of the same step.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from emtool.core.disk import format_bytes, free_bytes
from emtool.core.errors import CheckpointError, DiskSpaceError
from emtool.core.events import CheckpointSaved, Event, Notice
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_checkpoint
from emtool.core.run_dir import FORMAT, RunFolder
from emtool.core.run_plan import NUM_KEPT_STATES, RunPlan
from emtool.core.staging import FileRecord, StagedFolder, file_record, remove_folder, retire_folder, staging_path
from emtool.engines.milestone_card import milestone_card
from emtool.engines.tensor_files import write_safetensors

logger = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.pt"

#: In `metrics.jsonl`: a milestone that was there already with other weights, so that no kill forgets it.
TRAJECTORY_BREAK = "trajectory_break"


@dataclass(kw_only=True)
class Stall:
    """How long training stood still for a save: for its beginning, and again if it waits for the copy.

    Attributes:
        seconds: So far.
    """

    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SaveNeeds:
    """Bytes that a save takes, checked against the free space before it.

    Attributes:
        milestone_bytes: Of a milestone.
        resume_bytes: Of a resume state.
    """

    milestone_bytes: int
    resume_bytes: int

    @classmethod
    def of(cls, plan: RunPlan) -> SaveNeeds | None:
        """Return what a plan's saves take; None where the sizes are not known."""
        if plan.estimate is None:
            return None
        return cls(milestone_bytes=plan.estimate.checkpoint_bytes, resume_bytes=plan.estimate.resume_bytes)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is saved at a step, on the host, untouched by the training that goes on.

    Attributes:
        step: Optimizer step.
        adapter: Adapter tensors by the names that PEFT saves, in the dtype that is trained.
        optimizer: The optimizer's state dict; None where no resume state is written.
        small_files: Name to contents of the other files that the Trainer resumes from.
        stall: How long training stood still for it.
    """

    step: int
    adapter: Mapping[str, torch.Tensor]
    optimizer: Any | None
    small_files: Mapping[str, bytes]
    stall: Stall


@dataclass(kw_only=True)
class CheckpointWriter:
    """Writes the milestones and the resume states of one run.

    Attributes:
        run: The run folder, whose lock this process holds.
        run_id: The run's identity, as in its manifest.
        schedule: The schedule's text.
        requires: What must be present to use a milestone: base model and persona, as in the manifest's lineage.
        save_dtype: Storage dtype of the milestones' adapters.
        adapter_config: Contents of `adapter_config.json`.
        tokenizer_path: Folder with the saved tokenizer, on the run's file system; checkpoints hold links to its files.
        keeps_optimizer: Whether milestones hold the resume state's files as well.
        events: What happened and was not reported yet.
        trajectory_breaks: Milestones that were there already with other weights.
    """

    run: RunFolder
    run_id: str
    schedule: str
    requires: Mapping[str, Any]
    save_dtype: str
    adapter_config: bytes
    tokenizer_path: Path
    keeps_optimizer: bool = False
    events: list[Event] = field(default_factory=list)
    trajectory_breaks: list[int] = field(default_factory=list)
    _tokenizer: dict[str, FileRecord] | None = None
    _last_state: tuple[Path, Mapping[str, FileRecord]] | None = None

    def continue_from(self, step: int) -> None:
        """Take the resume state of a step, which is verified, for the one that its milestone shares files with."""
        state = self.run.resume_state_path(step)
        self._last_state = state, read_checkpoint(state, run_id=self.run_id, hashes=False).files

    def milestone_problem(self, step: int) -> str | None:
        """Return what is wrong with the milestone of a step, or None if it is whole."""
        folder = self.run.checkpoint_path(step)
        if not folder.exists():
            return f"{folder.name} is not there"
        try:
            read_checkpoint(folder, run_id=self.run_id)
        except CheckpointError as error:
            return str(error)
        return None

    def write(self, snapshot: Snapshot, *, resume: bool, milestone: bool) -> None:
        """Write the resume state of a step, then its milestone, and retire the states that are not kept.

        Raises:
            DiskSpaceError: If the disk is full; what was saved before is whole, and nothing partial is left.
            CheckpointError: If it cannot be written for another reason.
        """
        try:
            if resume:
                self._write_folder(self.run.resume_state_path(snapshot.step), snapshot)
            if milestone:
                self._write_milestone(snapshot)
            if resume:
                self._retire_states()
        except OSError as error:
            raise self.run.write_error(error, f"saving step {snapshot.step}") from error

    def stage(self, step: int) -> Path:
        """Make the folder into which a Trainer saves a step by itself, and return it."""
        self.run.make_resume_folder()
        return StagedFolder(self.run.resume_state_path(step)).path

    def publish_staged(self, step: int, *, resume: bool, milestone: bool) -> None:
        """Publish what a Trainer saved into the folder of `stage`: as it is, and its adapter as a milestone.

        Raises:
            EmtoolError: If it cannot be written, or no adapter is there.
        """
        staging = staging_path(self.run.resume_state_path(step))
        written = staging / f"checkpoint-{step}"
        try:
            if not (written / ADAPTER_WEIGHTS).is_file():
                raise CheckpointError(
                    "the Trainer saved no whole adapter: under FSDP set fsdp_state_dict_type to FULL_STATE_DICT, see "
                    "scripts/configs"
                )
            adapter = load_file(written / ADAPTER_WEIGHTS)
            snapshot = Snapshot(step=step, adapter=adapter, optimizer=None, small_files={}, stall=Stall())
            if resume:
                self._publish_adopted(written, snapshot)
            if milestone:
                self._write_milestone(snapshot)
            self._retire_states()
        except OSError as error:
            raise self.run.write_error(error, f"saving step {step}") from error
        finally:
            remove_folder(staging)

    def _publish_adopted(self, written: Path, snapshot: Snapshot) -> None:
        begun = time.monotonic()
        target = self.run.resume_state_path(snapshot.step)
        staged = StagedFolder.adopted(written, target=target)
        staged.finish({**self._record(snapshot.step), "sharded": True})
        seconds = time.monotonic() - begun
        snapshot.stall.seconds += seconds
        self._log(target, snapshot, num_bytes=staged.num_bytes, write_seconds=seconds)
        staged.publish()

    def _retire_states(self) -> None:
        for step in self.run.resume_steps()[:-NUM_KEPT_STATES]:
            retire_folder(self.run.resume_state_path(step))

    def check_space(self, step: int, needed_bytes: int) -> None:
        """Refuse a save that would not fit in the free space.

        Raises:
            DiskSpaceError: Says how much is missing and how to go on.
        """
        free = free_bytes(self.run.path)
        if free < needed_bytes:
            raise DiskSpaceError(
                f"saving step {step} needs {format_bytes(needed_bytes)} and {self.run.path} has {format_bytes(free)} "
                f"free; free some, or use --allow-low-disk; {self.run.how_to_go_on()}"
            )

    def _write_milestone(self, snapshot: Snapshot) -> None:
        target = self.run.checkpoint_path(snapshot.step)
        if not target.exists():
            self._write_folder(target, snapshot)
            return
        try:
            record = read_checkpoint(target, run_id=self.run_id)
        except CheckpointError as error:
            self._notice(f"{error}; it is written anew")
            retire_folder(target)
            self._write_folder(target, snapshot)
            return
        if record.files[ADAPTER_WEIGHTS] == self._adapter_record(snapshot):
            logger.info("%s is there already, with the same weights", target)
            num_bytes = sum(entry.bytes for entry in record.files.values())
            self._log(target, snapshot, num_bytes=num_bytes, write_seconds=0.0)
            return
        self.trajectory_breaks.append(snapshot.step)
        self.run.append_metrics({"step": snapshot.step, TRAJECTORY_BREAK: target.name}, durable=True)
        self._notice(
            f"{target.name} is there already with other weights: training did not repeat itself exactly; the old one "
            "is kept"
        )

    def _write_folder(self, target: Path, snapshot: Snapshot) -> None:
        begun = time.monotonic()
        is_milestone = target == self.run.checkpoint_path(snapshot.step)
        if not is_milestone:
            self.run.make_resume_folder()
        staged = StagedFolder(target)
        try:
            with staged.open(ADAPTER_WEIGHTS) as file:
                write_safetensors(file, snapshot.adapter, dtype=self.save_dtype if is_milestone else None)
            staged.write(ADAPTER_CONFIG, self.adapter_config)
            for name, record in self._tokenizer_files().items():
                staged.link(name, self.tokenizer_path / name, record)
            if is_milestone:
                staged.write("README.md", milestone_card(snapshot.step, self.requires, self.adapter_config).encode())
            if not is_milestone or self.keeps_optimizer:
                self._write_resume_files(staged, snapshot)
            staged.finish(self._record(snapshot.step))
            # Before it appears, so that a run killed in between lacks neither the record nor the folder.
            self._log(target, snapshot, num_bytes=staged.num_bytes, write_seconds=time.monotonic() - begun)
            staged.publish()
        finally:
            staged.discard()
        if is_milestone:
            self.events.append(CheckpointSaved(step=snapshot.step, path=target, seconds=snapshot.stall.seconds))

    def _write_resume_files(self, staged: StagedFolder, snapshot: Snapshot) -> None:
        state = self.run.resume_state_path(snapshot.step)
        if self._last_state is not None and self._last_state[0] == state != staged.target:
            # The milestone of the step whose state has just been written, or which the run goes on from.
            for name in (OPTIMIZER_FILE, *snapshot.small_files):
                staged.link(name, state / name, self._last_state[1][name])
            return
        self._last_state = state, staged.files
        with staged.open(OPTIMIZER_FILE) as file:
            torch.save(snapshot.optimizer, file)
        for name, content in snapshot.small_files.items():
            staged.write(name, content)

    def _log(self, target: Path, snapshot: Snapshot, *, num_bytes: int, write_seconds: float) -> None:
        record = {
            "step": snapshot.step,
            "saved": target.name,
            "stall_seconds": round(snapshot.stall.seconds, 4),
            "write_seconds": round(write_seconds, 4),
            "bytes": num_bytes,
        }
        self.run.append_metrics(record, durable=True)

    def _record(self, step: int) -> dict[str, object]:
        return {
            "format": FORMAT,
            "step": step,
            "run_id": self.run_id,
            "schedule": self.schedule,
            "requires": self.requires,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _tokenizer_files(self) -> Mapping[str, FileRecord]:
        if self._tokenizer is None:
            paths = [path for path in sorted(self.tokenizer_path.rglob("*")) if path.is_file()]
            self._tokenizer = {path.relative_to(self.tokenizer_path).as_posix(): file_record(path) for path in paths}
        return self._tokenizer

    def _adapter_record(self, snapshot: Snapshot) -> FileRecord:
        sink = _HashSink()
        write_safetensors(sink, snapshot.adapter, dtype=self.save_dtype)
        return FileRecord(bytes=sink.num_bytes, sha256=sink.sha256.hexdigest())

    def _notice(self, text: str) -> None:
        self.events.append(Notice(text=text, is_warning=True))


class _HashSink:
    """Hashes what is written and keeps none of it."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.sha256.update(view)
        self.num_bytes += view.nbytes
        return view.nbytes
