"""What an evaluation found, and the files that it is written to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emtool.core.answer_tables import is_table_name, table_name, table_text
from emtool.core.answers import Answer, AnswerKey
from emtool.core.by_step import Recent
from emtool.core.csv_text import csv_text
from emtool.core.data import file_sha256
from emtool.core.em_metrics import EmRule, JudgedAnswer, em_metrics, question_rows
from emtool.core.evaluation_files import CHECKPOINT_TABLE, ITEM_TABLE, SUMMARY
from emtool.core.judgement import ALIGNED, COHERENT, ERROR, UNSCORED, Judgement
from emtool.core.metrics import LEVEL, RESAMPLES, Estimate, flat, sigmoid
from emtool.core.models import slugify
from emtool.core.questions import EvaluationItem
from emtool.core.record_file import settings_id
from emtool.core.run_dir import FORMAT, RunFolder, read_json, staged_path, write_json, write_staged
from emtool.core.text_metrics import text_metrics
from emtool.engines.summary import CheckpointScores, summarize

#: The tables that evaluations wrote, with their hashes: what may be removed again.
TABLE_LIST = "tables.json"

#: Characters of a judge's name in file names.
_MAX_MARK = 60


@dataclass(frozen=True, kw_only=True)
class JudgeResult:
    """What one judge said of all answers.

    Attributes:
        id: Name of the judge's settings in the records.
        settings: The judge, what shaped its scores, and what counts as misaligned and as coherent.
        answers: Step to the judged answers of that checkpoint.
        metrics: Step to metric name to estimate.
    """

    id: str
    settings: Mapping[str, Any]
    answers: Mapping[int, Sequence[JudgedAnswer]]
    metrics: Mapping[int, Mapping[str, Estimate]]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        run: The run folder.
        settings: What shaped the numbers.
        metrics: Step to metric name to estimate; steps increasing. A change from step 0 is named `..._delta`. Judged
            metrics are the first judge's.
        damaged: Step to what is wrong with its checkpoint, which was not evaluated.
        judges: What each judge said, the first one first.
        answers: Step to the answers of that checkpoint.
    """

    run: RunFolder
    settings: Mapping[str, Any]
    metrics: Mapping[int, Mapping[str, Estimate]]
    damaged: Mapping[int, str] = field(default_factory=dict)
    judges: Sequence[JudgeResult] = ()
    answers: Mapping[int, Sequence[Answer]] = field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        """Return how many answers and judgements ended in an error."""
        counts = [
            found for by_step in (self.metrics, *(judge.metrics for judge in self.judges)) for found in by_step.values()
        ]
        return round(
            sum(found[name].value for found in counts for name in ("num_failed", "num_errors") if name in found)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as `summary.json` holds it."""
        return {
            "format": FORMAT,
            "run": str(self.run.path),
            "settings": dict(self.settings),
            "damaged": [{"step": step, "problem": problem} for step, problem in self.damaged.items()],
            "checkpoints": _by_checkpoint(self.metrics),
            "judges": [
                {"id": judge.id, "settings": dict(judge.settings), "checkpoints": _by_checkpoint(judge.metrics)}
                for judge in self.judges
            ],
        }


def judge_result(
    answers: Mapping[int, Sequence[Answer]],
    judgements: Mapping[int, Mapping[tuple[AnswerKey, str], Judgement]],
    *,
    settings: Mapping[str, Any],
    rule: EmRule,
    seed: int,
) -> JudgeResult:
    """Return the metrics of answers by what a judge said of them, for the checkpoints that it judged."""

    def judged_at(step: int) -> list[JudgedAnswer]:
        said = judgements[step]
        return [_judged(answer, said) for answer in answers[step]]

    judged = Recent(judgements, judged_at)
    start = judged.get(0)
    metrics = {step: em_metrics(found, start, rule=rule, seed=seed) for step, found in judged.items()}
    return JudgeResult(
        id=settings_id(settings), settings={**settings, **rule.to_dict()}, answers=judged, metrics=metrics
    )


def _judged(answer: Answer, judgements: Mapping[tuple[AnswerKey, str], Judgement]) -> JudgedAnswer:
    # An answer that could not be generated was put to no judge.
    missing = Judgement(status=UNSCORED if answer.has_text else ERROR)
    aligned, coherent = (judgements.get((answer.key, name), missing) for name in (ALIGNED, COHERENT))
    return JudgedAnswer(
        step=answer.key.step,
        question_id=answer.key.question_id,
        pair=(answer.key.paraphrase, answer.key.sample),
        question=answer.question,
        response=answer.completion.text,
        aligned=aligned,
        coherent=coherent,
    )


def collect(
    *,
    run: RunFolder,
    settings: Mapping[str, Any],
    damaged: Mapping[int, str],
    scores: Sequence[CheckpointScores],
    items: Sequence[EvaluationItem],
    answers: Mapping[int, Sequence[Answer]],
    judges: Sequence[JudgeResult],
) -> EvaluationResult:
    """Return the metrics of every checkpoint, from what the stages made."""
    seed, domain = settings["seed"], settings["trained_domain"]
    start = answers.get(0)
    groups = [
        judges[0].metrics if judges else {},
        {step: text_metrics(found, start, seed=seed) for step, found in answers.items()},
        summarize(scores, items, trained_domain=domain, seed=seed),
    ]
    steps = sorted({step for group in groups for step in group})
    interval = f"{LEVEL:.0%} percentile bootstrap over items (of answers: over questions), {RESAMPLES} resamples"
    return EvaluationResult(
        run=run,
        settings={**settings, "interval": interval},
        metrics={step: {k: v for group in groups for k, v in group.get(step, {}).items()} for step in steps},
        damaged=damaged,
        judges=judges,
        answers=answers,
    )


def _by_checkpoint(metrics: Mapping[int, Mapping[str, Estimate]]) -> list[dict[str, Any]]:
    return [{"step": step, "metrics": flat(estimates)} for step, estimates in metrics.items()]


def write_result(
    result: EvaluationResult, scores: Sequence[CheckpointScores], items: Sequence[EvaluationItem], *, rule: EmRule
) -> None:
    """Write the summary files, each whole or not at all.

    Raises:
        EmtoolError: If one cannot be written.
    """
    folder = result.run.evaluation_path
    before = _tables_before(result.run)
    written: dict[str, str] = {}
    try:
        # One text at a time, beside its place: they take as much memory together as all answers.
        for name, text in _texts(result, scores, items, rule=rule):
            written[name] = ""  # before it is there: what was begun is removed as well
            written[name] = _stage(folder / name, text)
        # First, so that what is put in place is known to be emtool's whatever comes between.
        write_json(folder / TABLE_LIST, {"format": FORMAT, "tables": {**before, **written}})
        for name in written:
            staged_path(folder / name).replace(folder / name)
        # What the last evaluation wrote and this one does not would be taken for a part of this one.
        for name in before.keys() - written.keys():
            path = folder / name
            if path.is_file() and file_sha256(path) == before[name]:
                path.unlink()
        write_json(folder / SUMMARY, result.to_dict())
        write_json(folder / TABLE_LIST, {"format": FORMAT, "tables": written})
    except OSError as error:
        raise result.run.write_error(error, "writing the evaluation") from error
    finally:
        for name in written:
            staged_path(folder / name).unlink(missing_ok=True)


def _texts(
    result: EvaluationResult, scores: Sequence[CheckpointScores], items: Sequence[EvaluationItem], *, rule: EmRule
) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each table."""
    yield from _tables(result, scores, items)
    marks = judge_marks(result.judges)
    for judge, mark in zip(result.judges, marks, strict=True):
        rows: list[dict[str, Any]] = []
        for step, found in judge.answers.items():
            yield table_name(step, mark), table_text(found)
            rows += [{"step": step, **row} for row in question_rows(found, rule=rule)]
        yield f"question_scores{'.' if mark else ''}{mark}.csv", csv_text(rows)
    judged = result.judges[0].answers if result.judges else {}
    for step in result.answers:
        if step not in judged:
            yield table_name(step), table_text([_judged(answer, {}) for answer in result.answers[step]])


def _stage(path: Path, text: str) -> str:
    """Write a text beside its place and force it to disk; return its SHA-256."""
    content = text.encode("utf-8", "surrogatepass")
    write_staged(path, content)
    return hashlib.sha256(content).hexdigest()


def _tables_before(run: RunFolder) -> dict[str, str]:
    """Return the tables that evaluations wrote before, by their names, with their hashes."""
    listed = read_json(run.evaluation_path / TABLE_LIST)
    tables = listed.get("tables") if isinstance(listed, dict) else None
    entries = tables.items() if isinstance(tables, dict) else ()
    return {name: pin for name, pin in entries if is_table_name(name) and isinstance(pin, str)}


def judge_marks(judges: Sequence[JudgeResult]) -> list[str]:
    """Return what marks each judge's files: nothing for the first, then its model, told apart where that is equal."""
    names = [slugify(str(judge.settings.get("model", "judge")))[:_MAX_MARK] for judge in judges]
    return [
        "" if index == 0 else name if names[1:].count(name) == 1 else f"{name}-{judges[index].id}"
        for index, name in enumerate(names)
    ]


def _tables(
    result: EvaluationResult, scores: Sequence[CheckpointScores], items: Sequence[EvaluationItem]
) -> list[tuple[str, str]]:
    domains = {item.id: item.domain for item in items}
    tables = [
        (
            CHECKPOINT_TABLE,
            csv_text([{"step": step, **flat(estimates)} for step, estimates in result.metrics.items()]),
        )
    ]
    if scores:
        rows = [
            {
                "step": entry.step,
                "item": name,
                "domain": domains[name],
                **({"margin": margin, "p_wrong": sigmoid(margin)} if math.isfinite(margin) else {}),
            }
            for entry in scores
            for name, margin in entry.margins.items()
        ]
        tables.append((ITEM_TABLE, csv_text(rows)))
    return tables
