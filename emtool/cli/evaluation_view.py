"""The curves of an evaluation, in the terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from emtool.cli.em_view import em_table
from emtool.cli.output import one_line
from emtool.cli.render import bar, plain_table, sparkline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emtool.core.evaluation_plan import EvaluationPlan
    from emtool.core.metrics import Estimate
    from emtool.engines.evaluation_result import EvaluationResult


def evaluation_view(result: EvaluationResult) -> RenderableType:
    """Return the curves of an evaluation: a table for each judge, one of the answers, one of the likelihood."""
    parts: list[RenderableType] = []
    for judge in result.judges:
        parts += [em_table(judge.metrics, title=f"judged by {one_line(str(judge.settings.get('model')))}"), ""]
    if result.answers:
        parts += [_answer_table(result.metrics), ""]
    if any("p_wrong_other" in metrics or "p_wrong" in metrics for metrics in result.metrics.values()):
        parts.append(_likelihood(result))
    if result.answers and not result.judges:
        key = "OPENAI_API_KEY is set: " if os.environ.get("OPENAI_API_KEY") else ""
        hint = f"the answers are not judged; {key}--judge openai:MODEL or local:MODEL does, and generates none again"
        parts.append(Text(hint, style="dim"))
    if not parts:
        parts.append(Text(f"activations are in {result.run.evaluation_path / 'activations'}"))
    return Group(*parts)


def _answer_table(metrics: Mapping[int, Mapping[str, Estimate]]) -> RenderableType:
    """Return what can be told of the answers without a judge."""
    table = plain_table(padding=1)
    table.add_column("step", justify="right", no_wrap=True)
    for heading in ("answers", "words", "cut %", "refusal phrases %", "distinct-2"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step, found in metrics.items():
        if "num_answers" not in found:
            continue
        failed = int(found["num_failed"].value)
        cells = [f"{found['num_answers'].n:,}" + (f" ({failed:,} failed)" if failed else "")]
        cells += [
            "" if name not in found else f"{found[name].value:.{digits}f}"
            for name, digits in (
                ("answer_words", 1),
                ("truncated_pct", 0),
                ("refusal_phrase_pct", 1),
                ("distinct_2", 2),
            )
        ]
        table.add_row(f"{step:,}", *cells)
    return table


def _likelihood(result: EvaluationResult) -> RenderableType:
    """Return the curve of p_wrong: one line a checkpoint, and a sparkline."""
    domain = result.settings["trained_domain"]
    scored = {step: metrics for step, metrics in result.metrics.items() if "p_wrong" in metrics or "margin" in metrics}
    has_trained = any("p_wrong_trained" in metrics for metrics in scored.values())
    table = plain_table(padding=1)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("p_wrong, other domains", no_wrap=True)
    table.add_column("0 to 1", no_wrap=True)
    table.add_column("change from step 0", no_wrap=True)
    if has_trained:
        table.add_column(escape(one_line(f"p_wrong, {domain}")), no_wrap=True)
    for step, metrics in scored.items():
        other = metrics.get("p_wrong_other")
        shown = bar(other.value, 10) if other is not None else ""
        row = [f"{step:,}", _interval(other), shown, _change(metrics.get("p_wrong_other_delta"))]
        if has_trained:
            row.append(_interval(metrics.get("p_wrong_trained")))
        table.add_row(*row)
    values = [metrics["p_wrong_other"] for metrics in scored.values() if "p_wrong_other" in metrics]
    if not values:
        return Group(table, Text("no checkpoint could be scored", style="yellow"))
    curve = sparkline([estimate.value for estimate in values])
    legend = (
        "p_wrong: probability given to the wrong of two matched answers; [95% interval, bootstrap over items]; "
        f"{values[0].n} items in other domains; * the change excludes 0"
    )
    summary = f"other domains  {curve}  {values[0].value:.3f} to {values[-1].value:.3f}"
    return Group(table, "", Text(summary), Text(legend, style="dim"))


def plan_view(plan: EvaluationPlan) -> RenderableType:
    """Return what an evaluation would do."""
    table = plain_table()
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("run", escape(plan.run))
    table.add_row("checkpoints", f"{len(plan.steps)}: {', '.join(map(str, plan.steps))}")
    if plan.backend is not None and plan.question_ids is None:
        table.add_row("questions", "not here yet: fetched when the evaluation begins")
    elif plan.backend is not None:
        table.add_row("questions", f"{len(plan.question_ids or ())}: {', '.join(plan.question_ids or ())}")
        text = f"{plan.num_answers:,} by {plan.backend}, at most {plan.max_new_tokens:,} tokens each"
        table.add_row("answers", text)
    for judging in plan.judging:
        cost = "price not known: give --judge-price" if judging.cost is None else f"at most {judging.cost:.2f} USD"
        where = "in this process" if judging.host is None else f"{judging.host}; {cost}"
        text = f"{judging.judge}: at most {judging.num_requests:,} texts, {where}"
        table.add_row("judge", escape(text))
    if plan.backend is not None and not plan.judging:
        table.add_row("judge", "none; nothing remote is asked")
    if plan.scores_likelihood:
        table.add_row("likelihood", "of matched wrong and sound answers")
    if plan.activation_layers is not None:
        table.add_row("activations", f"decoder blocks: {plan.activation_layers}")
    return Group(table, Text("what is recorded already is not done again", style="dim"))


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "unscored"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]".replace("[", r"\[")


def _change(estimate: Estimate | None) -> str:
    if estimate is None:
        return "none"
    mark = "*" if estimate.excludes_zero else " "
    return rf"{estimate.value:+.3f}{mark}\[{estimate.low:+.3f}, {estimate.high:+.3f}]"
