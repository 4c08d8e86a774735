"""The stage that scores: what each judge is about to be asked is said and allowed first, then it is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emtool.core.by_step import ByStep
from emtool.core.errors import EmtoolError
from emtool.core.events import EventSink
from emtool.core.judge_prices import Budget, JudgePlan
from emtool.core.judgement import Judgement
from emtool.core.record_file import settings_id
from emtool.core.run_dir import RunFolder
from emtool.engines.judges.judge import JudgeChoice
from emtool.engines.judging import (
    Asked,
    JudgementRecord,
    JudgeTask,
    fully_judged,
    judge_answers,
    missing_prompts,
    recorded_judges,
)

Tasks = Mapping[int, Sequence[JudgeTask]]
#: What a judge said, by step.
Judgements = Mapping[int, Mapping[Asked, Judgement]]


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
    _records: dict[str, JudgementRecord] = field(default_factory=dict, init=False)

    def judge(self, tasks: Tasks, *, asked_steps: Collection[int]) -> list[tuple[dict[str, Any], Judgements]]:
        """Return what each judge says: one that knows more checkpoints comes first, then one that is asked now.

        Args:
            tasks: What there is to judge, by step.
            asked_steps: Checkpoints whose answers the judges are asked about; for the others the record counts.

        Returns:
            Settings and judgements of each judge, without those that know nothing.

        Raises:
            EmtoolError: If a judge may not or cannot be asked; what was judged is kept.
        """
        asked = ByStep([step for step in tasks if step in asked_steps], tasks.__getitem__)
        others = ByStep([step for step in tasks if step not in asked_steps], tasks.__getitem__)
        # Every judge is allowed before the first one is asked.
        known = [self._find_known(choice, asked) for choice in self.choices]
        try:
            found = [
                self._ask(choice, asked) if settings is None else (settings, self._recorded(settings, asked))
                for choice, settings in zip(self.choices, known, strict=True)
            ]
        except EmtoolError:
            for choice, settings in zip(self.choices, known, strict=True):
                self._give_back(choice, asked if settings is None else {})
            raise
        if others:
            found = [(settings, judged | fully_judged(others, self.run, settings)) for settings, judged in found]
        found += self._judged_before(tasks, {settings_id(settings) for settings, _ in found})
        known_steps = [(settings, dict(sorted(judged.items()))) for settings, judged in found if judged]
        # The sort is stable.
        known_steps.sort(key=lambda entry: len(entry[1]), reverse=True)
        return [(settings, _judgements(tasks, judged)) for settings, judged in known_steps]

    def _find_known(self, choice: JudgeChoice, tasks: Tasks) -> dict[str, Any] | None:
        """Return the settings under which a remote judge has said everything already; None where it must be asked."""
        if choice.plan is None:
            return None
        plans = []
        for settings, plan in self._missing(choice, choice.plan, tasks):
            if not plan.num_requests:
                self.describe(settings)
                return settings
            plans.append(plan)
        # Which settings it will be is not known yet: the most that it may cost must be allowed.
        every = (task.prompt for of_step in tasks.values() for task in of_step)
        self.budget.approve(max(plans or [choice.plan(every)], key=_cost))
        return None

    def _missing(
        self, choice: JudgeChoice, plan: Callable[[Iterable[str]], JudgePlan], tasks: Tasks
    ) -> Iterator[tuple[dict[str, Any], JudgePlan]]:
        """Yield, for each settings that a remote judge may have, what it must still be asked."""
        for values in choice.possible_settings:
            settings = _judging(values)
            yield settings, plan(missing_prompts(tasks, self._record(settings_id(settings), is_cached=True)))

    def _give_back(self, choice: JudgeChoice, tasks: Tasks) -> None:
        """Take back the allowance for what is still missing after a failure; it is allowed anew when it is asked."""
        if choice.plan is not None and tasks:
            plans = [plan for _, plan in self._missing(choice, choice.plan, tasks)]
            if plans:
                self.budget.give_back(min(plans, key=_cost))

    def _recorded(self, settings: Mapping[str, Any], tasks: Tasks) -> dict[int, JudgementRecord]:
        record = self._record(settings_id(settings), is_cached=True)
        return dict.fromkeys(judge_answers(None, tasks, record, on_event=self.on_event), record)

    def _ask(self, choice: JudgeChoice, tasks: Tasks) -> tuple[dict[str, Any], dict[int, JudgementRecord]]:
        judge = choice.make()
        try:
            judge.prepare()
            settings = _judging(judge.settings)
            record = self._record(self.describe(settings), is_cached=choice.plan is not None)
            return settings, dict.fromkeys(judge_answers(judge, tasks, record, on_event=self.on_event), record)
        finally:
            judge.close()

    def _record(self, name: str, *, is_cached: bool) -> JudgementRecord:
        """Return what was recorded under the name of settings, read once: it may be millions of judgements."""
        if name not in self._records:
            self._records[name] = JudgementRecord(self.run, name, is_cached=is_cached)
        return self._records[name]

    def _judged_before(
        self, tasks: Tasks, asked: Collection[str]
    ) -> list[tuple[dict[str, Any], dict[int, JudgementRecord]]]:
        recorded = [
            (settings, fully_judged(tasks, self.run, settings))
            for settings in recorded_judges(self.run)
            if settings_id(settings) not in asked
        ]
        places = {name: place for place, name in enumerate(self.order)}
        # As the last summary has them; those that it does not know behind, the one last asked first.
        return sorted(recorded, key=lambda entry: places.get(settings_id(entry[0]), len(places)))


def _judgements(tasks: Tasks, records: Mapping[int, JudgementRecord]) -> Judgements:
    """Return what a judge said of the checkpoints of which a record holds every judgement, be it an error."""
    return ByStep(records, lambda step: records[step].find(tasks[step], with_errors=True))


def _judging(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"stage": "judging", **values}


def _cost(plan: JudgePlan) -> tuple[float, int]:
    """Return what plans are compared by; one whose cost is not known counts as the dearest."""
    return (math.inf if plan.cost is None else plan.cost, plan.num_requests)
