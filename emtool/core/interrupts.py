"""Signals: an exception where nothing is lost by stopping at once, a request where a step is in progress."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from emtool.core.errors import EmtoolError, Interrupted

_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass
class Requests:
    """What signals have asked of a training run.

    Attributes:
        stop: Number of the signal that asked to save and stop; None if none did.
        save: Whether SIGUSR1 asked to save and go on.
        is_deferring: Whether a stop waits for the run to look here, because a step is in progress.
    """

    stop: int | None = None
    save: bool = False
    is_deferring: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted` while the block runs; ignore those that follow it.

    SIGUSR1, which asks a training to save, gets a line where there is nothing to save, instead of ending the process.

    Outside the main thread, where Python allows no signal handlers, nothing changes.
    """
    raised: list[int] = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        _ignore_stopping()
        raised.append(signum)
        raise Interrupted(signum)

    def answer(_signum: int, _frame: FrameType | None) -> None:
        # Not through sys.stderr, which may be in the middle of a line.
        with contextlib.suppress(OSError):
            os.write(2, b"emtool: SIGUSR1: there is nothing to save now\n")

    with _handlers({**dict.fromkeys(_STOPPING, stop), "SIGUSR1": answer}), _still_interrupted(raised):
        yield


@contextlib.contextmanager
def requested() -> Iterator[Requests]:
    """Turn SIGUSR1 into a request while the block runs, and SIGINT, SIGTERM and SIGHUP while it defers them.

    Raises:
        Interrupted: At a signal to stop while nothing is deferred, and at a SIGINT when a stop waits already.
    """
    requests = Requests()
    raised: list[int] = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        if not requests.is_deferring or (requests.stop is not None and signum == signal.SIGINT):
            _ignore_stopping()
            raised.append(signum)
            raise Interrupted(signum)
        requests.stop = requests.stop or signum

    def save(_signum: int, _frame: FrameType | None) -> None:
        requests.save = True

    with _handlers({**dict.fromkeys(_STOPPING, stop), "SIGUSR1": save}), _still_interrupted(raised):
        yield requests


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Let an interruption say that nothing was lost, where a command that is given again goes on where it was."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(stop.signum, "what was made is kept, and the same command goes on") from stop


@contextlib.contextmanager
def _still_interrupted(raised: Sequence[int]) -> Iterator[None]:
    """Turn what a library made of an interruption, an error of its own, into the interruption again.

    Args:
        raised: Signals that were raised as exceptions. What emtool or the system says while it stops is kept.
    """
    try:
        yield
    except (EmtoolError, OSError):
        raise
    except Exception as error:
        if not raised:
            raise
        raise Interrupted(raised[0]) from error


@contextlib.contextmanager
def _handlers(handlers: dict[str, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    known = {getattr(signal, name): handler for name, handler in handlers.items() if name in signal.Signals.__members__}
    previous = {number: signal.signal(number, handler) for number, handler in known.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore_stopping() -> None:
    for name in _STOPPING:
        if name in signal.Signals.__members__:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
