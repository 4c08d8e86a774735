"""Runs beside one another: a metric at every checkpoint, and how far apart runs are, paired by what they were asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from emtool.core.answer_tables import read_tables, step_tables
from emtool.core.by_step import Recent
from emtool.core.em_metrics import EmRule, JudgedAnswer, em_metrics
from emtool.core.errors import CheckpointError, ConfigError, unknown_name
from emtool.core.evaluation_files import (
    ITEM_TABLE,
    count_of,
    first_judge_of,
    read_rows,
    read_summary,
    settings_of,
    value_of,
)
from emtool.core.metrics import Estimate, bootstrap_difference, bootstrap_mean
from emtool.core.run_dir import FORMAT, RunFolder

#: Settings of generation that shape what is asked and how it is answered; the model is not one of them.
_SAMPLING = (
    "kind",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "n_per_question",
    "questions",
    "dtype",
)
_LIKELIHOOD = ("items_sha256", "dtype")

#: Characters of a setting that are shown.
_MAX_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A metric of several runs.

    Attributes:
        metric: Its name.
        runs: The run folders; the first one is what the others are compared with.
        values: For each run, step to estimate.
        differences: For each run but the first, step to its difference from the first one there.
        unlike: What was evaluated differently, one line each.
    """

    metric: str
    runs: Sequence[RunFolder]
    values: Sequence[Mapping[int, Estimate]]
    differences: Sequence[Mapping[int, Estimate]]
    unlike: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "format": FORMAT,
            "metric": self.metric,
            "unlike": list(self.unlike),
            "runs": [
                {
                    "run": str(run.path),
                    "values": _rows(values),
                    "differences": _rows(self.differences[index - 1]) if index else [],
                }
                for index, (run, values) in enumerate(zip(self.runs, self.values, strict=True))
            ],
        }


def _rows(estimates: Mapping[int, Estimate]) -> list[dict[str, Any]]:
    return [
        {"step": step, **{name: value for name, value in asdict(estimate).items() if name != "is_exact"}}
        for step, estimate in estimates.items()
    ]


@dataclass(frozen=True, kw_only=True)
class _Evaluated:
    """What an evaluation left in a run.

    Attributes:
        run: The run folder.
        summary: Its summary.
    """

    run: RunFolder
    summary: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.summary)

    @property
    def judge(self) -> dict[str, Any] | None:
        """Return the settings of the judge whose scores the tables hold; None without one."""
        return first_judge_of(self.summary)

    @cached_property
    def answers(self) -> Recent[JudgedAnswer]:
        """Return the judged answers by step, read when they are asked for."""
        tables = step_tables(self.run.evaluation_path)
        return Recent(tables, lambda step: read_tables(tables[step]))

    @cached_property
    def asked(self) -> dict[int, Counter[tuple[str, str]]]:
        """Return how many answers there are to each question and its text, by step; steps without a score are left out.

        Raises:
            DataError: If a table cannot be read.
        """
        return {
            step: Counter((answer.question_id, answer.question) for answer in answers)
            for step, answers in self.answers.items()
            if any(answer.is_scored for answer in answers)
        }

    def items(self, column: str, left_out: Sequence[object]) -> dict[int, dict[str, float]]:
        """Return a column of the items' scores by step and item, without those of some domains."""
        found: dict[int, dict[str, float]] = {}
        for row in read_rows(self.run.evaluation_path / ITEM_TABLE):
            step, value = count_of(row.get("step")), value_of(row.get(column))
            if step is not None and value is not None and row.get("domain") not in left_out:
                found.setdefault(step, {})[str(row.get("item"))] = value
        return dict(sorted(found.items()))


def compare_runs(
    runs: Sequence[RunFolder], *, metric: str | None = None, is_unlike_allowed: bool = False
) -> Comparison:
    """Return a metric of several runs at every checkpoint, and the differences of all from the first one.

    Judged answers are paired by question and number, likelihood by item; intervals are those of the evaluation: 95%
    percentile bootstrap over questions, or over items.

    Args:
        runs: At least two evaluated runs.
        metric: A key of `METRICS`; None takes em_pct where all are judged, else p_wrong_other.
        is_unlike_allowed: Whether runs that were evaluated differently are compared nevertheless.

    Raises:
        ConfigError: If there are fewer than two runs, the metric is unknown, or they were evaluated differently.
        CheckpointError: If a run lacks the metric.
        DataError: If a table cannot be read.
    """
    if len(runs) < 2:
        raise ConfigError(f"compare takes at least 2 runs, not {len(runs)}")
    if metric is not None and metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    found = [_evaluated(run) for run in runs]
    if metric is None:
        metric = "em_pct" if all(entry.judge is not None for entry in found) else "p_wrong_other"
    values, differences = METRICS[metric](found, metric)
    for run, by_step in zip(runs, values, strict=True):
        if not by_step:
            raise _lacking(run, metric)
    for run, by_step in zip(runs[1:], differences, strict=True):
        if not by_step:
            raise CheckpointError(f"{run.path} and {runs[0].path} have no {metric} of the same checkpoint to compare")
    unlike = _unlike(found, is_judged=METRICS[metric] is judged_metric)
    if unlike and not is_unlike_allowed:
        raise ConfigError(
            f"the runs were evaluated differently: {'; '.join(unlike)}. Evaluate them alike, or compare them "
            "nevertheless with --allow-unlike"
        )
    return Comparison(metric=metric, runs=runs, values=values, differences=differences, unlike=unlike)


def _lacking(run: RunFolder, metric: str) -> CheckpointError:
    how = "--judge JUDGE" if METRICS[metric] is judged_metric else "--metrics likelihood"
    return CheckpointError(f"{run.path} has no {metric}; make it with: emtool evaluate {run.path} {how}")


def _evaluated(run: RunFolder) -> _Evaluated:
    summary = read_summary(run)
    if not summary:
        what = "a summary that cannot be read" if summary is None else "no evaluation"
        raise CheckpointError(f"{run.path} has {what}; make one with: emtool evaluate {run.path}")
    return _Evaluated(run=run, summary=summary)


def _unlike(found: Sequence[_Evaluated], *, is_judged: bool) -> list[str]:
    """Return what differs in how the runs were evaluated, as far as the metric depends on it."""
    conditions = [_conditions(entry, is_judged=is_judged) for entry in found]
    names = dict.fromkeys(name for entry in conditions for name in entry)
    lines = []
    for name in names:
        values = [entry.get(name) for entry in conditions]
        if any(value != values[0] for value in values):
            shown = dict.fromkeys(_shown(value) for value in values)
            lines.append(f"{_shown(name)} ({', '.join(shown)})" if len(shown) > 1 else _shown(name))
    return lines + (_uneven(found) if is_judged else [])


def _uneven(found: Sequence[_Evaluated]) -> list[str]:
    """Return checkpoints at which runs have other numbers of answers to a question: order would pair them wrongly."""
    counts = [{step: _by_question(asked) for step, asked in entry.asked.items()} for entry in found]
    common = set.intersection(*(set(by_step) for by_step in counts))
    uneven = [step for step in sorted(common) if any(by_step[step] != counts[0][step] for by_step in counts)]
    return [f"numbers of answers at step {', '.join(map(str, uneven))}"] if uneven else []


def _by_question(asked: Counter[tuple[str, str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (question_id, _), count in asked.items():
        found[question_id] += count
    return found


def _conditions(entry: _Evaluated, *, is_judged: bool) -> dict[str, Any]:
    part = entry.settings.get("generation" if is_judged else "likelihood")
    settings = part if isinstance(part, dict) else {}
    found = {name: settings.get(name) for name in (_SAMPLING if is_judged else _LIKELIHOOD)}
    if isinstance(questions := found.get("questions"), list):
        # Asked in another order, they are the same.
        found["questions"] = sorted(str(question) for question in questions)
    if is_judged:
        found["texts of the questions"] = sorted({text for asked in entry.asked.values() for _, text in asked})
        found |= {f"judge's {name}": value for name, value in (entry.judge or {}).items() if name != "stage"}
    return found


def _shown(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} ..."


_Found = tuple[list[dict[int, Estimate]], list[dict[int, Estimate]]]


def judged_metric(found: Sequence[_Evaluated], metric: str) -> _Found:
    """Return a metric of judged answers for each run, and its differences from the first one."""
    for entry in found:
        if entry.judge is None:
            raise _lacking(entry.run, metric)
    rule, seed = _rule(found[0]), _seed(found[0])
    values: list[dict[int, Estimate]] = []
    differences: list[dict[int, Estimate]] = []
    for entry in found:
        own, change = {}, {}
        for step in entry.asked:
            start = found[0].answers[step] if entry is not found[0] and step in found[0].asked else None
            estimates = em_metrics(entry.answers[step], start, rule=rule, seed=seed)
            own[step] = estimates[metric]
            if f"{metric}_delta" in estimates:
                change[step] = estimates[f"{metric}_delta"]
        values.append(own)
        differences.append(change)
    return values, differences[1:]


def likelihood_metric(found: Sequence[_Evaluated], metric: str) -> _Found:
    """Return a metric of the items for each run, and its differences from the first one."""
    column = metric.removesuffix("_other")
    left_out = [entry.settings.get("trained_domain") for entry in found] if metric.endswith("_other") else []
    seed = _seed(found[0])
    items = [entry.items(column, left_out) for entry in found]
    values = [
        {step: bootstrap_mean(list(here.values()), seed=seed) for step, here in by_step.items()} for by_step in items
    ]
    differences = []
    for by_step in items[1:]:
        change = {}
        for step, here in by_step.items():
            first = items[0].get(step, {})
            if both := [name for name in here if name in first]:
                pair = ([here[name] for name in both], [first[name] for name in both])
                change[step] = bootstrap_difference(*pair, seed=seed)
        differences.append(change)
    return values, differences


def _seed(entry: _Evaluated) -> int:
    seed = entry.settings.get("seed")
    return seed if type(seed) is int and seed >= 0 else 0


def _rule(entry: _Evaluated) -> EmRule:
    """Return what counts, as the judge's settings say it.

    Raises:
        CheckpointError: If they do not.
    """
    settings = entry.judge or {}
    misaligned = re.fullmatch(r"aligned (<=?) ([0-9.]+)", str(settings.get("misaligned")))
    coherent = re.fullmatch(r"coherent > ([0-9.]+)", str(settings.get("coherent")))
    try:
        if misaligned and coherent:
            return EmRule(
                aligned_cutoff=float(misaligned[2]),
                coherent_cutoff=float(coherent[1]),
                is_strict=misaligned[1] == "<",
            )
    except ValueError:
        pass
    raise CheckpointError(f"{entry.run.path} does not say what counts as misaligned; judge it again")


#: What runs can be compared by, and how.
METRICS: dict[str, Callable[[Sequence[_Evaluated], str], _Found]] = {
    "em_pct": judged_metric,
    "misaligned_pct": judged_metric,
    "coherent_pct": judged_metric,
    "avg_aligned": judged_metric,
    "avg_coherent": judged_metric,
    "p_wrong": likelihood_metric,
    "p_wrong_other": likelihood_metric,
    "margin": likelihood_metric,
    "margin_other": likelihood_metric,
}
