"""Whether saved folders hold what their records say."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from emtool.core.errors import CheckpointError
from emtool.core.run_dir import FORMAT, RunFolder
from emtool.core.staging import RECORD_NAME, FileRecord, file_record

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

#: A record names about ten files in a few kilobytes.
MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """The contents of `checkpoint.json`.

    Attributes:
        step: Optimizer step.
        run_id: The run that it belongs to.
        requires: What must be present to use it: `base` and `persona`, as in the manifest's lineage.
        files: Name, relative to the folder, to what the file must hold.
    """

    step: int
    run_id: str
    requires: Mapping[str, object]
    files: Mapping[str, FileRecord]


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


def read_checkpoint(folder: Path, *, run_id: str, hashes: bool = True, only_recorded: bool = False) -> CheckpointRecord:
    """Return a folder's record after checking its files against it.

    Args:
        folder: A milestone or a resume state.
        run_id: The run that it must belong to.
        hashes: Whether contents are checked; sizes always are.
        only_recorded: Whether files that the record does not name are refused, because a library might read them.

    Raises:
        CheckpointError: If the record or a file is missing, a size or hash differs, a name leads out of the folder, or
            it belongs to another run or step.
    """
    record = read_record(folder)
    if (record.run_id, record.step) != (run_id, _step_of(folder)):
        raise CheckpointError(f"{folder} belongs to another run or step than its place says; it is not used")
    if ADAPTER_WEIGHTS not in record.files or ADAPTER_CONFIG not in record.files:
        raise CheckpointError(f"{folder / RECORD_NAME} names no adapter")
    for name, expected in record.files.items():
        _check_file(folder, name, expected, hashes=hashes)
    if only_recorded:
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if not path.is_dir() and name not in record.files and name != RECORD_NAME:
                raise CheckpointError(f"{folder} holds {name!r}, which its record does not name; it is not used")
    return record


def damaged_files(folder: Path, record: CheckpointRecord) -> list[str]:
    """Return the names of the files of a folder that do not hold what its record says."""
    names = []
    for name, expected in record.files.items():
        if _leads_out(name):
            continue
        try:
            _check_file(folder, name, expected, hashes=True)
        except CheckpointError:
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
    saved, resumable = run.saved_steps(), run.resume_steps()
    reached = max([*saved, *resumable], default=-1)
    if manifest.get("status") == "completed":
        reached = max(planned, default=reached)
    checks = [
        FolderCheck(name=run.checkpoint_path(step).name, step=step, status="missing", problem="planned, and not there")
        for step in planned - set(saved)
        if step <= reached
    ]
    checks += [
        _check(run.checkpoint_path(step), step, run_id, hashes=hashes, is_planned=step in planned) for step in saved
    ]
    checks.sort(key=lambda check: check.step)
    states = [_check(run.resume_state_path(step), step, run_id, hashes=hashes, is_planned=True) for step in resumable]
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


def _check(folder: Path, step: int, run_id: str, *, hashes: bool, is_planned: bool) -> FolderCheck:
    try:
        read_checkpoint(folder, run_id=run_id, hashes=hashes)
    except CheckpointError as error:
        return FolderCheck(name=folder.name, step=step, status="damaged", problem=str(error))
    if not is_planned:
        return FolderCheck(name=folder.name, step=step, status="unplanned", problem="there, and not in the plan")
    return FolderCheck(name=folder.name, step=step, status="ok")


def read_record(folder: Path) -> CheckpointRecord:
    """Return a folder's record as it stands, its files unchecked; names may still lead out of the folder.

    Raises:
        CheckpointError: If it cannot be read.
    """
    path = folder / RECORD_NAME
    try:
        if path.is_symlink() or path.stat().st_size > MAX_RECORD_BYTES:
            raise CheckpointError(f"{folder} is damaged: {path.name} is a link or absurdly large")
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise CheckpointError(f"{path} is not of format {FORMAT}; use the emtool that wrote it")
        requires = values["requires"]
        requires["base"], requires["persona"]
        return CheckpointRecord(
            step=int(values["step"]),
            run_id=str(values["run_id"]),
            requires=requires,
            files={
                str(name): FileRecord(bytes=int(entry["bytes"]), sha256=str(entry["sha256"]))
                for name, entry in values["files"].items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is damaged: cannot read {path.name} ({error!r})") from error


def _check_file(folder: Path, name: str, expected: FileRecord, *, hashes: bool) -> None:
    path = folder
    if _leads_out(name):
        raise CheckpointError(f"{folder / RECORD_NAME} names {name!r}, which is not a file of this folder")
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise CheckpointError(f"{folder / RECORD_NAME} names {name!r}, which is not a file of this folder")
    try:
        found = path.stat()
    except OSError:
        found = None
    if found is None or not stat.S_ISREG(found.st_mode) or found.st_size != expected.bytes:
        raise CheckpointError(f"{folder} is damaged: {name} is missing or does not have {expected.bytes} bytes")
    if not hashes:
        return
    try:
        contents = file_record(path)
    except OSError as error:
        raise CheckpointError(f"{folder} is damaged: {name} cannot be read ({error.strerror})") from error
    if contents != expected:
        raise CheckpointError(f"{folder} is damaged: the contents of {name} have changed since it was saved")


def _leads_out(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not parts or name.startswith("/") or ".." in parts or "\0" in name


def _step_of(folder: Path) -> int | None:
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else None
