"""Many requests in flight, their results handed over one by one in the caller's thread.

The requests run in an event loop of a thread of its own. A signal's exception is raised in the main thread, where it
finds the caller between two results; within an event loop it would end in whichever task happens to run.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

from emtool.core.errors import BackendError, Interrupted
from emtool.engines.openai_client import Connection, Failure, JsonObject, Request, Server, import_openai

#: Takes the index of a request and what came of it.
ReplySink = Callable[[int, JsonObject | Failure], None]

#: How many requests in a row may fail by what retrying should have mended, before the server counts as down: a multiple
#: of those in flight, and at least so many.
_DOWN_FACTOR, _DOWN_LEAST = 2, 16

#: How long the requests' thread is waited for once it has been told to stop: a look-up of a name cannot be cancelled.
_STOP_SECONDS = 5.0


def ask_once(server: Server, request: Request) -> JsonObject | Failure:
    """Send one request and return what came of it, with retries.

    Raises:
        MissingDependencyError: If the `openai` package is not installed.
    """
    replies: list[JsonObject | Failure] = []
    _Pump(server=server, requests=iter([request]), concurrency=1, ends_early=False).run(
        lambda _index, reply: replies.append(reply)
    )
    return replies[0]


def run_many(
    server: Server, requests: Iterable[Request], on_reply: ReplySink, *, concurrency: int = 32, num_failed: int = 0
) -> int:
    """Send requests, several at a time, and hand over what comes of each, in the order in which they finish.

    Args:
        server: The server.
        requests: The requests, made one by one as they are sent, in another thread.
        on_reply: Called in this thread. What fails for one request, after the retries, is its `Failure`.
        concurrency: Most requests in flight.
        num_failed: How many requests in a row had failed before these, as the call before returned it: a server that is
            down shows it over many short calls as well.

    Returns:
        How many requests in a row have failed at the end, by what retrying should have mended.

    Raises:
        BackendError: If every further request would fail as well: a refused key, no such model, a server that is
            down. What finished before has been handed over.
        MissingDependencyError: If the `openai` package is not installed.
        Interrupted: As soon as a signal asks to stop; requests in flight are dropped, what finished before has been
            handed over.
    """
    pump = _Pump(
        server=server, requests=iter(requests), concurrency=concurrency, ends_early=True, num_failed=num_failed
    )
    pump.run(on_reply)
    return pump.num_failed


@dataclass(kw_only=True)
class _Pump:
    """Requests on their way.

    Attributes:
        server: The server.
        requests: Those that have not been sent.
        concurrency: Most in flight.
        ends_early: Whether a failure that others would share ends it all.
        num_failed: How many in a row have failed by what retrying should have mended.
    """

    server: Server
    requests: Iterator[Request]
    concurrency: int
    ends_early: bool
    num_failed: int = 0
    _finished: SimpleQueue[tuple[int, JsonObject | Failure] | None] = field(default_factory=SimpleQueue)
    _loop: asyncio.AbstractEventLoop | None = None
    _main: asyncio.Task[None] | None = None
    _fatal: str | None = None
    _error: BaseException | None = None
    _is_stopping: bool = False

    def run(self, on_reply: ReplySink) -> None:
        import_openai()
        thread = threading.Thread(target=self._work, name="emtool-requests", daemon=True)
        try:
            thread.start()
            while self._hand_over(on_reply):
                pass
        except (KeyboardInterrupt, Interrupted):
            self._stop(thread)
            while not self._finished.empty() and self._hand_over(on_reply):
                pass
            raise
        finally:
            self._stop(thread)
        if self._error is not None:
            raise self._error
        if self._fatal is not None:
            raise BackendError(self._fatal)

    def _hand_over(self, on_reply: ReplySink) -> bool:
        # Taken before it is handed over: an interrupt in between may lose one result, and never doubles a record.
        item = self._finished.get()
        if item is None:
            return False
        on_reply(*item)
        return True

    def _stop(self, thread: threading.Thread) -> None:
        self._is_stopping = True
        if self._loop is not None and self._main is not None:
            # The loop closes by itself when all is done.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._main.cancel)
        if thread.is_alive():
            thread.join(timeout=_STOP_SECONDS)

    def _work(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(self._send_all())
        except BaseException as error:  # noqa: BLE001 -- handed to the thread that waits
            self._error = error
        finally:
            self._finished.put(None)

    async def _send_all(self) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        if self._is_stopping:
            return
        numbered = enumerate(self.requests)
        async with self.server.connect() as connection, asyncio.TaskGroup() as group:
            for _ in range(self.concurrency):
                group.create_task(self._send(numbered, connection))

    async def _send(self, numbered: Iterator[tuple[int, Request]], connection: Connection) -> None:
        for index, request in numbered:
            if self._is_stopping:
                return
            reply = await connection.ask(request)
            if self.ends_early and isinstance(reply, Failure) and reply.is_fatal:
                self._end(fatal_message(self.server, reply))
                return
            self._finished.put((index, reply))
            is_down = isinstance(reply, Failure) and reply.is_passing
            self.num_failed = self.num_failed + 1 if is_down else 0
            if self.ends_early and self.num_failed >= max(_DOWN_FACTOR * self.concurrency, _DOWN_LEAST):
                assert isinstance(reply, Failure)
                self._end(
                    f"{self.server.address.url} failed {self.num_failed} requests in a row: {reply.text}; see whether "
                    "it is up, and run the same command again"
                )
                return

    def _end(self, reason: str) -> None:
        if self._fatal is None and self._main is not None:
            self._fatal = reason
            self._main.cancel()


def fatal_message(server: Server, failure: Failure) -> str:
    """Return one line for a failure that every request would share, with what to do."""
    url, name = server.address.url, server.key.variable
    if failure.status in {401, 402, 403, 429}:
        given = f"the key in {name}" if server.key.value is not None else f"a request without a key ({name} is not set)"
        return f"{url} refuses {given} ({failure.text}); set a valid one and run the same command again"
    if failure.status == 404:
        return f"{url} does not have what was asked for ({failure.text}); check the model's name and the base URL"
    if failure.status is not None and failure.status < 400:
        return f"{url} redirects elsewhere ({failure.text}), where no key is sent; give the address that it leads to"
    return f"{url} cannot be used: {failure.text}"
