"""Restoring what a run shares with its base model: the tokenizer, of which every checkpoint holds a link."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emtool.core.checkpoint_record import read_record
from emtool.core.errors import CheckpointError
from emtool.core.events import EventSink
from emtool.core.integrity import damaged_files
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import locked
from emtool.core.staging import STAGING_SUFFIX, FileRecord, file_record, remove_folder, staging_path, sync
from emtool.engines.modeling import open_base


def repair_tokenizer(run: RunFolder, *, on_event: EventSink) -> list[str]:
    """Restore the tokenizer files of a run's checkpoints from the base model; return the paths of those restored.

    A file is restored only if the base model's tokenizer gives exactly the contents that the record names.

    Raises:
        EmtoolError: If the manifest, the base model or the folder cannot be used.
    """
    manifest = run.read_manifest()
    with locked(run):
        damaged = list(_damaged(run))
        if not damaged:
            return []
        base = _recorded_base(run, manifest, on_event)
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", suffix=STAGING_SUFFIX, dir=run.path) as scratch:
            base.tokenizer.save_pretrained(scratch)
            return [str(path) for path, expected in damaged if _restore(path, expected, Path(scratch))]


def _damaged(run: RunFolder) -> Iterator[tuple[Path, FileRecord]]:
    folders = [
        *(run.checkpoint_path(step) for step in run.saved_steps()),
        *(run.resume_state_path(step) for step in run.resume_steps()),
    ]
    for folder in folders:
        try:
            record = read_record(folder)
        except CheckpointError:
            continue
        for name in damaged_files(folder, record):
            if "/" not in name:
                yield folder / name, record.files[name]


def _restore(path: Path, expected: FileRecord, fresh: Path) -> bool:
    source = fresh / path.name
    if path.is_symlink() or not source.is_file() or file_record(source) != expected:
        return False
    # Beside the checkpoint, on its disk: what a killed repair leaves is then a writer's leftover, and no stray file.
    staged = staging_path(path.parent)
    remove_folder(staged)
    staged.mkdir()
    try:
        _put(source, staged / path.name)
        (staged / path.name).replace(path)
        sync(path.parent)
    finally:
        remove_folder(staged)
    return True


def _put(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        # No links here: every folder has a copy anyway.
        shutil.copyfile(source, target)
    sync(target)


def _recorded_base(run: RunFolder, manifest: dict[str, Any], on_event: EventSink) -> Any:
    try:
        recorded, config = manifest["lineage"]["base"], manifest["config"]
        name, dtype = str(recorded["name"]), str(config["dtype"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run.manifest_path} lacks {error}; the tokenizer cannot be restored") from error
    return open_base(name, device="cpu", dtype=dtype, recorded=recorded, on_event=on_event)
