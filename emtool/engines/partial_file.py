"""What has come of a download, kept so that a later attempt goes on from it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emtool.core.errors import BackendError
from emtool.core.run_dir import write_json


@dataclass(frozen=True, kw_only=True)
class PartialFile:
    """The beginning of a file, and beside it what the server said about the whole.

    Attributes:
        path: Where it lies.
    """

    path: Path

    @property
    def num_bytes(self) -> int:
        """Return the bytes that have come."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def validator(self) -> str | None:
        """Return what the server names this very content by, an ETag or a date; None if it gave neither."""
        try:
            value = json.loads(self._record_path.read_text(encoding="utf-8"))["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return value if isinstance(value, str) else None

    @property
    def can_go_on(self) -> bool:
        """Return whether the rest can be asked for on condition that the file is still the same."""
        return self.num_bytes > 0 and self.validator is not None

    @property
    def _record_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def begin(self, *, url: str, validator: str | None) -> None:
        """Empty the file, and record what will come.

        Args:
            url: Its address, without what may be secret.
            validator: What the server names the content by.
        """
        self.path.write_bytes(b"")
        write_json(self._record_path, {"format": 1, "url": url, "validator": validator})

    def remove(self) -> None:
        """Remove the file and its record; nothing happens if they are not there."""
        for path in (self.path, self._record_path):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes off while the block runs.

        Raises:
            BackendError: If another process holds it.
        """
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BackendError("another process is downloading this file; wait for it, then try again") from error
            yield
        finally:
            os.close(descriptor)
