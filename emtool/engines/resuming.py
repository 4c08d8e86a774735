"""Going on with a run that stopped: from which state, and what is taken back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emtool.core.checkpoint_record import read_record
from emtool.core.errors import CheckpointError, shown
from emtool.core.events import EventSink, Notice
from emtool.core.integrity import damaged_files, is_run_file, read_checkpoint
from emtool.core.run_dir import RunFolder, free_name, saves_states_of
from emtool.core.run_plan import NUM_KEPT_STATES
from emtool.core.staging import file_record, retire_folder
from emtool.engines.checkpointing import TRAJECTORY_BREAK

#: What is left to do with a run whose manifest was changed.
DAMAGED = "put back the run.json that emtool wrote; the run cannot go on with this one"


def newest_state(run: RunFolder, manifest: Mapping[str, Any], *, on_event: EventSink) -> Path | None:
    """Return the newest resume state that is whole, or None if the run stopped before it saved any.

    Every file is hashed. A state that is damaged is passed over with a warning that says why.

    Raises:
        CheckpointError: If there are states or milestones and no state is whole: nothing restarts silently.
    """
    problems = []
    for step in reversed(run.resume_steps()):
        state = run.resume_state_path(step)
        try:
            read_checkpoint(state, run_id=str(manifest.get("run_id")), only_recorded=True)
        except CheckpointError as error:
            problems.append(str(error))
            on_event(Notice(text=f"{error}; trying the state before it", is_warning=True))
            continue
        return state
    anew = f"train it anew under another name, for instance --output-name {free_name(run.path.parent, run.path.name)}"
    if problems:
        restore = ""
        if any(_lacks_only_tokenizer(run.resume_state_path(step)) for step in run.resume_steps()):
            restore = f"restore the tokenizer's files with: emtool verify --repair {run.path}; or "
        raise CheckpointError(f"no state of {run.path} is whole; its checkpoints are kept; {restore}{anew}")
    if not saves_states_of(manifest):
        raise CheckpointError(f"{run.path} was trained with --resume-every 0 and holds no state to go on from; {anew}")
    if any(step > 0 for step in run.saved_steps()):
        raise CheckpointError(f"{run.path} has checkpoints and no state to go on from; {anew}")
    return None


def _lacks_only_tokenizer(state: Path) -> bool:
    """Return whether all that is wrong with a state are files that the base model can give again."""
    try:
        damaged = damaged_files(state, read_record(state))
    except CheckpointError:
        return False
    return bool(damaged) and not any(is_run_file(name) for name in damaged)


def rewind(run: RunFolder, step: int | None, *, on_event: EventSink) -> None:
    """Take back what was recorded after a step, so that the run records it again.

    Args:
        run: The run folder, whose lock this process holds.
        step: The step that the run goes on from; None for its very beginning.
        on_event: Where damaged lines are reported.
    """
    later = [at for at in run.resume_steps() if step is None or at > step]
    for at in (*later, *run.resume_steps()[: -len(later) - NUM_KEPT_STATES]):
        retire_folder(run.resume_state_path(at))

    def is_kept(record: Mapping[str, object]) -> bool:
        at, saved = record.get("step"), record.get("saved")
        if not isinstance(at, int) or step is None or at > step or "held_out_loss" in record:
            return False
        # A milestone is recorded just before it appears; one that did not appear is written and recorded again.
        return at < step or saved != f"checkpoint-{step}" or run.checkpoint_path(step).exists()

    if num_damaged := run.keep_metrics(is_kept):
        text = f"{run.metrics_path} had {num_damaged} damaged line(s), which are dropped; the training is not affected"
        on_event(Notice(text=text, is_warning=True))


def recorded_breaks(run: RunFolder) -> list[int]:
    """Return the steps at which the records name a milestone of another trajectory: a kill leaves nothing else."""
    records = [record for record in run.read_metrics() if TRAJECTORY_BREAK in record]
    return [step for record in records if isinstance(step := record.get("step"), int)]


def check_same_lineage(run: RunFolder, manifest: Mapping[str, Any], lineage: Mapping[str, Any]) -> None:
    """Refuse to go on with another base model or persona than the run began with.

    Raises:
        CheckpointError: Shows the difference.
    """
    recorded = manifest.get("lineage")
    for part in ("base", "persona"):
        before, now = recorded.get(part) if isinstance(recorded, dict) else None, lineage[part]
        if not isinstance(before, dict | None):
            raise CheckpointError(f"{run.manifest_path} is damaged: its lineage has {part} {shown(before)}; {DAMAGED}")
        if before == now:
            continue
        fields = sorted({*(before or {}), *(now or {})})
        changes = [f"{name} was {_of(before, name)}, is {_of(now, name)}" for name in fields]
        changes = [change for name, change in zip(fields, changes, strict=True) if _of(before, name) != _of(now, name)]
        raise CheckpointError(f"{run.path} was trained on another {part}: {'; '.join(changes)}")


def share_tokenizer(fresh: Path, state: Path) -> None:
    """Replace freshly saved tokenizer files by links to the same files of a verified state, to store them once."""
    for path in fresh.rglob("*"):
        stored = state / path.relative_to(fresh)
        if path.is_file() and stored.is_file() and file_record(stored) == file_record(path):
            path.unlink()
            try:
                path.hardlink_to(stored)
            except OSError:
                # No links on this file system: every folder has a copy anyway.
                shutil.copyfile(stored, path)


def _of(values: Mapping[str, Any] | None, name: str) -> object:
    return None if values is None else values.get(name)
