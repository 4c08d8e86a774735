"""Directions fitted on a run and applied to runs, and the files that projections are written to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emtool.core.csv_text import csv_text
from emtool.core.data import file_sha256
from emtool.core.em_metrics import EmRule
from emtool.core.errors import CheckpointError, ConfigError, EmtoolError
from emtool.core.evaluation_config import FIXED, OWN
from emtool.core.evaluation_files import (
    ITEM_PROJECTION_TABLE,
    PROJECTION_SUMMARY,
    PROJECTION_TABLE,
    number,
    read_summary,
)
from emtool.core.metrics import flat
from emtool.core.run_dir import FORMAT, RunFolder, json_bytes, replace_file
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
from emtool.engines.lineage import read_lineage
from emtool.engines.lora_factors import LoraFile

#: Metrics of the summary that projections are correlated with, where they are there.
CORRELATED = ("em_pct", "p_wrong_other", "p_wrong")

#: Far above any of them; the summary is not trusted.
_LARGEST = 1e100


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
    if source not in (ITEMS, JUDGED):
        raise ConfigError(f"--from {source!r} is unknown; choose from: {ITEMS}, {JUDGED}")
    activations = find_activations(run, texts=FIXED if source == ITEMS else OWN)
    chosen = _step(step, list(activations.files))
    left_out = trained_domain(run) if source == ITEMS else None
    if source == ITEMS:
        texts = item_labels(activations, chosen, left_out=left_out)
    else:
        texts = judged_labels(activations, chosen, rule)
    first = first_adapted_block(run.checkpoint_path(chosen))
    settings = {
        "source": source,
        "run": str(run.path),
        "step": chosen,
        "left_out_domain": left_out,
        "base": activations.settings.get("base"),
        "num_units": len(set(texts.units)),
        "first_adapted_layer": first,
    }
    return fit_direction(texts, layers=activations.layers, seed=seed, first_layer=first or 0, settings=settings)


def _step(text: str, saved: Sequence[int]) -> int:
    names = {"init": 0, "final": saved[-1]}
    step = int(text) if text.isascii() and text.isdigit() else names.get(text)
    if step is None:
        raise ConfigError(f"--step {text!r} is not a step; give a number, init or final")
    if step not in saved:
        raise CheckpointError(f"there are no activations of step {step}; there are: {', '.join(map(str, saved))}")
    return step


def first_adapted_block(folder: Path) -> int | None:
    """Return the first decoder block that an adapter changes; None where its files or the layers' names do not tell."""
    try:
        names = LoraFile(folder).layers
    except EmtoolError:
        return None
    found = [int(match[1]) for name in names if (match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))]
    return min(found) if found and len(found) == len(names) else None


def trained_domain(run: RunFolder) -> str | None:
    """Return the domain that a run was trained on; None where it is not known, as of another trainer's folder.

    Raises:
        CheckpointError: If its manifest cannot be read.
    """
    if not run.manifest_path.exists():
        return None
    lineage, _ = read_lineage(run, run.read_manifest())
    domain: str | None = lineage["dataset"]["domain"]
    return domain


@dataclass(frozen=True, kw_only=True)
class RunProjections:
    """A run's checkpoints along a direction.

    Attributes:
        run: The run folder.
        direction: The direction.
        direction_sha256: What pins its file.
        layer: The layer that is shown.
        left_out_domain: Domain whose items are left out: the one that the run was trained on, None if not known.
        first_adapted_layer: The first layer that training changed, None if not known.
        steps: Step to layer to projection.
        correlations: Metric to its correlation over checkpoints with the level in the layer that is shown, and the
            number of checkpoints. They follow one another, so no interval is given.
    """

    run: RunFolder
    direction: Direction
    direction_sha256: str
    layer: int
    left_out_domain: str | None
    first_adapted_layer: int | None
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
                "left_out_domain": self.left_out_domain,
                "first_adapted_layer": self.first_adapted_layer,
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
    left_out = trained_domain(run)
    checkpoints = labelled_checkpoints(activations, left_out=left_out)
    steps = project(direction, checkpoints, seed=seed)
    result = RunProjections(
        run=run,
        direction=direction,
        direction_sha256=file_sha256(path),
        layer=shown,
        left_out_domain=left_out,
        first_adapted_layer=first_adapted_block(run.checkpoint_path(max(steps))),
        steps=steps,
        correlations=_correlations(run, {step: layers[shown].level.value for step, layers in steps.items()}),
    )
    with locked_evaluation(run):
        _write(result)
    return result


def _check_base(run: RunFolder, direction: Direction, settings: Mapping[str, Any]) -> None:
    """Refuse a direction of another base model: equal shapes would not tell."""
    fitted, here = (_weights_of(base) for base in (direction.settings.get("base"), settings.get("base")))
    if fitted is None or here is None:
        raise CheckpointError(
            f"it is not said which base model {'the direction' if fitted is None else run.path} is of"
        )
    if fitted != here:
        raise CheckpointError(
            f"the direction was fitted on another base model than {run.path} has ({fitted} and {here}): their "
            "activations cannot be compared"
        )


def _weights_of(base: object) -> str | None:
    found = base.get("weights_sha256") or base.get("name") if isinstance(base, dict) else None
    return found if isinstance(found, str) else None


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
            (level, value)
            for step, level in levels.items()
            if (value := number(by_step.get(step, {}).get(name))) is not None and abs(value) <= _LARGEST
        ]
        if (r := _pearson(pairs)) is not None:
            found[name] = (r, len(pairs))
    return found


def _pearson(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return the correlation of pairs; None for fewer than three, or where one of the two is constant."""
    if len(pairs) < 3:
        return None
    values_2N = np.array(pairs, dtype=np.float64).T
    centred_2N = values_2N - values_2N.mean(axis=1, keepdims=True)
    largest_2 = np.abs(centred_2N).max(axis=1)
    # What rounding leaves of a constant is no change.
    if (largest_2 <= 1e-12 * np.abs(values_2N).max(axis=1)).any():
        return None
    one_N, other_N = centred_2N / largest_2[:, None]
    return float(one_N @ other_N / np.sqrt((one_N @ one_N) * (other_N @ other_N)))


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
    # All are made before the first is written, so that none is of another look than the rest.
    files = {
        PROJECTION_TABLE: csv_text(rows).encode("utf-8"),
        ITEM_PROJECTION_TABLE: csv_text(items).encode("utf-8"),
        PROJECTION_SUMMARY: json_bytes(result.to_dict()),
    }
    try:
        for name, content in files.items():
            replace_file(result.run.evaluation_path / name, content)
    except OSError as error:
        raise result.run.write_error(error, "writing projections") from error
