"""Errors that a user can mend, and the exit code of each.

Every message is one line: what is wrong, the value, what is allowed, the next step. To add a kind of error, subclass
`EmtoolError` here and say in its docstring who can mend it. A bug is never an `EmtoolError`: it keeps its traceback.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

#: Names that are listed beside one that is nearly right.
_MAX_LISTED = 12


class EmtoolError(Exception):
    """Something that the user can mend."""

    exit_code = 1


class ConfigError(EmtoolError):
    """An option or a name that emtool does not accept; nothing has been created."""

    exit_code = 2


class PointedError(ConfigError):
    """A text that cannot be read, with the place where.

    Args:
        message: One line.
        text: The text as given.
        start: First character of the offending piece.
        length: Characters of it.
    """

    def __init__(self, message: str, *, text: str, start: int, length: int) -> None:
        super().__init__(message)
        self.text = text
        self.start = start
        self.length = length

    @property
    def pointer(self) -> str:
        """Return the text, and below it marks under the place; the part around it where the text is long."""
        begin = max(0, self.start - 30)
        shown = "".join(c if c.isprintable() else " " for c in self.text[begin : begin + 70])
        return f"  {shown}\n  {' ' * (self.start - begin)}{'^' * min(self.length, 40)}"


class DataError(EmtoolError):
    """A dataset that cannot be read or used; names the file and the line."""


class ModelError(EmtoolError):
    """A model, tokenizer or chat template that cannot be found or used."""


class CheckpointError(EmtoolError):
    """A run folder or checkpoint that is missing, damaged or contradicts its manifest."""


class DiskSpaceError(EmtoolError):
    """The plan needs more space than the file system has."""


class BackendError(EmtoolError):
    """A device or a service that is not there or refuses the work."""


class MissingDependencyError(EmtoolError):
    """A program or package that this step needs; the message holds the install command."""


class Interrupted(BaseException):
    """The run was asked to stop by a signal.

    Not an `Exception`, so that nothing that handles failures takes it for one.

    Args:
        signum: The signal's number; the exit code is 128 plus it, as shells expect.
        detail: What was kept, for the closing line.
    """

    def __init__(self, signum: int, detail: str = "") -> None:
        super().__init__(detail)
        self.signum = signum
        self.detail = detail

    @property
    def exit_code(self) -> int:
        """Return the process exit code: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


def unknown_name(kind: str, value: str, choices: Iterable[str], hint: str = "") -> ConfigError:
    """Return the error for a name that is not among the choices, with the nearest one first.

    Args:
        kind: What was named, for instance "persona".
        value: The name as typed.
        choices: The names that exist.
        hint: What else would be accepted, for instance "or a path to a folder".
    """
    import difflib

    known = sorted(choices)
    near = difflib.get_close_matches(value, known, n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ";"
    if near and len(known) > _MAX_LISTED:
        return ConfigError(f"unknown {kind} {shown(value)}{suggestion}")
    tail = f", {hint}" if hint else ""
    return ConfigError(f"unknown {kind} {shown(value)}{suggestion} choose from: {', '.join(known)}{tail}")


def shown(value: object) -> str:
    """Return a value as a message shows it: as Python writes it, cut where it is long or deep."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    """Writes values short, whatever they are."""

    def repr_int(self, x: int, level: int) -> str:
        """Return a number, or its size: Python may refuse to write more than 640 digits."""
        return super().repr_int(x, level) if x.bit_length() <= 2_000 else f"<a whole number of {x.bit_length():,} bits>"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3
