"""Directions fitted on a run and applied to runs, and the files that projections are written to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.csv_text import csv_text
from emtool.core.data import file_sha256
from emtool.core.em_metrics import EmRule
from emtool.core.errors import CheckpointError, ConfigError, EmtoolError
from emtool.core.evaluation_config import FIXED, OWN
from emtool.core.metrics import flat
from emtool.core.run_dir import FORMAT, RunFolder, replace_file, write_json
from emtool.core.run_lock import locked_evaluation
from emtool.engines.direction import Direction, LayerProjection, fit_direction, project
from emtool.engines.direction_files import (
    ITEMS,
    JUDGED,
    find_activations,
    item_labels,
    judged_labels,
    labelled_checkpoints,
    read_direction,
)
from emtool.engines.last_evaluation import read_summary, settings_of
from emtool.engines.lora_factors import LoraFile

#: Files in the evaluation folder: every layer, the items of the layer that is shown, and all of it.
PROJECTION_TABLE, ITEM_TABLE, PROJECTION_SUMMARY = "projections.csv", "item_projections.csv", "projections.json"

#: Metrics of the summary that projections are correlated with, where they are there.
CORRELATED = ("em_pct", "p_wrong_other", "p_wrong")


def fit_on_run(run: RunFolder, *, source: str, step: str, seed: int, rule: EmRule) -> Direction:
    """Return a direction fitted on one checkpoint of a run, from the activations that evaluation left.

    Args:
        run: The run folder.
        source: "items" takes the wrong and sound texts of emtool's items, without those of the trained domain;
            "judged" the checkpoint's own answers, as a judge scored them.
        step: The checkpoint: a step, "init" or "final".
        seed: Seed of the halves and of the shuffled labels.
        rule: What counts as misaligned, for judged answers.

    Raises:
        EmtoolError: If the activations are not there, or too few texts are labelled.
    """
    activations = find_activations(run, texts=FIXED if source == ITEMS else OWN)
    chosen = _step(step, list(activations.files))
    path = activations.files[chosen]
    if source == ITEMS:
        left_out = trained_domain(run)
        texts = item_labels(path, left_out=left_out)
    elif source == JUDGED:
        left_out = None
        texts = judged_labels(run, path, chosen, rule)
    else:
        raise ConfigError(f"--from {source!r} is unknown; choose from: {ITEMS}, {JUDGED}")
    settings = {
        "source": source,
        "run": str(run.path),
        "step": chosen,
        "left_out_domain": left_out,
        "base": activations.settings.get("base"),
        "num_wrong": sum(texts.is_wrong),
        "num_sound": len(texts.is_wrong) - sum(texts.is_wrong),
    }
    first = first_adapted_block(run.checkpoint_path(chosen))
    return fit_direction(texts, layers=activations.layers, seed=seed, first_layer=first, settings=settings)


def _step(text: str, saved: Sequence[int]) -> int:
    names = {"init": 0, "final": saved[-1]}
    step = int(text) if text.isascii() and text.isdigit() else names.get(text)
    if step is None:
        raise ConfigError(f"--step {text!r} is not a step; give a number, init or final")
    if step not in saved:
        raise CheckpointError(f"there are no activations of step {step}; there are: {', '.join(map(str, saved))}")
    return step


def first_adapted_block(folder: Path) -> int:
    """Return the first decoder block that an adapter changes; 0 where the names of its layers do not tell."""
    try:
        names = LoraFile(folder).layers
    except EmtoolError:
        return 0
    found = [match for name in names if (match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))]
    return min((int(match[1]) for match in found), default=0) if len(found) == len(names) else 0


def trained_domain(run: RunFolder) -> str | None:
    """Return the domain that a run was trained on, as its last summary says; None where it is not known."""
    domain = settings_of(read_summary(run)).get("trained_domain")
    return domain if isinstance(domain, str) else None


@dataclass(frozen=True, kw_only=True)
class RunProjections:
    """A run's checkpoints along a direction.

    Attributes:
        run: The run folder.
        direction: The direction.
        direction_sha256: What pins its file.
        layer: The layer that is shown.
        steps: Step to layer to projection.
        correlations: Metric to its correlation over checkpoints with the level in the layer that is shown, and the
            number of checkpoints. They follow one another, so no interval is given.
    """

    run: RunFolder
    direction: Direction
    direction_sha256: str
    layer: int
    steps: Mapping[int, Mapping[int, LayerProjection]]
    correlations: Mapping[str, tuple[float, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return the projections as `projections.json` holds them."""
        return {
            "format": FORMAT,
            "run": str(self.run.path),
            "settings": {
                "direction_sha256": self.direction_sha256,
                "direction": dict(self.direction.settings),
                "layer": self.layer,
                "num_items": next(iter(self.steps.values()))[self.layer].level.n,
            },
            "correlations": {name: {"r": r, "n": n} for name, (r, n) in self.correlations.items()},
            "checkpoints": [
                {"step": step, "metrics": projection_row(layers[self.layer])} for step, layers in self.steps.items()
            ],
        }


def apply_to_run(run: RunFolder, path: Path, *, layer: int | None = None, seed: int) -> RunProjections:
    """Return a run's checkpoints along a direction, and write them to the evaluation folder.

    Args:
        run: The run folder, with activations over the fixed texts.
        path: The direction's file.
        layer: The layer that is shown; None takes the direction's best one.
        seed: Seed of the bootstrap and of the random directions.

    Raises:
        EmtoolError: If there are no activations, they are of other layers or another model, or the layer is unknown.
    """
    direction = read_direction(path)
    shown = direction.best_layer if layer is None else layer
    if shown not in direction.layers:
        raise ConfigError(
            f"--layer {shown} is not one of the direction's layers, {direction.layers[0]} to {direction.layers[-1]}"
        )
    activations = find_activations(run, texts=FIXED)
    _check_base(run, direction, activations.settings)
    if list(activations.layers) != list(direction.layers):
        raise CheckpointError(
            f"{run.path} has activations of layers {list(activations.layers)}, the direction is of "
            f"{list(direction.layers)}; take them again with the same --activation-layers"
        )
    checkpoints = labelled_checkpoints(activations, left_out=trained_domain(run))
    steps = project(direction, checkpoints, seed=seed)
    result = RunProjections(
        run=run,
        direction=direction,
        direction_sha256=file_sha256(path),
        layer=shown,
        steps=steps,
        correlations=_correlations(run, {step: layers[shown].level.value for step, layers in steps.items()}),
    )
    with locked_evaluation(run):
        _write(result)
    return result


def _check_base(run: RunFolder, direction: Direction, settings: Mapping[str, Any]) -> None:
    """Refuse a direction of another base model: equal shapes would not tell."""
    fitted, here = (_weights_of(base) for base in (direction.settings.get("base"), settings.get("base")))
    if fitted is not None and here is not None and fitted != here:
        raise CheckpointError(
            f"the direction was fitted on another base model than {run.path} has ({fitted} and {here}): their "
            "activations cannot be compared"
        )


def _weights_of(base: object) -> str | None:
    return str(base.get("weights_sha256") or base.get("name")) if isinstance(base, dict) else None


def projection_row(found: LayerProjection) -> dict[str, float | int]:
    """Return one layer's projection at one checkpoint as named values; what is not known is left out."""
    estimates = {"projection": found.level, "drift": found.drift, "separation": found.separation}
    values = flat({name: estimate for name, estimate in estimates.items() if estimate is not None})
    for name in ("cosine_to_previous", "cosine_to_direction"):
        if (cosine := getattr(found, name)) is not None:
            values[name] = cosine
    for name in ("random_range", "shuffled_range"):
        if (ends := getattr(found, name)) is not None:
            values |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return values


def _correlations(run: RunFolder, levels: Mapping[int, float]) -> dict[str, tuple[float, int]]:
    entries = (read_summary(run) or {}).get("checkpoints")
    by_step = {
        entry["step"]: entry["metrics"]
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("metrics"), dict)
    }
    found = {}
    for name in CORRELATED:
        pairs = [
            (level, float(value))
            for step, level in levels.items()
            if isinstance(value := by_step.get(step, {}).get(name), int | float)
        ]
        if (r := _pearson(pairs)) is not None:
            found[name] = (r, len(pairs))
    return found


def _pearson(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return the correlation of pairs; None for fewer than three, or where one of the two is constant."""
    if len(pairs) < 3:
        return None
    means = [math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True)]
    centred = [(one - means[0], other - means[1]) for one, other in pairs]
    squares = [math.fsum(value**2 for value in column) for column in zip(*centred, strict=True)]
    if not all(squares):
        return None
    return math.fsum(one * other for one, other in centred) / math.sqrt(squares[0] * squares[1])


def _write(result: RunProjections) -> None:
    rows = [
        {"step": step, "layer": layer, **projection_row(found)}
        for step, layers in result.steps.items()
        for layer, found in layers.items()
    ]
    items = [
        {"step": step, "item": unit, "projection": value}
        for step, layers in result.steps.items()
        for unit, value in layers[result.layer].units.items()
    ]
    folder = result.run.evaluation_path
    try:
        replace_file(folder / PROJECTION_TABLE, csv_text(rows).encode("utf-8"))
        replace_file(folder / ITEM_TABLE, csv_text(items).encode("utf-8"))
        write_json(folder / PROJECTION_SUMMARY, result.to_dict())
    except OSError as error:
        raise result.run.write_error(error, "writing projections") from error
