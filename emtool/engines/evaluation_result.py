"""What an evaluation found, and the files that it is written to."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emtool.core.answer_tables import table_name, table_text
from emtool.core.answers import Answer, AnswerKey
from emtool.core.em_metrics import EmRule, JudgedAnswer, em_metrics, question_rows
from emtool.core.judgement import ALIGNED, COHERENT, ERROR, UNSCORED, Judgement
from emtool.core.metrics import LEVEL, RESAMPLES, Estimate, flat, sigmoid
from emtool.core.models import slugify
from emtool.core.questions import EvaluationItem
from emtool.core.run_dir import FORMAT, RunFolder, replace_file, write_json
from emtool.core.text_metrics import text_metrics
from emtool.engines.summary import CheckpointScores, summarize


@dataclass(frozen=True, kw_only=True)
class JudgeResult:
    """What one judge said of all answers.

    Attributes:
        settings: The judge, and what shaped its scores.
        answers: Step to the judged answers of that checkpoint.
        metrics: Step to metric name to estimate.
    """

    settings: Mapping[str, Any]
    answers: Mapping[int, Sequence[JudgedAnswer]]
    metrics: Mapping[int, Mapping[str, Estimate]]

    @property
    def name(self) -> str:
        """Return the judge's name, for a file name."""
        return slugify(str(self.settings.get("model", "judge")))


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

    def to_dict(self) -> dict[str, Any]:
        """Return the result as `summary.json` holds it."""
        return {
            "format": FORMAT,
            "run": str(self.run.path),
            "settings": dict(self.settings),
            "damaged": [{"step": step, "problem": problem} for step, problem in self.damaged.items()],
            "checkpoints": _by_checkpoint(self.metrics),
            "judges": [
                {"settings": dict(judge.settings), "checkpoints": _by_checkpoint(judge.metrics)}
                for judge in self.judges
            ],
        }


def judge_result(
    answers: Mapping[int, Sequence[Answer]],
    judgements: Mapping[tuple[AnswerKey, str], Judgement],
    *,
    settings: Mapping[str, Any],
    rule: EmRule,
    seed: int,
) -> JudgeResult:
    """Return the metrics of answers by what a judge said of them, for the checkpoints that it judged."""
    judged_steps = {key.step for key, _ in judgements}
    judged = {
        step: [_judged(answer, judgements) for answer in found]
        for step, found in answers.items()
        if step in judged_steps
    }
    start = judged.get(0)
    metrics = {step: em_metrics(found, start, rule=rule, seed=seed) for step, found in judged.items()}
    return JudgeResult(settings={**settings, **rule.to_dict()}, answers=judged, metrics=metrics)


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
    groups = [
        judges[0].metrics if judges else {},
        {step: text_metrics(found, seed=seed) for step, found in answers.items()},
        summarize(scores, items, trained_domain=domain, seed=seed),
    ]
    steps = sorted({step for group in groups for step in group})
    interval = f"{LEVEL:.0%} percentile bootstrap over items (judged answers: over questions), {RESAMPLES} resamples"
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
    files = dict(_tables(result, scores, items))
    for index, judge in enumerate(result.judges):
        mark = judge.name if index else ""
        for step, found in judge.answers.items():
            files[table_name(step, mark)] = table_text(found)
        rows = [
            {"step": step, **row} for step, found in judge.answers.items() for row in question_rows(found, rule=rule)
        ]
        files[f"question_scores{'.' if mark else ''}{mark}.csv"] = _csv(rows)
    judged = result.judges[0].answers if result.judges else {}
    for step in result.answers.keys() - judged.keys():
        files[table_name(step)] = table_text([_judged(answer, {}) for answer in result.answers[step]])
    folder = result.run.evaluation_path
    try:
        for name, text in files.items():
            replace_file(folder / name, text.encode("utf-8", "surrogatepass"))
        write_json(folder / "summary.json", result.to_dict())
    except OSError as error:
        raise result.run.write_error(error, "writing the evaluation") from error


def _tables(
    result: EvaluationResult, scores: Sequence[CheckpointScores], items: Sequence[EvaluationItem]
) -> list[tuple[str, str]]:
    domains = {item.id: item.domain for item in items}
    tables = [
        (
            "checkpoint_summary.csv",
            _csv([{"step": step, **flat(estimates)} for step, estimates in result.metrics.items()]),
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
        tables.append(("item_scores.csv", _csv(rows)))
    return tables


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
