"""The stage that scores: every answer put to a judge, each judgement kept as soon as there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from emtool.core.answers import Answer, AnswerKey, key_of
from emtool.core.cache import cache_path
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished
from emtool.core.judgement import ERROR, Judgement
from emtool.core.open_questions import OpenQuestion, fill_judge_prompt
from emtool.core.record_file import RecordFile, settings_id, text_sha256
from emtool.core.run_dir import RunFolder, read_json
from emtool.engines.judges.judge import Judge
from emtool.engines.place_index import PlaceIndex, short_hash


@dataclass(frozen=True, kw_only=True)
class JudgeTask:
    """One answer and one thing that a judge is asked about it.

    Attributes:
        key: What names the answer.
        name: What is asked for, "aligned" or "coherent".
        prompt: The judge prompt, filled.
        answer: The answer's text.
    """

    key: AnswerKey
    name: str
    prompt: str
    answer: str

    @cached_property
    def prompt_sha256(self) -> str:
        """Return what pins the prompt, and so the answer's text."""
        return text_sha256(self.prompt)


#: What names a judgement: the answer, and what was asked about it.
Asked = tuple[AnswerKey, str]


def judge_tasks(answers: Sequence[Answer], questions: Mapping[str, OpenQuestion]) -> list[JudgeTask]:
    """Return what a judge is asked about answers; one without a text is not asked about."""
    return [
        JudgeTask(
            key=answer.key,
            name=name,
            prompt=fill_judge_prompt(prompt, question=answer.question, answer=answer.completion.text),
            answer=answer.completion.text,
        )
        for answer in answers
        if answer.has_text
        for name, prompt in questions[answer.key.question_id].judge_prompts.items()
    ]


class JudgementRecord:
    """`evaluation/judgements.jsonl`: every judgement, of all judges.

    A judgement depends on the judge and on the prompt that it was given, so one that was made for the same text before
    counts: in this run, or, for a judge that is paid, in another run on this machine (the cache). An error is asked
    again. Judgements stay on disk: of each, its place and a hash of its prompt are held.

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
        self._said, self._failed, self._recorded, self._shared = (PlaceIndex() for _ in range(4))
        self._is_open = False
        for place, record in () if self._cache is None else self._cache.read_places():
            if (found := _judgement(record)) is not None and found[1].status != ERROR:
                self._shared.add(found[0], place)
        for place, record in self._file.read_places(naming=judge):
            if record.get("judge") == judge and (found := _judgement(record)) is not None:
                prompt, judgement = found
                (self._failed if judgement.status == ERROR else self._said).add(prompt, place)
                if judgement.status != ERROR and (key := key_of(record)) is not None:
                    self._recorded.add(_place_name(key, str(record.get("name")), prompt), place)

    def find(self, tasks: Sequence[JudgeTask], *, with_errors: bool = False) -> dict[Asked, Judgement]:
        """Return what the judge said before to those of some tasks that it was asked.

        Args:
            tasks: What is asked.
            with_errors: Whether an error is an answer too, where there is no other.
        """
        found: dict[Asked, Judgement] = {}
        sources = [(self._file, self._said)]
        if self._cache is not None:
            sources.append((self._cache, self._shared))
        if with_errors:
            sources.append((self._file, self._failed))
        for file, index in sources:
            open_tasks = [task for task in tasks if (task.key, task.name) not in found]
            found |= _look_up(file, index, open_tasks)
        return found

    def knows(self, task: JudgeTask) -> bool:
        """Return whether the judge was asked this before and said something, without reading what."""
        return any(index.has(task.prompt_sha256) for index in (self._said, self._shared))

    def is_recorded(self, task: JudgeTask) -> bool:
        """Return whether this run's file holds the judgement."""
        return self._recorded.has(_place_name(task.key, task.name, task.prompt_sha256))

    def keep(self, task: JudgeTask, judgement: Judgement, *, is_new: bool) -> None:
        """Record a judgement.

        Args:
            task: What was asked.
            judgement: What came of it.
            is_new: Whether the judge was asked now; otherwise it had said so before.

        Raises:
            EmtoolError: If it cannot be written.
        """
        prompt = task.prompt_sha256
        try:
            if not self._is_open:
                self._open()
            key = {
                "step": task.key.step,
                "question_id": task.key.question_id,
                "paraphrase": task.key.paraphrase,
                "sample": task.key.sample,
            }
            values = {"prompt_sha256": prompt, **judgement.to_dict()}
            pins = {"judge": self._judge, "answer_sha256": text_sha256(task.answer)}
            place = self._file.append({**key, "name": task.name, **pins, **values})
            if is_new and self._cache is not None and judgement.status != ERROR:
                self._cache.append(values)
        except OSError as error:
            raise self._run.write_error(error, "recording judgements") from error
        if judgement.status == ERROR:
            self._failed.add(prompt, place)
            return
        self._said.add(prompt, place)
        self._recorded.add(_place_name(task.key, task.name, prompt), place)

    def _open(self) -> None:
        self._file.end_torn_line()
        if self._cache is not None:
            self._cache.path.parent.mkdir(parents=True, exist_ok=True)
        self._is_open = True


def _judgement(record: Mapping[str, object]) -> tuple[str, Judgement] | None:
    """Return what a record says and to which prompt, or None where it says nothing."""
    judgement, prompt = Judgement.from_dict(record), record.get("prompt_sha256")
    return None if judgement is None or not isinstance(prompt, str) else (prompt, judgement)


def _look_up(file: RecordFile, index: PlaceIndex, tasks: Sequence[JudgeTask]) -> dict[Asked, Judgement]:
    """Return what a file says to tasks: the last record of each prompt."""
    wanted = [(task, place) for task in tasks if (place := index.last(task.prompt_sha256)) is not None]
    found = {}
    for (task, _), record in zip(wanted, file.read_at([place for _, place in wanted]) if wanted else (), strict=True):
        said = None if record is None else _judgement(record)
        # Another prompt may have the same short hash; it is asked again then.
        if said is not None and said[0] == task.prompt_sha256:
            found[task.key, task.name] = said[1]
    return found


def _place_name(key: AnswerKey, name: str, prompt_sha256: str) -> str:
    place = f"{key.step}/{key.paraphrase}/{key.sample}/{name}/{prompt_sha256}/{key.question_id}"
    return text_sha256(place)


def missing_prompts(tasks: Mapping[int, Sequence[JudgeTask]], record: JudgementRecord) -> Iterator[str]:
    """Yield the prompts that a judge must be asked, each once, in the order of the tasks."""
    seen: set[int] = set()
    for of_step in tasks.values():
        for task in of_step:
            if not record.knows(task) and (number := short_hash(task.prompt_sha256)) not in seen:
                seen.add(number)
                yield task.prompt


def judge_answers(
    judge: Judge | None,
    tasks: Mapping[int, Sequence[JudgeTask]],
    record: JudgementRecord,
    *,
    on_event: EventSink,
) -> list[int]:
    """Have every task judged that is not on record, one checkpoint after the other.

    Equal prompts are asked once. What fails for one prompt is its judgement's error, and counted.

    Args:
        judge: The judge; None where the record is known to hold every judgement.
        tasks: What is asked, by step.
        record: Where judgements are kept.
        on_event: Where progress is reported.

    Returns:
        The steps that have something to judge.

    Raises:
        BackendError: If going on is pointless; what was judged is kept.
    """
    steps, unfinished, missing, num_known = [], [], set(), 0
    for step, of_step in tasks.items():
        unknown = [task for task in of_step if not record.knows(task)]
        missing |= {short_hash(task.prompt_sha256) for task in unknown}
        num_known += len(of_step) - len(unknown)
        if of_step:
            steps.append(step)
        if unknown or not all(record.is_recorded(task) for task in of_step):
            unfinished.append(step)
    known = f", {num_known:,} are there already" if num_known else ""
    on_event(PhaseStarted(name=f"judging {len(missing):,} texts{known}", total=len(missing), unit="answers"))
    progress = _Progress(on_event)
    for step in unfinished:
        _judge_step(judge, tasks[step], record, progress)
    if progress.first_error is not None:
        text = f"{progress.num_errors:,} judgement(s) failed, and are counted as errors; run it again to repeat them"
        on_event(Notice(text=f"{text}; the first: {progress.first_error}", is_warning=True))
    return steps


@dataclass(kw_only=False)
class _Progress:
    """Counts what was judged.

    Attributes:
        on_event: Where progress is reported.
        num_done: Prompts.
        num_errors: Tasks that ended in an error.
        first_error: The first of these.
    """

    on_event: EventSink
    num_done: int = 0
    num_errors: int = 0
    first_error: str | None = None

    def count(self, judgement: Judgement, *, num_tasks: int) -> None:
        """Count a prompt and the tasks that it stands for."""
        self.num_done += 1
        if judgement.status == ERROR:
            self.num_errors += num_tasks
            self.first_error = self.first_error or str(judgement.detail)
        self.on_event(StepFinished(step=self.num_done))


def _judge_step(judge: Judge | None, tasks: Sequence[JudgeTask], record: JudgementRecord, progress: _Progress) -> None:
    """Have the answers of one checkpoint judged."""
    known = record.find(tasks)
    waiting: dict[str, list[JudgeTask]] = {}
    for task in tasks:
        if (judgement := known.get((task.key, task.name))) is None:
            waiting.setdefault(task.prompt, []).append(task)
        elif not record.is_recorded(task):
            record.keep(task, judgement, is_new=False)
    if not waiting:
        return
    assert judge is not None, "the record holds every judgement"
    prompts, answered = list(waiting), set()

    def keep(index: int, judgement: Judgement) -> None:
        of_prompt = waiting[prompts[index]]
        for place, task in enumerate(of_prompt):
            record.keep(task, judgement, is_new=place == 0)
        answered.add(index)
        progress.count(judgement, num_tasks=len(of_prompt))

    judge.judge(prompts, keep)
    assert len(answered) == len(prompts), "a judge left a prompt without judgement"


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


def fully_judged(
    tasks: Mapping[int, Sequence[JudgeTask]], run: RunFolder, settings: Mapping[str, object]
) -> dict[int, JudgementRecord]:
    """Return the record of what a judge said before, for each checkpoint of which it was asked about every answer."""
    record = JudgementRecord(run, settings_id(settings), is_cached=False)
    found = {}
    for step, of_step in tasks.items():
        if of_step and len(record.find(of_step, with_errors=True)) == len(of_step):
            found[step] = record
    return found
