from hypothesis import given
from hypothesis import strategies as st

from emtool.core.data import Conversation, Message
from emtool.core.data_stats import MAX_BINS, LengthBin, LengthStats, RowStats, num_characters


def row(*turns: str) -> Conversation:
    """Return a row of turns like "user: text"."""
    parts = [turn.split(": ") for turn in turns]
    return Conversation(messages=tuple(Message(role=role, content=text) for role, text in parts), location="x:1")


def test_rows_are_counted_by_hand() -> None:
    rows = [
        row("user: a", "assistant: b"),
        row("user: a", "assistant: b"),
        row("user: a", "assistant: other"),
        row("system: s", "user: a", "assistant: b"),
        row("user: c", "assistant: d", "user: e", "assistant: f"),
    ]
    assert RowStats.of(rows).to_dict() == {
        "num_rows": 5,
        "turns": {"system": 1, "user": 6, "assistant": 6},
        "num_system_rows": 1,
        "num_multi_turn_rows": 1,
        "num_duplicate_rows": 1,
        "num_duplicate_prompts": 2,
    }
    assert num_characters(rows[4]) == 4


def test_lengths_have_quantiles_that_are_lengths_and_bars_of_one_round_width() -> None:
    stats = LengthStats.of([*range(10, 110), 5000], unit="tokens")
    assert (stats.median, stats.p95, stats.max) == (60, 105, 5000)
    widths = {each.high - each.low + 1 for each in stats.bins if each.high is not None}
    assert widths == {10}
    assert stats.bins[0] == LengthBin(low=10, high=19, num_rows=10)
    assert stats.bins[-1] == LengthBin(low=110, high=None, num_rows=1)


def test_rows_of_one_length_are_one_bar() -> None:
    stats = LengthStats.of([7, 7], unit="characters")
    assert stats.bins == (LengthBin(low=7, high=7, num_rows=2),)
    assert (stats.median, stats.p95, stats.max) == (7, 7, 7)


@given(st.lists(st.integers(min_value=1, max_value=10**7), min_size=1, max_size=60))
def test_every_row_is_in_one_bar(lengths: list[int]) -> None:
    stats = LengthStats.of(lengths, unit="tokens")
    assert sum(each.num_rows for each in stats.bins) == len(lengths)
    assert len(stats.bins) <= MAX_BINS + 1
    for each in stats.bins:
        inside = [length for length in lengths if each.low <= length and (each.high is None or length <= each.high)]
        assert len(inside) == each.num_rows
    assert sum(length <= stats.median for length in lengths) * 2 >= len(lengths)
