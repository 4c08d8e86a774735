"""One writer beside the training: a job at a time, and its error where the training looks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs one job at a time in a thread of its own.

    The thread does not keep the process alive: `wait` before the process may end.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run a job, once the one before it is done.

        Raises:
            BaseException: What the job before it raised.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def check(self) -> bool:
        """Return whether no job is running.

        Raises:
            BaseException: What the last job raised; once.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Return when no job is running.

        Raises:
            BaseException: What the last job raised; once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 -- handed to the thread that trains
            self._error = error
