"""Answers as two small texts that a page can unpack: what is known of them, and their words."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emtool.core.em_metrics import JudgedAnswer
from emtool.core.judgement import SCORED, UNSCORED, Judgement
from emtool.report.report_run import shown_text

#: A word with the space before it, marks likewise, or other space: one after another they are the text again.
_WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s+")


@dataclass(frozen=True, kw_only=True)
class PackedAnswers:
    """Answers packed for a page, each part gzip in base64.

    Attributes:
        index: JSON. `runs`, `questions` and `asked` are names and texts; `words` the words of all answers, the most
            frequent first; `answers` an array each: run, step, question, number, text asked (all but step as indices),
            alignment and coherence (a number, or a word for why there is none).
        texts: For each answer the number of its words, then each word as its index, least significant seven bits
            first, the eighth set where more follow (LEB128).
    """

    index: str
    texts: str


def pack_answers(names: Sequence[str], answers: Iterable[tuple[int, JudgedAnswer]]) -> PackedAnswers:
    """Return answers packed; numbers for words leave less than gzip alone does.

    Args:
        names: The runs.
        answers: Index of the run, and an answer of it.
    """
    ordered = sorted(answers, key=lambda one: (one[0], one[1].step or 0, one[1].question_id, one[1].pair))
    texts = [_WORD.findall(answer.response) for _, answer in ordered]
    words = [word for word, _ in Counter(word for text in texts for word in text).most_common()]
    numbers = {word: number for number, word in enumerate(words)}
    questions: dict[str, int] = {}
    asked: dict[str, int] = {}
    rows = [
        [
            run,
            answer.step or 0,
            questions.setdefault(answer.question_id, len(questions)),
            answer.pair[1],
            asked.setdefault(answer.question, len(asked)),
            _score(answer.aligned),
            _score(answer.coherent),
        ]
        for run, answer in ordered
    ]
    index = {
        "runs": list(names),
        "questions": [shown_text(question) for question in questions],
        "asked": list(asked),
        "words": words,
        "answers": rows,
    }
    written = json.dumps(index, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    packed = bytearray()
    for text in texts:
        for number in (len(text), *(numbers[word] for word in text)):
            packed += _varint(number)
    # Half of a surrogate pair becomes its JSON escape.
    return PackedAnswers(index=_zipped(written.encode("utf-8", "backslashreplace")), texts=_zipped(bytes(packed)))


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def _zipped(content: bytes) -> str:
    # Without the time of writing: the same answers give the same page.
    return base64.b64encode(gzip.compress(content, compresslevel=9, mtime=0)).decode("ascii")


def _score(judgement: Judgement) -> float | str:
    if judgement.status == SCORED and judgement.score is not None:
        return round(judgement.score, 2)
    return "" if judgement.status == UNSCORED else judgement.status
