"""Scores kept as soon as they are made, so that an evaluation that stops goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.data import file_sha256
from emtool.core.integrity import ADAPTER_WEIGHTS
from emtool.core.run_dir import FORMAT, RunFolder, append_record


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """`evaluation/scores.jsonl`: the margins of each milestone, with what shaped them.

    Attributes:
        run: The run folder.
        settings: What must be equal for scores to be used again: device, dtype, items.
    """

    run: RunFolder
    settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Return the file."""
        return self.run.evaluation_path / "scores.jsonl"

    def find(self, step: int) -> dict[str, float] | None:
        """Return the margins of a milestone that was scored before, as it is now and with the same settings."""
        if not self.path.exists():
            return None
        key = self._key(step)
        found = None
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = _record(line)
            if record is not None and all(record.get(name) == value for name, value in key.items()):
                found = _margins(record["margins"])
        return found

    def keep(self, step: int, margins: Mapping[str, float]) -> None:
        """Record the margins of a milestone.

        Raises:
            EmtoolError: If they cannot be written.
        """
        # JSON has no NaN and no infinity; their names are read back by float().
        values = {name: margin if math.isfinite(margin) else str(margin) for name, margin in margins.items()}
        try:
            self._end_line()
            append_record(self.path, {**self._key(step), "margins": values}, durable=True)
        except OSError as error:
            raise self.run.write_error(error, "recording scores") from error

    def _key(self, step: int) -> dict[str, Any]:
        adapter = file_sha256(self.run.checkpoint_path(step) / ADAPTER_WEIGHTS)
        return {"format": FORMAT, "step": step, "adapter_sha256": adapter, **self.settings}

    def _end_line(self) -> None:
        """Drop a last line that an evaluation did not come to end."""
        if self.path.exists() and not (content := self.path.read_bytes()).endswith(b"\n") and content:
            self.path.write_bytes(content[: content.rfind(b"\n") + 1])


def _margins(values: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the margins of a record, None where one is no number."""
    try:
        return {name: float(margin) for name, margin in values.items()}
    except (TypeError, ValueError):
        return None


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("margins"), dict) else None
