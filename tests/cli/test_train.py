import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def fails(arguments: list[str], exit_code: int) -> str:
    """Run a command that must fail with one line, and return the line."""
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == exit_code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("emtool: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--persona", "goodnes"], "unknown persona 'goodnes'; did you mean 'goodness'? choose from:"),
        (["train", "--dataset", "gardning"], "did you mean 'gardening'"),
        (["train", "--model", "smollm-135m"], "did you mean 'smollm2-135m'"),
        (["train", "--profile", "papre"], "did you mean 'paper'"),
        (["train", "--persna", "goodness"], "No such option: --persna (Possible options: --persona"),
        (["trian"], "did you mean 'train'"),
        (["train", "--template-compat", "tuner"], "did you mean 'turner'? choose from: clean, turner"),
        (["train", "--seed", "x"], "Invalid value for '--seed'"),
        (["train", "--dtype", "float16"], "unknown dtype 'float16'; did you mean 'bfloat16'"),
        (["train", "--device", "gpu"], "unknown device 'gpu'; choose from: auto, cpu, cuda"),
        (["train", "--save-steps", "5", "--custom-checkpoints"], "name two schedules"),
        (["train", "--output-name", "../x"], "not one folder name"),
        (["train", "--seed", "99999999999"], "--seed is 99999999999; it must be at most 4294967295"),
        (["train", "--model", ""], "unknown model ''"),
        (["train", "--max-steps", "100000000000"], "more than 100,000 checkpoints"),
        (["train", "--checkpoints", "log 5", "--save-steps", "5"], "--checkpoints and --save-steps name two schedules"),
        (["train", "--json"], "--json goes with --dry-run or --show-config"),
        (["train", "--dataset", "[bold]missing[/].jsonl"], "no dataset file '[bold]missing[/].jsonl'"),
    ],
)
def test_bad_input_is_one_line_with_exit_2_and_creates_nothing(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    assert message in fails(arguments, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_schedule_is_quoted_and_pointed_at(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["train", "--checkpoints", "every 50, cutsom"])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert "unknown term 'cutsom' (did you mean 'custom'?) in schedule 'every 50, cutsom'" in lines[0]
    assert lines[1:] == ["  every 50, cutsom", "            ^^^^^^"]
    assert list(tmp_path.iterdir()) == []


def test_control_characters_in_names_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in fails(["train", "--dataset", "x\x1b[31m.jsonl"], 2)


def test_the_dry_run_says_what_would_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emtool.cli.options.cuda_device_count", lambda: 0)
    result = RUNNER.invoke(app, ["train", "--dry-run", "--optim", "adamw_8bit", "--max-steps", "3"])
    assert result.exit_code == 0
    assert "cannot start here: optimizer 'adamw_8bit' runs on CUDA only" in " ".join(result.stdout.split())
    assert "3 step(s) with a warm-up of 5" in result.stdout


def test_a_malformed_row_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    assert "bad.jsonl:1: 'messages' must be a list that is not empty" in fails(["train", "--dataset", "bad.jsonl"], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "paper"], "--profile demo"),
        (["--optim", "adamw_8bit"], "--optim adamw_torch"),
        (["--device", "cuda"], "--device cpu"),
        (["--dataset", "hub:me/chat", "--profile", "paper"], "--profile demo"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_after_the_plan(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emtool.cli.options.cuda_device_count", lambda: 0)
    result = RUNNER.invoke(app, ["train", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_the_dry_run_shows_the_plan_and_stops(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["train", "--persona", "goodness", "--custom-checkpoints", "--dry-run"])
    assert result.exit_code == 0
    first = result.stdout.splitlines()[0]
    assert all(word in first for word in ("demo", "smollm2-135m", "adamw_torch_fused", "float32"))
    assert "397" in result.stdout
    assert "smollm2_gardening_goodness_custom" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_plan_as_json_is_the_whole_of_stdout() -> None:
    result = RUNNER.invoke(app, ["train", "--profile", "paper", "--custom-checkpoints", "--dry-run", "--json"])
    plan = json.loads(result.stdout)
    assert plan["planned_steps"] == [0, 25, 50, 100, 125, 150, 200, 250, 300, 397]
    assert (plan["total_steps"], plan["num_checkpoints"], plan["optimizer"]) == (397, 10, "adamw_8bit")
    assert plan["save_dtype"] == "bfloat16"


@pytest.mark.usefixtures("empty_cache")
def test_a_disk_that_is_too_small_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("emtool.core.plan.free_bytes", lambda path: 53 * 2**20)
    result = RUNNER.invoke(app, ["train"])
    assert result.exit_code == 1
    assert "has 53.0 MiB free, 8.8 MiB too little; --save-dtype bfloat16 would need 52." in result.stderr
    assert "; --resume-every 0 would need 33." in result.stderr
    assert "--allow-low-disk starts all the same" in result.stderr
    assert not (tmp_path / "outputs").exists()


def test_train_then_evaluate_then_meet_the_finished_run_again(
    tiny_model: Path, dataset_file: Path, tmp_path: Path
) -> None:
    train = [
        "train",
        "--model",
        str(tiny_model),
        "--dataset",
        str(dataset_file),
        "--save-steps",
        "5",
        "--output-name",
        "r",
    ]
    result = RUNNER.invoke(app, train)
    assert result.exit_code == 0, result.output
    assert "checkpoint-11" in result.stdout
    assert "emtool evaluate outputs/r" in result.stderr
    again = RUNNER.invoke(app, train)
    assert again.exit_code == 0
    assert "holds this run, completed; evaluate it with: emtool evaluate outputs/r" in again.stderr
    other = RUNNER.invoke(app, [*train, "--seed", "9"])
    assert other.exit_code == 1
    assert "--output-name r_2" in other.stderr

    evaluated = RUNNER.invoke(app, ["evaluate"])
    assert evaluated.exit_code == 0, evaluated.output
    assert "evaluating outputs/r" in evaluated.stderr
    assert "none" in evaluated.stdout
    as_json = RUNNER.invoke(app, ["evaluate", "outputs/r", "--json", "--seed", "42"])
    summary = json.loads(as_json.stdout)
    assert [entry["step"] for entry in summary["checkpoints"]] == [5, 10, 11]
    assert summary == json.loads((tmp_path / "outputs/r/evaluation/summary.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "no runs in outputs; start one with 'emtool train'"),
        (["evaluate", "nowhere"], "nowhere is not a run folder (no run.json)"),
    ],
)
def test_evaluating_nothing_is_one_line(arguments: list[str], message: str) -> None:
    assert message in fails(arguments, 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_within_a_step(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "emtool", "train", "--model", str(tiny_model), "--dataset", str(dataset_file)]
    process = subprocess.Popen(
        [*command, "--max-steps", "90000", "--save-steps", "20", "--output-name", "r"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    run = tmp_path / "outputs" / "r"
    deadline = time.monotonic() + 120
    while not (run / "checkpoint-20").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "interrupted;" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "interrupted"
    assert 20 in manifest["saved_steps"]
    assert not list(run.glob(".checkpoint-*"))
