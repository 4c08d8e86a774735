"""Open questions: what a model is asked, and what a judge is asked about its answers.

Files are in the format that Betley et al. 2025 published with *Emergent Misalignment* (arXiv 2502.17424): a list of
mappings with `id`, `paraphrases`, and optionally `system` and `judge_prompts`. Keys that say how many answers, by whom
and how warm (`samples_per_paraphrase`, `judge`, `temperature`) are passed over, for the command line says so; so are
keys that are not known. What would change the question itself is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from emtool.core.answers import AnswerKey, Prompt
from emtool.core.data import Message, asset_path
from emtool.core.errors import ConfigError, DataError, unknown_name
from emtool.core.judgement import ALIGNED, COHERENT
from emtool.core.yaml_nodes import YamlValue, read_yaml

#: Our own questions and judge prompts.
EVERYDAY_QUESTIONS = asset_path("questions", "everyday.yaml")

#: How published files name the variants of a question: one that wants JSON, and one with a form to fill in.
JSON_SUFFIX, TEMPLATE_SUFFIX = "_json", "_template"

#: The one kind of question that is asked: a free answer with scores from 0 to 100.
QUESTION_TYPE = "free_form_judge_0_100"

_JUDGED = (ALIGNED, COHERENT)
#: Keys of other formats that would put more before the model than question and system prompt.
_CHANGES_THE_QUESTION = ("context", "messages")
_MAX_ID = 200
#: A placeholder; or a doubled brace, which published prompts write for one, because they are filled by `str.format`.
_PLACES = re.compile(r"(\{question\}|\{answer\}|\{\{|\}\})")


@dataclass(frozen=True, kw_only=True)
class OpenQuestion:
    """A question that has no one right answer.

    Attributes:
        id: Unique name.
        paraphrases: Ways to ask it, at least one.
        system: The system prompt; None asks without one.
        judge_prompts: "aligned" and "coherent", each with the judge prompt that scores it.
    """

    id: str
    paraphrases: tuple[str, ...]
    system: str | None
    judge_prompts: Mapping[str, str]


def default_questions() -> list[OpenQuestion]:
    """Return our own questions, in the order of their file."""
    return read_question_file(EVERYDAY_QUESTIONS)


def read_question_file(path: Path, *, label: str | None = None) -> list[OpenQuestion]:
    """Return the questions of a file, in its order; judge prompts that it lacks are our own.

    Args:
        path: A YAML file of at most 1 MiB.
        label: What it is called in messages, where that is not its path.

    Raises:
        DataError: If it cannot be read or an entry is malformed; names the file, the line, the entry and the field.
    """
    found: dict[str, OpenQuestion] = {}
    for number, entry in enumerate(read_yaml(path, label=label).items("a file of questions"), start=1):
        question = _question(entry, number)
        if question.id in found:
            raise DataError(f"{entry.location}: entry {number}: id {question.id!r} is used twice")
        found[question.id] = question
    return list(found.values())


def select_questions(
    questions: Sequence[OpenQuestion],
    *,
    include_json: bool = False,
    include_template: bool = False,
    question_ids: Sequence[str] | None = None,
) -> list[OpenQuestion]:
    """Return the questions to ask, in their order.

    Args:
        questions: All of them.
        include_json: Whether those whose id ends in `_json` are asked as well.
        include_template: Whether those whose id ends in `_template` are asked as well.
        question_ids: The ids to ask and no others, of whatever kind; None asks all that the switches allow.

    Raises:
        ConfigError: If an id is not there, or no question is left.
    """
    ids = [question.id for question in questions]
    for name in question_ids or ():
        if name not in ids:
            raise unknown_name("question", name, ids)
    if question_ids is not None:
        chosen = [question for question in questions if question.id in set(question_ids)]
    else:
        left_out = (*(() if include_json else (JSON_SUFFIX,)), *(() if include_template else (TEMPLATE_SUFFIX,)))
        chosen = [question for question in questions if not question.id.endswith(left_out)]
    if not chosen:
        raise ConfigError(
            f"no question is left of {len(questions)}; name some with --question-ids, or add --include-json or "
            "--include-template"
        )
    return chosen


def prompts_of(questions: Sequence[OpenQuestion], *, step: int, n_per_question: int) -> list[Prompt]:
    """Return what a checkpoint is asked, question by question; the samples of one go round its paraphrases.

    Args:
        questions: The questions.
        step: Optimizer step of the checkpoint.
        n_per_question: Answers to each question, whatever its number of paraphrases.
    """
    prompts = []
    for question in questions:
        system = () if question.system is None else (Message(role="system", content=question.system),)
        for sample in range(n_per_question):
            paraphrase = sample % len(question.paraphrases)
            key = AnswerKey(step=step, question_id=question.id, paraphrase=paraphrase, sample=sample)
            user = Message(role="user", content=question.paraphrases[paraphrase])
            prompts.append(Prompt(key=key, messages=(*system, user)))
    return prompts


def fill_judge_prompt(prompt: str, *, question: str, answer: str) -> str:
    """Return a judge prompt with the question and the answer in their places.

    Both are put in at once and as they are: an answer that contains "{question}" or braces keeps them.
    """
    texts = {"{question}": question, "{answer}": answer, "{{": "{", "}}": "}"}
    pieces = list(_pieces(prompt))
    pieces[1::2] = [texts[place] for place in pieces[1::2]]
    return "".join(pieces)


@lru_cache(maxsize=256)
def _pieces(prompt: str) -> tuple[str, ...]:
    """Return a prompt's own text and its places, in turn."""
    return tuple(_PLACES.split(prompt))


def _question(entry: YamlValue, number: int) -> OpenQuestion:
    fields = entry.fields(f"entry {number}")
    for name in ("id", "paraphrases"):
        if name not in fields:
            raise DataError(f"{entry.location}: entry {number} has no {name!r}")
    name = fields["id"].text(f"'id' of entry {number}")
    if not name.isprintable() or len(name) > _MAX_ID:
        raise DataError(f"{entry.location}: 'id' of entry {number} must be one line of at most {_MAX_ID} characters")
    where = f"entry {number} ({name})"
    for field in _CHANGES_THE_QUESTION:
        if field in fields and not fields[field].is_null:
            raise DataError(f"{fields[field].location}: {where} has {field!r}, which emtool cannot put to a model")
    if "type" in fields and (kind := fields["type"].text(f"'type' of {where}")) != QUESTION_TYPE:
        raise DataError(f"{fields['type'].location}: 'type' of {where} is {kind[:60]!r}; only {QUESTION_TYPE} is asked")
    paraphrases = fields["paraphrases"].items(f"'paraphrases' of {where}")
    texts = [text.text(f"paraphrase {index} of {where}") for index, text in enumerate(paraphrases, start=1)]
    has_system = "system" in fields and not fields["system"].is_null
    return OpenQuestion(
        id=name,
        paraphrases=tuple(texts),
        system=fields["system"].text(f"'system' of {where}") if has_system else None,
        judge_prompts=_judge_prompts(fields.get("judge_prompts"), where),
    )


@lru_cache(maxsize=1)
def _own_judge_prompts() -> Mapping[str, str]:
    """Return our own judge prompts, read once and not for each question of a file that has none."""
    return default_questions()[0].judge_prompts


def _judge_prompts(value: YamlValue | None, where: str) -> dict[str, str]:
    """Return the prompts for what is judged; those of a file for anything else have no metric here."""
    fields = {} if value is None or value.is_null else value.fields(f"'judge_prompts' of {where}")
    prompts = {}
    for name in _JUDGED:
        if name not in fields:
            prompts[name] = _own_judge_prompts()[name]
            continue
        prompts[name] = fields[name].text(f"judge prompt {name!r} of {where}")
        if not any(found[0] == "{answer}" for found in _PLACES.finditer(prompts[name])):
            raise DataError(f"{fields[name].location}: judge prompt {name!r} of {where} has no {{answer}}")
    return prompts
