"""How runs end when something is in the way: signals at the last moment, lost milestones, another trajectory."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from emtool.core.errors import CheckpointError, DiskSpaceError, Interrupted
from emtool.core.events import CheckpointSaved, Event, Notice, PhaseStarted
from emtool.core.run_dir import RunFolder
from emtool.engines import saving, training
from emtool.engines.snapshot import SnapshotBuffer
from emtool.engines.training import train
from tests.engines.test_durability import WEIGHTS, StopError, plan_for, stop_at, stopped_run, weights


@pytest.fixture(scope="module")
def whole(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """Return the weights of each milestone of a run that nothing disturbed."""
    plan, rows = plan_for(tiny_model, rows_file, tmp_path_factory.mktemp("whole"))
    return weights(train(plan, rows, command=[]).run)


def damage(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def test_milestones_that_were_lost_are_named_and_the_run_is_completed(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes]
) -> None:
    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path)
    damage(run.checkpoint_path(0))
    shutil.rmtree(run.checkpoint_path(3))
    events: list[Any] = []
    result = train(plan, rows, command=[], resume=True, on_event=events.append)
    assert [problem.split(" ")[0].rpartition("/")[2] for problem in result.lost] == ["checkpoint-0", "checkpoint-3"]
    warnings = [event.text for event in events if isinstance(event, Notice) and event.is_warning]
    assert sum("the run will end without it" in text for text in warnings) == 2
    assert run.read_manifest()["status"] == "completed"
    assert result.held_out_loss is not None
    assert {step: whole[step] for step in (6, 8)} == {step: weights(run)[step] for step in (6, 8)}


def test_a_damaged_milestone_of_the_resumed_step_is_written_anew_from_its_state(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes]
) -> None:
    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path)
    damage(run.checkpoint_path(6))
    result = train(plan, rows, command=[], resume=True)
    assert result.lost == []
    assert weights(run) == whole


def test_a_milestone_that_a_kill_prevented_holds_the_optimizer_files_of_its_state(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path, keep_optimizer=True, keep_resume=True)
    expected = {path.name: path.read_bytes() for path in run.resume_state_path(6).iterdir()}
    before = {path.name: path.read_bytes() for path in run.checkpoint_path(6).iterdir()}
    shutil.rmtree(run.checkpoint_path(6))
    train(plan, rows, command=[], resume=True)
    after = {path.name: path.read_bytes() for path in run.checkpoint_path(6).iterdir()}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
        assert after[name] == expected[name] == before[name], name
    assert after[WEIGHTS] == before[WEIGHTS]


def other_trajectory(run: RunFolder, source: int, target: int) -> None:
    """Make a valid milestone with the weights of another step, which no resumed training will repeat."""
    from emtool.core.staging import StagedFolder, retire_folder

    folder, donor = run.checkpoint_path(target), run.checkpoint_path(source)
    record = json.loads((folder / "checkpoint.json").read_text())
    del record["files"]
    names = [path.name for path in folder.iterdir() if path.name != "checkpoint.json"]
    contents = {name: ((donor if name == WEIGHTS else folder) / name).read_bytes() for name in names}
    retire_folder(folder)
    staged = StagedFolder(folder)
    for name, content in contents.items():
        staged.write(name, content)
    staged.finish({key: value for key, value in record.items() if key != "record_sha256"})
    staged.publish()


def test_another_trajectory_is_remembered_whatever_ends_the_run_after_it(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path, resume_every="1")
    other_trajectory(run, 3, 6)
    for state in (6, 7):
        shutil.rmtree(run.resume_state_path(state), ignore_errors=True)
    assert run.resume_steps() == [5]
    with pytest.raises(StopError):
        train(plan, rows, command=[], resume=True, on_event=stop_at(7))
    assert run.read_manifest()["trajectory_breaks"] == [6]
    # As a kill leaves it: the manifest was never written again.
    manifest: Any = run.read_manifest()
    run.write_manifest({**manifest, "trajectory_breaks": [], "status": "running"})
    train(plan, rows, command=[], resume=True)
    assert run.read_manifest()["trajectory_breaks"] == [6]


def stop_when(condition: Any) -> Any:
    """Return a sink that sends this process SIGTERM at the first event for which the condition holds."""
    sent = threading.Event()

    def on_event(event: Event) -> None:
        if not sent.is_set() and condition(event):
            sent.set()
            os.kill(os.getpid(), signal.SIGTERM)

    return on_event


@pytest.mark.parametrize("moment", ["before the first step", "during the last save", "the held-out loss"])
def test_a_stop_leaves_a_state_although_none_is_saved_by_itself(
    moment: str,
    tiny_model: Path,
    rows_file: Path,
    tmp_path: Path,
    whole: dict[int, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, resume_every="0")
    real = saving.RunCheckpoints._make_buffer

    def stopped_here(self: saving.RunCheckpoints, args: Any) -> SnapshotBuffer:
        if moment == "before the first step" and not RunFolder(path=plan.output_path).resume_steps():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, args)

    monkeypatch.setattr(saving.RunCheckpoints, "_make_buffer", stopped_here)
    conditions = {
        "before the first step": lambda event: False,
        "during the last save": lambda event: isinstance(event, CheckpointSaved) and event.step == 8,
        "the held-out loss": lambda event: isinstance(event, PhaseStarted) and "held-out" in event.name,
    }
    with pytest.raises(Interrupted):
        train(plan, rows, command=[], on_event=stop_when(conditions[moment]))
    run = RunFolder(path=plan.output_path)
    assert run.read_manifest()["status"] == "interrupted"
    assert run.resume_steps() == [0 if moment == "before the first step" else 8]
    train(plan, rows, command=[], resume=True)
    assert weights(run) == whole


def test_sigusr1_during_the_held_out_loss_saves_a_state(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, resume_every="0", keep_resume=True)

    def ask(event: Event) -> None:
        if isinstance(event, PhaseStarted) and "held-out" in event.name:
            os.kill(os.getpid(), signal.SIGUSR1)

    result = train(plan, rows, command=[], on_event=ask)
    assert result.run.resume_steps() == [8]


def test_a_full_disk_while_the_tokenizer_is_written_is_one_line(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training, "copy_folder", full)
        with pytest.raises(DiskSpaceError, match=r"no space left in .* while writing the tokenizer"):
            train(plan, rows, command=[])
    assert RunFolder(path=plan.output_path).read_manifest()["status"] == "failed"


def test_the_tokenizer_is_on_disk_before_checkpoints_link_to_it(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced.add((found.st_dev, found.st_ino))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    run = train(plan, rows, command=[]).run
    for step in run.saved_steps():
        for path in (*run.checkpoint_path(step).rglob("*"), run.checkpoint_path(step)):
            found = path.stat()
            assert (found.st_dev, found.st_ino) in synced, path


def test_weights_do_not_change_before_they_are_copied(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is slow, as on a large model: the optimizer step must wait for it."""
    real = SnapshotBuffer.finish

    def slow(self: SnapshotBuffer) -> None:
        threading.Event().wait(0.4)
        real(self)

    monkeypatch.setattr(SnapshotBuffer, "finish", slow)
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    assert weights(train(plan, rows, command=[]).run) == whole


def test_the_buffer_holds_what_the_tensors_were_when_the_copy_began_if_one_waits() -> None:
    weight = torch.arange(6.0)
    buffer = SnapshotBuffer(64, is_pinned=False)
    copies = buffer.begin({"w": weight, "more": [torch.zeros(40), 3]})
    thread = threading.Thread(target=buffer.finish)
    thread.start()
    buffer.wait()
    weight.add_(1)
    thread.join()
    assert torch.equal(copies["w"], torch.arange(6.0))
    assert copies["more"][1] == 3
    assert buffer.num_bytes >= 64 + 160


def test_a_vanished_state_of_a_resumed_run_is_refused(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path)
    shutil.rmtree(run.resume_path)
    with pytest.raises(CheckpointError, match="has checkpoints and no state to go on from"):
        train(plan, rows, command=[], resume=True)


STOP_IN_HELD_OUT = """
import os, signal
from emtool.cli.app import main
from emtool.engines import training

real = training._held_out_loss

def stopped(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments)

training._held_out_loss = stopped
main()
"""


@pytest.mark.slow
def test_processes_under_accelerate_launch_and_a_stop_after_the_last_step(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Only the first process measures the held-out loss; its state must not wait for the others."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    script = tmp_path / "stopped.py"
    script.write_text(STOP_IN_HELD_OUT)
    options = ["train", "--model", str(tiny_model), "--dataset", str(rows_file), "--max-steps", "6", "--device", "cpu"]
    options += ["--checkpoints", "0, 3", "--output-root", str(tmp_path), "--resume-every", "0"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]

    def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*accelerate, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)

    done = launched("-m", "emtool", *options, "--output-name", "whole")
    assert done.returncode == 0, done.stderr
    whole_run = RunFolder(path=tmp_path / "whole")
    manifest: Any = whole_run.read_manifest()
    assert (manifest["plan"]["num_processes"], manifest["status"]) == (2, "completed")
    again = launched("-m", "emtool", *options, "--output-name", "whole")
    assert (again.returncode, again.stderr.count("holds this run, completed")) == (0, 1)

    done = launched(str(script), *options, "--output-name", "stopped")
    assert done.returncode != 0
    run = RunFolder(path=tmp_path / "stopped")
    assert run.read_manifest()["status"] == "interrupted"
    assert run.resume_steps() == [6]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in run.resume_state_path(6).iterdir()}
    done = launched("-m", "emtool", "resume", str(run.path))
    assert done.returncode == 0, done.stderr
    assert weights(run) == weights(whole_run)
