"""The terms of a schedule: what each names in a run of a given length.

A new kind of term is a frozen class with `__str__`, `count` and `steps`, and an entry in `TERMS` of
`emtool/core/schedule_text.py` that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from emtool.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """What a schedule is compiled for.

    Attributes:
        total_steps: Optimizer steps in the run, at least 1.
        steps_per_epoch: Optimizer steps of an epoch; None where no dataset is known.
    """

    total_steps: int
    steps_per_epoch: int | None = None


class Term(Protocol):
    """A part of a schedule."""

    def __str__(self) -> str:
        """Return the term in normal form."""

    def count(self, run: RunLength) -> int:
        """Return an upper bound of how many steps it names in the run, without expanding it."""

    def steps(self, run: RunLength) -> Iterable[int]:
        """Return the steps that it names, also past the end of the run where it names them one by one."""


@dataclass(frozen=True)
class Point:
    """One step: a number, a share of the run or of epochs, or its end.

    Attributes:
        value: The number as written.
        unit: "" for steps, "%" of the run, "ep" for epochs, "final" for the last step.
    """

    value: Fraction
    unit: str = ""

    def __str__(self) -> str:
        """Return the point in normal form."""
        return "final" if self.unit == "final" else f"{_decimal(self.value)}{self.unit}"

    def step(self, run: RunLength) -> int:
        """Return the step, rounded to even on ties.

        Raises:
            ConfigError: If epochs are asked for and no dataset is known.
        """
        if self.unit == "final":
            return run.total_steps
        if self.unit == "%":
            return round(self.value * run.total_steps / 100)
        if self.unit == "ep":
            if run.steps_per_epoch is None:
                raise ConfigError(f"schedule term {str(self)!r} counts epochs; give a dataset or --steps-per-epoch")
            return round(self.value * run.steps_per_epoch)
        return int(self.value)

    def count(self, run: RunLength) -> int:
        """Return 1."""
        return 1

    def steps(self, run: RunLength) -> Sequence[int]:
        """Return the one step."""
        return (self.step(run),)


@dataclass(frozen=True)
class Range:
    """Steps from a first to a last one, both included, a stride apart."""

    first: int
    last: int
    stride: int

    def __str__(self) -> str:
        """Return the range in normal form."""
        return f"{self.first}-{self.last}:{self.stride}"

    def count(self, run: RunLength) -> int:
        """Return the number of steps."""
        return (self.last - self.first) // self.stride + 1

    def steps(self, run: RunLength) -> range:
        """Return the steps, also past the end of the run."""
        return range(self.first, self.last + 1, self.stride)


@dataclass(frozen=True)
class Every:
    """Absolute multiples, phase after phase; 0 is not one of them.

    Attributes:
        phases: Stride and upper bound (inclusive) of each; None is the end of the run. A later phase holds the
            multiples above the bound of the one before.
    """

    phases: tuple[tuple[int, Point | None], ...]

    def __str__(self) -> str:
        """Return the phases in normal form."""
        return " then ".join(
            f"every {stride}" + (f" until {until}" if until is not None else "") for stride, until in self.phases
        )

    def count(self, run: RunLength) -> int:
        """Return the number of steps."""
        return sum(max(0, (phase.stop - phase.start - 1) // phase.step + 1) for phase in self._ranges(run))

    def steps(self, run: RunLength) -> Iterable[int]:
        """Return the steps inside the run."""
        for phase in self._ranges(run):
            yield from phase

    def _ranges(self, run: RunLength) -> list[range]:
        ranges: list[range] = []
        above = 0
        for stride, until in self.phases:
            bound = run.total_steps if until is None else until.step(run)
            if ranges and until is not None and bound <= above:
                raise ConfigError(
                    f"schedule term {str(self)!r}: the phase until {until} ends at step {bound}, not after the one "
                    f"before it, which ends at {above}"
                )
            last = min(bound, run.total_steps)
            ranges.append(range((above // stride + 1) * stride, last + 1, stride))
            above = max(above, last)
        return ranges


@dataclass(frozen=True)
class Even:
    """K steps spread evenly from 0 to the end."""

    number: int

    def __str__(self) -> str:
        """Return the term in normal form."""
        return f"even {self.number}"

    def count(self, run: RunLength) -> int:
        """Return K."""
        return _check_room(self, self.number, run)

    def steps(self, run: RunLength) -> list[int]:
        """Return round(i * T / (K - 1)) for i = 0 .. K - 1."""
        return [round(Fraction(i * run.total_steps, self.number - 1)) for i in range(self.number)]


@dataclass(frozen=True)
class Log:
    """Step 0 and K - 1 distinct steps, geometric from 1 to the end."""

    number: int

    def __str__(self) -> str:
        """Return the term in normal form."""
        return f"log {self.number}"

    def count(self, run: RunLength) -> int:
        """Return K."""
        return _check_room(self, self.number, run)

    def steps(self, run: RunLength) -> list[int]:
        """Return the steps; a duplicate becomes the next free one, and the last is the end of the run."""
        steps = [0]
        others = self.number - 1
        for i in range(others):
            exponent = i / (others - 1) if others > 1 else 1.0
            wanted = max(round(run.total_steps**exponent), steps[-1] + 1)
            # Room is kept for those that follow, so that the last one lands on the end.
            steps.append(min(wanted, run.total_steps - (others - 1 - i)))
        return steps


@dataclass(frozen=True)
class Powers:
    """Powers of two from 1 up to a bound, inclusive; None is the end of the run."""

    until: Point | None

    def __str__(self) -> str:
        """Return the term in normal form."""
        return "pow2" + (f" until {self.until}" if self.until is not None else "")

    def count(self, run: RunLength) -> int:
        """Return the number of steps."""
        return self._last(run).bit_length()

    def steps(self, run: RunLength) -> list[int]:
        """Return the steps inside the run."""
        return [1 << i for i in range(self._last(run).bit_length())]

    def _last(self, run: RunLength) -> int:
        return run.total_steps if self.until is None else max(0, min(self.until.step(run), run.total_steps))


@dataclass(frozen=True)
class Preset:
    """A schedule with a name."""

    name: str
    terms: tuple[Term, ...]

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def count(self, run: RunLength) -> int:
        """Return the sum over its terms."""
        return sum(term.count(run) for term in self.terms)

    def steps(self, run: RunLength) -> Iterable[int]:
        """Return the steps of its terms."""
        for term in self.terms:
            yield from term.steps(run)


def _check_room(term: Term, number: int, run: RunLength) -> int:
    if number > run.total_steps + 1:
        raise ConfigError(
            f"schedule term {str(term)!r} asks for {number:,} distinct steps and the run has {run.total_steps + 1:,}, "
            "step 0 included; ask for fewer"
        )
    return number


def _decimal(value: Fraction) -> str:
    """Return a fraction that came from a decimal number as that number."""
    if value.denominator == 1:
        return str(value.numerator)
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    whole, rest = divmod(int(value * 10**digits), 10**digits)
    return f"{whole}.{rest:0{digits}d}"
