"""The lock of a run folder: one process trains it at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from emtool.core.errors import CheckpointError
from emtool.core.run_dir import RunFolder
from emtool.core.staging import STAGING_SUFFIX, leftover_folders, remove_folder

#: How often, and how long after one another, the lock is tried before the run counts as held.
_NUM_TRIES = 10
_PAUSE_SECONDS = 0.02

#: A folder that cannot be changed, by its file system or its owner.
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Hold the run folder while the block runs. The system frees it however the process ends.

    Raises:
        CheckpointError: If another process holds it; names the process.
    """
    with _locked(run, in_use):
        yield


@contextlib.contextmanager
def locked_evaluation(run: RunFolder) -> Iterator[None]:
    """Hold the folder of a run's evaluation, making it if it is not there, while the block runs.

    Training may go on meanwhile: it has a lock of its own.

    Raises:
        CheckpointError: If another process holds it; names the process.
    """
    try:
        run.evaluation_path.mkdir(exist_ok=True)
    except OSError as error:
        raise run.write_error(error, "making the folder evaluation") from error
    with _locked(RunFolder(path=run.evaluation_path), _in_evaluation):
        yield


@contextlib.contextmanager
def locked_sweep(folder: Path) -> Iterator[None]:
    """Hold the folder of a sweep while the block runs; its runs have locks of their own.

    Raises:
        CheckpointError: If another process holds it; names the process.
    """
    with _locked(RunFolder(path=folder), _in_sweep):
        yield


@contextlib.contextmanager
def _locked(run: RunFolder, refuse: Callable[[RunFolder], CheckpointError]) -> Iterator[None]:
    try:
        descriptor = os.open(run.lock_path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot lock {run.path}: {error.strerror}; is the folder writable?") from error
    try:
        try:
            _take(descriptor)
        except BlockingIOError as error:
            raise refuse(run) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def lock_holder(run: RunFolder) -> int | None:
    """Return the process that holds a run folder, or None if none does."""
    try:
        descriptor = os.open(run.lock_path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 20, 0).strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(descriptor)
    return None


def in_use(run: RunFolder) -> CheckpointError:
    """Return the error for a run that another process holds."""
    return CheckpointError(
        f"{run.path} is being trained by process {lock_holder(run) or '(unknown)'}; wait for it, or stop it with a "
        "signal: it saves its state first"
    )


def _in_evaluation(folder: RunFolder) -> CheckpointError:
    return CheckpointError(
        f"{folder.path.parent} is being evaluated by process {lock_holder(folder) or '(unknown)'}; wait for it, or "
        "stop it with Ctrl-C: what it made is kept"
    )


def _in_sweep(folder: RunFolder) -> CheckpointError:
    return CheckpointError(
        f"{folder.path} is being swept by process {lock_holder(folder) or '(unknown)'}; wait for it, or stop it with "
        "Ctrl-C: its runs save their state first"
    )


def _take(descriptor: int) -> None:
    """Take the lock. Who only looks whether it is held, holds it for a moment: that is waited for."""
    for _ in range(_NUM_TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_PAUSE_SECONDS)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def tidy_completed(run: RunFolder) -> None:
    """Remove what a run killed after its completion did not come to remove, where the folder can be changed."""
    config = run.read_manifest().get("config")
    removes_states = isinstance(config, dict) and not config.get("keep_resume")
    has_states = run.resume_path.exists() or run.resume_path.is_symlink()
    if not (_leftovers(run) or (removes_states and has_states)):
        return
    try:
        with locked(run):
            remove_leftovers(run)
            if removes_states:
                run.remove_states()
    except (CheckpointError, OSError) as error:
        reason = error.__cause__ if isinstance(error, CheckpointError) else error
        if not isinstance(reason, OSError) or reason.errno not in _READ_ONLY:
            raise


def remove_leftovers(run: RunFolder) -> list[str]:
    """Remove what killed writers left half-written, and return the names. Only the holder of the lock may."""
    leftovers = _leftovers(run)
    for path in leftovers:
        if path.suffix == STAGING_SUFFIX:
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in leftovers if path.suffix == STAGING_SUFFIX]


def _leftovers(run: RunFolder) -> list[Path]:
    replaced = (path.with_name(f".{path.name}.new") for path in (run.manifest_path, run.metrics_path))
    folders = [*leftover_folders(run.path), *leftover_folders(run.resume_path)]
    return [*folders, *(path for path in replaced if path.exists())]
