"""Trainer callbacks: saving on the schedule, and the record of each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emtool.core.events import EventSink, StepFinished
from emtool.core.run_dir import RunFolder
from emtool.core.schedule import CompiledSchedule


class ScheduledCheckpointCallback(TrainerCallback):
    """Saves at the steps of a schedule, step 0 and the real final step included.

    The Trainer looks at `should_save` only after a step, so it can save neither the state before the first one nor an
    early end. This callback saves by itself: step 0 when training begins, the others as their step ends, and the last
    one when training ends, wherever that is.

    Args:
        schedule: The compiled schedule; training must run for its `total_steps`.
        save: Called with the step; must have saved when it returns.
    """

    def __init__(self, schedule: CompiledSchedule, *, save: Callable[[int], None]) -> None:
        self.schedule = schedule
        self.saved_steps: list[int] = []
        self._save = save

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the plan against the Trainer's own count, and save step 0 if it is scheduled."""
        assert state.max_steps == self.schedule.total_steps, (
            f"the Trainer will run {state.max_steps} steps, the schedule was made for {self.schedule.total_steps}"
        )
        if state.global_step == 0:
            self._save_if(0, 0 in self.schedule.planned_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the step that has just ended if it is scheduled."""
        self._save_if(state.global_step, state.global_step in self.schedule.planned_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the step at which training really ended, unless the schedule removes it."""
        self._save_if(state.global_step, self.schedule.has_final and state.global_step not in self.saved_steps)

    def _save_if(self, step: int, is_due: bool) -> None:
        if is_due:
            self._save(step)
            self.saved_steps.append(step)


class StepRecorder(TrainerCallback):
    """Writes a line of `metrics.jsonl` for each logged step and reports it.

    Args:
        run: The run folder; None reports only.
        on_event: Where steps are reported.
    """

    #: Names in the Trainer's log, and in the record.
    KEPT: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
        "num_input_tokens_seen": "num_tokens",
        "epoch": "epoch",
    }

    def __init__(self, run: RunFolder | None, *, on_event: EventSink) -> None:
        self._run = run
        self._on_event = on_event
        self._begun = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._begun = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record what the Trainer logged; values that are not finite are recorded as text."""
        logs = logs or {}
        kept = {name: _finite(logs[key]) for key, name in self.KEPT.items() if key in logs}
        if self._run is not None and "loss" in logs:
            if "num_tokens" in kept:
                kept["num_tokens"] = int(logs["num_input_tokens_seen"])
            seconds = round(time.monotonic() - self._begun, 3)
            self._run.append_metrics({"step": state.global_step, "seconds": seconds, **kept})
        if "loss" in logs:
            self._on_event(StepFinished(step=state.global_step, loss=float(logs["loss"])))


def _finite(value: Any) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
