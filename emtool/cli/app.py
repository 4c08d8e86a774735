"""The application: its commands, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import errno
import io
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.markup import escape

from emtool import __version__
from emtool.cli.output import one_line, talk
from emtool.cli.plain_options import PlainCommand, PlainGroup
from emtool.core.errors import ConfigError, EmtoolError, Interrupted, PointedError, unknown_name
from emtool.core.hardware import launched_rank
from emtool.core.interrupts import interruptible

#: What a folder or a disk may refuse at any place that is looked at.
_ENVIRONMENT = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
)


class BoundaryGroup(PlainGroup):
    """A command group that loads a command when it is asked for, and ends every error in one line.

    Typer builds a validator for each option of each command; loading all of them would take longer than a plan.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, as the help shows them."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; None where the shell asks what could follow a name that there is not.

        Raises:
            ConfigError: If there is none of that name.
        """
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:
                return None
            raise unknown_name("command", cmd_name, COMMANDS)
        return load_command(cmd_name)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and exit with its code; what a user can mend is one line, a bug keeps its traceback."""
        kwargs["standalone_mode"] = False
        _tolerate_encodings()
        try:
            with interruptible():
                result = super().main(*args, **kwargs)
        except PointedError as error:
            _fail(str(error), error.exit_code, below=error.pointer)
        except EmtoolError as error:
            _fail(str(error), error.exit_code)
        except Interrupted as stop:
            _fail("interrupted" + (f"; {stop.detail}" if stop.detail else ""), stop.exit_code)
        except typer.TyperException as error:
            problem = error.format_message().rstrip(".")
            if problem:
                _fail(f"{problem}. Run with --help to see what is allowed.", error.exit_code)
            sys.exit(error.exit_code)
        except OSError as error:
            _fail_on_environment(error)
        except typer.Abort:
            _fail("aborted", 1)
        sys.exit(result if isinstance(result, int) else 0)


def _tolerate_encodings() -> None:
    """Let a terminal that lacks a character show a question mark in its place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail_on_environment(error: OSError) -> None:
    if error.errno not in _ENVIRONMENT:
        raise error
    _fail(f"cannot use {error.filename or 'the output'}: {error.strerror}", 1)


def _fail(message: str, exit_code: int, *, below: str = "") -> None:
    if rank := launched_rank():
        # What the user did wrong, the first process says; what only this one met, it must say itself.
        if exit_code != ConfigError.exit_code:
            sys.stderr.write(f"emtool [process {rank}]: {one_line(message)}\n")
        sys.exit(exit_code)
    talk().print(f"[bold red]emtool:[/] {escape(one_line(message))}", soft_wrap=True)
    if below:
        talk().print(escape(below), soft_wrap=True)
    sys.exit(exit_code)


app = typer.Typer(
    name="emtool",
    cls=BoundaryGroup,
    help="Train model organisms of emergent misalignment and watch the misalignment develop.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"emtool {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


#: Each command, and where it is defined: a function, or a Typer application for a group of commands.
COMMANDS: dict[str, str] = {
    "train": "emtool.cli.train:train",
    "resume": "emtool.cli.resume:resume",
    "evaluate": "emtool.cli.evaluate:evaluate",
    "metrics": "emtool.cli.metrics:metrics",
    "sweep": "emtool.cli.sweep:sweep",
    "direction": "emtool.cli.direction:commands",
    "geometry": "emtool.cli.geometry:geometry",
    "transition": "emtool.cli.transition:transition",
    "report": "emtool.cli.report:report",
    "compare": "emtool.cli.compare:compare",
    "verify": "emtool.cli.verify:verify",
    "runs": "emtool.cli.runs:runs",
    "data": "emtool.cli.data:commands",
    "schedule": "emtool.cli.schedule:schedule",
    "persona": "emtool.cli.persona:commands",
    "export": "emtool.cli.export:export",
    "disk-estimate": "emtool.cli.disk_estimate:disk_estimate",
}


def load_command(name: str) -> Any:
    """Return a command of `COMMANDS`, importing its module."""
    module, _, attribute = COMMANDS[name].partition(":")
    target = getattr(import_module(module), attribute)
    if isinstance(target, typer.Typer):
        group = typer.main.get_group(target)
        group.name = name
        return group
    single = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="rich")
    single.command(name=name, cls=PlainCommand)(target)
    return typer.main.get_command(single)


def main() -> None:
    """Run the console script."""
    app()
