"""Checkpoints recorded by several workers, each an ordinary evaluation of its own shard."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from emtool.core.errors import BackendError, CheckpointError
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished
from emtool.core.jobs import Command, Job, JobListener, JobOutcome, Pool, thread_variables, wait_for
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import locked_evaluation
from emtool.core.shards import Shard, absorb, deal, leftover_shards, seed_shard, shards_path

#: How often the records of the workers are counted, in seconds.
_COUNT_SECONDS = 2.0


def record_on_workers(
    run: RunFolder,
    steps: Sequence[int],
    *,
    pool: Pool,
    num_workers: int,
    arguments: Sequence[str],
    threads: int | None,
    num_answers: int | None,
    on_event: EventSink,
) -> None:
    """Have workers record what checkpoints answer and score, into the run's records.

    Args:
        run: The run folder.
        steps: Steps of the checkpoints.
        pool: Runs the workers.
        num_workers: How many share the checkpoints.
        arguments: Options of `emtool evaluate` for each of them.
        threads: Threads of each; None leaves that to the libraries.
        num_answers: Answers that all of them give; None where none are asked for.
        on_event: Where progress is reported.

    Raises:
        BackendError: If a worker failed; what was made is kept.
        CheckpointError: If records cannot be written, or another process evaluates.
    """
    outcomes: list[JobOutcome] = []
    with locked_evaluation(run):
        absorb_leftovers(run)
        parts = deal(steps, num_workers)
        shards = [Shard(path=run.path, number=number) for number in range(len(parts))]
        with _writing(run):
            for shard, part in zip(shards, parts, strict=True):
                seed_shard(shard, part)
        jobs = [_job(shard, part, arguments, threads) for shard, part in zip(shards, parts, strict=True)]
        name = f"evaluating {len(steps)} checkpoints with {len(jobs)} worker(s); their logs are in {shards_path(run)}"
        on_event(PhaseStarted(name=name, total=num_answers, unit="answers"))
        with _counting(shards, on_event):
            pool.run(jobs, JobListener(on_outcome=outcomes.append, on_event=on_event))
        failed = [outcome for outcome in outcomes if outcome.problem is not None]
        for outcome in failed:
            on_event(Notice(text=f"{outcome.name}: {outcome.problem}", is_warning=True))
        held = []
        for shard in shards:
            try:
                # The process of a worker that was lost may still be saving.
                wait_for(shard.evaluation_path)
            except CheckpointError as error:
                held.append(error)
                continue
            with _writing(run):
                absorb(shard)
        if held:
            raise held[0]
        if not failed:
            remove_logs(run)
    if failed:
        raise BackendError(
            f"{len(failed)} of {len(jobs)} workers failed; what was made is kept, and the same command goes on"
        )


def absorb_leftovers(run: RunFolder) -> None:
    """Take what the workers of an evaluation that was stopped have made. The caller holds the evaluation.

    Raises:
        CheckpointError: If records cannot be written, or a worker still runs.
    """
    for shard in leftover_shards(run):
        wait_for(shard.evaluation_path)
        with _writing(run):
            absorb(shard)
    remove_logs(run)


def remove_logs(run: RunFolder) -> None:
    """Remove what workers said, of whom nothing is left to take; a log of one that failed was there to be read."""
    for path in shards_path(run).glob("*.log"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        shards_path(run).rmdir()


def _job(shard: Shard, steps: Sequence[int], arguments: Sequence[str], threads: int | None) -> Job:
    path = shard.path.absolute()
    own = ("--steps", ",".join(map(str, steps)), "--shard", str(shard.number))
    return Job(
        name=f"worker {shard.number}",
        commands=(Command(arguments=("evaluate", str(path), *arguments, *own)),),
        log_path=path / "evaluation" / "workers" / f"{shard.number}.log",
        folder=Path.cwd(),
        locked=(shard.evaluation_path.absolute(),),
        environment=thread_variables(threads),
    )


@contextlib.contextmanager
def _writing(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise run.write_error(error, "collecting what workers made") from error


@contextlib.contextmanager
def _counting(shards: Sequence[Shard], on_event: EventSink) -> Iterator[None]:
    """Report the answers that there are, now and then, while the block runs."""
    done = threading.Event()

    def count() -> None:
        while not done.wait(_COUNT_SECONDS):
            on_event(StepFinished(step=sum(_num_lines(shard.evaluation_path / "answers.jsonl") for shard in shards)))

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    try:
        yield
    finally:
        done.set()
        counter.join()


def _num_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return 0
