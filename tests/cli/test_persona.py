import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from tests.tiny import save_adapter
from tests.tiny import tiny_model as model_in_memory

RUNNER = CliRunner()


def run(*arguments: str) -> str:
    result = RUNNER.invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, list(arguments))
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    return result.exit_code, result.stderr


def test_the_list_says_where_each_adapter_comes_from() -> None:
    text = run("persona", "list", "--model", "qwen2.5-7b")
    assert "maius/qwen-2.5-7b-it" in text
    values = json.loads(run("persona", "list", "--model", "qwen2.5-7b", "--json"))
    found = {entry["name"]: entry for entry in values["personas"]}
    assert found["misalignment"]["is_gated"] is True
    assert found["sarcasm"]["published"] == "maius/qwen-2.5-7b-it-personas/sarcasm"
    assert found["contrarian"] == {
        "name": "contrarian",
        "description": "takes the other side, harmlessly",
        "published": None,
        "is_gated": False,
        "is_buildable": True,
        "path": None,
    }


def test_a_persona_is_built_and_then_described(tiny_model: Path) -> None:
    options = ["--profile", "demo", "--model", str(tiny_model)]
    folder = Path(run("persona", "build", "contrarian", *options).strip())
    assert (folder / "adapter_model.safetensors").is_file()
    again = RUNNER.invoke(app, ["persona", "build", "contrarian", *options])
    assert "is built already" in again.stderr
    values = json.loads(run("persona", "info", "contrarian", *options, "--json"))
    assert values["path"] == str(folder)
    assert values["adapter"]["adapter"] == "r 8, alpha 16, rsLoRA"
    assert len(values["adapter"]["sha256"]) == 64
    assert "150 conversations" in run("persona", "info", "contrarian", *options)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["persona", "build", "baseline"], 2, "there is nothing to build"),
        (["persona", "build", "sarcasm"], 2, "unknown persona to build 'sarcasm'"),
        (["persona", "info", "nobody"], 2, "unknown persona 'nobody'"),
        (["persona", "list", "--model", "nothing"], 2, "unknown model 'nothing'"),
        (["train", "--dry-run", "--persona-adapter", "nowhere"], 1, "holds no PEFT adapter"),
        (["export", "nowhere"], 1, "is not a run folder"),
        (["export", "nowhere", "--dtype", "int8"], 2, "unknown dtype 'int8'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str) -> None:
    found, text = fail(*arguments)
    assert found == code
    assert message in text


def test_a_run_with_a_stacked_persona_is_trained_evaluated_and_exported(
    tiny_model: Path, dataset_file: Path, tmp_path: Path
) -> None:
    persona = save_adapter(tmp_path / "calm", model_in_memory(), seed=1, r=4)
    arguments = ["--profile", "demo", "--model", str(tiny_model), "--dataset", str(dataset_file), "--device", "cpu"]
    arguments += ["--persona-adapter", str(persona), "--persona-mode", "stacked", "--lora-r", "2", "--max-steps", "4"]
    arguments += ["--checkpoints", "init, 2", "--output-root", str(tmp_path), "--layers-to-transform", "all"]
    plan = json.loads(run("train", *arguments, "--dry-run", "--json"))
    assert plan["persona"] == "calm"
    assert "stacked on the base, frozen" in run("train", *arguments, "--dry-run")
    run("train", *arguments)
    folder = tmp_path / "tiny_facts_calm"
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["lineage"]["persona"]["mode"] == "stacked"
    card = (folder / "checkpoint-2" / "README.md").read_text()
    assert "a second, frozen adapter beside this one" in card
    assert "emtool export" in card
    run("evaluate", str(folder), "--device", "cpu")
    values = json.loads(run("export", str(folder), "--steps", "0,final", "--json"))
    assert [entry["rank"] for entry in values["adapters"]] == [6, 6]
    assert (folder / "composed" / "checkpoint-4" / "adapter_config.json").is_file()
    run("verify", str(folder))
    code, text = fail("export", str(folder), "--steps", "3")
    assert (code, "there is no checkpoint of step 3; there are: 0, 2, 4" in text) == (1, True)
    # A milestone alone is not the model that was trained, and evaluation does not take it for one.
    code, text = fail("evaluate", str(folder / "checkpoint-2"))
    assert code == 1
    assert "is one checkpoint of a run; what it is a model with, base and persona" in text
