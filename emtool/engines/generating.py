"""The stage that generates: every question asked of every checkpoint, each answer kept as soon as there is one."""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from emtool.core.answers import Answer, AnswerKey, Completion, Prompt, key_of
from emtool.core.by_step import Recent
from emtool.core.data import Message
from emtool.core.errors import CheckpointError
from emtool.core.evaluation_config import MAX_PER_QUESTION
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished
from emtool.core.open_questions import OpenQuestion, prompts_of
from emtool.core.record_file import RecordFile, text_sha256
from emtool.core.run_dir import RunFolder
from emtool.engines.backends.backend import Backend


@dataclass(frozen=True, kw_only=True)
class CheckpointPrompts:
    """What one checkpoint is asked.

    Attributes:
        step: Optimizer step.
        folder: What the backend loads: the milestone, or a composed adapter of it.
        adapter_sha256: What pins the milestone's weights.
        prompts: The prompts, their keys with this step.
    """

    step: int
    folder: Path
    adapter_sha256: str
    prompts: Sequence[Prompt]


class AnswerRecord:
    """`evaluation/answers.jsonl`: every answer, with what shaped it.

    An answer counts again if its settings, its checkpoint's weights and its prompt are what they were. One that was
    recorded with an error is asked for again. Answers stay on disk: of each, its place is held, and the answers of the
    two checkpoints that were asked for last.

    Args:
        run: The run folder.
        settings: Name of the settings, see `settings_id`.
    """

    def __init__(self, run: RunFolder, settings: str) -> None:
        self._run = run
        self._settings = settings
        self._file = RecordFile(path=run.evaluation_path / "answers.jsonl")
        self._places: dict[int, array[int]] = {}
        self._loaded: OrderedDict[int, dict[AnswerKey, _Kept]] = OrderedDict()
        for place, record in self._file.read_places(naming=settings):
            if record.get("settings") == settings and (key := key_of(record)) is not None:
                self._places.setdefault(key.step, array("q")).append(place)
        self._is_open = False

    def find(self, prompt: Prompt, adapter_sha256: str) -> Answer | None:
        """Return the answer that was recorded for a prompt, or None where it must be generated."""
        answer = self.latest(prompt, adapter_sha256)
        return answer if answer is not None and answer.has_text else None

    def latest(self, prompt: Prompt, adapter_sha256: str) -> Answer | None:
        """Return what was recorded for a prompt last, be it an error, or None where there is nothing."""
        kept = self._of_step(prompt.key.step).get(prompt.key)
        is_sound = kept is not None and kept.pins == (adapter_sha256, prompt_sha256(prompt))
        return kept.answer if kept is not None and is_sound else None

    def keep(self, prompt: Prompt, adapter_sha256: str, completion: Completion) -> None:
        """Record a completion.

        Raises:
            EmtoolError: If it cannot be written.
        """
        answer = Answer(key=prompt.key, question=prompt.question, completion=completion)
        pins = (adapter_sha256, prompt_sha256(prompt))
        names = {"settings": self._settings, "adapter_sha256": pins[0], "prompt_sha256": pins[1]}
        try:
            if not self._is_open:
                self._file.end_torn_line()
                self._is_open = True
            place = self._file.append({**answer.to_dict(), **names})
        except OSError as error:
            raise self._run.write_error(error, "recording answers") from error
        loaded = self._of_step(prompt.key.step)
        self._places.setdefault(prompt.key.step, array("q")).append(place)
        loaded[prompt.key] = _Kept(answer=answer, pins=pins)

    def _of_step(self, step: int) -> dict[AnswerKey, _Kept]:
        if step in self._loaded:
            self._loaded.move_to_end(step)
            return self._loaded[step]
        found = {}
        places = self._places.get(step, ())
        for record in self._file.read_at(places) if places else ():
            if record is not None and (answer := Answer.from_dict(record)) is not None:
                pins = (str(record.get("adapter_sha256")), str(record.get("prompt_sha256")))
                found[answer.key] = _Kept(answer=answer, pins=pins)
        self._loaded[step] = found
        if len(self._loaded) > 2:
            self._loaded.popitem(last=False)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """An answer on record, and what pins its checkpoint and its prompt."""

    answer: Answer
    pins: tuple[str, str]


def recorded_answers(record: AnswerRecord, checkpoints: Sequence[CheckpointPrompts]) -> Recent[Answer]:
    """Return the answers of checkpoints by step, increasing, in the order of the prompts.

    Args:
        record: Where they are kept.
        checkpoints: Checkpoints of which every prompt is on record, by an answer or an error.
    """
    by_step = {checkpoint.step: checkpoint for checkpoint in checkpoints}

    def answers_at(step: int) -> list[Answer]:
        found = [record.latest(prompt, by_step[step].adapter_sha256) for prompt in by_step[step].prompts]
        answers = [answer for answer in found if answer is not None]
        assert len(answers) == len(found), "an answer is not on record any more"
        return answers

    return Recent(sorted(by_step), answers_at)


def prompt_sha256(prompt: Prompt) -> str:
    """Return what pins the turns of a prompt."""
    return _turns_sha256(prompt.messages)


@lru_cache(maxsize=4096)
def _turns_sha256(messages: tuple[Message, ...]) -> str:
    # Every sample at every checkpoint asks the same.
    return text_sha256(json.dumps([message.to_dict() for message in messages], ensure_ascii=False))


def generate_answers(
    backend: Backend,
    checkpoints: Sequence[CheckpointPrompts],
    record: AnswerRecord,
    *,
    on_event: EventSink,
) -> dict[int, str]:
    """Have every prompt answered that has no answer on record yet.

    Args:
        backend: What answers.
        checkpoints: What each checkpoint is asked, by step.
        record: Where answers are kept.
        on_event: Where progress is reported.

    Returns:
        What is wrong with checkpoints that could not be used, by step.

    Raises:
        BackendError: If going on is pointless; what was generated is kept.
    """
    counts = {c.step: sum(record.find(p, c.adapter_sha256) is None for p in c.prompts) for c in checkpoints}
    num_missing = sum(counts.values())
    num_known = sum(len(c.prompts) for c in checkpoints) - num_missing
    if not num_missing:
        on_event(Notice(text=f"{num_known:,} answers are there already"))
        return {}
    known = f", {num_known:,} are there already" if num_known else ""
    on_event(PhaseStarted(name=f"generating {num_missing:,} answers{known}", total=num_missing, unit="answers"))
    progress = _Progress(on_event)
    problems = {}
    for checkpoint in checkpoints:
        if not counts[checkpoint.step]:
            continue
        try:
            backend.use_checkpoint(checkpoint.step, checkpoint.folder)
        except CheckpointError as error:
            problems[checkpoint.step] = str(error)
            on_event(Notice(text=f"{error}; it is passed over", is_warning=True))
            progress.skip(counts[checkpoint.step])
            continue
        _generate(backend, checkpoint, record, progress)
    progress.report_errors()
    return problems


def _generate(backend: Backend, checkpoint: CheckpointPrompts, record: AnswerRecord, progress: _Progress) -> None:
    """Have one checkpoint answer what is missing."""
    adapter = checkpoint.adapter_sha256
    missing = [prompt for prompt in checkpoint.prompts if record.find(prompt, adapter) is None]
    answered = set()

    def keep(index: int, completion: Completion) -> None:
        record.keep(missing[index], adapter, completion)
        answered.add(index)
        progress.count(completion)

    backend.generate(missing, keep)
    assert len(answered) == len(missing), "a backend left a prompt without completion"


def fully_answered(checkpoints: Sequence[CheckpointPrompts], record: AnswerRecord) -> list[CheckpointPrompts]:
    """Return the checkpoints of which every prompt was answered before."""
    return [c for c in checkpoints if c.prompts and all(record.find(p, c.adapter_sha256) for p in c.prompts)]


def prompts_asked(generation: Mapping[str, Any], questions: Mapping[str, OpenQuestion]) -> list[Prompt]:
    """Return what an earlier evaluation asked, nothing where one of its questions is not among these.

    Args:
        generation: What its summary says; nothing in it is trusted.
        questions: Questions by id.
    """
    names, count = generation.get("questions"), generation.get("n_per_question")
    if not isinstance(names, list) or not isinstance(count, int) or not 0 < count <= MAX_PER_QUESTION:
        return []
    if not all(isinstance(name, str) and name in questions for name in names):
        return []
    return prompts_of([questions[name] for name in names], step=0, n_per_question=count)


class _Progress:
    """Counts answers and tokens."""

    def __init__(self, on_event: EventSink) -> None:
        self._on_event = on_event
        self._num_done = self._num_tokens = self._num_errors = 0
        self._first_error = ""

    def count(self, completion: Completion) -> None:
        self._num_done += 1
        self._num_tokens += completion.num_tokens or 0
        if completion.error is not None:
            self._num_errors += 1
            self._first_error = self._first_error or completion.error
        self._on_event(StepFinished(step=self._num_done, tokens=self._num_tokens))

    def skip(self, num_answers: int) -> None:
        self._num_done += num_answers
        self._on_event(StepFinished(step=self._num_done, tokens=self._num_tokens))

    def report_errors(self) -> None:
        if self._num_errors:
            text = f"{self._num_errors:,} answer(s) could not be generated, and are counted as errors"
            self._on_event(Notice(text=f"{text}; the first: {self._first_error}", is_warning=True))


class PromptsAt(Sequence[Prompt]):
    """Prompts with the key of another step, made when they are looked at.

    Args:
        prompts: The prompts.
        step: Optimizer step.
    """

    def __init__(self, prompts: Sequence[Prompt], step: int) -> None:
        self._prompts = prompts
        self._step = step

    def __getitem__(self, index: Any) -> Any:
        """Return a prompt, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        prompt: Prompt = self._prompts[index]
        key = prompt.key
        at_step = AnswerKey(step=self._step, question_id=key.question_id, paraphrase=key.paraphrase, sample=key.sample)
        return Prompt(key=at_step, messages=prompt.messages)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._prompts)
