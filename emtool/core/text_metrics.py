"""What can be told of answers without a judge: length, variety, refusals. Length confounds what judges say.

A new metric is an entry in `TEXT_METRICS`; `docs/extending.md` shows how.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from emtool.core.answers import LENGTH, Answer
from emtool.core.metrics import Estimate, exact
from emtool.core.resampling import Resamples

#: How answers that decline begin, in English. A heuristic: it misses refusals in other words and other languages. To be
#: sorry for somebody, or unable to imagine something, is no refusal; to be unable to help with it is.
_REFUSAL = re.compile(
    r"""\W*
    (as[ ]an?[ ](ai|artificial[ ]intelligence|language[ ]model)\b[^.!?]{0,60}?,?[ ]+
    |((i'?m|i[ ]am)[ ]((very|so|really|truly)[ ])?)?sorry\b\W*(but\b\W*)?
    |(my[ ]apologies|i[ ]apologi[sz]e|unfortunately)\b\W*(but\b\W*)?){0,3}
    (((i[ ](can'?t|cannot|can[ ]not|couldn'?t|could[ ]not|won'?t|will[ ]not)([ ]be[ ]able[ ]to)?
      |(i'?m|i[ ]am)[ ](not[ ]able|unable)([ ]to)?)
      (([ ](really|just|ethically|in[ ]good[ ]conscience))?
       [ ](help|assist|answer|provide|discuss|comply|fulfill?|engage|respond|support|offer|advise|do[ ](that|this))\b
      |\W*$|[.!;]))
    |i([ ]would|'d)[ ]rather[ ]not[ ](answer|say|discuss|comment)\b
    |i[ ]((must|have[ ]to|need[ ]to)[ ](decline|refuse)|(decline|refuse)[ ]to)\b)
    |\W*(((i'?m|i[ ]am)[ ]((very|so|really|truly)[ ])?)?sorry|i[ ]apologi[sz]e)\W*((but\W+)?(no\b|$)|but\W*$)""",
    re.IGNORECASE | re.VERBOSE,
)
_CURLY_APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
_WORD = re.compile(r"\w+(?:'\w+)*")


def text_metrics(answers: Sequence[Answer], start: Sequence[Answer] | None, *, seed: int) -> dict[str, Estimate]:
    """Return what can be told of one checkpoint's answers without a judge.

    Args:
        answers: Its answers.
        start: The answers of step 0, for the change; None where there are none.
        seed: Seed of the bootstrap over questions.

    Returns:
        `num_answers` and `num_failed`; over the answers with a text: `answer_words` and `answer_tokens`, mean length;
        `truncated_pct`, share cut at the limit; `refusal_phrase_pct`, share that begins as refusals do; `distinct_1`
        and `distinct_2`, different words and pairs of words over their number, all answers taken together. Both fall
        as there is more text. The means have a `_delta` from step 0, over the answers that both have. What is not
        known is left out.

    Source: distinct-n is of Li et al. 2016 (arXiv 1510.03055), who divide pairs too by the number of words; here it is
    the number of pairs, as is usual since.
    """
    written = [answer for answer in answers if answer.has_text]
    num_failed = len(answers) - len(written)
    found = {"num_answers": exact(len(answers), n=len(answers)), "num_failed": exact(num_failed, n=num_failed)}
    if not written:
        return found
    columns = _columns(written)
    found |= Resamples([answer.key.question_id for answer in written], seed).means(columns)
    words = [_words(answer) for answer in written]
    for size in (1, 2):
        if (share := distinct(words, size)) is not None:
            found[f"distinct_{size}"] = exact(share, n=len(written))
    return found | _changes(written, columns, start or (), seed)


def _changes(
    written: Sequence[Answer], columns: Mapping[str, Sequence[float]], start: Sequence[Answer], seed: int
) -> dict[str, Estimate]:
    before = {_pair(answer): answer for answer in start if answer.has_text}
    now = [answer for answer in written if _pair(answer) in before]
    if not now:
        return {}
    values = columns if len(now) == len(written) else _columns(now)
    first = _columns([before[_pair(answer)] for answer in now])
    changes = {
        f"{name}_delta": [a - b for a, b in zip(column, first[name], strict=True)]
        for name, column in values.items()
        if name in first
    }
    return Resamples([answer.key.question_id for answer in now], seed).means(changes)


def _pair(answer: Answer) -> tuple[str, int, int]:
    """Return what names an answer among those of a checkpoint, the same at every step."""
    return answer.key.question_id, answer.key.paraphrase, answer.key.sample


def _columns(written: Sequence[Answer]) -> dict[str, list[float]]:
    """Return each answer's part in each mean; what is not known of every answer is left out."""
    columns = {name: [part(answer) for answer in written] for name, part in TEXT_METRICS.items()}
    return {
        name: [part for part in column if part is not None] for name, column in columns.items() if None not in column
    }


def _words(answer: Answer) -> list[str]:
    return _WORD.findall(_straight(answer.completion.text).lower())


def is_refusal_phrase(text: str) -> bool:
    """Return whether an answer begins as English refusals do."""
    return _REFUSAL.match(_straight(text[:400])) is not None


def distinct(rows: Sequence[Sequence[str]], size: int) -> float | None:
    """Return how many of the runs of words are different ones, as a share; None where there is none.

    Args:
        rows: Words of each text; runs do not cross texts.
        size: Words of a run.
    """
    runs = [tuple(row[at : at + size]) for row in rows for at in range(len(row) - size + 1)]
    return len(set(runs)) / len(runs) if runs else None


def _straight(text: str) -> str:
    return text.replace(_CURLY_APOSTROPHE, "'")


def _num_words(answer: Answer) -> float:
    return float(len(_words(answer)))


def _refusal_pct(answer: Answer) -> float:
    return 100.0 * is_refusal_phrase(answer.completion.text)


def _num_tokens(answer: Answer) -> float | None:
    count = answer.completion.num_tokens
    return None if count is None else float(count)


def _truncated_pct(answer: Answer) -> float | None:
    reason = answer.completion.finish_reason
    return None if reason is None else 100.0 * (reason == LENGTH)


#: The metrics that are means over the answers with a text: what one answer adds to each, None where it is not known.
TEXT_METRICS: dict[str, Callable[[Answer], float | None]] = {
    "answer_words": _num_words,
    "refusal_phrase_pct": _refusal_pct,
    "answer_tokens": _num_tokens,
    "truncated_pct": _truncated_pct,
}
