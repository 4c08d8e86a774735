"""Disk space: what is free, what a folder takes, how bytes are read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from emtool.core.errors import ConfigError


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
    """Return the bytes of the files below a folder; a file with several hard links there counts once."""
    stats = (file.stat() for file in path.rglob("*") if file.is_file())
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def format_bytes(count: int) -> str:
    """Return a byte count for reading, in binary units: 1536 becomes "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            digits = {"B": 0, "GiB": 2}.get(unit, 1)
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
