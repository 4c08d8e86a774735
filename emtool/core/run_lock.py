"""The lock of a run folder: one process trains it at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from emtool.core.errors import CheckpointError
from emtool.core.run_dir import RunFolder
from emtool.core.staging import leftover_folders, remove_folder


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Hold the run folder while the block runs. The system frees it however the process ends.

    Raises:
        CheckpointError: If another process holds it; names the process.
    """
    try:
        descriptor = os.open(run.lock_path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot lock {run.path}: {error.strerror}; is the folder writable?") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise in_use(run) from error
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


def tidy_completed(run: RunFolder) -> None:
    """Remove what a run that was killed after its completion did not come to remove."""
    with locked(run):
        config = run.read_manifest().get("config")
        remove_leftovers(run)
        if isinstance(config, dict) and not config.get("keep_resume"):
            run.remove_states()


def remove_leftovers(run: RunFolder) -> list[str]:
    """Remove what killed writers left half-written, and return the names. Only the holder of the lock may."""
    folders = [*leftover_folders(run.path), *leftover_folders(run.resume_path)]
    for folder in folders:
        remove_folder(folder)
    for name in (run.manifest_path, run.metrics_path):
        with contextlib.suppress(FileNotFoundError):
            name.with_name(f".{name.name}.new").unlink()
    return [folder.name for folder in folders]
