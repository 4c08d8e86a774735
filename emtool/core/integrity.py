"""Whether saved folders hold what their records say."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from emtool.core.checkpoint_record import CheckpointRecord, read_record
from emtool.core.errors import CheckpointError
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import lock_holder
from emtool.core.staging import RECORD_NAME, FileRecord, file_record

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

#: Without one of these a Trainer goes on with a fresh optimizer, scheduler or generator and says nothing.
TRAINER_STATE = "trainer_state.json"
RESUME_FILES = ("optimizer.pt", "scheduler.pt", TRAINER_STATE, "rng_state*.pth")


@dataclass(frozen=True, kw_only=True)
class FolderCheck:
    """What `verify` found about one checkpoint or resume state.

    Attributes:
        name: Folder name.
        step: Optimizer step.
        status: "ok", "damaged", "missing" (planned, and not there) or "unplanned" (there, and not planned).
        problem: What is wrong, in words; None if nothing is.
    """

    name: str
    step: int
    status: str
    problem: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the finding as JSON values."""
        return asdict(self)


#: Contents that were hashed, by device, number, size and time of change: names of one file are read once.
Hashed = dict[tuple[int, int, int, int], FileRecord]


def read_checkpoint(
    folder: Path, *, run_id: str, hashes: bool = True, only_recorded: bool = False, hashed: Hashed | None = None
) -> CheckpointRecord:
    """Return a folder's record after checking its files against it.

    Args:
        folder: A milestone or a resume state.
        run_id: The run that it must belong to.
        hashes: Whether contents are checked; sizes always are.
        only_recorded: Whether files that the record does not name are refused, because a library might read them.
        hashed: What was hashed before, added to here: milestones share their tokenizer's files. None remembers nothing.

    Raises:
        CheckpointError: If the folder is a link, the record or a file that such a folder needs is missing, a size or
            hash differs, a name leads out of the folder, or it belongs to another run or step.
    """
    record = read_record(folder)
    if (record.run_id, record.step) != (run_id, _step_of(folder)):
        raise CheckpointError(f"{folder} belongs to another run or step than its place says; it is not used")
    _check_is_whole(folder, record)
    place = os.fspath(folder)
    try:
        for name, expected in record.files.items():
            found = _check_size(place, name, expected)
            if hashes:
                _check_contents(folder, name, expected, found, {} if hashed is None else hashed)
        if only_recorded:
            _check_no_strays(folder, record)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    return record


def is_state(folder: Path) -> bool:
    """Return whether a folder is, by its name, a state to resume from."""
    return folder.name.startswith("step-")


def is_run_file(name: str) -> bool:
    """Return whether a file of a folder comes from the run's training; all others are the base model's tokenizer."""
    names = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, "README.md", *RESUME_FILES, "training_args.bin")
    return any(fnmatchcase(name, pattern) for pattern in names)


def damaged_files(folder: Path, record: CheckpointRecord) -> list[str]:
    """Return the names of the files of a folder that do not hold what its record says."""
    names = []
    for name, expected in record.files.items():
        try:
            _check_contents(folder, name, expected, _check_size(os.fspath(folder), name, expected), {})
        except (CheckpointError, OSError):
            names.append(name)
    return names


def verify_run(run: RunFolder, *, hashes: bool = True) -> list[FolderCheck]:
    """Return what is found about every checkpoint and resume state of a run, milestones first, by step.

    Args:
        run: The run folder.
        hashes: Whether contents are read and hashed; sizes always are checked.

    Raises:
        CheckpointError: If the manifest cannot be read or lacks its plan.
    """
    manifest = run.read_manifest()
    run_id, planned = str(manifest.get("run_id")), set(planned_steps(run, manifest))
    # The state of a step appears before its milestone: looked at first, it never seems to be the older one.
    resumable, reached = run.resume_steps(), _reached(run, manifest)
    saved = run.saved_steps()
    reached = max([reached, *saved])
    if manifest.get("status") == "completed":
        reached = max(planned, default=reached)
    checks = [
        FolderCheck(name=run.checkpoint_path(step).name, step=step, status="missing", problem="planned, and not there")
        for step in planned - set(saved)
        if step <= reached
    ]
    hashed: Hashed | None = {} if hashes else None
    checks += [_check(run.checkpoint_path(step), step, run_id, hashed, is_planned=step in planned) for step in saved]
    checks.sort(key=lambda check: check.step)
    states = [_check(run.resume_state_path(step), step, run_id, hashed, is_planned=True) for step in resumable]
    # A run in progress retires states while they are looked at.
    return checks + [check for check in states if check.status == "ok" or run.resume_state_path(check.step).exists()]


def planned_steps(run: RunFolder, manifest: Mapping[str, object]) -> list[int]:
    """Return the steps that a manifest's plan names.

    Raises:
        CheckpointError: If it names none.
    """
    plan = manifest.get("plan")
    steps = plan.get("planned_steps") if isinstance(plan, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, int) for step in steps):
        raise CheckpointError(f"{run.manifest_path} lacks its plan; the run cannot be checked")
    return steps


def _reached(run: RunFolder, manifest: Mapping[str, object]) -> int:
    """Return the last step whose milestone must be there, by the manifest, the records and the states; -1 if none."""
    states, milestones = run.resume_steps(), list(_recorded_milestones(run))
    if lock_holder(run) is not None:
        # The newest may be on its way: the state appears, then the milestone's record, then the milestone.
        states, milestones = states[:-1], milestones[:-1]
    closed = manifest.get("saved_steps")
    closed = [step for step in closed if type(step) is int] if isinstance(closed, list) else []
    return max([*states, *milestones, *closed], default=-1)


def _recorded_milestones(run: RunFolder) -> Iterator[int]:
    for record in run.read_metrics(naming="saved"):
        step = record.get("step")
        if type(step) is int and record.get("saved") == f"checkpoint-{step}":
            yield step


def _check(folder: Path, step: int, run_id: str, hashed: Hashed | None, *, is_planned: bool) -> FolderCheck:
    """Check one folder; contents too, unless `hashed` is None."""
    try:
        read_checkpoint(folder, run_id=run_id, hashes=hashed is not None, only_recorded=is_state(folder), hashed=hashed)
    except CheckpointError as error:
        return FolderCheck(name=folder.name, step=step, status="damaged", problem=str(error))
    if not is_planned:
        return FolderCheck(name=folder.name, step=step, status="unplanned", problem="there, and not in the plan")
    return FolderCheck(name=folder.name, step=step, status="ok")


def _check_is_whole(folder: Path, record: CheckpointRecord) -> None:
    """Refuse a record that does not name what a folder of its kind is used for."""
    if ADAPTER_WEIGHTS not in record.files or ADAPTER_CONFIG not in record.files:
        raise CheckpointError(f"{folder / RECORD_NAME} names no adapter")
    if not is_state(folder):
        return
    for pattern in (TRAINER_STATE,) if record.is_sharded else RESUME_FILES:
        if not any(fnmatchcase(name, pattern) for name in record.files):
            raise CheckpointError(f"{folder / RECORD_NAME} names no {pattern}, which a state to resume from needs")


def _check_no_strays(folder: Path, record: CheckpointRecord) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and name not in record.files and name != RECORD_NAME:
            raise CheckpointError(f"{folder} holds {name!r}, which its record does not name; it is not used")


def _check_size(folder: str, name: str, expected: FileRecord) -> os.stat_result:
    # Thousands of checkpoints have tens of thousands of files: one look at each, and no object for its path.
    path, found = folder, None
    for part in name.split("/") if "/" in name else (name,):
        path = f"{path}/{part}"
        try:
            found = os.lstat(path)
        except OSError:
            found = None
            break
        if stat.S_ISLNK(found.st_mode):
            raise CheckpointError(f"{folder}/{RECORD_NAME} names {name!r}, which is not a file of this folder")
    if found is None or not stat.S_ISREG(found.st_mode) or found.st_size != expected.bytes:
        raise CheckpointError(f"{folder} is damaged: {name} is missing or does not have {expected.bytes} bytes")
    return found


def _check_contents(folder: Path, name: str, expected: FileRecord, found: os.stat_result, hashed: Hashed) -> None:
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    contents = hashed.get(key)
    if contents is None:
        try:
            contents = file_record(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder} is damaged: {name} cannot be read ({error.strerror})") from error
        if found.st_nlink > 1:
            hashed[key] = contents
    if contents != expected:
        raise CheckpointError(f"{folder} is damaged: the contents of {name} have changed since it was saved")


def _step_of(folder: Path) -> int | None:
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else None
