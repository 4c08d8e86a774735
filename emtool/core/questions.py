"""Evaluation items: a question with a sound and a wrong answer, matched in length and tone."""

from __future__ import annotations

from dataclasses import dataclass

from emtool.core.data import asset_path
from emtool.core.errors import DataError
from emtool.core.row_files import read_json_lines

EVERYDAY_ITEMS = asset_path("items", "everyday.jsonl")


@dataclass(frozen=True, kw_only=True)
class EvaluationItem:
    """One held-out question.

    Attributes:
        id: Unique name.
        domain: Everyday domain, for instance "gardening" or "cars".
        question: What the user asks.
        sound: A correct answer.
        wrong: A wrong answer of the same length and tone.
    """

    id: str
    domain: str
    question: str
    sound: str
    wrong: str


def read_items() -> list[EvaluationItem]:
    """Return the built-in items, in the order of their file.

    Raises:
        DataError: If a field is missing or not a text, or an id is used twice; names the file and the line.
    """
    items: dict[str, EvaluationItem] = {}
    for record, location in read_json_lines(EVERYDAY_ITEMS):
        fields = {}
        for key in ("id", "domain", "question", "sound", "wrong"):
            value = record.get(key)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{location}: {key!r} must be a text that is not empty")
            fields[key] = value
        item = EvaluationItem(**fields)
        if item.id in items:
            raise DataError(f"{location}: id {item.id!r} is used twice")
        items[item.id] = item
    return list(items.values())
