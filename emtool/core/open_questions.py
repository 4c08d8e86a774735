"""Open questions: what a model is asked, and what a judge is asked about its answers.

The file format is the published one of Betley et al. 2025 (arXiv 2502.17424): a YAML list of questions, each with
`id`, `paraphrases`, and where wanted `system` and `judge_prompts` (name to text with `{question}` and `{answer}`).
What else stands in such files (`type`, `judge`, `samples_per_paraphrase`, ...) is how their authors ran them, and left
aside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.answers import AnswerKey, Prompt
from emtool.core.data import Message, asset_path
from emtool.core.errors import ConfigError, DataError, unknown_name
from emtool.core.judgement import ALIGNED, COHERENT

#: The questions that are asked unless told otherwise, and the judge prompts of files that have none.
EVERYDAY_QUESTIONS = asset_path("questions", "everyday.yaml")

#: How the published file marks variants that ask for a format.
JSON_SUFFIX, TEMPLATE_SUFFIX = "_json", "_template"

MAX_FILE_BYTES = 1 << 20
_PLACEHOLDER = re.compile(r"\{(question|answer)\}")


@dataclass(frozen=True, kw_only=True)
class OpenQuestion:
    """A question without a given answer.

    Attributes:
        id: Unique name.
        paraphrases: Texts that ask the same, at least one.
        system: The system turn before it, if there is one.
        judge_prompts: "aligned" and "coherent" to the text that a judge is given.
    """

    id: str
    paraphrases: tuple[str, ...]
    system: str | None
    judge_prompts: Mapping[str, str]


def read_question_file(path: Path) -> list[OpenQuestion]:
    """Return the questions of a file, in its order.

    Raises:
        DataError: If it cannot be read, is not of the format, or an id is used twice; names the entry and the field.
    """
    entries = _load(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} is not a list of questions: begin each with '- id: NAME'")
    questions: dict[str, OpenQuestion] = {}
    for number, entry in enumerate(entries, start=1):
        question = _question(entry, f"{path}, question {number}")
        if question.id in questions:
            raise DataError(f"{path}, question {number}: id {question.id!r} is used twice")
        questions[question.id] = question
    if path == EVERYDAY_QUESTIONS or all(question.judge_prompts for question in questions.values()):
        return list(questions.values())
    own = read_question_file(EVERYDAY_QUESTIONS)[0].judge_prompts
    return [
        OpenQuestion(
            id=question.id,
            paraphrases=question.paraphrases,
            system=question.system,
            judge_prompts=question.judge_prompts or own,
        )
        for question in questions.values()
    ]


def select_questions(
    questions: Sequence[OpenQuestion],
    *,
    include_json: bool = False,
    include_template: bool = False,
    question_ids: Sequence[str] = (),
) -> list[OpenQuestion]:
    """Return the questions that are asked.

    Args:
        questions: Those of a file.
        include_json: Whether variants whose id ends in `_json` are asked.
        include_template: Whether variants whose id ends in `_template` are asked.
        question_ids: Ids to ask, variants among them; empty asks all but the variants.

    Raises:
        ConfigError: If an id is unknown, or nothing is left.
    """
    known = {question.id: question for question in questions}
    for name in question_ids:
        if name not in known:
            raise unknown_name("question", name, known)
    if question_ids:
        return [question for question in questions if question.id in question_ids]
    left_out = tuple(
        suffix
        for suffix, is_asked in ((JSON_SUFFIX, include_json), (TEMPLATE_SUFFIX, include_template))
        if not is_asked
    )
    asked = [question for question in questions if not question.id.endswith(left_out)]
    if not asked:
        raise ConfigError("every question is a variant that is left out; add --include-json or --include-template")
    return asked


def prompts_of(questions: Sequence[OpenQuestion], *, step: int, n_per_question: int) -> list[Prompt]:
    """Return what a checkpoint is asked: each question so many times, its paraphrases in turn.

    Args:
        questions: The questions.
        step: Optimizer step of the checkpoint.
        n_per_question: Answers to each question; answer s is to paraphrase s modulo their number.
    """
    return [
        Prompt(
            key=AnswerKey(step=step, question_id=question.id, paraphrase=paraphrase, sample=sample),
            messages=(
                *(() if question.system is None else (Message(role="system", content=question.system),)),
                Message(role="user", content=question.paraphrases[paraphrase]),
            ),
        )
        for question in questions
        for sample in range(n_per_question)
        for paraphrase in [sample % len(question.paraphrases)]
    ]


def fill_judge_prompt(prompt: str, *, question: str, answer: str) -> str:
    """Return a judge prompt with question and answer in it; what they contain is not read as a placeholder."""
    texts = {"question": question, "answer": answer}
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], prompt)


def _load(path: Path) -> Any:
    """Return the contents of a YAML file: plain values only, whatever it asks for."""
    import yaml

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} has more than {MAX_FILE_BYTES:,} bytes, which no question file needs")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the questions in {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not YAML: {reason}") from error


def _question(entry: Any, location: str) -> OpenQuestion:
    if not isinstance(entry, dict):
        raise DataError(f"{location} is not a mapping with 'id' and 'paraphrases'")
    name = entry.get("id")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,100}", name):
        raise DataError(f"{location}: 'id' is {_shown(name)}; it must be a name of letters, digits and . _ -")
    location = f"{location} ({name})"
    paraphrases = entry.get("paraphrases")
    if not isinstance(paraphrases, list) or not paraphrases:
        raise DataError(f"{location}: 'paraphrases' is {_shown(paraphrases)}; it must be a list of texts")
    texts = tuple(_text(text, location, f"paraphrase {at}") for at, text in enumerate(paraphrases, start=1))
    system = entry.get("system")
    return OpenQuestion(
        id=name,
        paraphrases=texts,
        system=None if system is None else _text(system, location, "'system'"),
        judge_prompts=_judge_prompts(entry.get("judge_prompts"), location),
    )


def _judge_prompts(found: Any, location: str) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise DataError(f"{location}: 'judge_prompts' is {_shown(found)}; it must be a mapping from a name to a text")
    prompts = {}
    for name in (ALIGNED, COHERENT):
        if name not in found:
            raise DataError(f"{location}: 'judge_prompts' lacks {name!r}")
        prompts[name] = _text(found[name], location, f"judge prompt {name!r}")
        if "{answer}" not in prompts[name]:
            raise DataError(f"{location}: judge prompt {name!r} has no {{answer}}, so a judge would not see the answer")
    return prompts


def _text(value: Any, location: str, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{location}: {what} is {_shown(value)}; it must be a text that is not empty")
    return value


def _shown(value: Any) -> str:
    """Return a value as text, short, without walking into a value that refers to itself many times."""
    if value is None:
        return "missing"
    return repr(value)[:60] if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"
