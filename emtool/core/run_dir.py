"""The run folder: where each file of a run is, and how manifests and records are read and written."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emtool.core.errors import CheckpointError, DiskSpaceError, EmtoolError

FORMAT = 1

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run's folder, which may not exist yet.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def manifest_path(self) -> Path:
        """Return the path of `run.json`."""
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        """Return the path of `metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def evaluation_path(self) -> Path:
        """Return the folder of evaluation results."""
        return self.path / "evaluation"

    def checkpoint_path(self, step: int) -> Path:
        """Return the folder of the milestone at a step."""
        return self.path / f"checkpoint-{step}"

    def saved_steps(self) -> list[int]:
        """Return the steps of the milestones on disk, increasing, whatever their spacing."""
        if not self.path.is_dir():
            return []
        matches = (_CHECKPOINT.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def read_manifest(self) -> dict[str, object]:
        """Return the contents of `run.json`.

        Raises:
            CheckpointError: If the folder holds no readable manifest of a format this version knows.
        """
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.path} is not a run folder (no run.json); give the folder that 'emtool train' wrote"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read {self.manifest_path}: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CheckpointError(f"{self.manifest_path} is not of format {FORMAT}; use the emtool that wrote it")
        return manifest

    def create(self, manifest: Mapping[str, object]) -> None:
        """Make the folder, which must not exist, with its manifest.

        Raises:
            CheckpointError: If it cannot be made.
        """
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot create {self.path}: {error.strerror}; choose another --output-root or --output-name"
            ) from error
        self.write_manifest(manifest)

    def write_manifest(self, manifest: Mapping[str, object]) -> None:
        """Replace `run.json` as a whole.

        Raises:
            EmtoolError: If it cannot be written.
        """
        try:
            write_json(self.manifest_path, {"format": FORMAT, **manifest})
        except OSError as error:
            raise self.write_error(error, "writing run.json") from error

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """Append a record to `metrics.jsonl`.

        Raises:
            EmtoolError: If it cannot be written.
        """
        try:
            append_record(self.metrics_path, record)
        except OSError as error:
            raise self.write_error(error, "writing metrics.jsonl") from error

    def write_error(self, error: OSError, doing: str) -> EmtoolError:
        """Return the error for a folder that cannot be written to; says what is kept."""
        kept = f"{len(self.saved_steps())} earlier checkpoints are whole"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskSpaceError(f"no space left in {self.path} while {doing}; {kept}; free some and train again")
        return CheckpointError(f"cannot write in {self.path} while {doing}: {error.strerror or error}; {kept}")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that a reader sees the old contents or the new, never a part."""
    staged = path.with_name(f".{path.name}.new")
    with staged.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def publish_folder(staging: Path, target: Path) -> None:
    """Make a finished folder appear under its name, complete and durable, by one rename.

    Args:
        staging: The folder, on the same file system.
        target: Its name from now on; must not exist.
    """
    for path in (*sorted(staging.rglob("*")), staging):
        _sync(path)
    staging.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_record(path: Path, record: Mapping[str, object]) -> None:
    """Append one record to a JSON Lines file with a single write."""
    line = json.dumps({"format": FORMAT, **record}, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode("utf-8"))


def newest_run(output_root: Path) -> RunFolder:
    """Return the run folder under a root that was started last.

    Raises:
        CheckpointError: If there is none.
    """
    manifests = [path for path in output_root.glob("*/run.json") if path.is_file()]
    if not manifests:
        raise CheckpointError(f"no runs in {output_root}; start one with 'emtool train' or name a run folder")
    runs = [RunFolder(path=path.parent) for path in manifests]
    return max(runs, key=lambda run: (str(run.read_manifest().get("started_at")), run.path.name))


def free_name(output_root: Path, name: str) -> str:
    """Return the first of `name_2`, `name_3`, ... that no folder has."""
    number = 2
    while (output_root / f"{name}_{number}").exists():
        number += 1
    return f"{name}_{number}"
