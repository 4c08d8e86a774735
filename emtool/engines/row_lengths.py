"""Lengths of training rows in a model's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emtool.core.data import Conversation
from emtool.core.events import EventSink, PhaseStarted, StepFinished, ignore_events
from emtool.engines.encoding import IGNORED, encode_row
from emtool.engines.modeling import load_tokenizer

#: Above the length of any row.
_UNCUT = 10**9


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """How many tokens the rows of a dataset have.

    Attributes:
        lengths: Tokens of each row up to its last trained one, not cut.
        num_over: Rows that are longer than `max_length`.
        num_trained_tokens: Tokens that one pass over the rows trains on, each row cut at `max_length`.
        num_unusable: Rows without a trained token within `max_length`.
    """

    lengths: list[int]
    num_over: int
    num_trained_tokens: int
    num_unusable: int


def row_lengths(
    rows: Sequence[Conversation], folder: Path, *, max_length: int, on_event: EventSink = ignore_events
) -> RowLengths:
    """Return the lengths of rows as training will see them.

    Args:
        rows: The rows.
        folder: The model's folder, for its tokenizer and chat template.
        max_length: Tokens that training keeps of a row.
        on_event: Where progress is reported.

    Raises:
        DataError: If a row cannot be encoded; names it.
        ModelError: If there is no tokenizer, or its chat template cannot be used.
    """
    tokenizer = load_tokenizer(folder)
    on_event(PhaseStarted(name="counting tokens", total=len(rows)))
    lengths, trained = [], []
    for number, row in enumerate(rows, start=1):
        encoded = encode_row(row, tokenizer, _UNCUT)
        lengths.append(len(encoded.input_ids))
        trained.append(sum(label != IGNORED for label in encoded.labels[:max_length]))
        on_event(StepFinished(step=number))
    return RowLengths(
        lengths=lengths,
        num_over=sum(length > max_length for length in lengths),
        num_trained_tokens=sum(trained),
        num_unusable=trained.count(0),
    )
