"""Going on with a run that stopped: from which state, and what is taken back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emtool.core.errors import CheckpointError
from emtool.core.events import EventSink, Notice
from emtool.core.integrity import read_checkpoint
from emtool.core.resume_interval import ResumeInterval
from emtool.core.run_dir import RunFolder, free_name
from emtool.core.run_plan import NUM_KEPT_STATES
from emtool.core.staging import file_record, retire_folder
from emtool.engines.checkpointing import TRAJECTORY_BREAK


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
        raise CheckpointError(f"no state of {run.path} is whole; its checkpoints are kept; {anew}")
    interval = ResumeInterval.parse(str(manifest["config"].get("resume_every", "0")))
    if not interval.is_on:
        raise CheckpointError(f"{run.path} was trained with --resume-every 0 and holds no state to go on from; {anew}")
    if any(step > 0 for step in run.saved_steps()):
        raise CheckpointError(f"{run.path} has checkpoints and no state to go on from; {anew}")
    return None


def rewind(run: RunFolder, step: int | None) -> None:
    """Take back what was recorded after a step, so that the run records it again.

    Args:
        run: The run folder, whose lock this process holds.
        step: The step that the run goes on from; None for its very beginning.
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

    run.keep_metrics(is_kept)


def recorded_breaks(run: RunFolder) -> list[int]:
    """Return the steps at which the records name a milestone of another trajectory: a kill leaves nothing else."""
    try:
        lines = run.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    steps = []
    for line in lines:
        try:
            record = json.loads(line) if f'"{TRAJECTORY_BREAK}"' in line else {}
        except ValueError:
            continue
        if TRAJECTORY_BREAK in record and isinstance(record.get("step"), int):
            steps.append(record["step"])
    return steps


def check_same_lineage(run: RunFolder, manifest: Mapping[str, Any], lineage: Mapping[str, Any]) -> None:
    """Refuse to go on with another base model or persona than the run began with.

    Raises:
        CheckpointError: Shows the difference.
    """
    recorded = manifest.get("lineage")
    for part in ("base", "persona"):
        before, now = (recorded or {}).get(part), lineage[part]
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
