"""The examples of docs/extending.md are copied from the page, run as they stand there, and print what it says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emtool.core.run_dir import RunFolder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
#: Commands that load a model.
HEAVY = (" train --dataset", " build ", " evaluate outputs/RUN --metrics")

Command = tuple[str, tuple[str, ...]]


def files() -> dict[str, str]:
    """Return the files that the page shows, by name."""
    return dict(re.findall(r"`([\w.]+)`:\n\n```(?:python|json|csv)\n(.*?)```", PAGE, re.DOTALL))


def commands() -> list[Any]:
    """Return each command that the page shows, with the lines that it says come out."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, *output = part.splitlines()
            marks = pytest.mark.slow if any(text in line for text in HEAVY) else ()
            expected = tuple(text for text in output if text != "...")
            found.append(pytest.param(line, expected, id=line.replace("python ", ""), marks=marks))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the files of the page."""
    for name, text in files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def run(line: str, folder: Path) -> str:
    """Run a command of the page and return what it prints, results and talk in their order."""
    program, *arguments = shlex.split(line)
    assert program == "python"
    settings = {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
        "EMTOOL_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stdout, done.stdout
    assert done.returncode == (2 if done.stdout.startswith("emtool: ") else 0), done.stdout
    return done.stdout


def with_tiny_model(line: str, model: Path) -> str:
    """Return a command with the tiny model in the place of the one that must be fetched."""
    if "smollm2-135m" in line:
        return line.replace("smollm2-135m", str(model))
    return f"{line} --model {model}" if " train " in line else line


def one_space(text: str) -> str:
    return " ".join(text.split())


def assert_prints(output: str, expected: tuple[str, ...]) -> None:
    """Lines come out in the order of the page, each beginning as it says."""
    lines = iter(map(one_space, output.splitlines()))
    for text in expected:
        assert any(line.startswith(one_space(text)) for line in lines), f"{text!r} is not in:\n{output}"


@pytest.mark.parametrize(("line", "expected"), commands())
def test_a_command_of_the_page_prints_what_it_says(
    line: str, expected: tuple[str, ...], folder: Path, tiny_model: Path, request: pytest.FixtureRequest
) -> None:
    assert expected
    if request.node.get_closest_marker("slow"):
        line = with_tiny_model(line, tiny_model)
    if "outputs/RUN" in line:
        spread_run: RunFolder = request.getfixturevalue("spread_run")
        shutil.copytree(spread_run.path, folder / "outputs" / "RUN")
    assert_prints(run(line, folder), expected)
    if "--backend echo:Echo" in line:
        answers = (folder / "outputs" / "RUN" / "evaluation" / "answers.jsonl").read_text().splitlines()
        by_step = {entry["step"]: entry for entry in map(json.loads, answers)}
        assert {step: entry["response"] for step, entry in by_step.items()} == {
            step: f"Echo at step {step}: {entry['question']}" for step, entry in by_step.items()
        }
        assert sorted(by_step) == [0, 7, 20, 30]
    if "sourdough.py train" in line:
        manifest: Any = RunFolder(path=folder / "outputs" / "sourdough").read_manifest()
        assert manifest["lineage"]["dataset"]["domain"] == "cooking"


def test_every_kind_has_an_example_and_every_file_is_used() -> None:
    shown = files()
    used = {word for command in commands() for word in command.values[0].split()}
    assert {name for name in shown if name.endswith((".py", ".csv"))} <= used
    for registry in ("TERMS[", "PRESETS[", "PERSONAS[", "DATASETS[", "JUDGED_METRICS[", "TEXT_METRICS[", "BACKENDS["):
        assert any(f"\n{registry}" in text for text in shown.values()), registry


def test_dictionaries_that_the_page_names_are_there() -> None:
    from importlib import import_module

    named = re.findall(r"`([A-Z_]+)` (?:in|of)\s+`(emtool[\w.]+)`", PAGE)
    assert len(named) >= 12
    for name, module in named:
        assert isinstance(getattr(import_module(module), name), dict), (module, name)


def test_a_preset_that_removes_steps_is_a_mistake_of_who_wrote_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from emtool.core.schedule import CheckpointSchedule
    from emtool.core.schedule_text import PRESETS

    monkeypatch.setitem(PRESETS, "mine", "every 50, !100")
    with pytest.raises(AssertionError, match="preset 'mine' removes steps"):
        CheckpointSchedule.parse("mine")
