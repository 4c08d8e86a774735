"""Write docs/commands.md, the reference of the commands, from the application itself.

python scripts/make_command_reference.py            write it
python scripts/make_command_reference.py --check    fail if it is not what the application says
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from typer.core import TyperArgument, TyperGroup

from emtool.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """\
# Commands

All commands and options, written from the program by `python scripts/make_command_reference.py`; a test compares.
`emtool COMMAND --help` shows the same in the terminal, `emtool --install-completion` brings it to the Tab key. Options
of `emtool train` can stand in `emtool.toml` too ([planning](planning.md)).

"""
KINDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page is not what the application says")
    is_check = parser.parse_args().check
    text = reference()
    if not is_check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not what the application says; run: python {Path(__file__).name}", file=sys.stderr)
        return 1
    return 0


def reference() -> str:
    """Return the page."""
    root = typer.Context(typer.main.get_command(app), info_name="emtool")
    commands = list(walk(root))
    index = "".join(
        f"| [`{context.command_path}`](#{context.command_path.replace(' ', '-')}) | {first_line(context)} |\n"
        for context in commands
        if not isinstance(context.command, TyperGroup)
    )
    return (
        f"{HEAD}| command | what it does |\n|---|---|\n{index}\n"
        + "\n".join(section(context) for context in commands).rstrip("\n")
        + "\n"
    )


def walk(context: typer.Context) -> Iterator[typer.Context]:
    """Yield a command and those below it, in the order of the help."""
    yield context
    if isinstance(context.command, TyperGroup):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            assert command is not None
            yield from walk(typer.Context(command, info_name=name, parent=context))


def section(context: typer.Context) -> str:
    """Return what the page says of one command."""
    command = context.command
    level = "#" * min(2 + (context.parent is not None and context.parent.parent is not None), 4)
    parts = [f"{level} {context.command_path}\n", f"    {usage(context)}\n", f"{plain(command.help or '')}\n"]
    panels: dict[str, list[str]] = {}
    for param in parameters(context):
        if not param.hidden and "--help" not in param.opts:
            default = "Arguments" if isinstance(param, TyperArgument) else "Options"
            panels.setdefault(param.rich_help_panel or default, []).append(line(param))
    parts += [f"{title}:\n\n" + "".join(lines) for title, lines in panels.items()]
    return "\n".join(parts)


def parameters(context: typer.Context) -> list[Any]:
    """Return the arguments and options of a command."""
    return list(context.command.get_params(context))


def usage(context: typer.Context) -> str:
    """Return how a command is called."""
    pieces = [written(param) for param in parameters(context) if isinstance(param, TyperArgument)]
    tail = "COMMAND ..." if isinstance(context.command, TyperGroup) else " ".join(pieces)
    return f"{context.command_path} [OPTIONS] {tail}".rstrip()


def written(param: Any) -> str:
    """Return an argument as the usage has it."""
    name = str(param.metavar or param.name.upper()).removesuffix("...")
    name += "..." if param.nargs != 1 else ""
    return name if param.required else f"[{name}]"


def line(param: Any) -> str:
    """Return the line of an option or an argument."""
    name = f"`{written(param)}`" if isinstance(param, TyperArgument) else f"`{spelled(param)}`"
    return f"- {name}: {plain(param.help or '')}{''.join(f' [{note}]' for note in notes(param))}\n"


def spelled(param: Any) -> str:
    """Return an option with all its names and the kind of its value."""
    names = ", ".join([*param.opts, *param.secondary_opts])
    return names if param.is_flag else f"{names} {param.metavar or kind_of(param)}"


def kind_of(param: Any) -> str:
    """Return the word for what an option's value is."""
    annotation = param.type_descriptor.annotation
    inner = [one for one in get_args(annotation) if one is not type(None)] if get_origin(annotation) else [annotation]
    return KINDS[inner[0]]


def notes(param: Any) -> Iterator[str]:
    """Yield what else is known of a value: its default, where the help does not say it, and its bounds."""
    is_flag = getattr(param, "is_flag", False)
    if param.default is not None and not is_flag:
        yield f"default: {param.default}"
    if param.min is not None and param.max is not None:
        yield f"{param.min} to {param.max}"
    elif param.min is not None:
        yield f"at least {param.min}"
    elif param.max is not None:
        yield f"at most {param.max}"
    if getattr(param, "multiple", False):
        yield "repeatable"


def first_line(context: typer.Context) -> str:
    """Return the first paragraph of a command's help, for a table."""
    return plain(context.command.help or "").split("\n\n", maxsplit=1)[0].replace("|", "\\|")


def plain(text: str) -> str:
    """Return a help text as Markdown: without the escapes of the terminal's styles, and with Markdown's own."""
    return re.sub(r"([*<>])", r"\\\1", " ".join(text.replace("\\[", "[").split()))


if __name__ == "__main__":
    sys.exit(main())
