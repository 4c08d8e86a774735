import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emtool.core.errors import CheckpointError
from emtool.core.run_dir import RunFolder


def made(tmp_path: Path, **manifest: Any) -> RunFolder:
    run = RunFolder(path=tmp_path / "run")
    run.create({"status": "failed", "config": {"resume_every": "10m"}, **manifest})
    return run


def test_a_run_without_a_state_begins_again_where_states_are_saved(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.checkpoint_path(0).mkdir()
    assert run.how_to_go_on().startswith("1 checkpoint(s) kept, ")
    assert run.how_to_go_on().endswith(f"begin again with: emtool resume {run.path}")
    run.checkpoint_path(5).mkdir()
    assert run.how_to_go_on() == "2 checkpoint(s) kept, and there is no state to go on from"
    run.resume_state_path(5).mkdir(parents=True)
    assert run.how_to_go_on().endswith(f"step 5 can be resumed; go on with: emtool resume {run.path}")


@pytest.mark.parametrize("config", [{"resume_every": "0"}, {"resume_every": "often"}, {}, None])
def test_a_run_that_saves_no_states_has_none_to_go_on_from(tmp_path: Path, config: Any) -> None:
    run = made(tmp_path, config=config)
    assert run.how_to_go_on() == "0 checkpoint(s) kept, and there is no state to go on from"
    run.manifest_path.unlink()
    assert run.how_to_go_on() == "0 checkpoint(s) kept, and there is no state to go on from"


def test_a_completed_run_is_said_to_be_complete(tmp_path: Path) -> None:
    run = made(tmp_path, status="completed")
    run.resume_state_path(5).mkdir(parents=True)
    assert "the run is complete; evaluate it with: emtool evaluate" in run.how_to_go_on()


def test_states_behind_a_link_are_removed_with_it(tmp_path: Path) -> None:
    run = made(tmp_path)
    elsewhere = tmp_path / "disk2"
    (elsewhere / "step-5" / "deep").mkdir(parents=True)
    (elsewhere / "notes").write_text("not the run's")
    run.resume_path.symlink_to(elsewhere)
    run.remove_states()
    run.remove_states()
    assert not run.resume_path.is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["notes"]
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_damaged_lines_of_the_metrics_are_dropped_and_counted(tmp_path: Path) -> None:
    run = made(tmp_path)
    good = [b'{"format": 1, "step": 1}\n', b'{"format": 1, "step": 2}\n', b'{"format": 1, "step": 9}\n']
    bad = [b"\xff\xfe\n", b"[]\n", b'{"step": \n', b"[" * 100_000 + b"\n"]
    run.metrics_path.write_bytes(b"".join([good[0], *bad, *good[1:], b'{"torn": ']))
    assert run.keep_metrics(lambda record: record["step"] != 9) == 4
    assert run.metrics_path.read_bytes() == b"".join(good[:2])
    assert [record["step"] for record in run.read_metrics()] == [1, 2]


def test_what_a_process_killed_while_creating_left_is_removed_by_the_next(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [tmp_path / f".run.{process}.new" for process in (ended.pid, os.getppid())]
    other = tmp_path / f".run2.{ended.pid}.new"
    for folder in (*left, other):
        folder.mkdir()
    made(tmp_path)
    assert [folder.exists() for folder in (*left, other)] == [False, True, True]


def test_a_run_that_another_process_made_meanwhile_is_named(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(CheckpointError, match="was made by another process just now; wait for it, or"):
        made(tmp_path)
