"""Option values as a command line, for commands that start others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from emtool.core.errors import ConfigError, shown, unknown_name


def as_arguments(command: Any, values: Mapping[str, object], *, where: str, without: Collection[str] = ()) -> list[str]:
    """Return option values as arguments of a command.

    Args:
        command: The command.
        values: Parameter name to value; a list gives the option several times, or joined by commas where it takes one.
        where: Where the values stand, for messages.
        without: Options that are not offered.

    Raises:
        ConfigError: If the command has no such option, or a value is of a wrong type.
    """
    options = {param.name: param for param in command.params if param.param_type_name == "option"}
    arguments: list[str] = []
    for name, value in values.items():
        if name not in options:
            raise unknown_name(f"option in {where}", name, [known for known in options if known not in without])
        option = options[name]
        if option.is_flag != isinstance(value, bool):
            raise ConfigError(
                f"{where} {name} = {shown(value)} is not {'true or false' if option.is_flag else 'a value'}"
            )
        texts = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(text, str | int | float) or hasattr(text, "__fspath__") for text in texts):
            raise ConfigError(f"{where} {name} = {shown(value)} is neither a text nor a number")
        if option.is_flag:
            arguments += option.opts[:1] if value else []
        elif option.multiple:
            arguments += [part for text in texts for part in (option.opts[0], str(text))]
        else:
            arguments += [option.opts[0], ",".join(map(str, texts))]
    return arguments


def given_arguments(context: Any, *, leave_out: Collection[str]) -> list[str]:
    """Return the options that stood on a command's command line, but for some."""
    given = {
        name: value
        for name, value in context.params.items()
        if name not in leave_out and context.get_parameter_source(name).name == "COMMANDLINE"
    }
    return as_arguments(context.command, given, where="the command line")
