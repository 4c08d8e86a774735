"""The Tab key: what the shell is offered, asked as the shell asks, and in a real bash."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.datasets import DATASETS
from emtool.core.reporters import REPORTERS

HEAVY = ("torch", "transformers", "peft", "trl", "datasets")
#: The application under the name of its console script, which may not be on the path of the tests.
CALL = "import sys; sys.argv[0] = 'emtool'; from emtool.cli.app import main; main()"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, with two runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "run.json").write_text(json.dumps({"format": 1}))
    (tmp_path / "outputs" / "other").mkdir()
    return tmp_path


def offered(line: str) -> list[str]:
    """Return what bash is offered for the last word of a line; the line ends in a space for a new word."""
    result = CliRunner().invoke(app, [], env=question(line), prog_name="emtool")
    assert result.stderr == ""
    return result.stdout.split()


def question(line: str) -> dict[str, str]:
    words = line.split(" ")
    return {
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_EMTOOL_COMPLETE": "complete_bash",
    }


def environment(**values: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **values}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("emtool tr", ["train", "transition"]),
        ("emtool data ", ["list", "fetch", "info"]),
        ("emtool train --persona-", ["--persona-adapter", "--persona-mode"]),
        ("emtool train --profile ", ["auto", "paper", "demo"]),
        ("emtool train --persona good", ["goodness"]),
        ("emtool train --persona sar", ["sarcasm"]),
        ("emtool train --dataset ", list(DATASETS)),
        ("emtool train --dataset gard", ["gardening", "gardening-control"]),
        ("emtool train --report-to ", list(REPORTERS)),
        ("emtool train --checkpoints p", ["pythia"]),
        ("emtool train --seed 1 --lr-scheduler-type co", ["cosine", "constant", "constant_with_warmup"]),
        ("emtool data fetch med", ["medical"]),
        ("emtool persona info cont", ["contrarian"]),
        ("emtool evaluate ", ["outputs/first", "outputs/second"]),
        ("emtool compare outputs/first outputs/s", ["outputs/second"]),
        ("emtool evaluate outputs/first --sampling ", ["pure", "model"]),
        ("emtool nosuch --pro", []),
        ("emtool train --profile nosuch", []),
        ("emtool resume elsewhere/", []),
    ],
)
def test_the_shell_is_offered_what_can_stand_there(line: str, expected: list[str], folder: Path) -> None:
    assert offered(line) == expected


def test_a_settings_file_that_cannot_be_read_is_not_reported_at_the_prompt(folder: Path) -> None:
    (folder / "emtool.toml").write_text("[train\n")
    assert offered("emtool evaluate ") == []


def test_run_folders_are_looked_for_where_the_settings_say(folder: Path) -> None:
    (folder / "outputs").rename(folder / "runs")
    (folder / "emtool.toml").write_text('[train]\noutput_root = "runs"\n')
    assert offered("emtool report ") == ["runs/first", "runs/second"]


@pytest.mark.parametrize("line", ["emtool ", "emtool train --persona ", "emtool evaluate --"])
def test_the_tab_key_loads_no_part_of_the_torch_stack(line: str, folder: Path) -> None:
    code = (
        "import sys\nsys.argv[0] = 'emtool'\nfrom emtool.cli.app import main\n"
        f"try:\n    main()\nfinally:\n    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**question(line)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered_in_their_own_form(shell: str, folder: Path) -> None:
    asked = environment(
        _EMTOOL_COMPLETE=f"complete_{shell}",
        _TYPER_COMPLETE_ARGS="emtool train --persona-mode ",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    done = subprocess.run([sys.executable, "-c", CALL], env=asked, capture_output=True, text=True, check=True)
    assert "merged" in done.stdout
    assert "stacked" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_real_bash_completes_with_what_is_installed_into_it(folder: Path) -> None:
    """The script that --install-completion leaves in the home folder is loaded by an interactive bash."""
    home, programs = folder / "home", folder / "bin"
    home.mkdir()
    programs.mkdir()
    program = programs / "emtool"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{CALL}" "$@"\n')
    program.chmod(0o755)
    shell = environment(HOME=str(home), PATH=f"{programs}:{os.environ['PATH']}")
    install = subprocess.run(
        ["bash", "--norc", "-c", "emtool --install-completion; true"],
        env=shell,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bash completion installed in" in install.stdout, install.stderr
    ask = (
        "source ~/.bashrc; complete -p emtool; COMP_WORDS=(emtool train --dataset gard); COMP_CWORD=3; "
        "_emtool_completion emtool; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "--norc", "-c", ask], env=shell, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "complete -o default -F _emtool_completion emtool",
        "gardening",
        "gardening-control",
    ], done.stderr
