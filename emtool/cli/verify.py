"""`emtool verify`: does a run folder hold what it says?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from emtool.cli.options import AsJson, complete_runs
from emtool.cli.output import data, one_line, print_json, progress, quiet_libraries, say
from emtool.cli.render import plain_table
from emtool.core.errors import CheckpointError
from emtool.core.integrity import FolderCheck, verify_run
from emtool.core.run_dir import RunFolder


def verify(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", autocompletion=complete_runs, help="Run folder.")],
    sizes_only: Annotated[bool, typer.Option("--sizes-only", help="Check sizes, not contents: faster.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Restore damaged tokenizer files from the base model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every checkpoint and resume state of a run against its record."""
    run = RunFolder(path=run_path)
    if repair:
        _repair(run)
    checks = verify_run(run, hashes=not sizes_only)
    if as_json:
        print_json({"run": str(run.path), "checks": [check.to_dict() for check in checks]})
    else:
        data().print(_table(checks))
    bad = [check for check in checks if check.status != "ok"]
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(checks)} are not as they should be: {', '.join(check.name for check in bad[:10])}"
        )
    say(f"{len(checks)} folders are whole" + (" in size" if sizes_only else ""))


def _repair(run: RunFolder) -> None:
    quiet_libraries()
    from emtool.engines.repair import repair_tokenizer

    with progress() as on_event:
        repaired = repair_tokenizer(run, on_event=on_event)
    say(f"restored {len(repaired)} files: {', '.join(repaired)}" if repaired else "nothing that could be restored")


def _table(checks: list[FolderCheck]) -> object:
    table = plain_table()
    table.add_column("folder", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("what is wrong", overflow="fold")
    bad = [check for check in checks if check.status != "ok"]
    # Everything that is wrong is shown; of what is right, a long list is shortened.
    shown = checks if len(checks) <= MAX_ROWS else bad
    for check in shown:
        style = "" if check.status == "ok" else "yellow"
        table.add_row(check.name, Text(check.status, style=style), Text(one_line(check.problem or "")))
    if len(shown) < len(checks):
        table.add_row("", "", f"and {len(checks) - len(shown):,} that are whole")
    return table


#: Folders above which only those with a problem are listed.
MAX_ROWS = 40
