import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emtool.core.errors import Interrupted
from emtool.core.interrupts import interruptible
from emtool.core.jobs import Command, InSequence, Job, JobListener, JobOutcome, last_line, run_job
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import lock_holder, locked


def job(folder: Path, *commands: Command, name: str = "one", locked: tuple[Path, ...] = ()) -> Job:
    return Job(
        name=name,
        commands=commands,
        log_path=folder / "logs" / f"{name}.log",
        folder=folder,
        locked=locked,
        environment=(("EMTOOL_TEST", "yes"),),
    )


def python(code: str) -> Command:
    """Return a command that runs a line of Python; `emtool` and what follows are its arguments."""
    return Command(arguments=(), launcher=(sys.executable, "-c", code))


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_job_runs_its_commands_in_its_folder_and_keeps_what_they_say(tmp_path: Path) -> None:
    found = run_job(
        job(
            tmp_path,
            python("import os; print(os.getcwd(), os.environ['EMTOOL_TEST'])"),
            Command(arguments=("--version",)),
        )
    )
    assert found == JobOutcome(name="one")
    first, second = (tmp_path / "logs" / "one.log").read_text().splitlines()
    assert first == f"{tmp_path} yes"
    assert second.startswith("emtool ")


def test_a_command_that_fails_ends_its_job_with_emtools_own_line(tmp_path: Path) -> None:
    found = run_job(job(tmp_path, Command(arguments=("train", "--seed", "x")), python("open('reached', 'w')")))
    assert found.problem is not None
    assert found.problem.startswith("Invalid value for '--seed'")
    assert "(exit code 2; " in found.problem
    assert not (tmp_path / "reached").exists()


def test_a_command_that_is_killed_is_said_to_be(tmp_path: Path) -> None:
    found = run_job(job(tmp_path, python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")))
    assert found.problem is not None
    assert found.problem.startswith("ended by SIGKILL, as the system does where memory runs out (")
    found = run_job(job(tmp_path, python("import os; print('training', flush=True); os.kill(os.getpid(), 11)")))
    assert found.problem is not None
    assert found.problem.startswith(f"ended by SIGSEGV (its last line: training; {tmp_path}")


@pytest.mark.parametrize(("code", "was_stopped"), [(143, True), (130, True), (129, True), (1, False), (137, False)])
def test_a_command_that_saved_and_stopped_has_not_failed(tmp_path: Path, code: int, was_stopped: bool) -> None:
    found = run_job(job(tmp_path, python(f"import sys; sys.exit({code})")))
    assert found.problem is not None
    assert found.was_stopped is was_stopped


def test_a_folder_that_is_not_on_this_machine_is_a_failed_job(tmp_path: Path) -> None:
    there = job(tmp_path, python("1"))
    gone = Job(name="x", commands=there.commands, log_path=there.log_path, folder=tmp_path / "gone")
    assert "is not on this machine" in str(run_job(gone).problem)


def test_the_earlier_attempt_is_waited_for(tmp_path: Path) -> None:
    ended: list[JobOutcome] = []
    with locked(RunFolder(path=tmp_path)):
        waiting = threading.Thread(
            target=lambda: ended.append(run_job(job(tmp_path, python("open('ran', 'w')"), locked=(tmp_path,))))
        )
        waiting.start()
        time.sleep(0.6)
        assert not (tmp_path / "ran").exists()
    waiting.join()
    assert ended == [JobOutcome(name="one")]
    assert (tmp_path / "ran").exists()


def test_a_sequence_goes_on_after_a_failure(tmp_path: Path) -> None:
    ended: list[JobOutcome] = []
    InSequence().run(
        [job(tmp_path, python("raise SystemExit(3)"), name="bad"), job(tmp_path, python("1"), name="good")],
        JobListener(on_outcome=ended.append),
    )
    assert [(outcome.name, outcome.problem is None) for outcome in ended] == [("bad", False), ("good", True)]


WAITS = (
    "import signal, sys, time\n"
    "def stop(*_):\n    open('stopped', 'w').close()\n    sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, stop)\nopen('begun', 'w').close()\ntime.sleep(60)\n"
)


def test_a_signal_stops_the_command_and_waits_for_it(tmp_path: Path) -> None:
    def interrupt() -> None:
        until((tmp_path / "begun").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with interruptible(), pytest.raises(Interrupted):
        run_job(job(tmp_path, python(WAITS)))
    assert (tmp_path / "stopped").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a process is tied to its parent on Linux only")
def test_a_command_whose_worker_is_killed_is_told_to_stop(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests.core.test_jobs import WAITS, job, python; "
        "from emtool.core.jobs import run_job; "
        f"run_job(job(Path({str(tmp_path)!r}), python(WAITS)))"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    until((tmp_path / "begun").exists)
    assert not (tmp_path / "stopped").exists()
    worker.kill()
    assert worker.wait() == -signal.SIGKILL
    until((tmp_path / "stopped").exists)


def test_a_launcher_that_stops_at_once_takes_what_it_started_along(tmp_path: Path) -> None:
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAITS!r}])"

    def interrupt() -> None:
        until((tmp_path / "begun").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with interruptible(), pytest.raises(Interrupted):
        run_job(job(tmp_path, python(launcher)))
    until((tmp_path / "stopped").exists)


def test_a_launcher_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    found = run_job(job(tmp_path, Command(arguments=(), launcher=("nosuchprogram",))))
    assert str(found.problem).startswith("cannot start nosuchprogram: No such file or directory")


def test_the_last_line_is_emtools_own_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before\nemtool: old\n")
    begin = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"emtool: what is wrong\nResource tracker: \xff noise\n\n")
    assert last_line(path, begin) == "what is wrong"
    path.write_bytes(path.read_bytes()[:begin] + b"\nTraceback\n  ValueError: x\n")
    assert last_line(path, begin) == "ValueError: x"
    path.write_bytes(b"")
    assert last_line(path) == ""


def test_no_lock_is_no_holder(tmp_path: Path) -> None:
    assert lock_holder(RunFolder(path=tmp_path / "none")) is None
