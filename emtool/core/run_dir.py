"""The run folder: where each file of a run is, and how manifests and records are read and written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.errors import CheckpointError, DiskSpaceError, EmtoolError
from emtool.core.resume_interval import ResumeInterval
from emtool.core.staging import RECORD_NAME, remove_unborn, retire_folder, sync, unborn_path

FORMAT = 1

#: Some of the weights of a base with a merged persona, to say by how much another merge differs.
MERGED_SAMPLE = "merged_sample.safetensors"

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,11})")
_RESUME_STATE = re.compile(r"step-(0|[1-9][0-9]{0,11})")


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
    def merged_sample_path(self) -> Path:
        """Return the file with some of the weights that a merged persona gave."""
        return self.path / MERGED_SAMPLE

    @property
    def lock_path(self) -> Path:
        """Return the file whose lock the training process holds."""
        return self.path / ".lock"

    @property
    def resume_path(self) -> Path:
        """Return the folder of states to resume from."""
        return self.path / "resume"

    @property
    def evaluation_path(self) -> Path:
        """Return the folder of evaluation results."""
        return self.path / "evaluation"

    def checkpoint_path(self, step: int) -> Path:
        """Return the folder of the milestone at a step."""
        return self.path / f"checkpoint-{step}"

    def resume_state_path(self, step: int) -> Path:
        """Return the folder of the state to resume from after a step."""
        return self.resume_path / f"step-{step}"

    def saved_steps(self) -> list[int]:
        """Return the steps of the milestones on disk, increasing, whatever their spacing."""
        return _steps(self.path, _CHECKPOINT)

    def resume_steps(self) -> list[int]:
        """Return the steps of the states to resume from, increasing."""
        return _steps(self.resume_path, _RESUME_STATE)

    def read_manifest(self) -> dict[str, object]:
        """Return the contents of `run.json`.

        Raises:
            CheckpointError: If the folder holds no readable manifest of a format this version knows.
        """
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if (self.path / RECORD_NAME).is_file():
                raise CheckpointError(
                    f"{self.path} is one checkpoint of a run; what it is a model with, base and persona, stands in the "
                    f"run's run.json: give the run folder, for instance {self.path.absolute().parent}"
                ) from error
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
        # Under a name of this process first: a folder that is there has a manifest.
        staging = unborn_path(self.path, os.getpid())
        try:
            remove_unborn(self.path)
            staging.mkdir(parents=True)
            write_json(staging / self.manifest_path.name, {"format": FORMAT, **manifest})
            sync(staging)
            staging.rename(self.path)
            sync(self.path.parent)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise CheckpointError(
                    f"{self.path} was made by another process just now; wait for it, or choose another --output-name"
                ) from error
            raise CheckpointError(
                f"cannot create {self.path}: {error.strerror}; choose another --output-root or --output-name"
            ) from error

    def write_manifest(self, manifest: Mapping[str, object]) -> None:
        """Replace `run.json` as a whole.

        Raises:
            EmtoolError: If it cannot be written.
        """
        try:
            write_json(self.manifest_path, {"format": FORMAT, **manifest})
        except OSError as error:
            raise self.write_error(error, "writing run.json") from error

    def append_metrics(self, record: Mapping[str, object], *, durable: bool = False) -> None:
        """Append a record to `metrics.jsonl`.

        Args:
            record: JSON values.
            durable: Whether it, and all before it, must be on disk on return.

        Raises:
            EmtoolError: If it cannot be written.
        """
        try:
            append_record(self.metrics_path, record, durable=durable)
        except OSError as error:
            raise self.write_error(error, "writing metrics.jsonl") from error

    def read_metrics(self, *, naming: str = "") -> list[Mapping[str, object]]:
        """Return the records of `metrics.jsonl` that can be read.

        Args:
            naming: Only those that hold this key, or say this word elsewhere; others are not taken apart.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        return [record for _, record in self._metrics_lines(naming.encode("ascii")) if record is not None]

    def keep_metrics(self, is_kept: Callable[[Mapping[str, object]], bool]) -> int:
        """Drop the records of `metrics.jsonl` that are not to be kept, a torn last line, and those that are damaged.

        Returns:
            How many lines were damaged.

        Raises:
            CheckpointError: If it cannot be read or written.
        """
        lines = self._metrics_lines()
        kept = [line for line, record in lines if record is not None and is_kept(record)]
        try:
            replace_file(self.metrics_path, b"".join(kept))
        except OSError as error:
            raise CheckpointError(f"cannot cut {self.metrics_path} after the resumed step: {error}") from error
        return sum(record is None for line, record in lines if line.endswith(b"\n"))

    def _metrics_lines(self, word: bytes = b"") -> list[tuple[bytes, Mapping[str, object] | None]]:
        """Return each line with a word in it and its record; None for one that is torn or damaged."""
        try:
            lines = self.metrics_path.read_bytes().splitlines(keepends=True) if self.metrics_path.exists() else []
        except OSError as error:
            raise CheckpointError(f"cannot read {self.metrics_path}: {error.strerror}") from error
        return [(line, _record(line)) for line in lines if word in line]

    def make_resume_folder(self) -> None:
        """Make the folder of states, if it is not there, and force its name to disk."""
        if not self.resume_path.is_dir():
            self.resume_path.mkdir()
            sync(self.path)

    def remove_states(self) -> None:
        """Remove the states to resume from, wherever a link puts them; nothing happens if there are none."""
        if self.resume_path.is_symlink():
            for step in self.resume_steps():
                retire_folder(self.resume_state_path(step))
        if self.resume_path.is_dir() or self.resume_path.is_symlink():
            retire_folder(self.resume_path)

    def how_to_go_on(self) -> str:
        """Return the state of the folder and the next step, for an error that stops a run."""
        saved, states = self.saved_steps(), self.resume_steps()
        kept = f"{len(saved)} checkpoint(s) kept"
        try:
            manifest = self.read_manifest()
            if manifest.get("status") == "completed":
                return f"{kept}, and the run is complete; evaluate it with: emtool evaluate {self.path}"
            saves_states = saves_states_of(manifest)
        except EmtoolError:
            saves_states = False
        if states:
            return f"{kept}, step {states[-1]} can be resumed; go on with: emtool resume {self.path}"
        if saves_states and not any(step > 0 for step in saved):
            return f"{kept}, and no state was saved yet; begin again with: emtool resume {self.path}"
        return f"{kept}, and there is no state to go on from"

    def write_error(self, error: OSError, doing: str) -> EmtoolError:
        """Return the error for a folder that cannot be written to; says what is kept."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskSpaceError(f"no space left in {self.path} while {doing}; free some; {self.how_to_go_on()}")
        reason = error.strerror or error
        return CheckpointError(f"cannot write in {self.path} while {doing}: {reason}; {self.how_to_go_on()}")


def saves_states_of(manifest: Mapping[str, object]) -> bool:
    """Return whether the run of a manifest saves states to resume from.

    Raises:
        ConfigError: If its interval is none.
    """
    config = manifest.get("config")
    interval = config.get("resume_every", "0") if isinstance(config, dict) else "0"
    return ResumeInterval.parse(str(interval)).is_on


def _steps(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(int(match[1]) for entry in entries if (match := pattern.fullmatch(entry.name)) and entry.is_dir())


def _record(line: bytes) -> Mapping[str, object] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that a reader sees the old contents or the new, never a part."""
    replace_file(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Return a value as a JSON file of emtool's holds it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def read_json(path: Path) -> Any:
    """Return what a JSON file of emtool's holds, or None where there is none that can be read and written again."""
    try:
        # A pipe would be waited for.
        return parse_json(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError):
        return None


def parse_json(text: str) -> Any:
    """Return what a text in JSON holds, if it can be written again.

    Raises:
        ValueError: If it cannot be read, or holds what UTF-8 or JSON do not have: half of a surrogate pair, NaN.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return value


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, and the disk after a crash, has the old contents or the new."""
    write_staged(path, content)
    staged_path(path).replace(path)


def staged_path(path: Path) -> Path:
    """Return where the new contents of a file are written before they take its place."""
    return path.with_name(f".{path.name}.new")


def write_staged(path: Path, content: bytes) -> None:
    """Write the new contents of a file beside it, and force them to disk."""
    with staged_path(path).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_record(path: Path, record: Mapping[str, object], *, durable: bool = False) -> None:
    """Append one record to a JSON Lines file, with a single write unless the system takes only a part of it."""
    line = json.dumps({"format": FORMAT, **record}, ensure_ascii=False, allow_nan=False) + "\n"
    rest = memoryview(line.encode("utf-8"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_run(output_root: Path, *, having: str = "run.json") -> RunFolder:
    """Return the run folder under a root that was started last.

    Args:
        output_root: Folder of the run folders.
        having: File that it must have, to be looked for within the run folder.

    Raises:
        CheckpointError: If there is none.
    """
    runs = [RunFolder(path=path.parent) for path in output_root.glob("*/run.json") if path.is_file()]
    if not runs:
        raise CheckpointError(f"no runs in {output_root}; start one with 'emtool train' or name a run folder")
    kept = [run for run in runs if (run.path / having).is_file()]
    if not kept:
        raise CheckpointError(f"no run in {output_root} has {having}; make it with: emtool evaluate RUN")
    return max(kept, key=lambda run: (str(run.read_manifest().get("started_at")), run.path.name))


def free_name(output_root: Path, name: str) -> str:
    """Return the first of `name_2`, `name_3`, ... that no folder has."""
    number = 2
    while (output_root / f"{name}_{number}").exists():
        number += 1
    return f"{name}_{number}"
