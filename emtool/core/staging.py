"""Folders that appear complete or not at all.

A folder is written under a hidden name beside its place: each file is forced to disk, the record with the size and hash
of every file comes last, then one rename publishes it and the parent folder is forced to disk. Whoever sees the folder
under its name sees all of it. Only `os` writes here, so that a test can fail or kill at each call.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

#: Holds the size and hash of every other file of a folder.
RECORD_NAME = "checkpoint.json"
#: The record's key for the hash of all else that it says.
RECORD_HASH = "record_sha256"
STAGING_SUFFIX = ".staging"

_BUFFER_BYTES = 1 << 20

#: Made once: a run may have thousands of records.
_SORTED = json.JSONEncoder(sort_keys=True, allow_nan=False)


class FileRecord(NamedTuple):
    """What a file must hold.

    Attributes:
        bytes: Its size.
        sha256: SHA-256 of its contents, in hexadecimal.
    """

    bytes: int
    sha256: str


class StagedFolder:
    """A folder that is being written.

    Args:
        target: Where it will appear; its parent must exist. What an earlier attempt left of it is removed.

    Raises:
        OSError: If it cannot be made; so do all methods that write.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = staging_path(target)
        self.files: dict[str, FileRecord] = {}
        remove_folder(self.path)
        self.path.mkdir()

    @classmethod
    def adopted(cls, path: Path, *, target: Path) -> Self:
        """Return a staged folder of files that a library wrote; they are hashed and forced to disk.

        Args:
            path: The folder, on the file system of the target.
            target: Where it will appear.
        """
        staged = cls.__new__(cls)
        staged.target, staged.path, staged.files = target, path, {}
        for file in sorted(path.rglob("*")):
            if file.is_file():
                staged.files[file.relative_to(path).as_posix()] = file_record(file)
                sync(file)
        return staged

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the files so far."""
        return sum(record.bytes for record in self.files.values())

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a new file for writing; when the block ends it is on disk and recorded."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        raw = _HashingFile(self.path / name)
        try:
            with io.BufferedWriter(raw, _BUFFER_BYTES) as file:
                yield file
                file.flush()
                os.fsync(raw.fileno())
        finally:
            raw.close()
        self.files[name] = FileRecord(bytes=raw.num_bytes, sha256=raw.sha256.hexdigest())

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""
        with self.open(name) as file:
            file.write(content)

    def link(self, name: str, source: Path, record: FileRecord) -> None:
        """Add a file that is on disk already, as a hard link, or as a copy where links are impossible.

        Args:
            name: Its name here; may lie in a folder below.
            source: The file, which never changes.
            record: Its size and hash.

        Raises:
            OSError: If it cannot be added, or what was copied is not what the record says.
        """
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.hardlink_to(source)
        except OSError:
            with self.open(name) as file, source.open("rb") as original:
                shutil.copyfileobj(original, file, _BUFFER_BYTES)
            if self.files[name] != record:
                raise OSError(errno.EIO, "it has changed since it was saved", str(source)) from None
        self.files[name] = record

    def finish(self, record: Mapping[str, object]) -> None:
        """Write the record with the files' sizes and hashes and its own, and force the folder to disk."""
        files = {name: entry._asdict() for name, entry in sorted(self.files.items())}
        self.write(RECORD_NAME, record_content({**record, "files": files}))
        for folder in (*sorted(path for path in self.path.rglob("*") if path.is_dir()), self.path):
            sync(folder)

    def publish(self) -> None:
        """Make the finished folder appear under its name, which must be free, by one rename."""
        self.path.rename(self.target)
        sync(self.target.parent)

    def discard(self) -> None:
        """Remove what was written; nothing happens if it is gone."""
        with contextlib.suppress(OSError):
            remove_folder(self.path)


def record_content(values: Mapping[str, object]) -> bytes:
    """Return the contents of the file of a record: its values, and the hash by which a change of any is found."""
    signed = {**values, RECORD_HASH: record_sha256(values)}
    return (json.dumps(signed, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def record_sha256(values: Mapping[str, object]) -> str:
    """Return the SHA-256, in hexadecimal, of a record without its own hash, whatever the order of its keys.

    Raises:
        ValueError: If it holds a number that is not finite.
    """
    others = {key: value for key, value in values.items() if key != RECORD_HASH}
    return hashlib.sha256(_SORTED.encode(others).encode("ascii")).hexdigest()


def staging_path(target: Path) -> Path:
    """Return the hidden folder in which a folder is written; every process computes the same."""
    return target.with_name(f".{target.name}{STAGING_SUFFIX}")


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder that a library wrote into a new one, every file forced to disk.

    Raises:
        OSError: If it cannot be written; nothing is left then.
    """
    staged = StagedFolder(target)
    try:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            staged.write(path.relative_to(source).as_posix(), path.read_bytes())
        for folder in (*sorted(path for path in staged.path.rglob("*") if path.is_dir()), staged.path):
            sync(folder)
        remove_folder(target)
        staged.publish()
    finally:
        staged.discard()


def retire_folder(path: Path) -> None:
    """Remove a published folder so that no part of it is ever seen under its name."""
    hidden = staging_path(path.with_name(f"{path.name}.old"))
    remove_folder(hidden)
    path.rename(hidden)
    remove_folder(hidden)


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it; of a link, only the link. Nothing happens if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)


def leftover_folders(parent: Path) -> list[Path]:
    """Return the staging folders in a folder: of writers that were killed, once no writer is at work."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.name.startswith(".") and path.suffix == STAGING_SUFFIX)


def unborn_path(path: Path, process: int) -> Path:
    """Return the hidden folder in which a process makes a folder that others may be making as well."""
    return path.with_name(f".{path.name}.{process}.new")


def remove_unborn(path: Path) -> None:
    """Remove what processes that were killed while they made a folder have left beside it."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.([1-9][0-9]{{0,8}})\.new")
    matches = [pattern.fullmatch(entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    for match in matches:
        if match and not _is_alive(int(match[1])):
            remove_folder(path.with_name(match[0]))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def file_record(path: Path) -> FileRecord:
    """Return the size and hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(bytes=file.tell(), sha256=digest.hexdigest())


def publish_folder(staging: Path, target: Path) -> None:
    """Force a folder that a library wrote to disk and give it its name by one rename.

    Args:
        staging: The folder, on the same file system.
        target: Its name from now on; must not exist.
    """
    for path in (*sorted(staging.rglob("*")), staging):
        sync(path)
    staging.rename(target)
    sync(target.parent)


class _HashingFile(io.RawIOBase):
    """A new file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        count = os.write(self._descriptor, view)
        self.sha256.update(view[:count])
        self.num_bytes += count
        return count

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
