"""What was made last is held, as far as it fits: a small evaluation is read once, a large one stays on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

#: Items that are held of one mapping, tens of megabytes of answers; two steps are held however many they have.
MAX_ITEMS = 20_000


class Recent(Mapping[int, Sequence[T]]):
    """A mapping by step whose values take time to make; those that were asked for last are held.

    Args:
        source: Makes the values, always the same ones.
        max_items: Items of all values that are held; None takes `MAX_ITEMS`.
    """

    def __init__(self, source: Mapping[int, Sequence[T]], *, max_items: int | None = None) -> None:
        self._source = source
        self._steps = frozenset(source)
        self._max_items = MAX_ITEMS if max_items is None else max_items
        self._held: OrderedDict[int, Sequence[T]] = OrderedDict()
        self._num_items = 0

    def __getitem__(self, step: int) -> Sequence[T]:
        """Return the value of a step; it belongs to all who ask, and is not changed."""
        if step in self._held:
            self._held.move_to_end(step)
            return self._held[step]
        value = self._source[step]
        self._held[step] = value
        self._num_items += len(value)
        while self._num_items > self._max_items and len(self._held) > 2:
            self._num_items -= len(self._held.popitem(last=False)[1])
        return value

    def __contains__(self, step: object) -> bool:
        """Return whether there is a step, without making its value."""
        return step in self._steps

    def __iter__(self) -> Iterator[int]:
        """Iterate over the steps."""
        return iter(self._source)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._source)
