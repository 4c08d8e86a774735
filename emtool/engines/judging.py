"""The stage that scores: every answer put to a judge, each judgement kept as soon as there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emtool.core.answers import Answer, AnswerKey, key_of
from emtool.core.cache import cache_path
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished
from emtool.core.judgement import ERROR, Judgement
from emtool.core.open_questions import OpenQuestion, fill_judge_prompt
from emtool.core.record_file import RecordFile, settings_id, text_sha256
from emtool.core.run_dir import RunFolder, read_json
from emtool.engines.judges.judge import Judge


@dataclass(frozen=True, kw_only=True)
class JudgeTask:
    """One answer and one thing that a judge is asked about it.

    Attributes:
        key: What names the answer.
        name: What is asked for, "aligned" or "coherent".
        prompt: The judge prompt, filled.
        answer_sha256: What pins the answer's text.
    """

    key: AnswerKey
    name: str
    prompt: str
    answer_sha256: str

    @property
    def prompt_sha256(self) -> str:
        """Return what pins the prompt, and so the answer's text."""
        return text_sha256(self.prompt)


def judge_tasks(answers: Sequence[Answer], questions: Mapping[str, OpenQuestion]) -> list[JudgeTask]:
    """Return what a judge is asked about answers; one without a text is not asked about."""
    return [
        JudgeTask(
            key=answer.key,
            name=name,
            prompt=fill_judge_prompt(prompt, question=answer.question, answer=answer.completion.text),
            answer_sha256=text_sha256(answer.completion.text),
        )
        for answer in answers
        if answer.has_text
        for name, prompt in questions[answer.key.question_id].judge_prompts.items()
    ]


class JudgementRecord:
    """`evaluation/judgements.jsonl`: every judgement, of all judges.

    A judgement depends on the judge and on the prompt that it was given, so one that was made for the same text before
    counts: in this run, or, for a judge that is paid, in another run on this machine (the cache). An error is asked
    again.

    Args:
        run: The run folder.
        judge: Name of the judge's settings, see `settings_id`.
        is_cached: Whether judgements are shared between runs.
    """

    def __init__(self, run: RunFolder, judge: str, *, is_cached: bool) -> None:
        self._run = run
        self._judge = judge
        self._file = RecordFile(path=run.evaluation_path / "judgements.jsonl")
        self._cache = RecordFile(path=cache_path("judgements", f"{judge}.jsonl")) if is_cached else None
        self._by_prompt: dict[str, Judgement] = {}
        self._failed: dict[str, Judgement] = {}
        self._recorded: set[tuple[AnswerKey, str, str]] = set()
        self._is_open = False
        for record in () if self._cache is None else self._cache.read():
            self._learn(record)
        for record in self._file.read():
            if record.get("judge") == judge and self._learn(record) and (key := key_of(record)) is not None:
                self._recorded.add((key, str(record.get("name")), str(record.get("prompt_sha256"))))

    def find(self, task: JudgeTask) -> Judgement | None:
        """Return what the judge said to a prompt before, or None where it must be asked."""
        return self._by_prompt.get(task.prompt_sha256)

    def find_failed(self, task: JudgeTask) -> Judgement | None:
        """Return the error that a prompt ended in before, or None."""
        return self._failed.get(task.prompt_sha256)

    def is_recorded(self, task: JudgeTask) -> bool:
        """Return whether this run's file holds the judgement."""
        return (task.key, task.name, task.prompt_sha256) in self._recorded

    def keep(self, task: JudgeTask, judgement: Judgement, *, is_new: bool) -> None:
        """Record a judgement.

        Args:
            task: What was asked.
            judgement: What came of it.
            is_new: Whether the judge was asked now; otherwise it had said so before.

        Raises:
            EmtoolError: If it cannot be written.
        """
        try:
            if not self._is_open:
                self._open()
            key = {
                "step": task.key.step,
                "question_id": task.key.question_id,
                "paraphrase": task.key.paraphrase,
                "sample": task.key.sample,
            }
            values = {"prompt_sha256": task.prompt_sha256, **judgement.to_dict()}
            pins = {"judge": self._judge, "answer_sha256": task.answer_sha256}
            self._file.append({**key, "name": task.name, **pins, **values})
            if is_new and self._cache is not None and judgement.status != ERROR:
                self._cache.append(values)
        except OSError as error:
            raise self._run.write_error(error, "recording judgements") from error
        if judgement.status != ERROR:
            self._by_prompt[task.prompt_sha256] = judgement
            self._recorded.add((task.key, task.name, task.prompt_sha256))

    def _open(self) -> None:
        self._file.end_torn_line()
        if self._cache is not None:
            self._cache.path.parent.mkdir(parents=True, exist_ok=True)
        self._is_open = True

    def _learn(self, record: Mapping[str, object]) -> bool:
        judgement, prompt = Judgement.from_dict(record), record.get("prompt_sha256")
        if judgement is None or not isinstance(prompt, str):
            return False
        if judgement.status == ERROR:
            self._failed[prompt] = judgement
            return False
        self._by_prompt[prompt] = judgement
        return True


def missing_prompts(tasks: Sequence[JudgeTask], record: JudgementRecord) -> list[str]:
    """Return the prompts that a judge must be asked, each once, in the order of the tasks."""
    return list(dict.fromkeys(task.prompt for task in tasks if record.find(task) is None))


def judge_answers(
    judge: Judge | None, tasks: Sequence[JudgeTask], record: JudgementRecord, *, on_event: EventSink
) -> dict[tuple[AnswerKey, str], Judgement]:
    """Return the judgement of every task, those that were recorded before included.

    Equal prompts are asked once. What fails for one prompt is its judgement's error, and counted.

    Args:
        judge: The judge; None where the record is known to hold every judgement.
        tasks: What is asked.
        record: Where judgements are kept.
        on_event: Where progress is reported.

    Raises:
        BackendError: If going on is pointless; what was judged is kept.
    """
    prompts = missing_prompts(tasks, record)
    waiting: dict[str, list[JudgeTask]] = {prompt: [] for prompt in prompts}
    found: dict[tuple[AnswerKey, str], Judgement] = {}
    for task in tasks:
        if (judgement := record.find(task)) is None:
            waiting[task.prompt].append(task)
            continue
        found[task.key, task.name] = judgement
        if not record.is_recorded(task):
            record.keep(task, judgement, is_new=False)
    known = f", {len(found):,} are there already" if found else ""
    on_event(PhaseStarted(name=f"judging {len(prompts):,} texts{known}", total=len(prompts), unit="answers"))
    num_done = 0

    def keep(index: int, judgement: Judgement) -> None:
        nonlocal num_done
        for place, task in enumerate(waiting[prompts[index]]):
            record.keep(task, judgement, is_new=place == 0)
            found[task.key, task.name] = judgement
        num_done += 1
        on_event(StepFinished(step=num_done))

    if prompts:
        assert judge is not None, "the record holds every judgement"
        judge.judge(prompts, keep)
        assert len(found) == len(tasks), "a judge left a prompt without judgement"
    errors = [judgement for judgement in found.values() if judgement.status == ERROR]
    if errors:
        text = f"{len(errors):,} judgement(s) failed, and are counted as errors; run it again to repeat them"
        on_event(Notice(text=f"{text}; the first: {errors[0].detail}", is_warning=True))
    return found


def recorded_judges(run: RunFolder) -> list[dict[str, Any]]:
    """Return the settings of the judges that this run's answers were put to before, the one last asked first."""
    last: dict[str, int] = {}
    for place, record in enumerate(RecordFile(path=run.evaluation_path / "judgements.jsonl").read()):
        last[str(record.get("judge"))] = place
    found = []
    for name in sorted(last, key=lambda name: last[name], reverse=True):
        settings = read_json(run.evaluation_path / "settings" / f"{name}.json")
        if isinstance(settings, dict) and settings_id(settings) == name:
            found.append(settings)
    return found


def recorded_judgements(
    tasks: Sequence[JudgeTask], run: RunFolder, settings: Mapping[str, object]
) -> dict[tuple[AnswerKey, str], Judgement]:
    """Return what a judge said before, for the checkpoints of which it was asked about every answer."""
    record = JudgementRecord(run, settings_id(settings), is_cached=False)
    found = {(task.key, task.name): record.find(task) or record.find_failed(task) for task in tasks}
    incomplete = {key.step for (key, _), judgement in found.items() if judgement is None}
    return {
        place: judgement
        for place, judgement in found.items()
        if judgement is not None and place[0].step not in incomplete
    }
