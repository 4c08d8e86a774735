"""Checkpoint schedules: which optimizer steps of a run are saved.

A schedule is written as terms joined by commas; together they form a union:

    25   10%   0.5ep   init   final              one step
    0-150:25                                     from, to (inclusive), stride
    every 25 until 150 then every 50 until 300   absolute multiples, phase after phase
    log 10   even 8   pow2 until 512             spread over the run
    custom   pythia                              presets
    !75   !0-100:25   !final                     removal, which wins

It is a value: parsing gives a `CheckpointSchedule`, compiling that for a number of steps gives a `CompiledSchedule`,
and nothing else decides what is saved. The terms themselves are in `schedule_terms.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from emtool.core.errors import ConfigError
from emtool.core.schedule_terms import Point, RunLength, Term

#: The documented schedule, dense early and sparse late. The final step is implied.
CUSTOM_STEPS = (0, 25, 50, 100, 125, 150, 200, 250, 300)
#: Biderman et al. 2023, arXiv 2304.01373: step 0, powers of two to 512, then every 1,000.
PYTHIA_TEXT = "init, pow2 until 512, every 1000"
#: A schedule with more checkpoints than this is refused before it is expanded.
MAX_CHECKPOINTS = 100_000


@dataclass(frozen=True, kw_only=True)
class CompiledSchedule:
    """The steps that a schedule names in a run of a given length.

    Attributes:
        source: The schedule in normal form.
        total_steps: Optimizer steps in the run.
        planned_steps: Steps to save, strictly increasing, within [0, total_steps].
        skipped_steps: Steps that were named and lie past the end of the run, strictly increasing.
        has_final: Whether the step at which training really ends is saved.
        keeps_removed_final: Whether a removal other than `!final` names the last step, which is saved all the same: a
            schedule for runs of many lengths must not lose the final model by coincidence.
    """

    source: str
    total_steps: int
    planned_steps: tuple[int, ...]
    skipped_steps: tuple[int, ...]
    has_final: bool
    keeps_removed_final: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointSchedule:
    """A checkpoint schedule, independent of the length of the run.

    Attributes:
        kept: Terms whose union is saved; `final` is implied.
        removed: Terms that are taken out again.
    """

    kept: tuple[Term, ...]
    removed: tuple[Term, ...] = ()

    @classmethod
    def parse(cls, text: str) -> CheckpointSchedule:
        """Return the schedule that a text names, see the head of this module.

        Raises:
            ConfigError: If a term is unknown, negative, reversed or has a zero stride, or there is no term; the message
                quotes the text and points at the place.
        """
        from emtool.core.schedule_text import parse_schedule

        return parse_schedule(text)

    def __str__(self) -> str:
        """Return the schedule in normal form: parsing it gives the same steps."""
        return ", ".join([*map(str, self.kept), *(f"!{term}" for term in self.removed)])

    def compile(self, total_steps: int, *, steps_per_epoch: int | None = None) -> CompiledSchedule:
        """Return the steps to save in a run.

        Args:
            total_steps: Optimizer steps in the run, at least 1.
            steps_per_epoch: Optimizer steps of an epoch, for terms in epochs.

        Raises:
            ConfigError: If the run has no step, a term needs what is not known, nothing is left to save, or there are
                more than `MAX_CHECKPOINTS`.
        """
        if total_steps < 1:
            raise ConfigError(f"a run of {total_steps} steps cannot be scheduled; it needs at least 1")
        run = RunLength(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        removed = _union(self.removed, run)
        has_final = not any(isinstance(term, Point) and term.unit == "final" for term in self.removed)
        named = _union(self.kept, run) - removed
        planned = {step for step in named if step <= total_steps}
        if has_final:
            planned.add(total_steps)
        else:
            planned.discard(total_steps)
        if not planned:
            raise ConfigError(f"schedule {str(self)!r} leaves no step of {total_steps} to save; remove a '!' term")
        return CompiledSchedule(
            source=str(self),
            total_steps=total_steps,
            planned_steps=tuple(sorted(planned)),
            skipped_steps=tuple(sorted(step for step in named if step > total_steps)),
            has_final=has_final,
            keeps_removed_final=has_final and total_steps in removed,
        )


def default_checkpoint_steps(total_steps: int | None = None) -> list[int]:
    """Return the steps of the `custom` schedule.

    Args:
        total_steps: Optimizer steps in the run. Steps past it are left out and it is added as the final one; without
            it, the list ends at 300.
    """
    if total_steps is None:
        return list(CUSTOM_STEPS)
    if not isinstance(total_steps, int) or isinstance(total_steps, bool):
        raise ConfigError(f"total_steps is {total_steps!r}; it must be a whole number")
    return list(CheckpointSchedule.parse("custom").compile(total_steps).planned_steps)


def _union(terms: Iterable[Term], run: RunLength) -> set[int]:
    steps: set[int] = set()
    for term in terms:
        fits = term.count(run) <= MAX_CHECKPOINTS
        if fits:
            steps.update(term.steps(run))
        if not fits or len(steps) > MAX_CHECKPOINTS:
            raise ConfigError(f"schedule term {str(term)!r} makes more than {MAX_CHECKPOINTS:,} checkpoints; widen it")
    return steps
