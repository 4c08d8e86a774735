"""The stage that scores: what each judge is about to be asked is said and allowed first, then it is asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emtool.core.answers import AnswerKey
from emtool.core.events import EventSink
from emtool.core.judge_prices import JudgePlan
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
        approve: Called with what a remote judge is about to be asked, before anything is sent; raises to stop it.
        on_event: Where progress is reported.
    """

    run: RunFolder
    choices: Sequence[JudgeChoice]
    describe: Callable[[Mapping[str, Any]], str]
    approve: Callable[[JudgePlan], None]
    on_event: EventSink

    def judge(
        self, tasks: Sequence[JudgeTask], *, asked_steps: Collection[int]
    ) -> list[tuple[dict[str, Any], Judgements]]:
        """Return what each judge says, those that are asked now first, then those that were asked before.

        Args:
            tasks: What there is to judge.
            asked_steps: Checkpoints whose answers the judges are asked about; for the others the record counts.

        Returns:
            Settings and judgements of each judge.

        Raises:
            EmtoolError: If a judge may not or cannot be asked; what was judged is kept.
        """
        asked = [task for task in tasks if task.key.step in asked_steps]
        others = [task for task in tasks if task.key.step not in asked_steps]
        # Every judge is allowed before the first one is asked.
        known = [self._find_known(choice, asked) for choice in self.choices]
        found = [
            self._ask(choice, asked) if settings is None else (settings, self._recorded(settings, asked))
            for choice, settings in zip(self.choices, known, strict=True)
        ]
        found = [(settings, judged | recorded_judgements(others, self.run, settings)) for settings, judged in found]
        return found + self._judged_before(tasks, {settings_id(settings) for settings, _ in found})

    def _find_known(self, choice: JudgeChoice, tasks: Sequence[JudgeTask]) -> dict[str, Any] | None:
        """Return the settings under which a remote judge has said everything already; None where it must be asked."""
        if choice.plan is None:
            return None
        missing: list[list[str]] = []
        for values in choice.possible_settings:
            settings = _judging(values)
            left = missing_prompts(tasks, JudgementRecord(self.run, settings_id(settings), is_cached=True))
            if tasks and not left:
                self.describe(settings)
                return settings
            missing.append(left)
        # Which settings it will be is not known yet: the most that may be asked is what must be allowed.
        most = max(missing, key=len) if missing else [task.prompt for task in tasks]
        if most:
            self.approve(choice.plan(most))
        return None

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
        shown = [(settings, found) for settings, found in recorded if found]
        # The sort is stable: of judges that know equally many answers, the one last asked comes first.
        shown.sort(key=lambda judge: len(judge[1]), reverse=True)
        return shown


def _judging(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"stage": "judging", **values}
