"""Evaluation of a run: every milestone, scored on held-out items with the model that was trained."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emtool.core.data import Message, file_sha256
from emtool.core.errors import CheckpointError
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished, ignore_events
from emtool.core.metrics import LEVEL, RESAMPLES, Estimate, sigmoid
from emtool.core.questions import EVERYDAY_ITEMS, EvaluationItem, read_items
from emtool.core.run_dir import FORMAT, RunFolder, write_json
from emtool.engines.encoding import encode_conversation
from emtool.engines.likelihood import mean_log_probs
from emtool.engines.lineage import ComposedModel, check_requires, read_lineage, rebuild_model
from emtool.engines.modeling import attach_adapter, check_device, load_adapter_into
from emtool.engines.score_record import ScoreRecord
from emtool.engines.summary import CheckpointScores, summarize


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        run: The run folder.
        settings: What shaped the numbers.
        metrics: Step to metric name to estimate; steps increasing. A change from step 0 is named `..._delta`.
        damaged: Step to what is wrong with its checkpoint, which was not scored.
    """

    run: RunFolder
    settings: Mapping[str, Any]
    metrics: Mapping[int, Mapping[str, Estimate]]
    damaged: Mapping[int, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as `summary.json` holds it."""
        return {
            "format": FORMAT,
            "run": str(self.run.path),
            "settings": dict(self.settings),
            "damaged": [{"step": step, "problem": problem} for step, problem in self.damaged.items()],
            "checkpoints": [{"step": step, "metrics": _flat(estimates)} for step, estimates in self.metrics.items()],
        }


def evaluate(
    run: RunFolder,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    check_hashes: bool = False,
    on_event: EventSink = ignore_events,
) -> EvaluationResult:
    """Score every milestone of a run and write the summary files.

    The base is loaded once, the persona merged as at training, and each adapter loaded into place. The scores of each
    milestone are kept as soon as it is scored: an evaluation that was interrupted goes on with the next one. A
    damaged milestone is reported and passed over.

    Args:
        run: The run folder.
        seed: Seed of the bootstrap.
        device: Device to compute on, "cpu" or "cuda".
        dtype: Dtype of the base; None takes the run's.
        check_hashes: Whether the contents of every file are checked; sizes always are.
        on_event: Where progress is reported.

    Raises:
        CheckpointError: If the run has no whole milestone, or its lineage cannot be rebuilt.
        ModelError: If the base model here is not the one that was trained.
    """
    manifest = run.read_manifest()
    lineage, trained_dtype = read_lineage(run, manifest)
    damaged = _damaged_checkpoints(run, manifest, lineage, check_hashes=check_hashes)
    for problem in damaged.values():
        on_event(Notice(text=f"{problem}; it is passed over", is_warning=True))
    check_device(device)
    used_dtype = dtype or trained_dtype
    if manifest.get("status") != "completed":
        text = f"run.json says {manifest.get('status')}: this run is not complete"
        on_event(Notice(text=text, is_warning=True))
    items, items_sha256 = read_items(), file_sha256(EVERYDAY_ITEMS)
    composed = rebuild_model(
        lineage,
        trained_dtype=trained_dtype,
        device=device,
        dtype=used_dtype,
        sample_path=run.merged_sample_path,
        on_event=on_event,
    )
    steps = [step for step in run.saved_steps() if step not in damaged]
    record = ScoreRecord(run=run, settings={"device": device, "dtype": used_dtype, "items_sha256": items_sha256})
    scores, unreadable = _score_checkpoints(record, steps, composed, items, device=device, on_event=on_event)
    damaged |= unreadable
    if breaks := manifest.get("trajectory_breaks"):
        text = f"training did not repeat itself exactly at steps {breaks}: they belong to an earlier attempt"
        on_event(Notice(text=text, is_warning=True))
    domain = lineage["dataset"]["domain"]
    result = EvaluationResult(
        run=run,
        settings={
            "seed": seed,
            "device": device,
            "dtype": used_dtype,
            "items_sha256": items_sha256,
            "num_items": len(items),
            "trained_domain": domain,
            "interval": f"{LEVEL:.0%} percentile bootstrap over items, {RESAMPLES} resamples",
        },
        metrics=summarize(scores, items, trained_domain=domain, seed=seed),
        damaged=dict(sorted(damaged.items())),
    )
    _write(result, scores, items)
    return result


def _damaged_checkpoints(
    run: RunFolder, manifest: Mapping[str, Any], lineage: Mapping[str, Any], *, check_hashes: bool
) -> dict[int, str]:
    """Return what is wrong with the milestones that cannot be scored; refuse, before anything is loaded, a bad run.

    Raises:
        CheckpointError: If no milestone is whole, or nothing could be recorded.
    """
    steps = run.saved_steps()
    if not steps:
        raise CheckpointError(f"{run.path} has no checkpoint-* folders; train it first")
    damaged = {}
    for step in steps:
        try:
            check_requires(
                run.checkpoint_path(step), lineage, run_id=str(manifest.get("run_id")), check_hashes=check_hashes
            )
        except CheckpointError as error:
            damaged[step] = str(error)
    if len(damaged) == len(steps):
        raise CheckpointError(f"no checkpoint of {run.path} is whole: {next(iter(damaged.values()))}")
    try:
        run.evaluation_path.mkdir(exist_ok=True)
    except OSError as error:
        raise run.write_error(error, "making the folder evaluation") from error
    return damaged


def _score_checkpoints(
    record: ScoreRecord,
    steps: Sequence[int],
    composed: ComposedModel,
    items: Sequence[EvaluationItem],
    *,
    device: str,
    on_event: EventSink,
) -> tuple[list[CheckpointScores], dict[int, str]]:
    """Return the scores of the milestones, each adapter loaded into place, and those that cannot be loaded."""
    on_event(PhaseStarted(name=f"scoring {len(items)} items at {len(steps)} checkpoints", total=len(steps)))
    model: Any = None
    scores: list[CheckpointScores] = []
    unreadable: dict[int, str] = {}
    for done, step in enumerate(steps, start=1):
        folder = record.run.checkpoint_path(step)
        margins = record.find(step)
        if margins is None:
            try:
                model = _with_adapter(model, composed, folder, device)
            except CheckpointError as error:
                unreadable[step] = str(error)
                on_event(Notice(text=f"{error}; it is passed over", is_warning=True))
                continue
            margins = item_margins(model, composed.tokenizer, items)
            record.keep(step, margins)
        if unscored := sum(not math.isfinite(margin) for margin in margins.values()):
            text = f"step {step}: {unscored} of {len(items)} items are unscored, the model gives no finite probability"
            on_event(Notice(text=text, is_warning=True))
        scores.append(CheckpointScores(step=step, margins=margins))
        on_event(StepFinished(step=done))
    if not scores:
        raise CheckpointError(f"no checkpoint of {record.run.path} can be loaded: {next(iter(unreadable.values()))}")
    return scores, unreadable


def _with_adapter(model: Any, composed: ComposedModel, folder: Path, device: str) -> Any:
    """Return the model with the adapter of a folder: attached the first time, then loaded into place."""
    if model is None:
        return composed.with_persona(attach_adapter(composed.model, folder)).to(device).eval()
    load_adapter_into(model, folder)
    return model


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
