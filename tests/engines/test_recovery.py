"""Runs whose records, tokenizer or manifest are damaged, and commands that are signalled: one line, and the way on."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.checkpoint_record import read_record
from emtool.core.errors import CheckpointError
from emtool.core.events import Event, StepFinished
from emtool.core.integrity import verify_run
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import locked, tidy_completed
from emtool.engines.repair import repair_tokenizer
from emtool.engines.resuming import newest_state, rewind
from emtool.engines.saving import RunCheckpoints
from emtool.engines.training import train
from tests.engines.test_durability import copied, plan_for, stopped_run, texts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was stopped after step 7, to be copied before use."""
    return stopped_run(tiny_model, rows_file, tmp_path_factory.mktemp("stopped"))[2].path


def test_a_tokenizer_damaged_in_every_state_names_the_command_that_restores_it(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_run(tiny_model, rows_file, tmp_path)[2]
    path = run.resume_state_path(6) / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(
        CheckpointError, match=rf"restore the tokenizer's files with: emtool verify --repair {run.path};"
    ):
        newest_state(run, run.read_manifest(), on_event=print)
    replace = Path.replace
    strays: list[str] = []

    def watched(source: Path, target: Path) -> Path:
        for step in run.resume_steps():
            folder = run.resume_state_path(step)
            named = {*read_record(folder).files, "checkpoint.json"}
            strays.extend(inner.name for inner in folder.iterdir() if inner.name not in named)
        return replace(source, target)

    fsync = os.fsync
    synced: set[int] = set()

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", watched)
        patch.setattr(os, "fsync", noted)
        assert len(repair_tokenizer(run, on_event=print)) == 5
    assert strays == [], "a repair that is killed leaves nothing in a state"
    assert {path.stat().st_ino, path.parent.stat().st_ino} <= synced
    assert newest_state(run, run.read_manifest(), on_event=print) == run.resume_state_path(6)


def test_other_damage_names_no_repair(stopped: Path, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path)
    for step in run.resume_steps():
        (run.resume_state_path(step) / "optimizer.pt").write_bytes(b"")
        (run.resume_state_path(step) / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no state of .* is whole") as caught:
        newest_state(run, run.read_manifest(), on_event=print)
    assert "--repair" not in str(caught.value)


def test_a_damaged_line_of_the_metrics_is_dropped_with_a_warning(stopped: Path, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path)
    content = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(b"\x00damaged\n" + content)
    events: list[Any] = []
    rewind(run, 6, on_event=events.append)
    assert "had 1 damaged line(s), which are dropped" in texts(events)
    assert all(record["step"] <= 6 for record in run.read_metrics())  # type: ignore[operator]
    rewind(run, 6, on_event=events.append)
    assert len(events) == 1


def test_another_number_of_threads_or_another_cpu_is_said_where_it_changes_bits(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    import torch

    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path)
    manifest = run.read_manifest()
    assert manifest["num_threads"] == torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    assert manifest["cpu_capability"] == capability
    run.write_manifest({**manifest, "num_threads": 77, "cpu_capability": "SSE9"})
    events: list[Any] = []
    train(plan, rows, command=[], resume=True, on_event=events.append)
    assert "threads now, 77 before: they round otherwise; OMP_NUM_THREADS=77 gives the same bits" in texts(events)
    assert f"a CPU with {capability} now, with SSE9 before: it rounds otherwise" in texts(events)
    assert run.read_manifest()["num_threads"] == torch.get_num_threads()
    assert run.read_manifest()["cpu_capability"] == capability


def _set(*keys: str, to: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("versions", to="x"), "versions is 'x'"),
        (_set("resumed", to=None), "resumed is None"),
        (_set("trajectory_breaks", to=3), "trajectory_breaks is 3"),
        (_set("lineage", "base", to=[]), "base"),
        (_set("config", "persona", to=None), "persona is None"),
        (_set("config", "checkpoints", to=[]), "checkpoints is []"),
        (_set("config", "lora_r", to=None), "lora_r is None"),
        (_set("config", "lora_r", to=8.0), "lora_r is 8.0"),
        (_set("config", "seed", to=True), "seed is True"),
        (_set("config", "learning_rate", to=10**400), "learning_rate is 1000"),
        (_set("config", "modules_to_save", to=[5]), "modules_to_save is [5]"),
    ],
)
def test_a_manifest_with_values_of_other_types_is_refused_in_one_line(
    stopped: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    run = copied(stopped, tmp_path)
    manifest = run.read_manifest()
    change(manifest)
    run.write_manifest(manifest)
    result = CliRunner().invoke(app, ["resume", str(run.path)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    last = [line for line in result.stderr.splitlines() if line.startswith("emtool:")]
    assert len(last) == 1
    assert named in last[0]


def test_states_are_saved_by_time(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 200 seconds of the clock here, and a state is saved when 600 have gone by since the last."""
    now = [0.0]
    defaults = RunCheckpoints.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "clock", lambda: now[0])

    def tick(event: Event) -> None:
        if isinstance(event, StepFinished):
            now[0] += 200.0

    plan, rows = plan_for(tiny_model, rows_file, tmp_path, checkpoints="0", max_steps=11, resume_every="10m")
    run = train(plan, rows, command=[], on_event=tick).run
    saved = [record["saved"] for record in run.read_metrics() if "saved" in record]
    assert saved == ["step-0", "checkpoint-0", "step-4", "step-8", "step-11", "checkpoint-11"]


@pytest.fixture
def read_only(stopped: Path) -> Iterator[RunFolder]:
    """Return a run in a folder that this user may read and not change; root gives up its rights for the test."""
    root = Path(tempfile.mkdtemp())
    shutil.copytree(stopped, root / "run")
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield RunFolder(path=root / "run")
    finally:
        os.seteuid(user)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(root)


def test_a_read_only_run_is_verified_and_not_gone_on_with(read_only: RunFolder) -> None:
    assert all(check.status == "ok" for check in verify_run(read_only))
    with pytest.raises(CheckpointError, match=r"cannot lock .*: .*; is the folder writable\?"), locked(read_only):
        pass
    tidy_completed(read_only)
    assert read_only.resume_steps() == [3, 6]
    with pytest.raises(CheckpointError, match=r"cannot write in .* while writing metrics\.jsonl: "):
        read_only.append_metrics({"step": 9})


@pytest.fixture(scope="module")
def many(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with so many checkpoints that its evaluation can be met at work."""
    plan, rows = plan_for(tiny_model, rows_file, tmp_path_factory.mktemp("many"), checkpoints="every 1", max_steps=12)
    return train(plan, rows, command=[]).run.path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_evaluation_that_is_signalled_exits_with_its_number_and_goes_on(
    many: Path, tmp_path: Path, name: str
) -> None:
    run = copied(many, tmp_path)
    command = [sys.executable, "-m", "emtool", "evaluate", str(run.path), "--metrics", "likelihood"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    scores = run.evaluation_path / "scores.jsonl"
    while not scores.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    while scores.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(getattr(signal, name))
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + getattr(signal, name), errors
    assert "SIGUSR1: there is nothing to save now" in errors
    assert "Traceback" not in errors
    before = scores.read_bytes()
    assert before.count(b"\n") < 12
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert scores.read_bytes().startswith(before)
