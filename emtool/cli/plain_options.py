"""Reading option values without a validation library.

Typer builds a pydantic adapter for each option, and importing pydantic takes as long as a whole plan. The options of
emtool are plain texts, numbers, paths and switches, so they are read here; whatever Typer offers beyond that still goes
its own way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

_EXPECTED = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "a switch"}


@dataclass(frozen=True)
class PlainParam:
    """Reads one option, in the place of Typer's own reader.

    Attributes:
        kind: The option's type.
        low: Least value allowed, for a number.
        high: Largest value allowed.
    """

    kind: type
    low: float | None
    high: float | None

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the value as the option's type; None stays None.

        Raises:
            typer.BadParameter: If the text is not of that type, or the number is too small or too large.
        """
        # A path reaches here as a text; emtool writes paths into its files, and libraries take no others.
        if self.kind is Path and not _is_utf8(str(value)):
            raise typer.BadParameter(f"{value!r} is not a path in UTF-8; rename it.", ctx=ctx, param=param)
        if value is None or isinstance(value, self.kind):
            return value
        try:
            read = self.kind(value)
        except ValueError as error:
            raise typer.BadParameter(f"{value!r} is not {_EXPECTED[self.kind]}.", ctx=ctx, param=param) from error
        if isinstance(read, float) and math.isnan(read):
            raise typer.BadParameter(f"{value!r} is not a number.", ctx=ctx, param=param)
        if self.low is not None and read < self.low:
            raise typer.BadParameter(f"{value} is too small; the least is {self.low:g}.", ctx=ctx, param=param)
        if self.high is not None and read > self.high:
            raise typer.BadParameter(f"{value} is too large; the most is {self.high}.", ctx=ctx, param=param)
        return read


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _PlainParams:
    """Gives the plain options of a command their plain reader."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's parameters, its help switch included."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            _read_plainly(param)
        return params


class PlainCommand(_PlainParams, TyperCommand):
    """A command whose plain options are read by `PlainParam`."""


class PlainGroup(_PlainParams, TyperGroup):
    """A group of commands whose own plain options are read by `PlainParam`."""


def _read_plainly(param: Any) -> None:
    annotation = param.type_descriptor.annotation
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind in _EXPECTED]
    if len(kinds) == 1 and param.nargs == 1 and not param.multiple and not (bool in kinds and not param.is_flag):
        info = param.type_descriptor.parameter_info
        param._runtime_param = PlainParam(kinds[0], info.min, info.max)
