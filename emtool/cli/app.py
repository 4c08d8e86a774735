"""The application: its commands, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from emtool import __version__
from emtool.cli.evaluate import evaluate
from emtool.cli.output import one_line, talk
from emtool.cli.train import train
from emtool.core.errors import EmtoolError, Interrupted, PointedError
from emtool.core.interrupts import interruptible


class BoundaryGroup(TyperGroup):
    """A command group that turns what a user can mend into one line; a bug keeps its traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and exit with its code."""
        kwargs["standalone_mode"] = False
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
            _fail(f"{problem}. Run with --help to see what is allowed.", error.exit_code)
        except typer.Abort:
            _fail("aborted", 1)
        sys.exit(result if isinstance(result, int) else 0)


def _fail(message: str, exit_code: int, *, below: str = "") -> None:
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


app.command(name="train")(train)
app.command(name="evaluate")(evaluate)


def main() -> None:
    """Run the console script."""
    app()
