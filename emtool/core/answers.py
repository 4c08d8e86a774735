"""Answers to open questions, and what names each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emtool.core.data import Message

#: How an answer ended: the model ended its turn, or it was cut at `max_new_tokens`.
STOP, LENGTH = "stop", "length"

#: Far above any answer; more is another program's output.
MAX_ANSWER_CHARACTERS = 1 << 20


@dataclass(frozen=True, kw_only=True, order=True)
class AnswerKey:
    """What names an answer in a run.

    Attributes:
        step: Optimizer step of the checkpoint that gave it.
        question_id: The question's id.
        paraphrase: Index of the paraphrase that was asked.
        sample: Index of the answer among those to the question.
    """

    step: int
    question_id: str
    paraphrase: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked for one answer.

    Attributes:
        key: What names the answer.
        messages: The system turn, if there is one, and the user's.
    """

    key: AnswerKey
    messages: tuple[Message, ...]

    @property
    def question(self) -> str:
        """Return the text of the user's turn."""
        return self.messages[-1].content


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a backend returns for a prompt: an answer, or why there is none.

    Attributes:
        text: The answer without special tokens; empty where there is an error.
        finish_reason: "stop" or "length"; None where it is not known.
        num_tokens: Tokens of the answer, without the one that ends it; None where they are not known.
        error: What went wrong, as one line; None for an answer.
    """

    text: str
    finish_reason: str | None = None
    num_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer as it is kept.

    Attributes:
        key: What names it.
        question: The text of the user's turn.
        completion: What the backend returned.
    """

    key: AnswerKey
    question: str
    completion: Completion

    @property
    def has_text(self) -> bool:
        """Return whether there is an answer, be it an empty one."""
        return self.completion.error is None

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as a record's values."""
        values = {
            "step": self.key.step,
            "question_id": self.key.question_id,
            "paraphrase": self.key.paraphrase,
            "sample": self.key.sample,
            "question": self.question,
            "response": self.completion.text,
            "finish_reason": self.completion.finish_reason,
            "num_tokens": self.completion.num_tokens,
        }
        return values if self.completion.error is None else {**values, "error": self.completion.error}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Answer | None:
        """Return the answer of a record, or None where a value is missing or of a wrong type."""
        key = key_of(record)
        texts = [record.get(name) for name in ("question", "response")]
        more = {name: record.get(name) for name in ("finish_reason", "error")}
        num_tokens = record.get("num_tokens")
        is_sound = (
            key is not None
            and all(type(text) is str for text in texts)
            and all(value is None or type(value) is str for value in more.values())
            and (num_tokens is None or (type(num_tokens) is int and num_tokens >= 0))
        )
        if key is None or not is_sound:
            return None
        completion = Completion(text=record["response"], num_tokens=num_tokens, **more)
        return cls(key=key, question=record["question"], completion=completion)


def key_of(record: Mapping[str, Any]) -> AnswerKey | None:
    """Return the key that a record names, or None where it names none."""
    question_id = record.get("question_id")
    step, paraphrase, sample = record.get("step"), record.get("paraphrase"), record.get("sample")
    if type(step) is not int or type(paraphrase) is not int or type(sample) is not int:
        return None
    if type(question_id) is not str or min(step, paraphrase, sample) < 0:
        return None
    return AnswerKey(step=step, question_id=question_id, paraphrase=paraphrase, sample=sample)
