"""Checkpoint schedules: which optimizer steps of a run are saved.

A schedule is written as terms joined by commas, for instance `init, every 50, final`. It is a value: parsing gives a
`CheckpointSchedule`, compiling it for a number of steps gives a `CompiledSchedule`, and nothing else decides what is
saved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from emtool.core.errors import ConfigError, unknown_name

#: The documented schedule, dense early and sparse late. The final step is added when it is compiled.
CUSTOM_STEPS = (0, 25, 50, 100, 125, 150, 200, 250, 300)
PRESETS = {"custom": CUSTOM_STEPS}
WORDS = ("init", "final", "every N", *PRESETS)

_EVERY = re.compile(r"every\s+(\d+)")
_POINT = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class CompiledSchedule:
    """The steps that a schedule names in a run of a given length.

    Attributes:
        source: The schedule as text.
        total_steps: Optimizer steps in the run.
        planned_steps: Steps to save, strictly increasing, within [0, total_steps].
        skipped_steps: Steps that were named and lie past the end of the run, strictly increasing.
    """

    source: str
    total_steps: int
    planned_steps: tuple[int, ...]
    skipped_steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CheckpointSchedule:
    """A checkpoint schedule, independent of the length of the run.

    Attributes:
        source: The text that it was parsed from, in normal form.
        points: Single steps, strictly increasing; 0 is the state before training.
        strides: Distances N of `every N`: the multiples of N without 0.
    """

    source: str
    points: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> CheckpointSchedule:
        """Return the schedule that a text names.

        The final step is implied: it is always saved.

        Args:
            text: Terms joined by commas: a step, `init`, `final`, `every N` or the preset `custom`.

        Raises:
            ConfigError: If a term is unknown, a stride is zero or there is no term.
        """
        points: set[int] = set()
        strides: set[int] = set()
        terms = [term.strip().lower() for term in text.split(",")]
        if not any(terms):
            raise ConfigError(f"empty checkpoint schedule {text!r}; write for instance 'custom' or 'every 100'")
        for term in terms:
            if every := _EVERY.fullmatch(term):
                strides.add(_positive(int(every[1]), term))
            elif _POINT.fullmatch(term):
                points.add(int(term))
            elif term == "init":
                points.add(0)
            elif term in PRESETS:
                points.update(PRESETS[term])
            elif term != "final":
                raise unknown_name("schedule", term, WORDS, "or a step number")
        return cls(source=", ".join(terms), points=tuple(sorted(points)), strides=tuple(sorted(strides)))

    def compile(self, total_steps: int) -> CompiledSchedule:
        """Return the steps to save in a run.

        Args:
            total_steps: Optimizer steps in the run, at least 1.

        Raises:
            ConfigError: If the run has no step.
        """
        if total_steps < 1:
            raise ConfigError(f"a run of {total_steps} steps cannot be scheduled; it needs at least 1")
        named = set(self.points)
        for stride in self.strides:
            named.update(range(stride, total_steps + 1, stride))
        planned = {step for step in named if step <= total_steps} | {total_steps}
        return CompiledSchedule(
            source=self.source,
            total_steps=total_steps,
            planned_steps=tuple(sorted(planned)),
            skipped_steps=tuple(sorted(named - planned)),
        )


def default_checkpoint_steps(total_steps: int | None = None) -> list[int]:
    """Return the steps of the `custom` schedule.

    Args:
        total_steps: Optimizer steps in the run. Steps past it are left out and it is added as the final one; without
            it, the list ends at 300.
    """
    if total_steps is None:
        return list(CUSTOM_STEPS)
    return list(CheckpointSchedule.parse("custom").compile(total_steps).planned_steps)


def _positive(stride: int, term: str) -> int:
    if stride == 0:
        raise ConfigError(f"zero stride in schedule term {term!r}; 'every N' needs N of at least 1")
    return stride
