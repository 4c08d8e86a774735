"""The record of each training step."""

from __future__ import annotations

import json
import math
import time
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emtool.core.events import EventSink, StepFinished
from emtool.core.run_dir import RunFolder
from emtool.engines.movement import AdapterMovement


class StepRecorder(TrainerCallback):
    """Writes a line of `metrics.jsonl` for each logged step and reports it.

    `grad_norm` is the norm of the gradient before it is clipped, `adapter_movement` that of the change of the trained
    parameters in the step.

    Args:
        run: The run folder; None reports only.
        on_event: Where steps are reported.
        seconds_before: Time that the run took before it was resumed, in seconds.
    """

    #: Names in the Trainer's log, and in the record.
    KEPT: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
        "num_input_tokens_seen": "num_tokens",
        "epoch": "epoch",
    }

    def __init__(self, run: RunFolder | None, *, on_event: EventSink, seconds_before: float = 0.0) -> None:
        self._seconds_before = seconds_before
        self._run = run
        self._on_event = on_event
        self._begun = time.monotonic()
        self._movement: AdapterMovement | None = None
        self._moved: torch.Tensor | None = None

    @property
    def seconds(self) -> float:
        """Return the time of the run's steps and saves so far, in seconds."""
        return self._seconds_before + time.monotonic() - self._begun

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and remember where the adapter begins."""
        self._begun = time.monotonic()
        if self._run is not None:
            self._movement = AdapterMovement(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure how far the adapter moved in the step."""
        if self._movement is not None:
            self._moved = self._movement.measure()

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
            if self._moved is not None:
                kept["adapter_movement"] = _finite(self._moved)
            self._run.append_metrics({"step": state.global_step, "seconds": round(self.seconds, 3), **kept})
        if "loss" in logs:
            self._on_event(StepFinished(step=state.global_step, loss=float(logs["loss"])))


def recorded_seconds(run: RunFolder) -> float:
    """Return the time that a run's records say it took, in seconds; 0 without records."""
    if not run.metrics_path.exists():
        return 0.0
    records = [json.loads(line) for line in run.metrics_path.read_text(encoding="utf-8").splitlines()]
    return max((float(record["seconds"]) for record in records if "seconds" in record), default=0.0)


def _finite(value: Any) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
