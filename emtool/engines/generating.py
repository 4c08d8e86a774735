"""The stage that generates: every question asked of every checkpoint, each answer kept as soon as there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emtool.core.answers import Answer, AnswerKey, Completion, Prompt
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
    recorded with an error is asked for again.

    Args:
        run: The run folder.
        settings: Name of the settings, see `settings_id`.
    """

    def __init__(self, run: RunFolder, settings: str) -> None:
        self._run = run
        self._settings = settings
        self._file = RecordFile(path=run.evaluation_path / "answers.jsonl")
        self._found: dict[AnswerKey, tuple[Answer, str, str]] = {}
        for record in self._file.read():
            if record.get("settings") == settings and (answer := Answer.from_dict(record)) is not None:
                pins = (str(record.get("adapter_sha256")), str(record.get("prompt_sha256")))
                self._found[answer.key] = (answer, *pins)
        self._is_open = False

    def find(self, prompt: Prompt, adapter_sha256: str) -> Answer | None:
        """Return the answer that was recorded for a prompt, or None where it must be generated."""
        answer, *pins = self._found.get(prompt.key, (None,))
        is_sound = answer is not None and answer.has_text and pins == [adapter_sha256, prompt_sha256(prompt)]
        return answer if is_sound else None

    def keep(self, prompt: Prompt, adapter_sha256: str, completion: Completion) -> Answer:
        """Record a completion and return it as an answer.

        Raises:
            EmtoolError: If it cannot be written.
        """
        answer = Answer(key=prompt.key, question=prompt.question, completion=completion)
        pins = {"settings": self._settings, "adapter_sha256": adapter_sha256, "prompt_sha256": prompt_sha256(prompt)}
        try:
            if not self._is_open:
                self._file.end_torn_line()
                self._is_open = True
            self._file.append({**answer.to_dict(), **pins})
        except OSError as error:
            raise self._run.write_error(error, "recording answers") from error
        return answer


def prompt_sha256(prompt: Prompt) -> str:
    """Return what pins the turns of a prompt."""
    turns = [message.to_dict() for message in prompt.messages]
    return text_sha256(json.dumps(turns, ensure_ascii=False))


def generate_answers(
    backend: Backend,
    checkpoints: Sequence[CheckpointPrompts],
    record: AnswerRecord,
    *,
    on_event: EventSink,
) -> tuple[dict[int, list[Answer]], dict[int, str]]:
    """Return the answers of each checkpoint, those that were recorded before included.

    Args:
        backend: What answers.
        checkpoints: What each checkpoint is asked, by step.
        record: Where answers are kept.
        on_event: Where progress is reported.

    Returns:
        Answers by step, in the order of the prompts; and what is wrong with checkpoints that could not be used.

    Raises:
        BackendError: If going on is pointless; what was generated is kept.
    """
    found = {c.step: {p.key: record.find(p, c.adapter_sha256) for p in c.prompts} for c in checkpoints}
    num_missing = sum(answer is None for answers in found.values() for answer in answers.values())
    num_known = sum(len(answers) for answers in found.values()) - num_missing
    if not num_missing:
        on_event(Notice(text=f"{num_known:,} answers are there already"))
        return {step: [a for a in answers.values() if a is not None] for step, answers in found.items()}, {}
    known = f", {num_known:,} are there already" if num_known else ""
    on_event(PhaseStarted(name=f"generating {num_missing:,} answers{known}", total=num_missing, unit="answers"))
    progress = _Progress(on_event)
    problems = {}
    for checkpoint in checkpoints:
        answers = found[checkpoint.step]
        missing = [prompt for prompt in checkpoint.prompts if answers[prompt.key] is None]
        if not missing:
            continue
        try:
            backend.use_checkpoint(checkpoint.step, checkpoint.folder)
        except CheckpointError as error:
            problems[checkpoint.step] = str(error)
            on_event(Notice(text=f"{error}; it is passed over", is_warning=True))
            progress.skip(len(missing))
            continue

        def keep(
            index: int,
            completion: Completion,
            missing: Sequence[Prompt] = missing,
            checkpoint: CheckpointPrompts = checkpoint,
            answers: dict[AnswerKey, Answer | None] = answers,
        ) -> None:
            prompt = missing[index]
            answers[prompt.key] = record.keep(prompt, checkpoint.adapter_sha256, completion)
            progress.count(completion)

        backend.generate(missing, keep)
        assert all(answer is not None for answer in answers.values()), "a backend left a prompt without completion"
    progress.report_errors()
    done = {step: answers for step, answers in found.items() if step not in problems}
    return {step: [a for a in answers.values() if a is not None] for step, answers in done.items()}, problems


def recorded_answers(checkpoints: Sequence[CheckpointPrompts], record: AnswerRecord) -> dict[int, list[Answer]]:
    """Return the answers of the checkpoints of which every one was recorded before, by step."""
    found = {c.step: [record.find(prompt, c.adapter_sha256) for prompt in c.prompts] for c in checkpoints}
    whole = {step: [answer for answer in answers if answer is not None] for step, answers in found.items()}
    return {step: answers for step, answers in whole.items() if answers and len(answers) == len(found[step])}


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


def with_step(prompts: Sequence[Prompt], step: int) -> list[Prompt]:
    """Return prompts with the key of another step."""
    return [replace(prompt, key=replace(prompt.key, step=step)) for prompt in prompts]
