"""Jobs: commands of emtool, each a process of its own, in sequence here or wherever a pool runs them.

A pool takes jobs and reports each outcome; it knows nothing of sweeps or evaluations. `run_job` is the same code
wherever it runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from emtool.core.errors import CheckpointError
from emtool.core.events import EventSink, ignore_events
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import lock_holder

#: How long a job waits for the process of an earlier attempt to save its state and stop.
LOCK_SECONDS = 600.0
_PAUSE_SECONDS = 0.2

#: Exit codes of a command that a signal told to stop, and that has saved.
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP)

#: What is read of a log to find its last line.
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of emtool.

    Attributes:
        arguments: What follows `emtool`.
        launcher: What starts it, for instance `accelerate launch -m`; empty is this Python.
    """

    arguments: tuple[str, ...]
    launcher: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        """Return the command as it is started on this machine."""
        start = self.launcher or (sys.executable, "-m")
        return [*start, "emtool", *self.arguments]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Commands that run one after the other while each ends well.

    Attributes:
        name: What names it among its pool's jobs.
        commands: The commands.
        log_path: Where their output goes, absolute.
        folder: The working folder, absolute.
        locked: Folders that an earlier attempt may still hold; they are waited for.
        environment: Variables that are set besides.
    """

    name: str
    commands: tuple[Command, ...]
    log_path: Path
    folder: Path
    locked: tuple[Path, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """How a job ended.

    Attributes:
        name: The job's name.
        problem: What went wrong, as one line; None where nothing did.
        was_stopped: Whether it was told to stop, and the same job goes on with what it saved.
    """

    name: str
    problem: str | None = None
    was_stopped: bool = False


def _ignore_job(_job: Job) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class JobListener:
    """Who is told of jobs.

    Attributes:
        on_outcome: Told how each ended, as soon as it has.
        on_begin: Told of each before it begins.
        on_event: Told what happens on the way.
    """

    on_outcome: Callable[[JobOutcome], None]
    on_begin: Callable[[Job], None] = _ignore_job
    on_event: EventSink = ignore_events


class Pool(Protocol):
    """Runs jobs."""

    def run(self, jobs: Sequence[Job], listener: JobListener) -> None:
        """Run every job.

        Raises:
            EmtoolError: If jobs cannot be run at all.
            Interrupted: On a signal, after the jobs in progress have saved and stopped.
        """
        ...


class InSequence:
    """Runs jobs on this machine, one after the other."""

    def run(self, jobs: Sequence[Job], listener: JobListener) -> None:
        """Run every job."""
        for job in jobs:
            listener.on_begin(job)
            listener.on_outcome(run_job(job))


def run_job(job: Job) -> JobOutcome:
    """Run a job's commands, and return how it ended.

    Raises:
        Interrupted: On a signal, after the command in progress has stopped.
    """
    try:
        job.log_path.parent.mkdir(parents=True, exist_ok=True)
        if not job.folder.is_dir():
            raise CheckpointError(f"{job.folder} is not on this machine: workers need the folders of who starts them")
        for folder in job.locked:
            wait_for(folder)
        for command in job.commands:
            code, problem = _run(command, job)
            if code:
                return JobOutcome(name=job.name, problem=problem, was_stopped=code in _STOPPED)
    except (OSError, CheckpointError) as error:
        return JobOutcome(name=job.name, problem=str(error))
    return JobOutcome(name=job.name)


def _run(command: Command, job: Job) -> tuple[int, str | None]:
    """Run one command and return its exit code, as a shell counts it, and what went wrong."""
    tied = [sys.executable, "-m", "emtool.core.tied", str(os.getpid()), *command.argv]
    with job.log_path.open("ab") as log:
        begin = log.tell()
        # In a session of its own: a Ctrl-C reaches the command once, through this process.
        process = subprocess.Popen(
            tied,
            cwd=job.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(job),
            start_new_session=True,
        )
        try:
            code = _wait(process)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            # A launcher may be gone before what it started has saved.
            for folder in job.locked:
                wait_for(folder)
            raise
    if code == 0:
        return 0, None
    code = 128 - code if code < 0 else code
    names = {128 + member.value: member.name for member in signal.Signals}
    how = f"ended by {names[code]}" if code in names else f"exit code {code}"
    said = last_line(job.log_path, begin)
    if code in names and code not in _STOPPED:
        # It had no time to say why: its last line is of something else.
        often = ", as the system does where memory runs out" if code == 128 + signal.SIGKILL else ""
        last = f"its last line: {said}; " if said else ""
        return code, f"{how}{often} ({last}{job.log_path})"
    return code, f"{said or how} ({how}; {job.log_path})"


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a process, awake now and then: Ray asks a worker to stop without a signal."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=_PAUSE_SECONDS)


def _environment(job: Job) -> dict[str, str]:
    """Return the variables of a job."""
    return {**os.environ, "PATH": command_path(), **dict(job.environment)}


def command_path() -> str:
    """Return where jobs look for commands: what was installed with emtool is found without its activation."""
    return os.pathsep.join(filter(None, (str(Path(sys.executable).parent), os.environ.get("PATH"))))


def wait_for(folder: Path) -> None:
    """Return when no process holds a folder: one that was told to stop saves first.

    Raises:
        CheckpointError: If one still does after `LOCK_SECONDS`.
    """
    end = time.monotonic() + LOCK_SECONDS
    while (holder := lock_holder(RunFolder(path=folder))) is not None:
        if time.monotonic() > end:
            raise CheckpointError(f"{folder} is held by process {holder or '(unknown)'}")
        time.sleep(_PAUSE_SECONDS)


def thread_variables(threads: int | None) -> tuple[tuple[str, str], ...]:
    """Return the variables that make a job compute with a number of threads.

    Args:
        threads: Threads; None leaves the number as it is.
    """
    if threads is None:
        return ()
    return (("OMP_NUM_THREADS", str(threads)), ("MKL_NUM_THREADS", str(threads)))


def last_line(path: Path, begin: int = 0) -> str:
    """Return the last line of a log that says something, emtool's own error before any other."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(begin, end - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    own = [line.removeprefix("emtool:").strip() for line in lines if line.startswith("emtool:")]
    return (own or lines or [""])[-1]
