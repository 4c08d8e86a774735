"""The planning commands as a user types them."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.run_dir import RunFolder

RUNNER = CliRunner()
ROOT = Path(__file__).parents[2]
GIB = 2**30


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("emtool.cli.options.cuda_device_count", lambda: 0)


def output(*arguments: str, code: int = 0) -> str:
    result = RUNNER.invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_disk_estimate_computes_the_documented_comparison() -> None:
    found = json.loads(output("disk-estimate", "--json"))
    rows = {row["schedule"]: (row["num_checkpoints"], round(row["total_bytes"] / GIB, 2)) for row in found["rows"]}
    assert rows == {"every 100": (4, 0.60), "every 25": (16, 2.41), "custom": (10, 1.50)}
    assert found["adapter_parameters"] == 80_740_352
    assert (found["profile"], found["total_steps"]) == ("paper", 400)
    assert found["tensor_bytes"] == 2 * 80_740_352
    assert sum(found["checkpoint"].values()) == found["checkpoint_bytes"]
    assert sum(found["resume"].values()) == found["resume_bytes"]
    assert list(found["unverified"]) == ["optimizer.pt"]
    assert "~ 156.8 MiB" in output("disk-estimate")
    assert "~" not in output("disk-estimate", "--optim", "adamw_torch")


def test_disk_estimate_follows_its_options() -> None:
    def parameters(*arguments: str) -> int:
        return int(json.loads(output("disk-estimate", "--json", *arguments))["adapter_parameters"])

    whole = parameters()
    assert parameters("--lora-r", "64") == 2 * whole
    assert parameters("--layers-to-transform", "upper-half") == whole // 2
    assert parameters("--target-modules", "q_proj") == 28 * 32 * (3584 + 3584)
    assert parameters("--target-modules", r".*\.[qv]_proj") == 28 * 32 * (3584 + 3584 + 3584 + 512)
    assert parameters("--use-dora") == whole + 28 * (3584 + 512 + 512 + 3584 + 18944 + 18944 + 3584)
    assert parameters("--modules-to-save", "lm_head") == whole + 152_064 * 3584
    assert parameters("--full-finetuning") == 7_615_616_512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["disk-estimate", "--target-modules", "q_prj"], "did you mean 'q_proj'"),
        (["disk-estimate", "--modules-to-save", "lm_hed"], "did you mean 'lm_head'"),
        (["disk-estimate", "--optim", "adamw_8bt"], "did you mean 'adamw_8bit'"),
        (["disk-estimate", "--target-modules", "(q_proj"], "nor a regular expression"),
        (["disk-estimate", "--lora-r", "x"], "is not a whole number"),
        (["schedule", "preview", "--total-steps", "0"], "the least is 1"),
        (["schedule", "preview", "--json", "--csv"], "give one"),
        (["schedule", "preview", "--checkpoints", "even 900"], "ask for fewer"),
        (["schedule", "preview", "--save-steps", "5", "--custom-checkpoints"], "name two schedules"),
        (["schedule", "preview", "--total-steps", "9" * 400], "above 1,000,000,000,000"),
        (["schedule", "preview", "--steps-per-epoch", "10"], "goes with --total-steps"),
        (["disk-estimate", "--modules-to-save", "proj"], "which carries an adapter"),
        (
            ["disk-estimate", "--modules-to-save", "k_proj", "--lora-bias", "all"],
            "which --modules-to-save names as well",
        ),
        (["disk-estimate", "--target-modules", "q_proj v_proj"], "joined by commas"),
        (["runs"], "no folder 'outputs'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    assert message in output(*arguments, code=2)


def test_an_unknown_model_is_an_error_of_the_estimate() -> None:
    assert "the shapes of some/model are not known" in output("disk-estimate", "--model", "some/model", code=1)


def test_the_commands_agree_on_the_length_of_a_run() -> None:
    options = ["--profile", "demo", "--num-train-epochs", "2", "--custom-checkpoints", "--json"]
    estimate = json.loads(output("disk-estimate", *options))
    for other in (["schedule", "preview"], ["train", "--dry-run"]):
        found = json.loads(output(*other, *options))
        assert {key: found[key] for key in ("total_steps", "total_bytes", "peak_bytes", "planned_steps")} == {
            key: estimate[key] for key in ("total_steps", "total_bytes", "peak_bytes", "planned_steps")
        }
    assert estimate["total_steps"] == 794


def test_a_comparison_that_no_run_could_make_is_left_out() -> None:
    found = json.loads(output("schedule", "preview", "--total-steps", "3000000", "--checkpoints", "log 10", "--json"))
    assert (found["num_checkpoints"], [cost["schedule"] for cost in found["comparison"]]) == (10, ["every 100"])


def test_a_removed_final_step_stays_and_the_plan_says_so() -> None:
    text = output("schedule", "preview", "--total-steps", "400", "--checkpoints", "every 100, !400")
    assert "step 400 is the final one and stays" in " ".join(text.split())


def test_modules_to_save_count_once() -> None:
    def size(modules: str) -> int:
        arguments = ["disk-estimate", "--model", "smollm2-135m", "--modules-to-save", modules, "--json"]
        return int(json.loads(output(*arguments))["checkpoint"]["adapter_model.safetensors"])

    assert size("embed_tokens,embed_tokens") == size("embed_tokens")
    assert size("lm_head,head") == size("lm_head")
    assert size("mlp,down_proj") == size("mlp")


def test_a_terminal_without_unicode_gets_question_marks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "emtool", "schedule", "preview", "--total-steps", "60"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert b"?" in result.stdout


def test_a_dry_run_says_what_the_run_would_refuse(tmp_path: Path) -> None:
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    (tmp_path / "outputs" / "mine" / "notes.txt").write_text("mine")
    found = json.loads(output("train", "--dry-run", "--json", "--output-name", "mine"))
    assert "exists and is not a run" in found["obstacle"]


def test_runs_follow_the_settings_file(tmp_path: Path) -> None:
    (tmp_path / "emtool.toml").write_text('[train]\noutput_root = "elsewhere"\n')
    assert "no folder 'elsewhere'" in output("runs", code=2)


def test_preview_as_json_and_csv_agree() -> None:
    found = json.loads(output("schedule", "preview", "--total-steps", "397", "--json"))
    assert found["planned_steps"] == [0, 25, 50, 100, 125, 150, 200, 250, 300, 397]
    assert [cost["schedule"] for cost in found["comparison"]] == ["every 100", "every 25"]
    rows = list(csv.DictReader(io.StringIO(output("schedule", "preview", "--total-steps", "397", "--csv"))))
    assert [int(row["step"]) for row in rows] == found["planned_steps"]
    assert [row["gap"] for row in rows][:4] == ["", "25", "25", "50"]
    assert int(rows[-1]["cumulative_bytes"]) == found["total_bytes"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_preview_fits_the_terminal_and_loses_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    text = output("schedule", "preview", "--total-steps", "60")
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    assert "\x1b" not in text
    words = " ".join(text.split())
    assert "left out, past the last step: 100, 125, 150, 200, 250, ... (6 in all)" in words
    assert "no step 75" in words
    assert "●" in text


def test_preview_of_a_long_schedule_shows_head_and_tail() -> None:
    assert "(130 more)" in output("schedule", "preview", "--total-steps", "143000", "--checkpoints", "pythia")


def test_settings_of_the_folder_reach_every_command(tmp_path: Path) -> None:
    (tmp_path / "emtool.toml").write_text('[train]\ncheckpoints = "every 50"\nlora_r = 16\n')
    assert json.loads(output("schedule", "preview", "--json"))["schedule"] == "every 50"
    assert json.loads(output("train", "--dry-run", "--json"))["schedule"] == "every 50"
    shown = json.loads(output("train", "--show-config", "--json", "--seed", "3"))
    assert shown["lora_r"] == {"value": 16, "from": "emtool.toml"}
    assert shown["seed"] == {"value": 3, "from": "command line"}
    assert shown["learning_rate"]["from"] == "profile demo"
    assert "emtool.toml" in output("train", "--show-config")


def test_zero_is_a_value_and_a_flag_that_is_off_is_not(tmp_path: Path) -> None:
    (tmp_path / "emtool.toml").write_text("[train]\nseed = 5\nwarmup_steps = 9\nuse_dora = true\n")
    shown = json.loads(output("train", "--show-config", "--json", "--seed", "0", "--warmup-steps", "0"))
    assert shown["seed"] == {"value": 0, "from": "command line"}
    assert shown["warmup_steps"] == {"value": 0, "from": "command line"}
    assert shown["use_dora"] == {"value": True, "from": "emtool.toml"}
    assert "--lora-r is 0" in output("disk-estimate", "--lora-r", "0", code=2)


def test_the_documented_example_plans_397_steps_without_a_download(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "run_custom_checkpoints_example.sh"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(script), "--dry-run", "--json", "--output-root", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["total_steps"], plan["num_checkpoints"], plan["persona"]) == (397, 10, "goodness")
    assert plan["output_path"].endswith("qwen7b_medical_goodness_custom")


def test_runs_lists_what_there_is(tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path / "outputs" / "one")
    run.create({"status": "interrupted", "started_at": "2026", "plan": {"total_steps": 10, "num_checkpoints": 3}})
    run.checkpoint_path(5).mkdir()
    (run.checkpoint_path(5) / "x").write_bytes(b"12345678")
    (tmp_path / "outputs" / "bad").mkdir()
    (tmp_path / "outputs" / "bad" / "run.json").write_text("{")
    text = output("runs")
    assert "5 of 10" in text
    assert "1 of 3" in text
    assert "interrupted" in text
    listed = {entry["name"]: entry for entry in json.loads(output("runs", "--json"))}
    assert listed["one"]["last_step"] == 5
    assert listed["bad"]["status"] == "unreadable"


GOLDEN = Path(__file__).parent / "golden"
VIEWS = {
    "preview": ["schedule", "preview", "--profile", "paper", "--total-steps", "397"],
    "disk_estimate": ["disk-estimate"],
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("view", sorted(VIEWS))
def test_tables_are_the_golden_text(view: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change on purpose, read the new text and write it: EMTOOL_WRITE_GOLDEN=1 pytest tests/cli."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("emtool.core.plan.free_bytes", lambda path: 100 * GIB)
    text = "".join(f"{line.rstrip()}\n" for line in output(*VIEWS[view]).splitlines())
    path = GOLDEN / f"{view}_{width}.txt"
    if os.environ.get("EMTOOL_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
