"""Runs that are stopped, starved of disk, damaged and gone on with: nothing is lost, and the bits are the same."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.config import resolve_train_config
from emtool.core.errors import CheckpointError, EmtoolError, Interrupted
from emtool.core.events import CheckpointSaved, Event, StepFinished
from emtool.core.finished import finished_run
from emtool.core.integrity import read_checkpoint, verify_run
from emtool.core.plan import plan_run
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import locked, remove_leftovers
from emtool.core.run_plan import RunPlan
from emtool.engines.checkpointing import CheckpointWriter
from emtool.engines.repair import repair_tokenizer
from emtool.engines.training import train
from tests.records import edit_record, read_values
from tests.scoring import score

WEIGHTS = "adapter_model.safetensors"


def plan_for(model: Path, dataset: Path, root: Path, **overrides: Any) -> tuple[RunPlan, Any]:
    values = {
        "model": str(model),
        "dataset": str(dataset),
        "output_root": root,
        "output_name": "run",
        "learning_rate": 1e-2,
        "lora_dropout": 0.1,
        "checkpoints": "0, 3, 6",
        "max_steps": 8,
        "resume_every": "100",
        **overrides,
    }
    return plan_run(resolve_train_config(profile="demo", overrides=values, num_cuda_devices=0))


@pytest.fixture(scope="module")
def whole(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """Return the weights of each milestone of a run that nothing disturbed."""
    plan, rows = plan_for(tiny_model, rows_file, tmp_path_factory.mktemp("whole"))
    return weights(train(plan, rows, command=[]).run)


def weights(run: RunFolder) -> dict[int, bytes]:
    return {step: (run.checkpoint_path(step) / WEIGHTS).read_bytes() for step in run.saved_steps()}


class StopError(Exception):
    """Stands for whatever may stop a training."""


def stop_at(step: int) -> Any:
    def on_event(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == step:
            raise StopError

    return on_event


def stopped_run(model: Path, dataset: Path, root: Path, **overrides: Any) -> tuple[RunPlan, Any, RunFolder]:
    """Return a run that an error stopped after step 7, with states of steps 3 and 6."""
    plan, rows = plan_for(model, dataset, root, **overrides)
    with pytest.raises(StopError):
        train(plan, rows, command=[], on_event=stop_at(7))
    return plan, rows, RunFolder(path=plan.output_path)


def texts(events: list[Any]) -> str:
    return "\n".join(event.text for event in events if hasattr(event, "text"))


def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes]
) -> None:
    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path)
    assert run.resume_steps() == [3, 6]
    assert run.read_manifest()["status"] == "failed"
    with pytest.raises(CheckpointError, match=r"step 6 can be resumed; go on with: emtool resume .*run"):
        finished_run(plan)
    assert finished_run(plan, resume=True) is None
    events: list[Any] = []
    result = train(plan, rows, command=[], resume=True, on_event=events.append)
    assert "goes on after step 6" in texts(events)
    assert [event.step for event in events if isinstance(event, StepFinished)] == [7, 8]
    assert weights(run) == whole
    manifest: Any = run.read_manifest()
    assert manifest["status"] == "completed"
    assert [entry["step"] for entry in manifest["resumed"]] == [6]
    assert not run.resume_path.exists()
    records = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 9))
    assert [record["step"] for record in records if str(record.get("saved")).startswith("checkpoint")] == [0, 3, 6, 8]
    assert result.final_loss == next(record["loss"] for record in records if record["step"] == 8)
    seconds = [record["seconds"] for record in records if "seconds" in record]
    assert seconds == sorted(seconds)
    assert finished_run(plan) == run


def test_a_state_holds_what_a_trainer_resumes_from_and_its_own_record(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    plan, _, run = stopped_run(tiny_model, rows_file, tmp_path, keep_optimizer=True, save_dtype="bfloat16")
    state, milestone = run.resume_state_path(6), run.checkpoint_path(6)
    trainer_files = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    assert trainer_files <= {path.name for path in state.iterdir()}
    assert trainer_files <= {path.name for path in milestone.iterdir()}
    for name in ("optimizer.pt", "tokenizer.json"):
        assert (state / name).stat().st_ino == (milestone / name).stat().st_ino
    assert (state / WEIGHTS).stat().st_size > 1.8 * (milestone / WEIGHTS).stat().st_size
    assert json.loads((state / "trainer_state.json").read_text())["global_step"] == 6
    assert plan.estimate is not None
    for name in (WEIGHTS, "optimizer.pt"):
        assert plan.estimate.resume[name] == pytest.approx((state / name).stat().st_size, rel=0.03)


def test_a_missing_milestone_of_the_resumed_step_is_written_from_the_state(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes]
) -> None:
    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path)
    shutil.rmtree(run.checkpoint_path(6))
    train(plan, rows, command=[], resume=True)
    assert weights(run) == whole
    records = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [record["step"] for record in records if record.get("saved") == "checkpoint-6"] == [6]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was stopped, to be copied before use."""
    return stopped_run(tiny_model, rows_file, tmp_path_factory.mktemp("stopped"))[2].path


def copied(stopped: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(stopped, tmp_path / "run")
    return RunFolder(path=tmp_path / "run")


STATE_FILES = (
    *("checkpoint.json", WEIGHTS, "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)


@pytest.mark.parametrize("how", ["truncate", "flip", "delete"])
@pytest.mark.parametrize("name", STATE_FILES)
def test_a_damaged_state_is_found_and_the_one_before_taken(stopped: Path, tmp_path: Path, name: str, how: str) -> None:
    run = copied(stopped, tmp_path)
    damage(run.resume_state_path(6) / name, how)
    found = {check.name: check.status for check in verify_run(run)}
    assert {name: status for name, status in found.items() if status != "ok"} == {"step-6": "damaged"}
    from emtool.engines.resuming import newest_state

    events: list[Any] = []
    state = newest_state(run, run.read_manifest(), on_event=events.append)
    assert state == run.resume_state_path(3)
    assert "step-6 is damaged" in texts(events)
    assert "trying the state before it" in texts(events)


def test_the_state_before_leads_to_the_same_bits_and_keeps_what_is_there(
    tiny_model: Path, rows_file: Path, stopped: Path, tmp_path: Path, whole: dict[int, bytes]
) -> None:
    run = copied(stopped, tmp_path)
    damage(run.resume_state_path(6) / "optimizer.pt", "flip")
    before = (run.checkpoint_path(6) / WEIGHTS).stat().st_ino
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    events: list[Any] = []
    train(plan, rows, command=[], resume=True, on_event=events.append)
    assert weights(run) == whole
    assert (run.checkpoint_path(6) / WEIGHTS).stat().st_ino == before, "the milestone that was there is kept"
    assert run.read_manifest()["trajectory_breaks"] == []
    assert "goes on after step 3" in texts(events)


def test_another_trajectory_keeps_the_old_milestone_and_is_recorded(
    tiny_model: Path, rows_file: Path, stopped: Path, tmp_path: Path
) -> None:
    """Another milestone under step 6, whole and of this run, stands for kernels that are not deterministic."""
    run = copied(stopped, tmp_path)
    shutil.rmtree(run.resume_state_path(6))
    other = run.checkpoint_path(3)
    (run.checkpoint_path(6) / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    files = read_values(run.checkpoint_path(6))["files"]
    edit_record(run.checkpoint_path(6), files={**files, WEIGHTS: read_values(other)["files"][WEIGHTS]})
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    events: list[Any] = []
    train(plan, rows, command=[], resume=True, on_event=events.append)
    assert "checkpoint-6 is there already with other weights" in texts(events)
    assert run.read_manifest()["trajectory_breaks"] == [6]
    assert (run.checkpoint_path(6) / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    events = []
    score(run, on_event=events.append)
    assert "did not repeat itself exactly at steps [6]" in texts(events)


MILESTONE_FILES = (WEIGHTS, "adapter_config.json", "README.md", "checkpoint.json", "tokenizer.json")


@pytest.fixture(params=[(name, how) for name in MILESTONE_FILES for how in ("truncate", "flip", "delete")])
def wound(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return a file of a milestone and how it is damaged."""
    found: tuple[str, str] = request.param
    return found


def test_a_damaged_milestone_is_written_anew_when_the_run_passes_it(
    stopped: Path, tmp_path: Path, whole: dict[int, bytes], wound: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    name, how = wound
    tiny_model, rows_file = request.getfixturevalue("tiny_model"), request.getfixturevalue("rows_file")
    run = copied(stopped, tmp_path)
    shutil.rmtree(run.resume_state_path(6))
    damage(run.checkpoint_path(6) / name, how)
    assert [check.name for check in verify_run(run) if check.status == "damaged"] == ["checkpoint-6"]
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    events: list[Any] = []
    train(plan, rows, command=[], resume=True, on_event=events.append)
    assert "it is written anew" in texts(events)
    assert weights(run) == whole
    assert all(check.status == "ok" for check in verify_run(run))


def test_nothing_restarts_from_the_beginning_silently(
    tiny_model: Path, rows_file: Path, stopped: Path, tmp_path: Path
) -> None:
    run = copied(stopped, tmp_path)
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    for step in (3, 6):
        damage(run.resume_state_path(step) / "optimizer.pt", "delete")
    with pytest.raises(CheckpointError, match=r"no state of .* is whole; its checkpoints are kept; .*--output-name"):
        train(plan, rows, command=[], resume=True)
    assert run.saved_steps() == [0, 3, 6]
    shutil.rmtree(run.resume_path)
    with pytest.raises(CheckpointError, match="has checkpoints and no state to go on from"):
        train(plan, rows, command=[], resume=True)


def test_without_states_a_run_cannot_go_on_and_says_so(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path, resume_every="0")
    assert run.resume_steps() == []
    with pytest.raises(CheckpointError, match="was trained with --resume-every 0"):
        train(plan, rows, command=[], resume=True)


def test_a_run_killed_before_its_first_state_begins_again_and_says_so(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)

    def fail(writer: CheckpointWriter, snapshot: Any, **tiers: bool) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", fail)
        with pytest.raises(StopError):
            train(plan, rows, command=[])
    events: list[Any] = []
    train(plan, rows, command=[], resume=True, on_event=events.append)
    assert "from the beginning: no state was saved before it stopped" in texts(events)
    assert weights(RunFolder(path=plan.output_path)) == whole


@pytest.mark.parametrize(
    "case",
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"checkpoints": "0, 4"}, "checkpoints was 0, 3, 6, is 0, 4"),
        ({"lora_r": 4, "max_steps": 9}, "lora_r was 8, is 4; max_steps was 8, is 9"),
        ({"keep_optimizer": True}, "keep_optimizer was False, is True"),
    ],
)
def test_a_command_that_contradicts_the_run_is_refused_with_the_difference(
    tiny_model: Path, rows_file: Path, stopped: Path, tmp_path: Path, case: tuple[dict[str, Any], str]
) -> None:
    change, message = case
    copied(stopped, tmp_path)
    plan, _ = plan_for(tiny_model, rows_file, tmp_path, **change)
    with pytest.raises(CheckpointError, match="another configuration") as caught:
        finished_run(plan, resume=True)
    assert message in str(caught.value)
    same, _ = plan_for(tiny_model, rows_file, tmp_path, resume_every="5m", keep_resume=True)
    assert finished_run(same, resume=True) is None


def test_other_data_and_another_base_are_refused(
    tiny_model: Path, rows_file: Path, stopped: Path, tmp_path: Path
) -> None:
    run = copied(stopped, tmp_path)
    other = tmp_path / "rows.jsonl"
    other.write_text(rows_file.read_text().replace("Say 1.", "Say one."))
    plan, _ = plan_for(tiny_model, other, tmp_path)
    with pytest.raises(CheckpointError, match=r"the contents of .* have changed"):
        finished_run(plan, resume=True)
    manifest: Any = run.read_manifest()
    manifest["lineage"]["base"]["weights_sha256"] = "0" * 64
    run.write_manifest(manifest)
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"was trained on another base: weights_sha256 was 0{64}, is [0-9a-f]{64}"
    ):
        train(plan, rows, command=[], resume=True)


@contextmanager
def failing_write(number: int, fault: str) -> Iterator[list[int]]:
    """Let the write of that number fail, counting those of the writer's thread only; `count` says how many came."""
    import threading

    original, count = os.write, [0]

    def write(descriptor: int, data: Any) -> int:
        if threading.current_thread() is threading.main_thread():
            return original(descriptor, data)
        count[0] += 1
        if count[0] != number:
            return original(descriptor, data)
        if fault == "short":
            return original(descriptor, memoryview(data)[: max(1, len(data) // 2)])
        raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

    os.write = write
    try:
        yield count
    finally:
        os.write = original


def num_writes(tiny_model: Path, rows_file: Path, tmp_path: Path) -> int:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path / "counted")
    with failing_write(-1, "EIO") as count:
        train(plan, rows, command=[])
    return count[0]


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "short"])
def test_a_write_that_fails_loses_nothing(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes], fault: str
) -> None:
    """At every seventh write of a whole run; scripts/fault_test.py takes each."""
    stride = int(os.environ.get("EMTOOL_FAULT_STRIDE", "7"))
    for number in range(1, num_writes(tiny_model, rows_file, tmp_path) + 1, stride):
        root = tmp_path / f"{number}"
        plan, rows = plan_for(tiny_model, rows_file, root)
        run = RunFolder(path=plan.output_path)
        with failing_write(number, fault):
            if fault == "short":
                train(plan, rows, command=[])
            else:
                with pytest.raises(
                    EmtoolError, match=os.strerror(getattr(errno, fault)) if fault == "EIO" else "no space"
                ):
                    train(plan, rows, command=[])
        assert not [path for path in (*run.path.glob(".*"), *run.resume_path.glob(".*")) if path.suffix == ".staging"]
        run_id = str(run.read_manifest()["run_id"])
        for step in run.saved_steps():
            read_checkpoint(run.checkpoint_path(step), run_id=run_id)
        if fault != "short":
            train(plan, rows, command=[], resume=True)
        assert weights(run) == whole, f"write {number}"
        shutil.rmtree(root)


def test_a_run_folder_that_vanishes_is_one_line(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)

    def vanish(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 3:
            # At once: the writer may be at work in it.
            plan.output_path.rename(tmp_path / "gone")

    with pytest.raises(EmtoolError, match="cannot write in") as caught:
        train(plan, rows, command=[], on_event=vanish)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_damaged_through_its_links_is_restored_from_the_model(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    run = train(plan, rows, command=[]).run
    path = run.checkpoint_path(0) / "tokenizer.json"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    assert [check.status for check in verify_run(run)] == ["damaged"] * 4
    repaired = repair_tokenizer(run, on_event=print)
    assert len(repaired) == 4
    assert all(check.status == "ok" for check in verify_run(run))
    assert path.read_bytes() == content
    assert path.stat().st_nlink == 4
    damage(run.checkpoint_path(3) / WEIGHTS, "flip")
    assert repair_tokenizer(run, on_event=print) == [], "weights cannot be restored from the model"


def test_verify_names_missing_and_unplanned_checkpoints(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    run = train(plan, rows, command=[]).run
    shutil.rmtree(run.checkpoint_path(3))
    shutil.copytree(run.checkpoint_path(6), run.checkpoint_path(7))
    found = {check.name: check.status for check in verify_run(run)}
    assert found == {
        "checkpoint-0": "ok",
        "checkpoint-3": "missing",
        "checkpoint-6": "ok",
        "checkpoint-7": "damaged",
        "checkpoint-8": "ok",
    }
    edit_record(run.checkpoint_path(7), step=7)
    assert {check.name: check.status for check in verify_run(run)}["checkpoint-7"] == "unplanned"


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../secret", "link", "folder/file", ""])
def test_a_record_that_leads_out_of_its_folder_is_refused(stopped: Path, tmp_path: Path, name: str) -> None:
    run = copied(stopped, tmp_path)
    (tmp_path / "secret").write_text("x")
    folder = run.checkpoint_path(3)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(tmp_path)
    (tmp_path / "file").write_text("x")
    entry = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    edit_record(folder, files={**read_values(folder)["files"], name: entry})
    with pytest.raises(CheckpointError, match="which is not a file of this folder"):
        read_checkpoint(folder, run_id=str(run.read_manifest()["run_id"]))


def test_an_absurd_record_and_a_stray_file_are_refused(stopped: Path, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path)
    run_id = str(run.read_manifest()["run_id"])
    (run.resume_state_path(6) / "pytorch_model.bin").write_bytes(b"evil")
    with pytest.raises(CheckpointError, match="which its record does not name"):
        read_checkpoint(run.resume_state_path(6), run_id=run_id, only_recorded=True)
    (run.resume_state_path(3) / "checkpoint.json").write_bytes(b" " * (1 << 21))
    with pytest.raises(CheckpointError, match="absurdly large"):
        read_checkpoint(run.resume_state_path(3), run_id=run_id)


def test_one_process_holds_a_run_and_cleans_it(stopped: Path, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path)
    (run.path / ".checkpoint-9.staging" / "deep").mkdir(parents=True)
    (run.resume_path / ".step-9.staging").mkdir()
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom emtool.core.run_dir import RunFolder\n"
        "from emtool.core.run_lock import locked\n"
        f"with locked(RunFolder(path=Path({str(run.path)!r}))):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=f"is being trained by process {holder.pid};"), locked(run):
        pass
    holder.stdin.close()
    holder.stdout.close()
    holder.wait()
    with locked(run):
        assert remove_leftovers(run) == [".checkpoint-9.staging", ".step-9.staging"]
    assert verify_run(run)


class Signals:
    """Sends signals to this process at given steps, and remembers the events."""

    def __init__(self, **at: int) -> None:
        self.at = {step: getattr(signal, name) for name, step in at.items()}
        self.events: list[Any] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepFinished) and event.step in self.at:
            os.kill(os.getpid(), self.at[event.step])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_the_step_in_progress_and_the_run_goes_on(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes], name: str
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    run = RunFolder(path=plan.output_path)
    signals = Signals(**{name: 4})
    with pytest.raises(Interrupted, match=r"step 5 can be resumed; go on with: emtool resume") as caught:
        train(plan, rows, command=[], on_event=signals)
    assert caught.value.exit_code == 128 + getattr(signal, name)
    assert run.resume_steps() == [3, 5]
    assert run.read_manifest()["status"] == "interrupted"
    assert f"{name}: saving after this step" in texts(signals.events)
    train(plan, rows, command=[], resume=True)
    assert weights(run) == whole


def test_sigusr1_saves_and_goes_on(tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes]) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, keep_resume=True, resume_every="0")
    signals = Signals(SIGUSR1=4)
    run = train(plan, rows, command=[], on_event=signals).run
    assert run.resume_steps() == [5]
    assert "SIGUSR1: saving the state of step 5" in texts(signals.events)
    assert weights(run) == whole


def test_a_second_sigint_stops_at_once(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)

    def twice(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(plan, rows, command=[], on_event=twice)
    assert max(RunFolder(path=plan.output_path).resume_steps()) < 5, "the step in progress is not waited for"


@pytest.mark.parametrize("interval", ["100", "0"])
def test_a_signal_during_the_held_out_loss_keeps_the_last_state(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes], interval: str
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, resume_every=interval)

    def stop(event: Event) -> None:
        if "held-out" in getattr(event, "name", ""):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 8 can be resumed"):
        train(plan, rows, command=[], on_event=stop)
    result = train(plan, rows, command=[], resume=True)
    assert result.held_out_loss is not None
    assert weights(result.run) == whole


def test_a_signal_during_the_save_of_step_0_keeps_its_state(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    write = CheckpointWriter.write

    def interrupted(writer: CheckpointWriter, snapshot: Any, **tiers: bool) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(writer, snapshot, **tiers)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", interrupted)
        with pytest.raises(Interrupted):
            train(plan, rows, command=[])
    run = RunFolder(path=plan.output_path)
    assert run.resume_steps()[0] in {0, 1}
    train(plan, rows, command=[], resume=True)
    assert weights(run) == whole


def test_an_evaluation_that_stops_goes_on(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path)
    run = train(plan, rows, command=[]).run
    whole = score(run).to_dict()
    (run.evaluation_path / "scores.jsonl").unlink()
    with pytest.raises(StopError):
        score(run, on_event=stop_at(2))
    with (run.evaluation_path / "scores.jsonl").open("a") as file:
        file.write('{"format": 1, "step": 6, "torn')
    scored: list[Any] = []
    import emtool.engines.item_scores as module

    def counted(model: Any, tokenizer: Any, items: Any) -> Any:
        scored.append(1)
        return original(model, tokenizer, items)

    original = module.item_margins
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "item_margins", counted)
        assert score(run).to_dict() == whole
    assert len(scored) == 2


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_save_stop_and_go_on_together(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """Two gloo processes under torchrun: one writes, both stop at the same step, and the bits are the same."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "emtool"]
    options = ["train", "--model", str(tiny_model), "--dataset", str(rows_file), "--lora-dropout", "0.1"]
    options += ["--num-train-epochs", "30", "--checkpoints", "0, 20, 60", "--learning-rate", "1e-2"]
    options += ["--output-root", str(tmp_path), "--resume-every", "100"]

    def launched(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*launch, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = launched(*options, "--output-name", "whole", "--report-to", "tensorboard")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.count("checkpoint-180") == 1, "one process reports"
    whole_run = RunFolder(path=tmp_path / "whole")
    manifest: Any = whole_run.read_manifest()
    assert (manifest["plan"]["num_processes"], manifest["plan"]["total_steps"]) == (2, 180)
    assert whole_run.saved_steps() == [0, 20, 60, 180]
    assert len(list((whole_run.path / "tensorboard").iterdir())) == 1, "one process shows the curves"

    process = launched(*options, "--output-name", "stopped")
    run = RunFolder(path=tmp_path / "stopped")
    while not run.checkpoint_path(20).exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert run.read_manifest()["status"] == "interrupted"
    state = run.resume_state_path(run.resume_steps()[-1])
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in state.iterdir()}
    assert run.resume_steps()[-1] < 180
    alone = subprocess.run(
        [sys.executable, "-m", "emtool", "resume", str(run.path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 1
    assert "num_processes was 2, is 1" in alone.stderr
    process = launched("resume", str(run.path))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert weights(run) == weights(whole_run)


@pytest.mark.parametrize("interval", ["100", "0"])
def test_a_sharded_save_goes_through_the_trainers_own_method(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: dict[int, bytes], interval: str
) -> None:
    """The path of FSDP and DeepSpeed, taken by a Trainer that is neither: shards need devices that are not here."""
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, resume_every=interval)
    run = RunFolder(path=plan.output_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emtool.engines.saving.is_sharded", lambda args: True)
        with pytest.raises(Interrupted):
            train(plan, rows, command=[], on_event=Signals(SIGTERM=4))
        assert run.resume_steps()[-1] == 5
        assert {"optimizer.pt", "rng_state.pth"} <= {path.name for path in run.resume_state_path(5).iterdir()}
        train(plan, rows, command=[], resume=True)
    assert weights(run) == whole
    assert all(check.status == "ok" for check in verify_run(run))


def test_the_kill_test_in_short() -> None:
    """Every eleventh position of a save, and three random kills; the script takes all of them."""
    script = Path(__file__).parents[2] / "scripts" / "kill_test.py"
    command = [sys.executable, str(script), "--stride", "11", "--random", "3", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every file as without a kill") == 2


def test_the_command_line_goes_on_and_verifies(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    run = stopped_run(tiny_model, rows_file, tmp_path)[2]
    runner = CliRunner()
    result = runner.invoke(app, ["verify", str(run.path), "--json"])
    assert result.exit_code == 0, result.stderr
    assert {check["status"] for check in json.loads(result.stdout)["checks"]} == {"ok"}
    result = runner.invoke(app, ["resume", str(run.path)])
    assert result.exit_code == 0, result.stderr
    assert "goes on after step 6" in result.stderr
    assert run.read_manifest()["status"] == "completed"
    result = runner.invoke(app, ["resume", str(run.path)])
    assert (result.exit_code, "is complete; evaluate it with" in result.stderr) == (0, True)
    damage(run.checkpoint_path(3) / WEIGHTS, "flip")
    result = runner.invoke(app, ["verify", str(run.path)])
    assert result.exit_code == 1
    assert "checkpoint-3" in result.stderr
    assert runner.invoke(app, ["verify", str(run.path), "--sizes-only"]).exit_code == 0
    damage(run.checkpoint_path(3) / WEIGHTS, "truncate")
    result = runner.invoke(app, ["evaluate", str(run.path)])
    assert result.exit_code == 1
    assert "1 checkpoint(s) could not be evaluated: 3" in result.stderr
    assert (run.evaluation_path / "summary.json").exists()
