import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.cli.sweep import _evaluate_arguments, _evaluation_id, _request
from emtool.core.data import file_sha256
from emtool.core.errors import BackendError, CheckpointError, Interrupted
from emtool.core.jobs import Job, JobListener, JobOutcome
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import locked_sweep
from emtool.core.sweep import read_sweep
from emtool.core.sweep_folder import SweepFolder, metric_rows

RUNNER = CliRunner()
EMTOOL = [sys.executable, "-m", "emtool"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def sweep_file(model: Path, rows: Path, *, grid: str = "seed = [0, 1]", max_steps: int = 4, more: str = "") -> Path:
    path = Path("seeds.toml")
    path.write_text(
        f'[train]\nprofile = "demo"\nmodel = "{model}"\ndataset = "{rows}"\nmax_steps = {max_steps}\n'
        f'checkpoints = "init, every 2"\nlayers_to_transform = "all"\n{more}\n[grid]\n{grid}\n'
        '[evaluate]\nmetrics = ["likelihood", "answers"]\nn_per_question = 1\nmax_new_tokens = 2\n'
    )
    return path


def until(found: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not found():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def _far_enough(_folder: Path) -> NoReturn:
    raise CheckpointError("far enough")


def statuses(folder: Path) -> dict[str, str]:
    return {name: cell["status"] for name, cell in json.loads((folder / "sweep.json").read_text())["cells"].items()}


def weights(run: Path) -> dict[int, str]:
    folder = RunFolder(path=run)
    return {
        step: file_sha256(folder.checkpoint_path(step) / "adapter_model.safetensors") for step in folder.saved_steps()
    }


def test_the_dry_run_shows_every_cell_and_makes_nothing(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    file = sweep_file(tiny_model, rows_file)
    result = RUNNER.invoke(app, ["sweep", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert [line.split()[:4] for line in result.stdout.splitlines()[1:3]] == [
        ["seed-0", "waiting", "4", "3"],
        ["seed-1", "waiting", "4", "3"],
    ]
    assert "2 runs in outputs/seeds" in result.stdout
    found = json.loads(RUNNER.invoke(app, ["sweep", str(file), "--dry-run", "--json"]).stdout)
    assert [cell["plan"]["planned_steps"] for cell in found["cells"]] == [[0, 2, 4], [0, 2, 4]]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("grid", "more", "arguments", "message"),
    [
        ('persona = ["goodnes"]', "", [], "cell goodnes: unknown persona 'goodnes'; did you mean 'goodness'"),
        ("seed = [-1]", "", [], "cell seed-1: seeds.toml, [grid] and [train]: --seed is -1"),
        ("seed = [0]", "", ["--cell", "seed-9"], "unknown cell in seeds.toml 'seed-9'; did you mean 'seed-0'"),
        ("seed = [0]", '[job]\nlauncher = "no-such-launcher -m"\n', [], "there is no command 'no-such-launcher'"),
        ("seed = [0]", "", ["--address", "auto"], "--address goes with --workers"),
        ("seed = [0]", "", ["--output-name", "../x"], "not one folder name"),
        ("seed = [0]", "[evaluate]", [], "not TOML"),
        ('lora_r = [2]\nprofile = ["paper"]', "", [], "profile does not go with a sweep"),
        ("seed = [0]", "", ["--cell", "seed-0", "--dry-run"], "--cell trains one cell here"),
        ("seed = [0]", "", ["--cell", "seed-0", "--workers", "2"], "--cell trains one cell here"),
        ("seed = [0]", "", ["--workers", "1", "--address", "auto"], "cell seed-0: name the device in [train]"),
        ("seed = [0]", 'device = "cuda:1"', ["--workers", "2"], "device cuda:1 does not go with --workers"),
    ],
)
def test_what_no_cell_could_start_with_is_one_line_and_nothing_is_made(
    tiny_model: Path, rows_file: Path, grid: str, more: str, arguments: list[str], message: str
) -> None:
    file = sweep_file(tiny_model, rows_file, grid=grid, more=more)
    result = RUNNER.invoke(app, ["sweep", str(file), *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert result.stderr.count("emtool: ") == 1
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("metrcs = 1", "did you mean 'metrics'"),
        ('steps = "x"', "cell seed-0: seeds.toml, [evaluate]: --steps 'x': 'x' is not a step"),
        ("steps = [0, 3]", "cell seed-0: seeds.toml, [evaluate]: there is no checkpoint of step 3; there are: 0, 2, 4"),
        ("run_pth = 1", "option in seeds.toml: [evaluate] 'run_pth'; choose from"),
        ("n_per_question = 0", "it must be 1 to"),
        ('n_per_question = "x"', "seeds.toml: [evaluate]: Invalid value for '--n-per-question'"),
        ('questions = "nofile.yaml"', "seeds.toml: [evaluate]: cannot read"),
        ('metrics = "likelihood"\nquestions = "nofile.yaml"', "seeds.toml: [evaluate]: cannot read"),
        ('question_ids = "nope"', "unknown question 'nope'"),
        ('extract_activations = true\nactivation_layers = "foo"', "write 'all', 'upper-half' or a range"),
        (
            'extract_activations = true\nactivation_layers = "1-2"',
            "cell seed-0: seeds.toml, [evaluate]: activation_layers '1-2': the model has blocks 0 to 1",
        ),
        ('judge = "local:nosuch"', "unknown model 'nosuch'"),
        (
            'judge = "openai:m"\njudge_base_url = "https://judge.example/v1"',
            "what openai:m costs is not known; give judge_price = 'IN,OUT' in US dollars",
        ),
        ('backend = "scripted:nofile"', "there is no such file"),
        ('persona_adapter = "nofolder"', "--persona-adapter nofolder is not a folder"),
        ("watch = true", "watch does not go with a sweep"),
        ("strict = 1", "strict = 1 is not true or false"),
        (f"n_per_question = 0x{'F' * 4000}", "holds <a whole number of 16,000 bits>, which is more than"),
        ("seed = {}", "is neither a text nor a number"),
    ],
)
def test_a_wrong_evaluation_is_refused_before_anything_is_trained(
    tiny_model: Path, rows_file: Path, line: str, message: str
) -> None:
    file = sweep_file(tiny_model, rows_file)
    text = file.read_text()
    file.write_text(text[: text.index("[evaluate]")] + f"[evaluate]\n{line}\n")
    result = RUNNER.invoke(app, ["sweep", str(file), "--dry-run"])
    assert result.exit_code in (1, 2), result.output
    assert message in result.stderr.replace("\n", " ")


def test_a_sweep_that_does_not_fit_is_refused(
    tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emtool.core.plan.free_bytes", lambda _path: 1000)
    result = RUNNER.invoke(app, ["sweep", str(sweep_file(tiny_model, rows_file))])
    assert result.exit_code == 1
    assert "2 runs need" in result.stderr
    assert not Path("outputs").exists()


def test_a_judge_whose_key_is_not_set_is_refused_before_anything_is_trained(
    tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    file = sweep_file(tiny_model, rows_file)
    file.write_text(file.read_text() + 'judge = "openai:gpt-4o"\nmax_cost = 2.5\n')
    planned = RUNNER.invoke(app, ["sweep", str(file), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "judging may cost at most 2.5 USD a cell, 5 USD in all" in planned.stdout
    refused = RUNNER.invoke(app, ["sweep", str(file)])
    assert refused.exit_code == 2, refused.output
    assert "set OPENAI_API_KEY" in refused.stderr
    # Where nothing is left to do, nobody is asked.
    with monkeypatch.context() as patched:
        patched.setattr("emtool.cli.sweep._is_due", lambda *_, **__: False)
        patched.setattr("emtool.cli.sweep.locked_sweep", _far_enough)
        assert "far enough" in RUNNER.invoke(app, ["sweep", str(file)]).stderr
    shutil.rmtree("outputs")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install 'emtool[judge]'" in RUNNER.invoke(app, ["sweep", str(file)]).stderr.replace("\n", " ")
    assert not Path("outputs").exists()


def test_the_file_of_a_sweep_in_progress_is_not_touched(tiny_model: Path, rows_file: Path) -> None:
    file = sweep_file(tiny_model, rows_file)
    folder = SweepFolder(path=Path("outputs/seeds"))
    folder.create()
    folder.keep_file(read_sweep(file))
    before = folder.file_path.read_bytes()
    file.write_text(file.read_text().replace("[0, 1]", "[7, 8]"))
    with locked_sweep(folder.path):
        result = RUNNER.invoke(app, ["sweep", str(file)])
    assert result.exit_code == 1
    assert "is being swept" in result.stderr.replace("\n", " ")
    assert folder.file_path.read_bytes() == before


def test_a_cell_that_was_told_to_stop_goes_on_by_itself(tiny_model: Path, rows_file: Path) -> None:
    asked = read_sweep(sweep_file(tiny_model, rows_file))
    folder = SweepFolder(path=Path("outputs/seeds"))
    folder.create()
    for cell in asked.cells:
        (folder.run_of(cell).evaluation_path).mkdir(parents=True)
        summary = {"format": 1, "checkpoints": [{"step": 0, "metrics": {"em_pct": 1.0}}]}
        (folder.run_of(cell).evaluation_path / "summary.json").write_text(json.dumps(summary))
    folder.keep(JobOutcome(name="seed-0", problem="interrupted", was_stopped=True), evaluation="one")
    folder.keep(JobOutcome(name="seed-1", problem="broken"), evaluation="one")
    states = folder.states(asked, evaluation="one")
    assert [state.status for state in states] == ["begun", "failed"]
    assert [(row["cell"], row["status"], row["em_pct"]) for row in metric_rows(states)] == [
        ("seed-0", "begun", 1.0),
        ("seed-1", "failed", 1.0),
    ]
    job = folder.job(asked, asked.cells[0], evaluate=None, threads=None, allow_low_disk=True)
    assert job.commands[0].arguments[-1] == "--allow-low-disk"


def test_a_cell_is_completed_only_with_the_evaluation_that_is_asked_for(tiny_model: Path, rows_file: Path) -> None:
    asked = read_sweep(sweep_file(tiny_model, rows_file, grid="seed = [0]"))
    folder = SweepFolder(path=Path("outputs/seeds"))
    run = folder.run_of(asked.cells[0])
    run.evaluation_path.mkdir(parents=True)
    run.manifest_path.write_text(json.dumps({"format": 1, "status": "completed"}))
    summary = run.evaluation_path / "summary.json"
    summary.write_text(json.dumps({"format": 1, "checkpoints": []}))
    folder.keep(JobOutcome(name="seed-0"), evaluation="one")

    def status(evaluation: str | None) -> str:
        return folder.states(asked, evaluation=evaluation)[0].status

    assert [status("one"), status("other"), status(None)] == ["completed", "begun", "completed"]
    # By hand, with other settings: it is in the place of what the sweep made.
    summary.write_text(json.dumps({"format": 1, "checkpoints": [], "settings": {"seed": 5}}))
    assert status("one") == "begun"
    summary.write_text("{")
    folder.keep(JobOutcome(name="seed-0"), evaluation="one")
    assert status("one") == "begun"
    summary.unlink()
    folder.keep(JobOutcome(name="seed-0"), evaluation="one")
    assert [status("one"), status(None)] == ["begun", "completed"]
    for text in ("{", "[]", '{"format": 1}'):
        folder.record_path.write_text(text)
        with pytest.raises(CheckpointError, match=r"sweep\.json, which says how cells ended, is damaged"):
            status("one")
    folder.record_path.unlink()
    folder.record_path.mkdir()
    with pytest.raises(CheckpointError, match="is damaged"):
        status("one")


def test_changed_contents_and_settings_files_are_another_evaluation(tiny_model: Path, rows_file: Path) -> None:
    file = sweep_file(tiny_model, rows_file, grid="seed = [0]")
    script, questions = Path("script.jsonl"), Path("questions.yaml")
    script.write_text("")
    questions.write_text('- {id: one, paraphrases: ["What is one?"]}\n')
    lines = f'questions = "{questions}"\nbackend = "scripted:{script}"\n'
    file.write_text(file.read_text() + lines)

    def name() -> str:
        asked = read_sweep(file)
        request = _request(_evaluate_arguments(asked), asked, SweepFolder(path=Path("outputs")), is_on_ray=False)
        return _evaluation_id(asked, request)

    names = [name(), name()]
    questions.write_text('- {id: two, paraphrases: ["What is two?"]}\n')
    names.append(name())
    script.write_text("{}\n")
    names.append(name())
    Path("emtool.toml").write_text('[evaluate]\njudge = "local:smollm2-135m"\n')
    names.append(name())
    # An empty option is not given: the settings file's holds.
    file.write_text(file.read_text() + "judge = []\n")
    assert name() == names[-1]
    file.write_text(file.read_text().replace('["likelihood", "answers"]', '"likelihood"'))
    names.append(name())
    assert names[0] == names[1]
    assert len(set(names)) == 5


def test_a_failed_cell_has_failed_until_its_job_begins(
    tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sweep_file(tiny_model, rows_file)
    folder = SweepFolder(path=Path("outputs/seeds"))
    folder.create()
    for name in ("seed-0", "seed-1"):
        folder.keep(JobOutcome(name=name, problem="broken"), evaluation=None)

    class NoCluster:
        def run(self, jobs: Sequence[Job], listener: JobListener) -> None:
            raise BackendError("no cluster")

    class StoppedInTheFirst:
        def run(self, jobs: Sequence[Job], listener: JobListener) -> None:
            listener.on_begin(jobs[0])
            raise Interrupted(signal.SIGINT)

    monkeypatch.setattr("emtool.cli.sweep.make_pool", lambda *_, **__: NoCluster())
    assert RUNNER.invoke(app, ["sweep", str(file), "--retry-failed"]).exit_code == 1
    assert statuses(folder.path) == {"seed-0": "failed", "seed-1": "failed"}
    monkeypatch.setattr("emtool.cli.sweep.make_pool", lambda *_, **__: StoppedInTheFirst())
    assert RUNNER.invoke(app, ["sweep", str(file), "--retry-failed"]).exit_code == 130
    assert statuses(folder.path) == {"seed-1": "failed"}


def test_a_settings_file_without_a_finite_number_is_one_line(tiny_model: Path, rows_file: Path) -> None:
    Path("emtool.toml").write_text("[evaluate]\nmax_cost = inf\n")
    result = RUNNER.invoke(app, ["sweep", str(sweep_file(tiny_model, rows_file)), "--dry-run"])
    assert result.exit_code == 2
    assert "emtool.toml: [evaluate] max_cost = inf is no finite number" in result.stderr.replace("\n", " ")


def test_workers_without_ray_is_one_line(tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else object())
    result = RUNNER.invoke(app, ["sweep", str(sweep_file(tiny_model, rows_file)), "--workers", "2"])
    assert result.exit_code == 1
    assert "pip install 'emtool[ray]'" in result.stderr.replace("\n", " ")
    assert not Path("outputs").exists()


@pytest.mark.slow
def test_cells_are_trained_and_evaluated_skipped_failed_and_retried(tiny_model: Path, rows_file: Path) -> None:
    rows_file = Path(shutil.copy(rows_file, "rows.jsonl"))
    file = sweep_file(tiny_model, rows_file)
    folder = Path("outputs/seeds")
    folder.mkdir(parents=True)
    # A cell whose folder is taken fails; the others do not.
    (folder / "seed-0").mkdir()
    first = RUNNER.invoke(app, ["sweep", str(file)])
    assert first.exit_code == 1, first.output
    assert "1 of 2 cells failed: seed-0; begin them again with: emtool sweep seeds.toml --retry-failed" in first.stderr
    assert statuses(folder) == {"seed-0": "failed", "seed-1": "completed"}
    assert "exists and is not a run" in first.stdout
    assert RunFolder(path=folder / "seed-1").read_manifest()["status"] == "completed"
    before = (folder / "seed-1" / "run.json").read_bytes()
    # What failed is not begun again by itself; what is finished never.
    again = RUNNER.invoke(app, ["sweep", str(file)])
    assert again.exit_code == 1
    assert "cells:" not in again.stderr
    (folder / "seed-0").rmdir()
    last = RUNNER.invoke(app, ["sweep", str(file), "--retry-failed", "--json"])
    assert last.exit_code == 0, last.output
    assert [cell["status"] for cell in json.loads(last.stdout)["cells"]] == ["completed", "completed"]
    assert (folder / "seed-1" / "run.json").read_bytes() == before
    with (folder / "sweep.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [(row["cell"], row["seed"], row["step"]) for row in rows] == [
        (f"seed-{seed}", str(seed), str(step)) for seed in (0, 1) for step in (0, 2, 4)
    ]
    summary = json.loads((folder / "seed-0" / "evaluation" / "summary.json").read_text())
    assert float(rows[2]["p_wrong"]) == summary["checkpoints"][2]["metrics"]["p_wrong"]
    assert "seed-0" in (folder / "report.html").read_text()
    # A cell is the run that `emtool train` makes.
    train = ["train", "--profile", "demo", "--model", str(tiny_model), "--dataset", str(rows_file), "--max-steps", "4"]
    more = ["--checkpoints", "init, every 2", "--layers-to-transform", "all", "--seed", "1", "--output-name", "alone"]
    assert RUNNER.invoke(app, [*train, *more]).exit_code == 0
    assert weights(Path("outputs/alone")) == weights(folder / "seed-1")
    # What is there is not taken for what would come of other settings.
    file.write_text(file.read_text().replace("max_steps = 4", "max_steps = 5"))
    other = RUNNER.invoke(app, ["sweep", str(file)])
    assert other.exit_code == 1
    assert "holds a run of another configuration: max_steps was 4, is 5" in other.stderr.replace("\n", " ")
    file.write_text(file.read_text().replace("max_steps = 5", "max_steps = 4"))
    before_growth = rows_file.read_text()
    rows_file.write_text(before_growth + before_growth.splitlines()[0] + "\n")
    grown = RUNNER.invoke(app, ["sweep", str(file)])
    assert grown.exit_code == 1
    assert "seed-0 holds a run of another configuration: the contents of " in grown.stderr.replace("\n", " ")
    assert " have changed (SHA-256 was " in grown.stderr.replace("\n", " ")
    rows_file.write_text(before_growth)
    # Another evaluation is asked for: nothing is trained again.
    file.write_text(file.read_text().replace("n_per_question = 1", "n_per_question = 2"))
    assert RUNNER.invoke(app, ["sweep", str(file)]).exit_code == 0
    assert (folder / "seed-1" / "run.json").read_bytes() == before
    assert len((folder / "seed-1" / "evaluation" / "answers.jsonl").read_text().splitlines()) == 3 * 10 * 2


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_where_it_was(tiny_model: Path, rows_file: Path) -> None:
    file = sweep_file(tiny_model, rows_file, max_steps=3000, grid="seed = [0]", more='resume_every = "0"')
    text = file.read_text()
    file.write_text(text[: text.index("[evaluate]")])
    process = subprocess.Popen([*EMTOOL, "sweep", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path("outputs/seeds/seed-0/metrics.jsonl")
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 20)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "interrupted; what was made is kept, and the same command goes on" in said.replace("\n", " ")
    assert json.loads(Path("outputs/seeds/seed-0/run.json").read_text())["status"] == "interrupted"
    assert not Path("outputs/seeds/sweep.json").exists()
    dry = RUNNER.invoke(app, ["sweep", str(file), "--dry-run"])
    assert dry.stdout.splitlines()[1].split()[:2] == ["seed-0", "begun"]


def kill_worker_of(cell: str) -> None:
    """Kill the process that started a cell's training once it trains."""
    metrics = Path(f"outputs/seeds/{cell}/metrics.jsonl")
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 60)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "emtool.core.tied" in words and cell in words:
            worker = process.parent()
            assert worker is not None
            assert worker.pid != os.getpid()
            worker.kill()
            return
    raise AssertionError("the training had ended")


@pytest.mark.slow
def test_a_sweep_on_ray_that_is_stopped_saves_and_goes_on(tiny_model: Path, rows_file: Path) -> None:
    file = sweep_file(tiny_model, rows_file, max_steps=800, grid="seed = [0]")
    text = file.read_text()
    file.write_text(text[: text.index("[evaluate]")].replace("every 2", "every 400"))
    command = [*EMTOOL, "sweep", str(file), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path("outputs/seeds/seed-0/metrics.jsonl")
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 20)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130, said
    assert json.loads(Path("outputs/seeds/seed-0/run.json").read_text())["status"] == "interrupted"
    assert RUNNER.invoke(app, ["sweep", str(file)]).exit_code == 0
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, 801))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_on_a_ray_cluster_a_killed_workers_cell_resumes(tiny_model: Path, rows_file: Path) -> None:
    steps = 600
    file = sweep_file(tiny_model, rows_file, max_steps=steps, grid="seed = [0, 1]")
    file.write_text(file.read_text().replace("init, every 2", "init, every 200"))
    killer = threading.Thread(target=kill_worker_of, args=("seed-1",))
    killer.start()
    command = [*EMTOOL, "sweep", str(file), "--workers", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    killer.join()
    assert done.returncode == 0, done.stderr
    assert [cell["status"] for cell in json.loads(done.stdout)["cells"]] == ["completed", "completed"]
    assert "a worker was lost; Ray begins its job again, which goes on" in done.stderr.replace("\n", " ")
    assert "Ray:" not in done.stderr
    folder = Path("outputs/seeds")
    assert statuses(folder) == {"seed-0": "completed", "seed-1": "completed"}
    log = (folder / "logs" / "seed-1.log").read_text()
    assert "SIGTERM: saving after this step, then stopping" in log
    # It went on with the state that was saved, and is the run that was never stopped.
    lines = [json.loads(line) for line in (folder / "seed-1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    train = ["train", "--profile", "demo", "--model", str(tiny_model), "--dataset", str(rows_file)]
    more = ["--max-steps", str(steps), "--checkpoints", "init, every 200", "--layers-to-transform", "all"]
    more += ["--seed", "1"]
    assert RUNNER.invoke(app, [*train, *more, "--output-name", "alone"]).exit_code == 0
    assert weights(Path("outputs/alone")) == weights(folder / "seed-1")
