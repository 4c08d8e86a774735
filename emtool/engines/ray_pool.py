"""Jobs on Ray: placement, GPUs and retries are Ray's."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from emtool.core.errors import BackendError, Interrupted, MissingDependencyError
from emtool.core.events import EventSink, Notice
from emtool.core.interrupts import requested
from emtool.core.jobs import Job, JobListener, JobOutcome, run_job

#: How often a job whose worker died is begun again, Ray's own default.
DEFAULT_RETRIES = 3

#: How long jobs in progress have to save their state when the whole is stopped, in seconds.
_STOP_SECONDS = 120.0

#: How often a signal is looked for, in seconds.
_LOOK_SECONDS = 0.5

#: What Ray prints before the first line of what it says: who says it, in a colour.
_PREFIX = re.compile(r"(\x1b\[\d+m)?\((raylet|autoscaler|\S+ pid=)[^)]*\)(\x1b\[\d+m)?")
#: What it says of a job whose worker died: that it did, and how often the job is begun again at most.
_LOST = re.compile(r"A worker died or was killed while executing a task")
_RETRIED = re.compile(r"Task .+ failed( due to oom)?\. There are (\d+|infinite) (oom )?retries remaining")

#: Bytes of Ray's object store: jobs pass a few texts.
_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True, kw_only=True)
class RayPool:
    """Runs jobs on the workers of a Ray cluster.

    A job whose worker is killed is begun again elsewhere, and goes on where it was. One that fails by itself is not.

    Attributes:
        workers: Most jobs at a time.
        address: A cluster's address; None makes one on this machine for the time of the jobs.
        num_cpus: CPUs that a job takes of the cluster.
        num_gpus: GPUs that a job takes.
        max_retries: How often a job whose worker died is begun again.
    """

    workers: int
    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    max_retries: int = DEFAULT_RETRIES

    def run(self, jobs: Sequence[Job], listener: JobListener) -> None:
        """Run every job, at most `workers` at a time; events are lost workers, and whatever else Ray says.

        Raises:
            MissingDependencyError: If Ray is not installed.
            BackendError: If there is no cluster, or none of its nodes can ever run such a job.
            Interrupted: On a signal, after the jobs in progress were told to stop.
        """
        # Ray prints into the standard output, where results are.
        with contextlib.redirect_stdout(_RaySays(listener.on_event)), self._cluster() as ray, requested() as requests:
            # Ray's own code cannot be left by an exception: a signal waits until it is looked for here.
            requests.is_deferring = True
            self._check_resources(ray)
            remote = ray.remote(
                num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=self.max_retries, max_calls=1
            )(run_job)
            waiting = list(jobs)
            running: dict[Any, Job] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < self.workers:
                        job = waiting.pop(0)
                        listener.on_begin(job)
                        running[remote.remote(job)] = job
                    done, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
                    for reference in done:
                        listener.on_outcome(self._outcome(ray, reference, running.pop(reference)))
                    if requests.stop is not None:
                        raise Interrupted(requests.stop)
            except Interrupted:
                _stop(ray, list(running))
                raise

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[Any]:
        check_ray()
        # Nothing is sent anywhere unless it was asked for.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Each line as it comes, not one for several that resemble each other.
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        # Ray would kill what its workers have started at once: jobs are told to stop, and save first.
        os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")
        # A job that takes more memory than there is would be begun again for ever.
        os.environ.setdefault("RAY_task_oom_retries", str(self.max_retries))
        import ray

        own: dict[str, Any] = {
            "num_cpus": max(1, math.ceil(self.workers * self.num_cpus)),
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
        }
        try:
            with _own_handlers():
                ray.init(
                    address=self.address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **({} if self.address else own),
                )
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            where = f"no Ray cluster at {self.address}" if self.address else "Ray does not start on this machine"
            needs_token = self.address and "RAY_AUTH_MODE" not in os.environ
            hint = "; one that asks for a token takes RAY_AUTH_MODE=token" if needs_token else ""
            raise BackendError(f"{where}: {str(error).splitlines()[0]}{hint}") from error
        try:
            yield ray
        finally:
            ray.shutdown()

    def _check_resources(self, ray: Any) -> None:
        """Refuse jobs that would wait for ever."""
        for kind, wanted in (("CPU", self.num_cpus), ("GPU", self.num_gpus)):
            most = max((node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]), default=0)
            if wanted > most:
                raise BackendError(
                    f"a job takes {wanted:g} {kind}(s), and no node of the cluster has more than {most:g}"
                )

    def _outcome(self, ray: Any, reference: Any, job: Job) -> JobOutcome:
        try:
            outcome: JobOutcome = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            # The job itself could not be begun, and was not tried again: emtool is another one there, or not there.
            cause = (str(error.cause).strip() or type(error.cause).__name__).splitlines()[0]
            return JobOutcome(name=job.name, problem=f"its worker cannot run it: {cause}")
        except ray.exceptions.RayError as error:
            times = f"its worker was lost {self.max_retries + 1} time(s)"
            return JobOutcome(name=job.name, problem=f"{times}: {type(error).__name__} ({job.log_path})")
        return outcome


class _RaySays(io.TextIOBase):
    """Makes events of the lines that Ray prints."""

    def __init__(self, on_event: EventSink) -> None:
        self._on_event = on_event
        self._rest = ""

    def write(self, text: str) -> int:
        """Take a text; each line that it ends is reported."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if said := _notice_of(line):
                self._on_event(Notice(text=said, is_warning=True))
        return len(text)


def _notice_of(line: str) -> str | None:
    """Return what a line of Ray's says to the user, or None where another line or the job's outcome says it."""
    if (prefix := _PREFIX.match(line)) is None:
        # The rest of a longer text: how to read Ray's own logs, every process by its memory.
        return None
    text = line[prefix.end() :].strip()
    if (match := _RETRIED.match(text)) is not None:
        lost = "killed because memory runs out" if match[3] else "lost"
        times = "" if match[2] == "infinite" else f" ({match[2]} time(s) at most)"
        return f"a worker was {lost}; Ray begins its job again, which goes on where it was{times}"
    return None if not text or _LOST.match(text) else f"Ray: {text}"


def check_ray() -> None:
    """Refuse to go on without Ray, before anything is made.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("--workers needs the package ray: pip install 'emtool[ray]'")


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Put back the handler of SIGTERM that Ray replaces by its own, which ends the process with a code of Ray's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _stop(ray: Any, running: list[Any]) -> None:
    """Tell jobs in progress to stop and give them the time to save; a second Ctrl-C ends the wait, and they save on."""
    for reference in running:
        ray.cancel(reference, force=False)
    if running:
        ray.wait(running, num_returns=len(running), timeout=_STOP_SECONDS)
