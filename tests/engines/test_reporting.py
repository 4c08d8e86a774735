"""The numbers of a run in other places: only where asked, once, under the run's name."""

import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.errors import BackendError, MissingDependencyError
from emtool.core.finished import finished_run
from emtool.core.integrity import verify_run
from emtool.core.reporters import REPORTERS
from emtool.core.run_dir import RunFolder
from emtool.engines.reporting import begin_report, reporting
from emtool.engines.training import train
from tests.engines.test_durability import StopError, plan_for, stop_at, stopped_run, weights

Calls = list[tuple[str, dict[str, Any]]]


class FakeRun:
    """A run of the fake wandb."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def _label(self, **values: Any) -> None:
        """Take a label."""


class FakeConfig(dict[str, Any]):
    """What both packages keep of a configuration."""

    def update(self, values: Any, **options: Any) -> None:  # type: ignore[override]
        super().update(values)


def fake_package(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, origin="fake")
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a wandb that notes in `calls` what it is asked for."""
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    module: Any = fake_package("wandb", monkeypatch)
    errors: Any = fake_package("wandb.sdk.lib.config_util", monkeypatch)
    errors.ConfigError = type("ConfigError", (Exception,), {})
    module.Error = type("Error", (Exception,), {})
    module.calls, module.run, module.config = [], None, FakeConfig()

    def noted(name: str, then: Callable[[], Any] = lambda: None) -> Any:
        def call(values: Any = None, **options: Any) -> Any:
            module.calls.append((name, {**(values or {}), **options}))
            return then()

        return call

    module.login = noted("login", lambda: False)
    module.init = noted("init", lambda: setattr(module, "run", FakeRun()))
    module.finish = noted("finish", lambda: setattr(module, "run", None))
    module.log = noted("log")
    module.define_metric = lambda *names, **options: None
    return module


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a trackio that notes in `calls` what it is asked for."""
    module: Any = fake_package("trackio", monkeypatch)
    module.calls, module.config = [], FakeConfig()
    module.context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
    module.init = lambda **options: module.calls.append(("init", options))
    module.log = lambda values: module.calls.append(("log", values))
    module.finish = lambda: module.calls.append(("finish", {}))
    return module


def losses(run: RunFolder) -> dict[int, float]:
    return {int(str(entry["step"])): float(str(entry["loss"])) for entry in run.read_metrics() if "loss" in entry}


def logged_losses(calls: Calls) -> dict[int, float]:
    logs = [values for name, values in calls if name == "log" and "train/loss" in values]
    return {values["train/global_step"]: values["train/loss"] for values in logs}


def scalars(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_tensorboard_holds_the_losses_of_a_run_that_was_stopped_and_went_on(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    plan, rows, run = stopped_run(tiny_model, rows_file, tmp_path / "outputs", report_to="tensorboard")
    train(plan, rows, command=[], resume=True)
    expected = losses(run)
    assert sorted(expected) == list(range(1, 9))
    assert scalars(run.path / "tensorboard") == {step: float(np.float32(loss)) for step, loss in expected.items()}
    assert {check.status for check in verify_run(run)} == {"ok"}
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]

    silent, rows = plan_for(tiny_model, rows_file, tmp_path / "silent")
    silent_run = train(silent, rows, command=[]).run
    assert weights(silent_run) == weights(run), "a reporter changes no weight"
    assert {path.name for path in run.path.iterdir()} - {path.name for path in silent_run.path.iterdir()} == {
        "tensorboard"
    }


def test_tensorboards_own_variable_wins(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, report_to="tensorboard", max_steps=2)
    run = train(plan, rows, command=[]).run
    assert sorted(scalars(tmp_path / "elsewhere")) == [1, 2]
    assert not (run.path / "tensorboard").exists()


def test_wandb_is_told_name_folder_and_losses_and_the_run_is_closed(
    tiny_model: Path, rows_file: Path, tmp_path: Path, wandb: Any, trackio: Any
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, report_to="wandb", output_name="curve")
    run = train(plan, rows, command=[]).run
    assert [name for name, _ in wandb.calls if name != "log"] == ["login", "init", "finish"]
    begun = next(values for name, values in wandb.calls if name == "init")
    assert begun == {
        "project": "emtool",
        "name": "curve",
        "dir": str(run.path.absolute()),
        "id": run.read_manifest()["run_id"],
        "resume": "allow",
    }
    assert wandb.calls[-1] == ("finish", {"exit_code": 0})
    assert logged_losses(wandb.calls) == losses(run)
    assert trackio.calls == []


def test_a_run_that_stops_is_closed_as_failed_and_goes_on_under_the_same_identity(
    tiny_model: Path, rows_file: Path, tmp_path: Path, wandb: Any
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, report_to="wandb")
    statuses: list[object] = []
    finish = wandb.finish

    def finish_and_look(**options: Any) -> None:
        statuses.append(RunFolder(path=plan.output_path).read_manifest()["status"])
        finish(**options)

    wandb.finish = finish_and_look
    with pytest.raises(StopError):
        train(plan, rows, command=[], on_event=stop_at(7))
    assert wandb.calls[-1] == ("finish", {"exit_code": 1})
    assert statuses == ["failed"], "the manifest is closed before the reporter, which may wait for a network"
    train(plan, rows, command=[], resume=True)
    first, second = (values["id"] for name, values in wandb.calls if name == "init")
    assert first == second


def test_trackio_is_told_name_and_losses(
    tiny_model: Path, rows_file: Path, tmp_path: Path, wandb: Any, trackio: Any
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, report_to="trackio", output_name="curve")
    run = train(plan, rows, command=[]).run
    name, begun = trackio.calls[0]
    assert (name, begun["project"], begun["name"], begun["space_id"]) == ("init", "emtool", "curve", None)
    assert trackio.calls[-1][0] == "finish"
    assert logged_losses(trackio.calls) == losses(run)
    assert wandb.calls == []


def test_nobody_is_told_anything_unless_asked(
    tiny_model: Path, rows_file: Path, tmp_path: Path, wandb: Any, trackio: Any
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, max_steps=2)
    run = train(plan, rows, command=[]).run
    assert (wandb.calls, trackio.calls) == ([], [])
    assert not (run.path / "tensorboard").exists()
    assert not (run.path / "runs").exists()


def test_without_an_account_nothing_is_created(tiny_model: Path, rows_file: Path, tmp_path: Path, wandb: Any) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path / "outputs", report_to="wandb")

    def refuse() -> None:
        raise wandb.Error("No API key configured.")

    wandb.login = refuse
    with pytest.raises(BackendError, match="wandb: No API key configured; log in with 'wandb login', or set WANDB_M"):
        train(plan, rows, command=[])
    assert not (tmp_path / "outputs").exists()


def test_a_wandb_that_cannot_be_reached_is_one_line_and_the_run_can_go_on(
    tiny_model: Path, rows_file: Path, tmp_path: Path, wandb: Any
) -> None:
    plan, rows = plan_for(tiny_model, rows_file, tmp_path, report_to="wandb")

    def unreachable(**options: Any) -> None:
        raise wandb.Error("no network")

    wandb.init = unreachable
    with pytest.raises(BackendError, match=r"wandb: no network; .*WANDB_MODE=offline"):
        train(plan, rows, command=[])
    silent, _ = plan_for(tiny_model, rows_file, tmp_path)
    assert train(silent, rows, command=[], resume=True).saved_steps == [0, 3, 6, 8]


def test_a_run_of_wandb_that_the_caller_began_is_left_to_the_caller(wandb: Any, tmp_path: Path) -> None:
    wandb.run = FakeRun()
    with reporting("wandb"):
        begin_report("wandb", None, RunFolder(path=tmp_path), run_id="x")
    assert [name for name, _ in wandb.calls] == ["login"]


@pytest.mark.parametrize("reporter", REPORTERS[1:])
def test_a_package_that_is_missing_is_one_line_before_anything_is_created(
    reporter: str, tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, reporter, None)
    plan, rows = plan_for(tiny_model, rows_file, tmp_path / "outputs", report_to=reporter)
    message = f"--report-to {reporter} needs the package {reporter}: pip install 'emtool[{reporter}]'"
    with pytest.raises(MissingDependencyError) as caught:
        train(plan, rows, command=[])
    assert message in str(caught.value)
    options = ["--model", str(tiny_model), "--dataset", str(rows_file), "--output-root", str(tmp_path / "outputs")]
    result = CliRunner().invoke(app, ["train", "--report-to", reporter, *options])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"emtool: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_folder_that_wandb_left_behind_is_not_taken_for_the_package(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emtool.core.reporters import check_reporter

    (tmp_path / "wandb" / "latest-run").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingDependencyError):
        check_reporter("wandb")


def test_a_run_from_before_reporters_goes_on_and_another_reporter_is_the_same_run(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    _, _, run = stopped_run(tiny_model, rows_file, tmp_path)
    manifest: Any = json.loads(run.manifest_path.read_text())
    del manifest["config"]["report_to"]
    run.manifest_path.write_text(json.dumps(manifest))
    result = CliRunner().invoke(app, ["resume", str(run.path)])
    assert result.exit_code == 0, result.stderr
    assert losses(run).keys() == set(range(1, 9))
    other, _ = plan_for(tiny_model, rows_file, tmp_path, report_to="tensorboard")
    assert finished_run(other) == run
