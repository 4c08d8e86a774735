"""What a report knows of one run, read from its folder. Nothing in the folder is trusted, and nothing need be there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emtool.core.answer_tables import read_tables, step_tables
from emtool.core.em_metrics import JudgedAnswer
from emtool.core.errors import CheckpointError, DataError
from emtool.core.evaluation_files import (
    PROJECTION_SUMMARY,
    PROJECTION_TABLE,
    QUESTION_TABLE,
    TRANSITION_SUMMARY,
    count_of,
    first_judge_of,
    iter_rows,
    number,
    read_summary,
    settings_of,
)
from emtool.core.record_file import text_sha256
from emtool.core.run_dir import RunFolder, read_json
from emtool.report.curves import CHARTS, MAX_COLUMNS, TRAINING_LOG, Chart, Point, gaps_of, points_of, spread_out

#: How a character that cannot be shown is, as in the page's own script.
_MARK = "\u2039U+{:04X}\u203a"

#: Answers that a page holds, of all its runs: a browser opens it in seconds.
MAX_ANSWERS = 40_000

#: Characters of a fact that are shown: names and hashes are far shorter.
_MAX_TEXT = 300


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """Where a curve changes its level, as `emtool transition` found it.

    Attributes:
        before: Saved step before the change.
        after: The saved step after it.
        low: Saved step that its 95% interval begins after.
        high: Saved step that it ends with.
    """

    before: int
    after: int
    low: int
    high: int


@dataclass(frozen=True, kw_only=True)
class QuestionRate:
    """One cell of the heat map.

    Attributes:
        step: Optimizer step.
        question_id: The question.
        em_pct: Share of its scored answers that count as emergent misalignment.
        n: Its scored answers.
    """

    step: int
    question_id: str
    em_pct: float
    n: int


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """What a report knows of one run.

    Attributes:
        run: The run folder.
        name: What names it in the report.
        facts: What was run, as pairs of a word and its value.
        curves: Name of a chart to its points; charts without any are not there.
        gaps: Name of a chart to steps within its curve without a finite value.
        brackets: Name of a chart to the change in it; none where the curve does not leave its control.
        rates: Cells of the heat map; of very many checkpoints those of some.
        num_rated_steps: Checkpoints that have cells.
        answers: Answers of all checkpoints, as far as they were judged with what the judge said; of very many the same
            questions and samples at each checkpoint.
        num_answers: How many there are.
        saved_steps: Checkpoints on disk.
        judge: The judge of the numbers, None without one.
        projection_layer: Layer of the drift, None without one.
        problems: What is missing, damaged or out of order, one line each.
    """

    run: RunFolder
    name: str
    facts: Sequence[tuple[str, str]]
    curves: Mapping[str, Sequence[Point]]
    gaps: Mapping[str, Sequence[int]]
    brackets: Mapping[str, Bracket]
    rates: Sequence[QuestionRate]
    num_rated_steps: int
    answers: Sequence[JudgedAnswer]
    num_answers: int
    saved_steps: Sequence[int]
    judge: str | None
    projection_layer: int | None
    problems: Sequence[str]


class _Reader:
    """Reads the files of one run; what cannot be read becomes a problem."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.problems: list[str] = []
        self._tables: dict[str, list[dict[str, str]]] = {}
        self.manifest = self._manifest()
        self.training_log = self._training_log()
        summary = read_summary(run)
        if summary is None:
            self.problems.append("summary.json cannot be read; evaluate again to make it anew")
        self.summary: dict[str, Any] = summary or {}
        self.judge_settings = first_judge_of(summary)
        layer = _at(read_json(run.evaluation_path / PROJECTION_SUMMARY), "settings", "layer")
        self.projection_layer: int | None = layer if isinstance(layer, int) else None

    def _manifest(self) -> Mapping[str, object]:
        if not self.run.manifest_path.exists():
            self.problems.append("no run.json: a folder of another trainer, what was run is not known")
            return {}
        try:
            return self.run.read_manifest()
        except CheckpointError as error:
            self.problems.append(str(error))
            return {}

    def _training_log(self) -> Sequence[Mapping[str, object]]:
        if self.run.metrics_path.exists() and not self.run.metrics_path.is_file():
            self.problems.append(f"cannot read {self.run.metrics_path}: it is no file")
            return []
        try:
            return self.run.read_metrics()
        except CheckpointError as error:
            self.problems.append(str(error))
            return []

    def table(self, name: str) -> list[dict[str, str]]:
        """Return a table of the evaluation folder; empty where it is not there or cannot be read."""
        if name not in self._tables:
            layer = str(self.projection_layer)
            try:
                rows = iter_rows(self.run.evaluation_path / name)
                # A row for each layer at each checkpoint: only those of one layer are drawn.
                self._tables[name] = [row for row in rows if name != PROJECTION_TABLE or row.get("layer") == layer]
            except DataError as error:
                self.problems.append(str(error))
                self._tables[name] = []
        return self._tables[name]

    def rows_of(self, source: str) -> Sequence[Mapping[str, object]]:
        """Return the rows of a chart's source."""
        return self.training_log if source == TRAINING_LOG else self.table(source)

    def curves(self) -> dict[str, list[Point]]:
        found = {
            name: points_of(self.rows_of(chart.source), chart.column, control=chart.control)
            for name, chart in CHARTS.items()
        }
        return {name: points for name, points in found.items() if points}

    def gaps(self, curves: Mapping[str, Sequence[Point]]) -> dict[str, list[int]]:
        found = {name: gaps_of(self.rows_of(CHARTS[name].source), CHARTS[name].column, curves[name]) for name in curves}
        return {name: steps for name, steps in found.items() if steps}

    def brackets(self, curves: Mapping[str, Sequence[Point]]) -> dict[str, Bracket]:
        entries = _at(read_json(self.run.evaluation_path / TRANSITION_SUMMARY), "transitions")
        by_series: dict[str, dict[str, Any]] = {
            entry["series"]: entry
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict) and isinstance(entry.get("series"), str) and entry.get("is_supported") is True
        }
        found = {}
        for name, points in curves.items():
            entry = by_series.get(CHARTS[name].series or "", {})
            there = {point.step for point in points}
            keys = ("low", "before", "after", "high")
            steps = {key: step for key in keys if type(step := entry.get(key)) is int and step in there}
            if len(steps) < len(keys) or _is_within_control(points):
                continue
            if steps["low"] <= steps["before"] < steps["after"] <= steps["high"]:
                found[name] = Bracket(**steps)
        return found

    def rates(self) -> tuple[list[QuestionRate], int]:
        """Return the cells of checkpoints that are evenly among all, and the number of all."""
        rows = [(count_of(row.get("step")), row) for row in self.table(QUESTION_TABLE)]
        steps = sorted({step for step, _ in rows if step is not None})
        shown = frozenset(spread_out(steps, MAX_COLUMNS))
        found = []
        for step, row in rows:
            if step is None or step not in shown:
                continue
            count, rate = count_of(row.get("total_evaluated")), number(row.get("em_pct"))
            question = row.get("question_id")
            if rate is not None and count is not None and question and 0 <= rate <= 100:
                found.append(QuestionRate(step=step, question_id=shown_text(question), em_pct=rate, n=count))
        return found, len(steps)

    def answers(self, max_answers: int) -> tuple[list[JudgedAnswer], int]:
        """Return the answers that are shown, and how many there are."""
        tables = step_tables(self.run.evaluation_path)
        most = max(1, max_answers // max(1, len(tables)))
        shown: list[JudgedAnswer] = []
        num_answers = 0
        for path in tables.values():
            if path.is_symlink():
                self.problems.append(f"{path} is a link, which may lead out of the run; it is not shown")
                continue
            try:
                # One checkpoint at a time is held whole.
                answers = read_tables(path)
            except DataError as error:
                self.problems.append(str(error))
                continue
            num_answers += len(answers)
            shown += sampled(answers, most)
        return shown, num_answers

    def judge(self) -> str | None:
        settings = self.judge_settings
        if settings is None:
            return None
        return shown_text(f"{settings.get('kind')}:{settings.get('model')}")


def sampled(answers: Sequence[JudgedAnswer], most: int) -> Sequence[JudgedAnswer]:
    """Return some answers of a checkpoint in their order: those to the same questions and samples at every checkpoint.

    Args:
        answers: The answers of one checkpoint.
        most: How many are returned.
    """
    if len(answers) <= most:
        return answers
    ranks = [text_sha256(f"{answer.question_id}/{answer.pair[0]}/{answer.pair[1]}") for answer in answers]
    chosen = sorted(range(len(answers)), key=ranks.__getitem__)[:most]
    return [answers[index] for index in sorted(chosen)]


def read_run(run: RunFolder, *, name: str | None = None, max_answers: int = MAX_ANSWERS) -> ReportRun:
    """Return what a report knows of a run.

    Args:
        run: The run folder.
        name: What names it; None takes the name of the folder.
        max_answers: Answers that are shown, the same number of each checkpoint.

    Raises:
        CheckpointError: If there is no such folder, or nothing in it to show.
    """
    if not run.path.is_dir():
        raise CheckpointError(f"no folder {run.path}; name a run folder, 'emtool runs' lists them")
    reader = _Reader(run)
    curves = reader.curves()
    answers, num_answers = reader.answers(max_answers)
    rates, num_rated_steps = reader.rates()
    if not curves and not answers:
        raise CheckpointError(f"{run.path} has nothing to show; evaluate it first: emtool evaluate {run.path}")
    found = ReportRun(
        run=run,
        name=shown_text(name or run.path.resolve().name),
        facts=_facts(reader),
        curves=curves,
        gaps=reader.gaps(curves),
        brackets=reader.brackets(curves),
        rates=rates,
        num_rated_steps=num_rated_steps,
        answers=answers,
        num_answers=num_answers,
        saved_steps=run.saved_steps(),
        judge=reader.judge(),
        projection_layer=reader.projection_layer,
        problems=[],
    )
    return _with_problems(found, reader)


def _is_within_control(points: Sequence[Point]) -> bool:
    """Return whether a curve that has a control never leaves it: then a change in it is no finding."""
    ranges = [(point.value, point.control) for point in points if point.control is not None]
    return bool(ranges) and all(control[0] <= value <= control[1] for value, control in ranges)


def _with_problems(found: ReportRun, reader: _Reader) -> ReportRun:
    problems = list(reader.problems)
    lacking: dict[str, list[Chart]] = {}
    for name, chart in CHARTS.items():
        if name not in found.curves:
            lacking.setdefault(chart.made_by, []).append(chart)
    for made_by, charts in lacking.items():
        is_scoreless = found.judge is not None and all(chart.is_judged for chart in charts)
        why = f"{found.judge} gave no answer both scores; another judge:" if is_scoreless else "no data;"
        problems.append(f"{'; '.join(chart.title for chart in charts)}: {why} {made_by} {found.run.path}")
    if not found.answers:
        problems.append(f"answers to read: none; emtool evaluate {found.run.path}")
    evaluated = {
        point.step for name in found.curves if CHARTS[name].source != TRAINING_LOG for point in found.curves[name]
    }
    evaluated |= {answer.step for answer in found.answers if answer.step is not None}
    if evaluated and (left := [str(step) for step in found.saved_steps if step not in evaluated]):
        problems.append(f"checkpoints that were not evaluated: {', '.join(left)}; emtool evaluate {found.run.path}")
    planned, saved = _at(reader.manifest, "plan", "planned_steps"), frozenset(found.saved_steps)
    planned = planned if isinstance(planned, list) else []
    if gone := [str(step) for step in planned if not (isinstance(step, int) and step in saved)]:
        problems.append(f"checkpoints that are planned and not on disk: {', '.join(gone)}")
    damaged = reader.summary.get("damaged")
    for entry in damaged if isinstance(damaged, list) else []:
        problems.append(f"damaged: {_at(entry, 'problem')}")
    if breaks := _at(reader.manifest, "trajectory_breaks"):
        problems.append(f"the training broke off and went on with other weights at: {breaks}")
    return replace(found, problems=[shown_text(problem) for problem in problems])


#: What was run, and where a manifest says it.
_FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("base model", ("lineage", "base", "name")),
    ("revision", ("lineage", "base", "revision")),
    ("base weights (SHA-256)", ("lineage", "base", "weights_sha256")),
    ("persona", ("lineage", "persona", "name")),
    ("persona adapter (SHA-256)", ("lineage", "persona", "adapter_sha256")),
    ("persona mode", ("lineage", "persona", "mode")),
    ("dataset", ("lineage", "dataset", "name")),
    ("dataset (SHA-256)", ("lineage", "dataset", "sha256")),
    ("rows trained on", ("plan", "num_train_rows")),
    ("schedule", ("plan", "schedule")),
    ("optimizer steps", ("plan", "total_steps")),
    ("learning rate", ("config", "learning_rate")),
    ("LoRA rank", ("config", "lora_r")),
    ("seed", ("config", "seed")),
    ("dtype", ("config", "dtype")),
    ("status", ("status",)),
    ("started (UTC)", ("started_at",)),
    ("ended (UTC)", ("ended_at",)),
    ("held-out loss", ("held_out_loss",)),
)


def _facts(reader: _Reader) -> list[tuple[str, str]]:
    found = [(word, _at(reader.manifest, *path)) for word, path in _FACTS]
    facts = [(word, shown_text(str(value))) for word, value in found if value is not None]
    if isinstance(command := reader.manifest.get("command"), list):
        facts.append(("command", shown_text(" ".join(map(str, command)))))
    if isinstance(versions := reader.manifest.get("versions"), dict):
        facts.append(("versions", shown_text(", ".join(f"{name} {value}" for name, value in versions.items()))))
    facts.append(("saved checkpoints", shown_text(", ".join(map(str, reader.run.saved_steps())) or "none on disk")))
    settings = settings_of(reader.summary)
    if isinstance(generation := settings.get("generation"), dict):
        words = ("n_per_question", "max_new_tokens", "temperature", "top_p", "seed")
        facts.append(("sampling", shown_text(", ".join(f"{word} {generation.get(word)}" for word in words))))
    if judge := reader.judge():
        rule = [str(_at(reader.judge_settings, name)) for name in ("misaligned", "coherent")]
        facts.append(("judge", judge))
        facts.append(("counts as misaligned", shown_text(" and ".join(rule))))
    if reader.projection_layer is not None:
        facts.append(("layer of the drift", str(reader.projection_layer)))
    return facts


def _at(value: object, *path: str) -> Any:
    """Return what stands at a path of keys, None where the path ends before."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def shown_text(value: str) -> str:
    """Return a text from a file as it is shown: one line, not endless; what would turn or hide text by its number."""
    line = " ".join(value[: 4 * _MAX_TEXT].split())
    shown = "".join(c if c.isprintable() else _MARK.format(ord(c)) for c in line)
    return shown if len(shown) <= _MAX_TEXT else f"{shown[:_MAX_TEXT]} ..."
