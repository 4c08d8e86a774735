"""Append-only JSON Lines files: what was made is kept as soon as it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.errors import CheckpointError
from emtool.core.run_dir import FORMAT, append_record


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """A JSON Lines file that only grows.

    Each record is appended with one write that ends in a line break. A last line without one was torn when its writer
    was killed: it is not read, and dropped before the next record is written. One process writes at a time.

    Attributes:
        path: The file, which may not exist yet; its folder must when something is appended.
    """

    path: Path

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the whole records in the order in which they were written; lines that are no record are passed over.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        for _, record in self.read_places():
            yield record

    def read_places(self, *, naming: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each whole record after its place in the file: the bytes before it.

        Args:
            naming: Plain letters and digits; lines without them are not even parsed.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        place, wanted = 0, naming.encode("ascii", "backslashreplace")
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if wanted in line and (record := _record(line)) is not None:
                        yield place, record
                    place += len(line)
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def read_at(self, places: Iterable[int]) -> Iterator[dict[str, Any] | None]:
        """Yield the record at each place, None where there is none any more.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                for place in places:
                    file.seek(place)
                    yield _record(file.readline())
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def end_torn_line(self) -> None:
        """Drop a last line that its writer did not come to end. Call it once before the first `append`.

        Raises:
            OSError: If the file cannot be changed.
        """
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            end = file.seek(0, 2)
            while end:
                begin = max(0, end - (1 << 16))
                file.seek(begin)
                found = file.read(end - begin).rfind(b"\n")
                if found >= 0:
                    end = begin + found + 1
                    break
                end = begin
            file.truncate(end)

    def append(self, record: Mapping[str, object], *, durable: bool = False) -> int:
        """Append one record, and return its place.

        Args:
            record: JSON values; a float must be finite.
            durable: Whether it, and all before it, must be on disk on return.

        Raises:
            OSError: If it cannot be written.
        """
        place = self.path.stat().st_size if self.path.exists() else 0
        append_record(self.path, record, durable=durable)
        return place


def settings_id(settings: Mapping[str, object]) -> str:
    """Return a short name for settings: equal settings have equal names, whatever their order.

    Returns:
        The first 12 hexadecimal digits of the SHA-256 of their JSON text.
    """
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def text_sha256(text: str) -> str:
    """Return what pins a text; half of a surrogate pair, which JSON can hold, counts as it is."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None
