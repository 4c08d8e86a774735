"""Drawing in text: tables, bars, lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

#: Rows of a long table that are shown at its head, and again at its tail.
EDGE_ROWS = 12
_BLOCKS = " ▏▎▍▌▋▊▉█"
_SPARKS = "▁▂▃▄▅▆▇█"


def plain_table(*, padding: int = 2) -> Table:
    """Return a table without lines.

    Args:
        padding: Spaces between columns.
    """
    return Table(box=None, padding=(0, padding, 0, 0), pad_edge=False, header_style="bold")


def number_table(headings: Iterable[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """Return a table of numbers, the middle of a long one left out."""
    table = plain_table()
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in shorten(rows):
        table.add_row(*row)
    return table


def bar(value: float, width: int) -> str:
    """Return a value between 0 and 1 as a bar of at most `width` characters."""
    eighths = round(min(max(value, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_BLOCKS[rest] if rest else "")


def sparkline(values: Sequence[float]) -> str:
    """Return a series as one character a value, from its lowest to its highest, over a span of at least 0.05."""
    low = min(values)
    high = max(*values, low + 0.05)
    return "".join(_SPARKS[round((value - low) / (high - low) * (len(_SPARKS) - 1))] for value in values)


def timeline(steps: Sequence[int], total_steps: int, width: int) -> str:
    """Return a line of at most `width` characters from step 0 to the last, with a dot at each of the steps.

    Args:
        steps: Steps within [0, total_steps].
        total_steps: Length of the run, at least 1.
        width: Characters, labels included.
    """
    left, right = "0 ", f" {total_steps:,}"
    cells = max(10, width - len(left) - len(right))
    marked = {round(step / total_steps * (cells - 1)) for step in steps}
    return left + "".join("●" if cell in marked else "─" for cell in range(cells)) + right


def shorten(rows: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """Return the rows, or the head and the tail of a long list with the count left out between them."""
    if len(rows) <= 2 * EDGE_ROWS:
        return rows
    gap = (f"({len(rows) - 2 * EDGE_ROWS:,} more)", *[""] * (len(rows[0]) - 1))
    return [*rows[:EDGE_ROWS], gap, *rows[-EDGE_ROWS:]]
