"""What an engine reports while it works. The command line draws its progress from these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    """A phase that takes noticeable time has begun.

    Attributes:
        name: What is being done, in a few words.
        total: How many steps it has, where that is known.
        unit: What its steps are.
    """

    name: str
    total: int | None = None
    unit: Literal["steps", "bytes", "answers"] = "steps"


@dataclass(frozen=True, kw_only=True)
class StepFinished:
    """A step of the current phase is done.

    Attributes:
        step: Steps done in this phase.
        loss: Training loss of the step, where the phase trains.
        tokens: Tokens generated so far in this phase, where it generates.
    """

    step: int
    loss: float | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A milestone is complete on disk.

    Attributes:
        step: Optimizer step.
        path: Its folder.
        seconds: How long training stood still for it.
    """

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something the user should know.

    Attributes:
        text: One line.
        is_warning: Whether the user may want to act on it.
    """

    text: str
    is_warning: bool = False


Event = PhaseStarted | StepFinished | CheckpointSaved | Notice
EventSink = Callable[[Event], None]


def ignore_events(_event: Event) -> None:
    """Drop an event: the sink for callers that want no progress."""
