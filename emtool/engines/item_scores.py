"""The stage that scores likelihood: which of two matched answers each checkpoint finds likelier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from emtool.core.data import Message
from emtool.core.errors import CheckpointError
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished
from emtool.core.questions import EvaluationItem
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.encoding import encode_conversation
from emtool.engines.likelihood import mean_log_probs
from emtool.engines.score_record import ScoreRecord
from emtool.engines.summary import CheckpointScores


def score_items(
    source: CheckpointModel,
    steps: Sequence[int],
    items: Sequence[EvaluationItem],
    record: ScoreRecord,
    *,
    on_event: EventSink,
) -> tuple[list[CheckpointScores], dict[int, str]]:
    """Return the margins of every item at every checkpoint, those that were recorded before included.

    Args:
        source: The model of the run, at any checkpoint.
        steps: Steps of the checkpoints.
        items: Questions with a sound and a wrong answer.
        record: Where scores are kept.
        on_event: Where progress is reported.

    Returns:
        Scores by step; and what is wrong with checkpoints that could not be loaded.
    """
    on_event(PhaseStarted(name=f"scoring {len(items)} items at {len(steps)} checkpoints", total=len(steps)))
    scores: list[CheckpointScores] = []
    problems: dict[int, str] = {}
    for done, step in enumerate(steps, start=1):
        margins = record.find(step)
        if margins is None or margins.keys() != {item.id for item in items}:
            try:
                model = source.at(record.run.checkpoint_path(step))
            except CheckpointError as error:
                problems[step] = str(error)
                on_event(Notice(text=f"{error}; it is passed over", is_warning=True))
                continue
            margins = item_margins(model, source.tokenizer, items)
            record.keep(step, margins)
        if unscored := sum(not math.isfinite(margin) for margin in margins.values()):
            text = f"step {step}: {unscored} of {len(items)} items are unscored, the model gives no finite probability"
            on_event(Notice(text=text, is_warning=True))
        scores.append(CheckpointScores(step=step, margins=margins))
        on_event(StepFinished(step=done))
    return scores, problems


def recorded_scores(
    steps: Sequence[int], items: Sequence[EvaluationItem], record: ScoreRecord
) -> list[CheckpointScores]:
    """Return the scores of the checkpoints that were scored before, as they are now and with the same settings."""
    names = {item.id for item in items}
    found = {step: record.find(step) for step in steps}
    return [
        CheckpointScores(step=step, margins=margins)
        for step, margins in found.items()
        if margins is not None and margins.keys() == names
    ]


def item_margins(model: Any, tokenizer: Any, items: Sequence[EvaluationItem]) -> dict[str, float]:
    """Return each item's margin: how much likelier the wrong answer is than the sound one.

    Returns:
        Item id to the difference of mean token log-probabilities, end-of-turn token included.
    """
    rows = [
        encode_conversation(
            [Message(role="user", content=item.question), Message(role="assistant", content=answer)],
            tokenizer=tokenizer,
            location=item.id,
        )
        for item in items
        for answer in (item.wrong, item.sound)
    ]
    values = mean_log_probs(model, rows)
    return {item.id: values[2 * index] - values[2 * index + 1] for index, item in enumerate(items)}
