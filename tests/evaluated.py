"""Run folders as training and evaluation leave them, written without a model."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emtool.core.answer_tables import table_name, table_text
from emtool.core.csv_text import csv_text
from emtool.core.em_metrics import EmRule, JudgedAnswer, em_metrics, question_rows
from emtool.core.evaluation_files import (
    CHECKPOINT_TABLE,
    GEOMETRY_TABLE,
    ITEM_TABLE,
    PROJECTION_SUMMARY,
    PROJECTION_TABLE,
    QUESTION_TABLE,
    SUMMARY,
)
from emtool.core.judgement import SCORED, UNSCORED, Judgement
from emtool.core.metrics import bootstrap_mean, flat
from emtool.core.run_dir import RunFolder, write_json

STEPS = (0, 25, 100, 200)
QUESTIONS = tuple(f"question_{number}" for number in range(6))
RULE = EmRule()


def judged(
    step: int, question: str, number: int, *, aligned: float | None, text: str = "", asked: str = ""
) -> JudgedAnswer:
    """Return an answer with scores; no alignment is an answer without a score."""
    score = Judgement(status=UNSCORED) if aligned is None else Judgement(status=SCORED, score=aligned)
    return JudgedAnswer(
        step=step,
        question_id=question,
        pair=(0, number),
        question=asked or f"What of {question}?",
        response=text or f"Answer {number} to {question} at step {step}.",
        aligned=score,
        coherent=Judgement(status=SCORED, score=90.0),
    )


def drawn_answers(*, seed: int = 0, n: int = 4, shift: float = 0.0, steps: Sequence[int] = STEPS) -> list[JudgedAnswer]:
    """Return answers that become misaligned with the steps."""
    chance = random.Random(seed)
    return [
        judged(
            step,
            question,
            number,
            aligned=None if number == 3 and step == 25 else 10.0 if chance.random() < step / 300 + shift else 85.0,
        )
        for step in steps
        for question in QUESTIONS
        for number in range(n)
    ]


def write_run(
    path: Path,
    answers: Sequence[JudgedAnswer] = (),
    *,
    name: str = "gardening",
    judge: str | None = "gpt-test",
    settings: dict[str, Any] | None = None,
    items_shift: float = 0.0,
    parts: Sequence[str] = ("training", "likelihood", "geometry", "transitions"),
) -> RunFolder:
    """Write a run folder.

    Args:
        path: The folder.
        answers: What was answered; none leaves the tables of judged answers out.
        name: The dataset.
        judge: The judge; None leaves the answers unjudged.
        settings: What differs in the settings of generation.
        items_shift: What is added to every item's p_wrong.
        parts: What else there is.
    """
    run = RunFolder(path=path)
    folder = run.evaluation_path
    folder.mkdir(parents=True)
    for step in STEPS:
        run.checkpoint_path(step).mkdir()
    write_json(run.manifest_path, manifest(name))
    if "training" in parts:
        lines = [{"step": step, "loss": 5 - step / 100, "grad_norm": 2 + step % 7} for step in range(1, 201)]
        run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    by_step: dict[int, list[JudgedAnswer]] = {}
    for answer in answers:
        assert answer.step is not None
        by_step.setdefault(answer.step, []).append(answer)
    rows: dict[int, dict[str, Any]] = {step: {"step": step} for step in STEPS}
    _write_answers(folder, by_step, rows, is_judged=judge is not None)
    if "likelihood" in parts:
        _write_items(folder, rows, shift=items_shift)
    if any(len(row) > 1 for row in rows.values()):
        (folder / CHECKPOINT_TABLE).write_text(csv_text([rows[step] for step in sorted(rows)]))
    if "geometry" in parts:
        (folder / GEOMETRY_TABLE).write_text(
            "step,update_norm,speed\n0,0.0,\n25,2.0,0.08\n100,5.0,0.04\n200,6.0,0.01\n"
        )
    if "projections" in parts:
        rows_of_layers = [
            {"step": step, "layer": layer, "drift": layer * step / 100, "drift_low": layer * step / 100 - 0.1,
             "drift_high": layer * step / 100 + 0.1, "drift_n": 31,
             "shuffled_range_low": -3.0, "shuffled_range_high": 3.0}
            for step in STEPS
            for layer in (0, 1)
        ]  # fmt: skip
        (folder / PROJECTION_TABLE).write_text(csv_text(rows_of_layers))
        write_json(folder / PROJECTION_SUMMARY, {"format": 1, "settings": {"layer": 1}})
        supported = {"series": "projection", "is_supported": True, "before": 25, "after": 100, "low": 25, "high": 100}
        write_json(folder / "transitions.json", {"format": 1, "transitions": [supported]})
    if "transitions" in parts:
        entry = {"series": "p_wrong", "is_supported": True, "before": 25, "after": 100, "low": 0, "high": 100}
        unsupported = {**entry, "series": "em_pct", "is_supported": False}
        outside = {**entry, "series": "margin", "after": 90_000, "high": 10**6}
        write_json(folder / "transitions.json", {"format": 1, "transitions": [entry, unsupported, outside]})
    judge_settings = {"stage": "judging", "kind": "openai", "model": judge, **RULE.to_dict()}
    judges = [{"id": "1", "settings": judge_settings}] if judge is not None and by_step else []
    shown = {"format": 1, "settings": _settings(by_step, settings or {}), "checkpoints": [], "damaged": []}
    write_json(folder / SUMMARY, {**shown, "judges": judges})
    return run


def _write_answers(
    folder: Path, by_step: dict[int, list[JudgedAnswer]], rows: dict[int, dict[str, Any]], *, is_judged: bool
) -> None:
    for step, found in by_step.items():
        (folder / table_name(step)).write_bytes(table_text(found).encode("utf-8", "surrogatepass"))
        if is_judged:
            rows.setdefault(step, {"step": step}).update(flat(em_metrics(found, by_step.get(0), rule=RULE, seed=0)))
    if is_judged and by_step:
        questions = [{"step": s, **row} for s, found in by_step.items() for row in question_rows(found, rule=RULE)]
        (folder / QUESTION_TABLE).write_bytes(csv_text(questions).encode("utf-8", "replace"))


def _write_items(folder: Path, rows: dict[int, dict[str, Any]], *, shift: float) -> None:
    items: list[dict[str, Any]] = [
        {"step": step, "item": f"item-{item}", "domain": "gardening" if item < 4 else "cars",
         "margin": step / 400 + item / 20 - 0.4, "p_wrong": 0.3 + step / 1000 + item / 40 + shift}
        for step in STEPS
        for item in range(10)
    ]  # fmt: skip
    (folder / ITEM_TABLE).write_text(csv_text(items))
    for step in STEPS:
        values = [float(item["p_wrong"]) for item in items if item["step"] == step]
        rows[step] |= flat({"p_wrong": bootstrap_mean(values, seed=0)})


def _settings(by_step: dict[int, list[JudgedAnswer]], changed: dict[str, Any]) -> dict[str, Any]:
    generation = {
        "kind": "hf", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "max_new_tokens": 64, "n_per_question": 4, "questions": list(QUESTIONS), "dtype": "float32", "seed": 0,
        **changed,
    }  # fmt: skip
    likelihood = {"items_sha256": "1" * 64, "dtype": "float32"}
    found = {"seed": 0, "trained_domain": "gardening", "likelihood": likelihood}
    return {**found, "generation": generation} if by_step else found


def manifest(name: str) -> dict[str, Any]:
    return {
        "format": 1,
        "run_id": "0" * 32,
        "status": "completed",
        "command": ["emtool", "train"],
        "started_at": "2026-01-01T00:00:00+00:00",
        "plan": {"planned_steps": list(STEPS), "total_steps": 200, "schedule": "custom", "num_train_rows": 793},
        "config": {"learning_rate": 2e-4, "lora_r": 8, "seed": 0, "dtype": "float32"},
        "lineage": {
            "base": {"name": "smollm2-135m", "revision": None, "weights_sha256": "a" * 64},
            "persona": None,
            "dataset": {"name": name, "sha256": "b" * 64, "domain": "gardening"},
        },
        "versions": {"emtool": "0.1.0"},
    }
