"""Evaluation of a run: every milestone, scored on held-out items with the model that was trained."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.data import Message, file_sha256
from emtool.core.errors import CheckpointError
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished, ignore_events
from emtool.core.metrics import LEVEL, RESAMPLES, Estimate, bootstrap_difference, bootstrap_mean, sigmoid
from emtool.core.questions import EVERYDAY_ITEMS, EvaluationItem, read_items
from emtool.core.run_dir import FORMAT, RunFolder, write_json
from emtool.engines.checkpointing import read_checkpoint
from emtool.engines.encoding import encode_conversation
from emtool.engines.likelihood import mean_log_probs
from emtool.engines.lineage import ComposedModel, rebuild_model
from emtool.engines.modeling import DTYPES, attach_adapter, check_device, load_adapter_into


@dataclass(frozen=True, kw_only=True)
class CheckpointScores:
    """The scores of one milestone.

    Attributes:
        step: Optimizer step.
        margins: Item id to mean token log-probability of the wrong answer minus that of the sound one.
    """

    step: int
    margins: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        run: The run folder.
        settings: What shaped the numbers.
        metrics: Step to metric name to estimate; steps increasing. A change from step 0 is named `..._delta`.
    """

    run: RunFolder
    settings: Mapping[str, Any]
    metrics: Mapping[int, Mapping[str, Estimate]]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as `summary.json` holds it."""
        return {
            "format": FORMAT,
            "run": str(self.run.path),
            "settings": dict(self.settings),
            "checkpoints": [{"step": step, "metrics": _flat(estimates)} for step, estimates in self.metrics.items()],
        }


def evaluate(
    run: RunFolder,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    on_event: EventSink = ignore_events,
) -> EvaluationResult:
    """Score every milestone of a run and write the summary files.

    The base is loaded once, the persona merged as at training, and each adapter loaded into place.

    Args:
        run: The run folder.
        seed: Seed of the bootstrap.
        device: Device to compute on, "cpu" or "cuda".
        dtype: Dtype of the base; None takes the run's.
        on_event: Where progress is reported.

    Raises:
        CheckpointError: If the run has no milestone, one is damaged, or its lineage cannot be rebuilt.
        ModelError: If the base model here is not the one that was trained.
    """
    manifest = run.read_manifest()
    lineage, trained_dtype = _read_lineage(run, manifest)
    _check_checkpoints(run, manifest, lineage)
    check_device(device)
    used_dtype = dtype or trained_dtype
    if manifest.get("status") != "completed":
        text = f"run.json says {manifest.get('status')}: this run is not complete"
        on_event(Notice(text=text, is_warning=True))
    items = read_items()
    composed = rebuild_model(lineage, trained_dtype=trained_dtype, device=device, dtype=used_dtype, on_event=on_event)
    scores = _score_checkpoints(run, composed, items, device=device, on_event=on_event)
    domain = lineage["dataset"]["domain"]
    result = EvaluationResult(
        run=run,
        settings={
            "seed": seed,
            "device": device,
            "dtype": used_dtype,
            "items_sha256": file_sha256(EVERYDAY_ITEMS),
            "num_items": len(items),
            "trained_domain": domain,
            "interval": f"{LEVEL:.0%} percentile bootstrap over items, {RESAMPLES} resamples",
        },
        metrics=summarize(scores, items, trained_domain=domain, seed=seed),
    )
    _write(result, scores, items)
    return result


def _check_checkpoints(run: RunFolder, manifest: Mapping[str, Any], lineage: Mapping[str, Any]) -> None:
    """Refuse, before anything is loaded, what could not be scored or recorded."""
    steps = run.saved_steps()
    if not steps:
        raise CheckpointError(f"{run.path} has no checkpoint-* folders; train it first")
    for step in steps:
        _check_requires(run.checkpoint_path(step), lineage, run_id=str(manifest.get("run_id")))
    try:
        run.evaluation_path.mkdir(exist_ok=True)
    except OSError as error:
        raise run.write_error(error, "making the folder evaluation") from error


def _score_checkpoints(
    run: RunFolder, composed: ComposedModel, items: Sequence[EvaluationItem], *, device: str, on_event: EventSink
) -> list[CheckpointScores]:
    """Return the scores of every milestone, each adapter loaded into place."""
    steps = run.saved_steps()
    model = attach_adapter(composed.model, run.checkpoint_path(steps[0])).to(device).eval()
    on_event(PhaseStarted(name=f"scoring {len(items)} items at {len(steps)} checkpoints", total=len(steps)))
    scores = []
    for done, step in enumerate(steps, start=1):
        load_adapter_into(model, run.checkpoint_path(step))
        margins = item_margins(model, composed.tokenizer, items)
        if unscored := sum(not math.isfinite(margin) for margin in margins.values()):
            text = f"step {step}: {unscored} of {len(items)} items are unscored, the model gives no finite probability"
            on_event(Notice(text=text, is_warning=True))
        scores.append(CheckpointScores(step=step, margins=margins))
        on_event(StepFinished(step=done))
    return scores


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


def _read_lineage(run: RunFolder, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the lineage of a manifest and the dtype of its run.

    Raises:
        CheckpointError: If the manifest lacks a part of it.
    """
    try:
        lineage, dtype = manifest["lineage"], manifest["config"]["dtype"]
        persona = lineage["persona"]
        texts = [dtype, lineage["base"]["name"], lineage["base"]["source"]]
        if persona is not None:
            texts += [persona[key] for key in ("name", "adapter_path", "adapter_sha256", "merged_sha256")]
        texts += [lineage["dataset"]["domain"] or ""]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run.manifest_path} lacks {error}; the model cannot be rebuilt from it") from error
    if not all(isinstance(text, str) for text in texts) or dtype not in DTYPES:
        raise CheckpointError(f"{run.manifest_path} has a lineage that is not text; the model cannot be rebuilt")
    return dict(lineage), dtype


def _check_requires(folder: Path, lineage: Mapping[str, Any], *, run_id: str) -> None:
    requires = read_checkpoint(folder, run_id=run_id)["requires"]
    for part in ("base", "persona"):
        if requires.get(part) != lineage[part]:
            raise CheckpointError(f"{folder} was trained on another {part} than run.json says; it is not evaluated")


def _flat(estimates: Mapping[str, Estimate]) -> dict[str, float | int]:
    flat: dict[str, float | int] = {}
    for name, estimate in estimates.items():
        flat |= {
            name: estimate.value,
            f"{name}_low": estimate.low,
            f"{name}_high": estimate.high,
            f"{name}_n": estimate.n,
        }
    return flat


def _write(result: EvaluationResult, scores: Sequence[CheckpointScores], items: Sequence[EvaluationItem]) -> None:
    try:
        _write_files(result.run.evaluation_path, result, scores, items)
    except OSError as error:
        raise result.run.write_error(error, "writing the evaluation") from error


def _write_files(
    folder: Path, result: EvaluationResult, scores: Sequence[CheckpointScores], items: Sequence[EvaluationItem]
) -> None:
    _write_csv(
        folder / "checkpoint_summary.csv",
        [{"step": step, **_flat(estimates)} for step, estimates in result.metrics.items()],
    )
    domains = {item.id: item.domain for item in items}
    _write_csv(
        folder / "item_scores.csv",
        [
            {
                "step": entry.step,
                "item": name,
                "domain": domains[name],
                **({"margin": margin, "p_wrong": sigmoid(margin)} if math.isfinite(margin) else {}),
            }
            for entry in scores
            for name, margin in entry.margins.items()
        ],
    )
    write_json(folder / "summary.json", result.to_dict())


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text.getvalue(), encoding="utf-8")
    staged.replace(path)
