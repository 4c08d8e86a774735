"""docs/commands.md is what the application says."""

import os
import subprocess
import sys
from pathlib import Path

from emtool.cli.app import COMMANDS, load_command

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "commands.md"
SCRIPT = ROOT / "scripts" / "make_command_reference.py"


def make(*arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_page_is_up_to_date_whatever_the_terminal() -> None:
    for columns in ("40", "200"):
        done = make("--check", COLUMNS=columns, FORCE_COLOR="1")
        assert done.returncode == 0, done.stderr


def test_an_old_page_is_told_and_written_anew(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / SCRIPT.name
    page = tmp_path / "docs" / PAGE.name
    script.parent.mkdir()
    page.parent.mkdir()
    script.write_bytes(SCRIPT.read_bytes())
    page.write_text(PAGE.read_text(encoding="utf-8").replace("`--seed INTEGER`", "`--sed INTEGER`", 1))
    done = make("--check", script=script)
    assert done.returncode == 1
    assert "is not what the application says; run: python" in done.stderr
    assert make(script=script).returncode == 0
    assert page.read_bytes() == PAGE.read_bytes()


def test_every_option_that_the_help_shows_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in COMMANDS:
        command = load_command(name)
        below = getattr(command, "commands", {name: command})
        for inner in below.values():
            title = f"emtool {name}" if inner is command else f"emtool {name} {inner.name}"
            part = text.partition(f" {title}\n\n    {title} [OPTIONS]")[2].partition("\n#")[0]
            assert part, title
            for param in (param for param in inner.params if not param.hidden):
                for option in param.opts:
                    if option.startswith("--"):
                        assert any(f"`{option}{end}" in part for end in (" ", "`", ",")), (title, option)
