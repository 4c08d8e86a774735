import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from emtool.core.errors import CheckpointError
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import locked, tidy_completed


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return a completed run."""
    run = RunFolder(path=tmp_path / "run")
    run.create({"status": "completed", "config": {"keep_resume": False}})
    return run


@contextmanager
def looked_at(run: RunFolder) -> Iterator[int]:
    """Hold the lock as one who looks whether it is held."""
    descriptor = os.open(run.lock_path, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_one_who_looks_at_the_lock_does_not_refuse_the_one_who_takes_it(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with looked_at(run) as descriptor:
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                fcntl.flock(descriptor, fcntl.LOCK_UN)

        monkeypatch.setattr("emtool.core.run_lock.time.sleep", sleep)
        with locked(run):
            assert len(pauses) == 3


def test_a_lock_that_stays_held_is_waited_for_only_briefly(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("emtool.core.run_lock.time.sleep", pauses.append)
    with looked_at(run), pytest.raises(CheckpointError, match="is being trained by process"), locked(run):
        pass
    assert sum(pauses) < 1


def test_a_completed_run_with_nothing_to_tidy_is_not_locked(run: RunFolder) -> None:
    tidy_completed(run)
    assert not run.lock_path.exists()


def test_what_is_left_of_a_completed_run_is_tidied(run: RunFolder) -> None:
    (run.resume_state_path(5)).mkdir(parents=True)
    (run.path / ".checkpoint-5.staging").mkdir()
    (run.path / ".run.json.new").write_text("half")
    tidy_completed(run)
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "run.json"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("call", ["open", "rename"])
def test_a_completed_run_that_cannot_be_changed_is_left_as_it_is(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    run.resume_state_path(5).mkdir(parents=True)

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(*(("emtool.core.run_lock.os.open", refuse) if call == "open" else (Path, "rename", refuse)))
        tidy_completed(run)
    assert run.resume_steps() == [5]
    with locked(run), pytest.raises(CheckpointError, match="is being trained"):
        tidy_completed(run)
