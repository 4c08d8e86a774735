"""The stage that scores: what each judge is about to be asked is said and allowed first, then it is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emtool.core.answers import AnswerKey
from emtool.core.errors import EmtoolError
from emtool.core.events import EventSink
from emtool.core.judge_prices import Budget, JudgePlan
from emtool.core.judgement import Judgement
from emtool.core.record_file import settings_id
from emtool.core.run_dir import RunFolder
from emtool.engines.judges.judge import JudgeChoice
from emtool.engines.judging import (
    JudgementRecord,
    JudgeTask,
    judge_answers,
    missing_prompts,
    recorded_judgements,
    recorded_judges,
)

Judgements = dict[tuple[AnswerKey, str], Judgement]


@dataclass(frozen=True, kw_only=True)
class JudgeStage:
    """Judges of one run.

    Attributes:
        run: The run folder.
        choices: The judges that are asked; none leaves answers unjudged, but for what was judged before.
        describe: Keeps settings beside the records and returns their name.
        budget: What may be asked of remote judges.
        order: Ids of judges as the last summary has them, the first one first.
        on_event: Where progress is reported.
    """

    run: RunFolder
    choices: Sequence[JudgeChoice]
    describe: Callable[[Mapping[str, Any]], str]
    budget: Budget
    order: Sequence[str]
    on_event: EventSink

    def judge(
        self, tasks: Sequence[JudgeTask], *, asked_steps: Collection[int]
    ) -> list[tuple[dict[str, Any], Judgements]]:
        """Return what each judge says: one that knows more checkpoints comes first, then one that is asked now.

        Args:
            tasks: What there is to judge.
            asked_steps: Checkpoints whose answers the judges are asked about; for the others the record counts.

        Returns:
            Settings and judgements of each judge, without those that know nothing.

        Raises:
            EmtoolError: If a judge may not or cannot be asked; what was judged is kept.
        """
        asked = [task for task in tasks if task.key.step in asked_steps]
        others = [task for task in tasks if task.key.step not in asked_steps]
        # Every judge is allowed before the first one is asked.
        known = [self._find_known(choice, asked) for choice in self.choices]
        try:
            found = [
                self._ask(choice, asked) if settings is None else (settings, self._recorded(settings, asked))
                for choice, settings in zip(self.choices, known, strict=True)
            ]
        except EmtoolError:
            for choice, settings in zip(self.choices, known, strict=True):
                self._give_back(choice, asked if settings is None else ())
            raise
        found = [(settings, judged | recorded_judgements(others, self.run, settings)) for settings, judged in found]
        found += self._judged_before(tasks, {settings_id(settings) for settings, _ in found})
        found = [entry for entry in found if entry[1]]
        # The sort is stable.
        return sorted(found, key=lambda entry: len({key.step for key, _ in entry[1]}), reverse=True)

    def _find_known(self, choice: JudgeChoice, tasks: Sequence[JudgeTask]) -> dict[str, Any] | None:
        """Return the settings under which a remote judge has said everything already; None where it must be asked."""
        if choice.plan is None:
            return None
        missing = self._missing(choice, tasks)
        for settings, prompts in missing:
            if not prompts:
                self.describe(settings)
                return settings
        # Which settings it will be is not known yet: the most that it may cost must be allowed.
        plans = [choice.plan(prompts) for _, prompts in missing] or [choice.plan([task.prompt for task in tasks])]
        self.budget.approve(max(plans, key=_cost))
        return None

    def _missing(self, choice: JudgeChoice, tasks: Sequence[JudgeTask]) -> list[tuple[dict[str, Any], list[str]]]:
        """Return, for each settings that a remote judge may have, what it must still be asked."""
        found = []
        for values in choice.possible_settings:
            settings = _judging(values)
            record = JudgementRecord(self.run, settings_id(settings), is_cached=True)
            found.append((settings, missing_prompts(tasks, record)))
        return found

    def _give_back(self, choice: JudgeChoice, tasks: Sequence[JudgeTask]) -> None:
        """Take back the allowance for what is still missing after a failure; it is allowed anew when it is asked."""
        if choice.plan is not None and tasks:
            plans = [choice.plan(prompts) for _, prompts in self._missing(choice, tasks)]
            if plans:
                self.budget.give_back(min(plans, key=_cost))

    def _recorded(self, settings: Mapping[str, Any], tasks: Sequence[JudgeTask]) -> Judgements:
        record = JudgementRecord(self.run, settings_id(settings), is_cached=True)
        return judge_answers(None, tasks, record, on_event=self.on_event)

    def _ask(self, choice: JudgeChoice, tasks: Sequence[JudgeTask]) -> tuple[dict[str, Any], Judgements]:
        judge = choice.make()
        try:
            judge.prepare()
            settings = _judging(judge.settings)
            record = JudgementRecord(self.run, self.describe(settings), is_cached=choice.plan is not None)
            return settings, judge_answers(judge, tasks, record, on_event=self.on_event)
        finally:
            judge.close()

    def _judged_before(
        self, tasks: Sequence[JudgeTask], asked: Collection[str]
    ) -> list[tuple[dict[str, Any], Judgements]]:
        recorded = [
            (settings, recorded_judgements(tasks, self.run, settings))
            for settings in recorded_judges(self.run)
            if settings_id(settings) not in asked
        ]
        places = {name: place for place, name in enumerate(self.order)}
        # As the last summary has them; those that it does not know behind, the one last asked first.
        return sorted(recorded, key=lambda entry: places.get(settings_id(entry[0]), len(places)))


def _judging(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"stage": "judging", **values}


def _cost(plan: JudgePlan) -> tuple[float, int]:
    """Return what plans are compared by; one whose cost is not known counts as the dearest."""
    return (math.inf if plan.cost is None else plan.cost, plan.num_requests)
