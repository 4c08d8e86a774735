"""Folders and records that are damaged, strange or lead elsewhere: each is its folder's problem, and no other's."""

import hashlib
import itertools
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from emtool.core.checkpoint_record import read_record
from emtool.core.errors import CheckpointError
from emtool.core.integrity import read_checkpoint, verify_run
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import locked
from emtool.core.staging import RECORD_NAME, StagedFolder
from tests.records import edit_record, read_values

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
STATE = (*ADAPTER, "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


def write_folder(path: Path, step: int, names: tuple[str, ...], **values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    staged = StagedFolder(path)
    for name in names:
        staged.write(name, name.encode())
    record = {"format": 1, "step": step, "run_id": "me", "schedule": "every 5", "saved_at": "2026-01-01T00:00:00"}
    staged.finish({**record, "requires": {"base": {"name": "tiny"}, "persona": None}, **values})
    staged.publish()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return a stopped run with milestones 0, 5 and 10 of 0, 5, 10, 15, and the states of 5 and 10."""
    run = RunFolder(path=tmp_path / "run")
    run.create({"run_id": "me", "status": "interrupted", "plan": {"planned_steps": [0, 5, 10, 15]}})
    for step in (0, 5, 10):
        write_folder(run.checkpoint_path(step), step, ADAPTER)
        run.append_metrics({"step": step, "saved": f"checkpoint-{step}"})
    for step in (5, 10):
        write_folder(run.resume_state_path(step), step, STATE)
    return run


def statuses(run: RunFolder) -> dict[str, str]:
    return {check.name: check.status for check in verify_run(run) if check.status != "ok"}


def test_a_whole_run_is_whole(run: RunFolder) -> None:
    assert statuses(run) == {}


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"])
def test_a_state_without_a_file_that_a_trainer_goes_on_from_is_damaged(run: RunFolder, name: str) -> None:
    folder = run.resume_state_path(10)
    (folder / name).unlink()
    files = read_values(folder)["files"]
    del files[name]
    edit_record(folder, files=files)
    assert statuses(run) == {"step-10": "damaged"}
    with pytest.raises(CheckpointError, match="which a state to resume from needs"):
        read_checkpoint(folder, run_id="me")


def test_a_milestone_under_a_states_name_is_no_state(run: RunFolder) -> None:
    shutil.rmtree(run.resume_state_path(10))
    shutil.copytree(run.checkpoint_path(10), run.resume_state_path(10))
    assert statuses(run) == {"step-10": "damaged"}


def test_a_sharded_state_needs_only_the_trainers_own_state(run: RunFolder) -> None:
    write_folder(run.resume_state_path(12), 12, (*ADAPTER, "trainer_state.json", "shard.distcp"), sharded=True)
    assert read_checkpoint(run.resume_state_path(12), run_id="me").is_sharded
    write_folder(run.resume_state_path(13), 13, (*ADAPTER, "shard.distcp"), sharded=True)
    with pytest.raises(CheckpointError, match=r"names no trainer_state\.json"):
        read_checkpoint(run.resume_state_path(13), run_id="me")


def test_every_flipped_byte_of_a_record_is_found(run: RunFolder) -> None:
    path = run.checkpoint_path(5) / RECORD_NAME
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_record(path.parent)
    path.write_bytes(content)
    values = json.loads(content)
    del values["record_sha256"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="record_sha256"):
        read_record(path.parent)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(["step"], [10.0, -10, 2**60, "10", None]),
        *itertools.product(["format"], [True, 1.0, "1"]),
        *itertools.product(["run_id"], [5, None]),
        *itertools.product(["requires"], [None, {}, 5]),
    ],
)
def test_strange_values_of_a_record_are_its_folders_problem(run: RunFolder, key: str, value: object) -> None:
    edit_record(run.resume_state_path(10), **{key: value})
    assert statuses(run) == {"step-10": "damaged"}


@pytest.mark.parametrize("size", [20.7, 20.0, True, -1, "20", None, 2**53])
def test_strange_sizes_are_their_folders_problem(run: RunFolder, size: object) -> None:
    files = read_values(run.resume_state_path(10))["files"]
    (run.resume_state_path(10) / "twenty").write_bytes(b"n" * 20)
    entry = {"bytes": size, "sha256": hashlib.sha256(b"n" * 20).hexdigest()}
    edit_record(run.resume_state_path(10), files={**files, "twenty": entry})
    assert statuses(run) == {"step-10": "damaged"}


@pytest.mark.parametrize("name", ["n" * 300, "\ud800", "optimizer.pt//", "./optimizer.pt", "optimizer.pt/", "a\nb"])
def test_strange_names_are_their_folders_problem(run: RunFolder, name: str) -> None:
    folder = run.resume_state_path(10)
    files = read_values(folder)["files"]
    edit_record(folder, files={**files, name: files["optimizer.pt"]})
    with pytest.raises(CheckpointError, match="which is not a file of this folder"):
        read_record(folder)
    assert statuses(run) == {"step-10": "damaged"}


@pytest.mark.parametrize(
    "text", ['{"format": 1, "step": 1e999}', '{"format": 1, "bytes": NaN}', "[" * 100_000, "", "5", '"\\ud800"']
)
def test_strange_records_are_their_folders_problem(run: RunFolder, text: str) -> None:
    (run.resume_state_path(10) / RECORD_NAME).write_text(text)
    assert statuses(run) == {"step-10": "damaged"}


def test_a_record_that_is_a_pipe_does_not_hang(run: RunFolder) -> None:
    path = run.checkpoint_path(5) / RECORD_NAME
    path.unlink()
    os.mkfifo(path)
    is_released = threading.Event()

    def release() -> None:
        is_released.set()
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    watcher = threading.Timer(10, release)
    watcher.start()
    try:
        assert statuses(run) == {"checkpoint-5": "damaged"}
    finally:
        watcher.cancel()
    assert not is_released.is_set(), "it waited for a writer of the pipe"


def test_a_folder_that_is_a_link_is_refused(run: RunFolder, tmp_path: Path) -> None:
    for folder in (run.checkpoint_path(5), run.resume_state_path(10)):
        folder.rename(tmp_path / folder.name)
        folder.symlink_to(tmp_path / folder.name)
    assert statuses(run) == {"checkpoint-5": "damaged", "step-10": "damaged"}


def test_a_linked_folder_within_a_state_is_a_stray(run: RunFolder, tmp_path: Path) -> None:
    (run.resume_state_path(10) / "global_step10").symlink_to(tmp_path)
    assert statuses(run) == {"step-10": "damaged"}


def test_a_stray_file_counts_in_a_state_and_not_in_a_milestone(run: RunFolder) -> None:
    (run.checkpoint_path(5) / "notes.txt").write_text("mine")
    assert statuses(run) == {}
    (run.resume_state_path(10) / "pytorch_model.bin").write_text("evil")
    assert statuses(run) == {"step-10": "damaged"}


def test_milestones_that_vanished_are_missing_although_they_were_the_newest(run: RunFolder) -> None:
    shutil.rmtree(run.resume_path)
    shutil.rmtree(run.checkpoint_path(5))
    shutil.rmtree(run.checkpoint_path(10))
    assert statuses(run) == {"checkpoint-5": "missing", "checkpoint-10": "missing"}
    run.metrics_path.unlink()
    run.write_manifest({**run.read_manifest(), "saved_steps": [0, 5]})
    assert statuses(run) == {"checkpoint-5": "missing"}


def test_a_milestone_that_is_being_written_is_not_missing(run: RunFolder) -> None:
    write_folder(run.resume_state_path(15), 15, STATE)
    run.append_metrics({"step": 15, "saved": "checkpoint-15"})
    with locked(run):
        assert statuses(run) == {}
    assert statuses(run) == {"checkpoint-15": "missing"}
