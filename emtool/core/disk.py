"""Disk space: what is free, what a folder takes, how bytes are read."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from emtool.core.errors import ConfigError

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def free_bytes(path: Path) -> int:
    """Return the free space of the file system that a folder is on or would be created on.

    Raises:
        ConfigError: If neither the folder nor any parent of it can be looked at.
    """
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot look at {folder} ({error.strerror}); choose another --output-root") from error
    raise ConfigError(f"no part of {path} exists; choose another --output-root")


def folder_bytes(path: Path) -> int:
    """Return the bytes of the files below a folder; a file with several hard links there counts once.

    What another process removes meanwhile is not counted.
    """
    sizes: dict[tuple[int, int], int] = {}
    folders = [os.fspath(path)]
    while folders:
        # As with os.walk, a folder that cannot be listed is passed over.
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif not entry.is_dir():
                        found = entry.stat()
                        sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def is_writable(path: Path) -> bool:
    """Return whether a folder, or the nearest folder above it that exists, can be written to."""
    real = Path(os.path.realpath(path))
    return next((os.access(folder, os.W_OK) for folder in (real, *real.parents) if folder.exists()), False)


def format_bytes(count: int, *, unit: str | None = None) -> str:
    """Return a byte count for reading, in binary units: 1536 becomes "1.5 KiB".

    Args:
        count: Bytes.
        unit: The unit to use, of `UNITS`; None takes the largest that gives at least 1.
    """
    shown = unit or byte_unit(count)
    exponent = UNITS.index(shown)
    digits = 0 if exponent == 0 else 1 if exponent < UNITS.index("GiB") else 2
    return f"{count / 1024**exponent:.{digits}f} {shown}"


def byte_unit(count: int) -> str:
    """Return the unit that a byte count is read in."""
    exponent = 0
    while exponent + 1 < len(UNITS) and count >= 1024 ** (exponent + 1):
        exponent += 1
    return UNITS[exponent]
