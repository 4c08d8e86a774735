"""An evaluation in shards: workers record what some checkpoints give, and the evaluation takes it from there.

A shard is the evaluation folder of one worker, inside the run's own: the same files, about its checkpoints only. The
worker runs the ordinary evaluation on it, so that one that is killed goes on where it was; afterwards what it has made
is added to the run's records, where the evaluation finds it as if it had made it itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emtool.core.record_file import RecordFile
from emtool.core.run_dir import RunFolder, read_json, write_json

#: Records that are about one checkpoint each.
_RECORDS = ("answers.jsonl", "scores.jsonl")
_FOLDERS = ("activations", "settings")
_SEEDED = "seeded.json"


@dataclass(frozen=True, kw_only=True)
class Shard(RunFolder):
    """A run whose evaluation is recorded in a worker's folder.

    Attributes:
        number: The worker's number.
    """

    number: int

    @property
    def evaluation_path(self) -> Path:
        """Return the worker's folder."""
        return shards_path(self) / str(self.number)


def shards_path(run: RunFolder) -> Path:
    """Return the folder that holds the shards of a run."""
    return run.path / "evaluation" / "workers"


def deal(steps: Sequence[int], num_workers: int) -> list[list[int]]:
    """Return the steps of each worker, dealt like cards; no worker is left without one."""
    count = min(num_workers, len(steps))
    return [list(steps[index::count]) for index in range(count)]


def seed_shard(shard: Shard, steps: Sequence[int]) -> None:
    """Make a worker's folder with what the run has on record of its checkpoints, which is not made again.

    Raises:
        OSError: If it cannot be written.
    """
    whole = RunFolder(path=shard.path).evaluation_path
    shard.evaluation_path.mkdir(parents=True)
    wanted, seeded = set(steps), {}
    for name in _RECORDS:
        source, target = RecordFile(path=whole / name), shard.evaluation_path / name
        with target.open("wb") as file:
            for record in source.read():
                if record.get("step") in wanted:
                    file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
            seeded[name] = file.tell()
    names = {f"checkpoint-{step}.safetensors" for step in steps}
    for path in (whole / "activations").glob("*/*.safetensors"):
        if path.name in names:
            copy = shard.evaluation_path / "activations" / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    # Last: without it, nothing of the folder is taken for the worker's.
    write_json(shard.evaluation_path / _SEEDED, seeded)


def leftover_shards(run: RunFolder) -> list[Shard]:
    """Return the shards that are there, by number: of an evaluation that was stopped."""
    folder = shards_path(run)
    numbers = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return [Shard(path=run.path, number=number) for number in sorted(numbers)]


def absorb(shard: Shard) -> None:
    """Add what a worker has made to the run's records, and remove its folder. The caller holds the evaluation.

    Raises:
        OSError: If it cannot be written; the shard is kept.
    """
    whole, own = RunFolder(path=shard.path).evaluation_path, shard.evaluation_path
    seeded = read_json(own / _SEEDED)
    if isinstance(seeded, dict):
        for name in _RECORDS:
            if (end := _append_rest(own / name, seeded.get(name), RecordFile(path=whole / name))) is not None:
                # Whoever is killed from here on does not add them twice.
                seeded[name] = end
                write_json(own / _SEEDED, seeded)
        for path in (path for kind in _FOLDERS for path in (own / kind).rglob("*") if path.is_file()):
            target = whole / path.relative_to(own)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    shutil.rmtree(own)


def _append_rest(path: Path, begin: object, target: RecordFile) -> int | None:
    """Append the whole lines that follow what was seeded; return where they end, None where there are none."""
    if not path.is_file() or type(begin) is not int:
        return None
    target.end_torn_line()
    with path.open("rb") as source, target.path.open("ab") as file:
        source.seek(begin)
        end = begin
        for line in source:
            if line.endswith(b"\n"):
                file.write(line)
                end += len(line)
        file.flush()
        os.fsync(file.fileno())
    return end if end > begin else None
