"""What a dataset's rows look like in numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from emtool.core.data import ROLES, Conversation

#: Bars of a histogram, the open one at its end not counted.
MAX_BINS = 10
#: Share of the rows that the bars of equal width cover; a few long rows would squeeze the others into one bar.
_COVERED = 0.99


@dataclass(frozen=True, kw_only=True)
class RowStats:
    """Counts over the rows of a dataset.

    Attributes:
        num_rows: Rows.
        turns: Turns by role.
        num_system_rows: Rows with a system turn.
        num_multi_turn_rows: Rows with more than one assistant turn.
        num_duplicate_rows: Rows that repeat an earlier one exactly.
        num_duplicate_prompts: Rows whose turns before the first answer repeat those of an earlier row.
    """

    num_rows: int
    turns: Mapping[str, int]
    num_system_rows: int
    num_multi_turn_rows: int
    num_duplicate_rows: int
    num_duplicate_prompts: int

    @classmethod
    def of(cls, rows: Sequence[Conversation]) -> RowStats:
        """Return the counts over rows."""
        turns = Counter(message.role for row in rows for message in row.messages)
        roles = [[message.role for message in row.messages] for row in rows]
        prompts = {row.messages[: each.index("assistant")] for row, each in zip(rows, roles, strict=True)}
        return cls(
            num_rows=len(rows),
            turns={role: turns[role] for role in ROLES},
            num_system_rows=sum("system" in each for each in roles),
            num_multi_turn_rows=sum(each.count("assistant") > 1 for each in roles),
            num_duplicate_rows=len(rows) - len({row.messages for row in rows}),
            num_duplicate_prompts=len(rows) - len(prompts),
        )

    def to_dict(self) -> dict[str, object]:
        """Return the counts as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LengthBin:
    """A bar of a histogram.

    Attributes:
        low: Least length in it.
        high: Greatest length in it; None where it is open.
        num_rows: Rows in it.
    """

    low: int
    high: int | None
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class LengthStats:
    """How long the rows of a dataset are.

    Attributes:
        unit: What is counted, "tokens" or "characters".
        median: Length that half of the rows do not exceed.
        p95: Length that 95% of the rows do not exceed.
        max: Greatest length.
        bins: Histogram from the shortest row on.
    """

    unit: str
    median: int
    p95: int
    max: int
    bins: tuple[LengthBin, ...]

    @classmethod
    def of(cls, lengths: Iterable[int], *, unit: str) -> LengthStats:
        """Return the quantiles, each the length of a row, and the histogram of at least one length."""
        ordered = sorted(lengths)
        return cls(
            unit=unit,
            median=_quantile(ordered, 0.5),
            p95=_quantile(ordered, 0.95),
            max=ordered[-1],
            bins=_histogram(ordered),
        )

    def to_dict(self) -> dict[str, object]:
        """Return the lengths as JSON values."""
        return asdict(self)


def num_characters(row: Conversation) -> int:
    """Return the characters of a row's turns, without what a chat template adds."""
    return sum(len(message.content) for message in row.messages)


def _quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[math.ceil(share * len(ordered)) - 1]


def _histogram(ordered: Sequence[int]) -> tuple[LengthBin, ...]:
    """Return bars of one round width, and an open one for the longest rows."""
    low, high = ordered[0], _quantile(ordered, _COVERED)
    width = next(width for width in _round_widths() if high // width - low // width < MAX_BINS)
    counts = Counter(min(length // width, high // width + 1) for length in ordered)
    bins = [
        LengthBin(low=index * width, high=(index + 1) * width - 1, num_rows=counts[index])
        for index in range(low // width, high // width + 1)
    ]
    if rest := counts[high // width + 1]:
        bins.append(LengthBin(low=(high // width + 1) * width, high=None, num_rows=rest))
    return tuple(bins)


def _round_widths() -> Iterable[int]:
    return (step * 10**power for power in range(20) for step in (1, 2, 5))
