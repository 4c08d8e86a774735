"""`emtool evaluate --workers` as it is typed, on a real local cluster."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.errors import BackendError
from emtool.core.run_dir import RunFolder
from emtool.core.shards import Shard, leftover_shards, seed_shard
from emtool.engines.activation_files import read_activations
from emtool.engines.ray_pool import RayPool, _RaySays

RUNNER = CliRunner()
EMTOOL = [sys.executable, "-m", "emtool"]


@pytest.fixture
def copies(spread_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunFolder, RunFolder]:
    """Return two copies of a run that was not evaluated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ignored = shutil.ignore_patterns("evaluation", ".lock")
    paths = [Path(shutil.copytree(spread_run.path, tmp_path / name, ignore=ignored)) for name in ("one", "many")]
    return RunFolder(path=paths[0]), RunFolder(path=paths[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2", "--watch"], "--workers does not go with --watch"),
        (["--workers", "2", "--backend", "scripted:script.jsonl"], "--workers goes with --backend hf"),
        (["--workers", "0"], "the least is 1"),
        (["--address", "auto"], "--address goes with --workers"),
    ],
)
def test_what_does_not_go_with_workers_is_one_line(
    copies: tuple[RunFolder, RunFolder], arguments: list[str], message: str
) -> None:
    Path("script.jsonl").touch()
    for more in ([], ["--dry-run"]):
        result = RUNNER.invoke(app, ["evaluate", "many", *arguments, *more])
        assert result.exit_code == 2
        assert message in result.stderr.replace("\n", " ")
    assert not copies[1].evaluation_path.exists()


def test_workers_see_every_device_and_are_told_no_number(
    copies: tuple[RunFolder, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], str | None, float]] = []

    def record(*_: object, arguments: list[str], pool: RayPool, **__: object) -> None:
        seen.append((arguments, os.environ.get("CUDA_VISIBLE_DEVICES"), pool.num_gpus))
        raise BackendError("far enough")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("emtool.core.hardware.cuda_device_count", lambda: 3)
    monkeypatch.setattr("emtool.cli.evaluate.record_on_workers", record)
    refused = RUNNER.invoke(app, ["evaluate", "many", "--workers", "2", "--device", "cuda:1"])
    assert "--device cuda:1 does not go with --workers" in refused.stderr.replace("\n", " ")
    result = RUNNER.invoke(app, ["evaluate", "many", "--workers", "2", "--device", "cuda", "--seed", "7"])
    assert "far enough" in result.stderr
    assert seen == [(["--seed", "7", "--device", "cuda"], None, 1.0)]


def test_what_workers_of_a_stopped_evaluation_made_is_taken(copies: tuple[RunFolder, RunFolder]) -> None:
    asked = ["--metrics", "answers", "--n-per-question", "1", "--max-new-tokens", "2"]
    many = copies[1]
    many.evaluation_path.mkdir()
    seed_shard(Shard(path=many.path, number=0), [0])
    assert RUNNER.invoke(app, ["evaluate", "many", *asked, "--steps", "0", "--shard", "0"]).exit_code == 0
    assert not (many.evaluation_path / "answers.jsonl").exists()
    (many.evaluation_path / "workers" / "7.log").write_text("of a worker that failed")
    made = [json.loads(line) for line in (Shard(path=many.path, number=0).evaluation_path / "answers.jsonl").open()]
    result = RUNNER.invoke(app, ["evaluate", "many", *asked, "--steps", "0"])
    assert result.exit_code == 0, result.output
    assert "10 answers are there already" in result.stderr
    assert [json.loads(line) for line in (many.evaluation_path / "answers.jsonl").open()] == made
    assert leftover_shards(many) == []
    assert not (many.evaluation_path / "workers").exists()


def kill_a_worker(run: RunFolder) -> None:
    """Kill the process that started a worker's evaluation once it has answered some questions."""
    records = Shard(path=run.path, number=1).evaluation_path / "answers.jsonl"
    end = time.monotonic() + 240
    while not (records.exists() and records.read_bytes().count(b"\n") > 20):
        assert time.monotonic() < end, "the worker never answered"
        time.sleep(0.02)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "emtool.core.tied" in words and words[-2:] == ["--shard", "1"]:
            worker = process.parent()
            assert worker is not None
            worker.kill()
            return
    raise AssertionError("the worker had ended")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_workers_one_of_them_killed_give_what_one_process_gives(copies: tuple[RunFolder, RunFolder]) -> None:
    one, many = copies
    asked = ["--n-per-question", "12", "--max-new-tokens", "48", "--batch-size", "10", "--extract-activations"]
    assert RUNNER.invoke(app, ["evaluate", "one", *asked]).exit_code == 0
    killer = threading.Thread(target=kill_a_worker, args=(many,))
    killer.start()
    done = subprocess.run(
        [*EMTOOL, "evaluate", "many", *asked, "--workers", "2", "--json"], capture_output=True, text=True, check=False
    )
    killer.join()
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["checkpoints"]) == len(one.saved_steps())
    assert "a worker was lost; Ray begins its job again, which goes on" in done.stderr.replace("\n", " ")
    assert "Ray:" not in done.stderr
    assert_same(one, many, num_samples=12)
    files = [sorted((run.evaluation_path / "activations").rglob("*.safetensors")) for run in (one, many)]
    assert [len(paths) for paths in files] == [len(one.saved_steps())] * 2
    for mine, other in zip(*files, strict=True):
        found, same = read_activations(mine)[0], read_activations(other)[0]
        assert torch.equal(found.text_means_NLD, same.text_means_NLD)


def assert_same(one: RunFolder, many: RunFolder, *, num_samples: int) -> None:
    """Check that workers left the answers and the numbers that one process gives, and nothing else."""
    summaries = [json.loads((run.evaluation_path / "summary.json").read_text()) for run in (one, many)]
    assert summaries[0]["checkpoints"] == summaries[1]["checkpoints"]
    assert summaries[0]["settings"] == summaries[1]["settings"]
    answers = [sorted((run.evaluation_path / "answers.jsonl").read_text().splitlines()) for run in (one, many)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == len(one.saved_steps()) * 10 * num_samples
    assert not (many.evaluation_path / "workers").exists()


#: A cluster that somebody else started: it says where it is, and ends with its standard input.
CLUSTER = """
import sys
import ray
print(ray.init(num_cpus=2, include_dashboard=False).address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_cluster_that_is_there_does_the_work_and_stays(
    copies: tuple[RunFolder, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, many = copies
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    asked = ["--n-per-question", "2", "--max-new-tokens", "8", "--batch-size", "10"]
    assert RUNNER.invoke(app, ["evaluate", "one", *asked]).exit_code == 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], text=True, **pipes) as cluster:  # type: ignore[call-overload]
        address = cluster.stdout.readline().strip()
        command = [*EMTOOL, "evaluate", "many", *asked, "--workers", "2", "--address", address]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert cluster.poll() is None
        again = [sys.executable, "-c", f"import ray; ray.init(address={address!r}); print(len(ray.nodes()))"]
        assert subprocess.run(again, capture_output=True, text=True, check=True).stdout.strip() == "1"
        cluster.stdin.close()
    assert_same(one, many, num_samples=2)


def test_what_ray_prints_is_an_event_and_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    lines = [
        "\x1b[33m(raylet)\x1b[0m A worker died or was killed while executing a task by an unexpected system error.\n",
        "\x1b[33m(raylet)\x1b[0m Task run_job failed. There are 3 retries remaining, so the task will be retried.",
        " Error: \n(run_job pid=12, ip=192.0.2.2) \n",
        "\x1b[33m(raylet)\x1b[0m Task run_job failed due to oom. There are 2 oom retries remaining, so it will.\n",
        "(global lru) capacity: 83886080\nTop 10 memory users: PID\tMEM(GB)\tCOMMAND\n",
        "(raylet) Task run_job failed. There are infinite oom retries remaining, so the task will be retried.\n",
        "\x1b[36m(autoscaler +1m2s)\x1b[0m no node of this kind\n",
    ]
    with contextlib.redirect_stdout(_RaySays(lambda event: said.append(str(event.text)))):  # type: ignore[union-attr]
        for line in lines:
            sys.stdout.write(line)
    assert said == [
        "a worker was lost; Ray begins its job again, which goes on where it was (3 time(s) at most)",
        "a worker was killed because memory runs out; Ray begins its job again, which goes on where it was (2 time(s) "
        "at most)",
        "a worker was killed because memory runs out; Ray begins its job again, which goes on where it was",
        "Ray: no node of this kind",
    ]
    assert capsys.readouterr().out == ""
