"""`checkpoint.json`: what a folder says about itself, read without trusting it."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from emtool.core.errors import CheckpointError, shown
from emtool.core.run_dir import FORMAT
from emtool.core.staging import RECORD_HASH, RECORD_NAME, FileRecord, record_sha256

#: A record names about ten files in a few kilobytes.
MAX_RECORD_BYTES = 1 << 20

#: Above any step or size, and still exact in every JSON reader.
_MAX_COUNT = 2**53
#: What file systems allow for one part of a path.
_MAX_NAME_BYTES = 255
#: Parts of a path that name nothing, or lead elsewhere.
_NO_NAMES = ("", ".", "..")
#: What the names of nearly all files match, so that each need not be taken apart.
_USUAL_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """The contents of `checkpoint.json`.

    Attributes:
        step: Optimizer step.
        run_id: The run that it belongs to.
        requires: What must be present to use it: `base` and `persona`, as in the manifest's lineage.
        files: Name, relative to the folder, to what the file must hold.
        is_sharded: Whether a Trainer wrote the state by itself, in files that only it knows.
    """

    step: int
    run_id: str
    requires: Mapping[str, object]
    files: Mapping[str, FileRecord]
    is_sharded: bool = False


def read_record(folder: Path) -> CheckpointRecord:
    """Return a folder's record, which is as it was written; the files are unchecked, and may be links.

    Raises:
        CheckpointError: If the folder is a link, or the record cannot be read, was changed, or names what cannot be a
            file of the folder.
    """
    # Thousands of checkpoints have a record each: no object is made for its path.
    path = f"{folder}/{RECORD_NAME}"
    if os.path.islink(folder):  # noqa: PTH114
        raise CheckpointError(f"{folder} is a link and is not used; put the folder itself in its place")
    try:
        values = json.loads(_read_regular(folder, path).decode("utf-8"))
        if type(values["format"]) is not int or values["format"] != FORMAT:
            raise CheckpointError(f"{path} is not of format {FORMAT}; use the emtool that wrote it")
        if values[RECORD_HASH] != record_sha256(values):
            raise CheckpointError(f"{folder} is damaged: {RECORD_NAME} has changed since it was saved")
        requires = values["requires"]
        requires["base"], requires["persona"]
        return CheckpointRecord(
            step=_count(values["step"]),
            run_id=_text(values["run_id"]),
            requires=requires,
            files={
                name if _is_usual(name) else _file_name(path, name): _file(entry["bytes"], entry["sha256"])
                for name, entry in values["files"].items()
            },
            is_sharded=values.get("sharded") is True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is damaged: cannot read {RECORD_NAME} ({error!r})") from error


def _read_regular(folder: Path, path: str) -> bytes:
    """Return the contents of a record, which may be a link, a pipe that would be waited for, or endless.

    Raises:
        CheckpointError: If it is.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        descriptor = None
    if descriptor is not None:
        try:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_RECORD_BYTES:
                return os.read(descriptor, found.st_size)
        finally:
            os.close(descriptor)
    raise CheckpointError(f"{folder} is damaged: {RECORD_NAME} is not a regular file or absurdly large")


# By type as well: true is no number of bytes, and equal to one.
@lru_cache(maxsize=1024, typed=True)
def _file(num_bytes: object, sha256: object) -> FileRecord:
    """Return what a file must hold; the checkpoints of a run share half of their files."""
    if not _SHA256.fullmatch(_text(sha256)):
        raise ValueError(f"{shown(sha256)} is not a SHA-256")
    return FileRecord(_count(num_bytes), _text(sha256))


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"{shown(value)} is not a whole number from 0 to 2^53")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is not text")
    return value


@lru_cache(maxsize=1024)
def _is_usual(name: str) -> bool:
    """Return whether a name need not be taken apart; the checkpoints of a run have the same few."""
    return _USUAL_NAME.fullmatch(name) is not None


def _file_name(path: str, name: str) -> str:
    parts = name.split("/")
    is_plain = not any(part in _NO_NAMES for part in parts) and name.isprintable()
    if not is_plain or any(len(part.encode("utf-8")) > _MAX_NAME_BYTES for part in parts):
        raise CheckpointError(f"{path} names {shown(name)}, which is not a file of this folder")
    return name
