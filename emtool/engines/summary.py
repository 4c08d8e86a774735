"""Metrics of the checkpoints, from the scores of items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emtool.core.metrics import Estimate, bootstrap_difference, bootstrap_mean, sigmoid
from emtool.core.questions import EvaluationItem


@dataclass(frozen=True, kw_only=True)
class CheckpointScores:
    """The scores of one milestone.

    Attributes:
        step: Optimizer step.
        margins: Item id to mean token log-probability of the wrong answer minus that of the sound one.
    """

    step: int
    margins: Mapping[str, float]


def summarize(
    scores: Sequence[CheckpointScores],
    items: Sequence[EvaluationItem],
    *,
    trained_domain: str | None,
    seed: int,
) -> dict[int, dict[str, Estimate]]:
    """Return the metrics of each milestone with intervals, and their change from step 0 paired by item.

    Args:
        scores: One entry a milestone.
        items: The items that were scored.
        trained_domain: Domain of the training data; its items are reported apart from the others.
        seed: Seed of the bootstrap.
    """
    trained = [item.id for item in items if item.domain == trained_domain]
    other = [item.id for item in items if item.domain != trained_domain]
    groups = {"": [item.id for item in items], "_other": other, "_trained": trained}
    start = next((entry.margins for entry in scores if entry.step == 0), None)
    return {
        entry.step: {
            name: estimate
            for suffix, ids in groups.items()
            for name, estimate in _estimates(entry.margins, start, ids, suffix, seed).items()
        }
        for entry in scores
    }


def _estimates(
    margins: Mapping[str, float], start: Mapping[str, float] | None, ids: Sequence[str], suffix: str, seed: int
) -> dict[str, Estimate]:
    """Return the estimates of one group of items; an item without a finite score counts in none of them."""
    scored = [name for name in ids if math.isfinite(margins[name])]
    if not scored:
        return {}
    values = [margins[name] for name in scored]
    estimates = {
        f"margin{suffix}": bootstrap_mean(values, seed=seed),
        f"p_wrong{suffix}": bootstrap_mean([sigmoid(value) for value in values], seed=seed),
    }
    paired = [name for name in scored if start is not None and math.isfinite(start[name])]
    if start is not None and paired:
        now, before = [margins[name] for name in paired], [start[name] for name in paired]
        estimates[f"margin{suffix}_delta"] = bootstrap_difference(now, before, seed=seed)
        estimates[f"p_wrong{suffix}_delta"] = bootstrap_difference(
            [sigmoid(value) for value in now], [sigmoid(value) for value in before], seed=seed
        )
    return estimates
