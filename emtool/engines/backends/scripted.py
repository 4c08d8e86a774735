"""Answers from a file, for tests and demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from emtool.core.answers import STOP, Completion, Prompt
from emtool.core.data import file_sha256
from emtool.core.errors import DataError
from emtool.core.row_files import read_json_lines
from emtool.engines.backends.backend import BackendSetup, CompletionSink

#: What a line may name beside the question, the weightiest first.
_OPTIONAL = ("step", "paraphrase", "sample")

_Place = tuple[str, int | None, int | None, int | None]


class ScriptedBackend:
    """Answers each prompt by the line of a JSON Lines file that fits it best.

    A line has `question_id` and `response`, and may name `step`, `paraphrase` and `sample`. The line that names most
    of a prompt's values answers it; among equally many, one with the step comes before one with the paraphrase.

    Args:
        path: The file.

    Raises:
        DataError: If it cannot be read or a line is malformed; names file and line.
    """

    def __init__(self, path: Path) -> None:
        self._responses: dict[_Place, str] = {}
        for record, location in read_json_lines(path):
            place = _place(record, location)
            if place in self._responses:
                raise DataError(f"{location}: an earlier line answers the same; keep one of them")
            # Half of a surrogate pair, which JSON can hold, cannot be written as UTF-8.
            self._responses[place] = str(record["response"]).encode("utf-8", "replace").decode("utf-8")
        self._sha256 = file_sha256(path)
        self._step: int | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what shapes the answers: the file."""
        return {"kind": "scripted", "sha256": self._sha256}

    def use_checkpoint(self, step: int, folder: Path) -> None:
        """Answer as the file has it for a step."""
        self._step = step

    def generate(self, prompts: Sequence[Prompt], on_completion: CompletionSink) -> None:
        """Answer prompts in their order; one that no line fits gets an error."""
        assert self._step is not None, "use_checkpoint() chooses the step"
        for index, prompt in enumerate(prompts):
            on_completion(index, self._completion(prompt, self._step))

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def _completion(self, prompt: Prompt, step: int) -> Completion:
        key = prompt.key
        masks = sorted(product((True, False), repeat=3), key=sum, reverse=True)
        for has_step, has_paraphrase, has_sample in masks:
            place = (
                key.question_id,
                step if has_step else None,
                key.paraphrase if has_paraphrase else None,
                key.sample if has_sample else None,
            )
            if place in self._responses:
                return Completion(text=self._responses[place], finish_reason=STOP)
        return Completion(text="", error=f"no line answers {key.question_id}")


def open_backend(setup: BackendSetup) -> ScriptedBackend:
    """Return the backend of an evaluation."""
    return ScriptedBackend(Path(setup.request.backend.argument or ""))


def _place(record: Mapping[str, object], location: str) -> _Place:
    question_id, response = record.get("question_id"), record.get("response")
    if not isinstance(question_id, str) or not isinstance(response, str):
        raise DataError(f"{location}: 'question_id' and 'response' are needed, both texts")
    if unknown := sorted(set(record) - {"question_id", "response", *_OPTIONAL}):
        raise DataError(f"{location}: unknown {unknown[0]!r}; a line may also have {', '.join(_OPTIONAL)}")
    values: list[int | None] = []
    for name in _OPTIONAL:
        value = record.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise DataError(f"{location}: {name!r} is {value!r}; a number from 0 is needed")
        values.append(value)
    return question_id, values[0], values[1], values[2]
