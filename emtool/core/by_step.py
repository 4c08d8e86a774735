"""Values by step, made when they are asked for: a small evaluation is held in memory, a large one stays on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

V = TypeVar("V")
T = TypeVar("T")

#: Items that are held of one mapping, tens of megabytes of answers; two steps are held however many they have.
MAX_ITEMS = 20_000


class ByStep(Mapping[int, V]):
    """A value for each of some steps, made whenever it is asked for.

    Args:
        steps: The steps, in their order.
        make: Returns the value of a step, always the same one.
    """

    def __init__(self, steps: Iterable[int], make: Callable[[int], V]) -> None:
        self._steps = dict.fromkeys(steps)
        self._make = make

    def __getitem__(self, step: int) -> V:
        """Return the value of a step.

        Raises:
            KeyError: If it is none of the steps.
        """
        if step not in self._steps:
            raise KeyError(step)
        return self._make(step)

    def __contains__(self, step: object) -> bool:
        """Return whether there is a step, without making its value."""
        return step in self._steps

    def __iter__(self) -> Iterator[int]:
        """Iterate over the steps."""
        return iter(self._steps)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._steps)


class Recent(ByStep[Sequence[T]]):
    """A sequence for each of some steps; those that were asked for last are held.

    Args:
        steps: The steps, in their order.
        make: Returns the sequence of a step, always the same one.
        max_items: Items of all sequences that are held; None takes `MAX_ITEMS`.
    """

    def __init__(
        self, steps: Iterable[int], make: Callable[[int], Sequence[T]], *, max_items: int | None = None
    ) -> None:
        super().__init__(steps, make)
        self._max_items = MAX_ITEMS if max_items is None else max_items
        self._held: OrderedDict[int, Sequence[T]] = OrderedDict()
        self._num_items = 0

    def __getitem__(self, step: int) -> Sequence[T]:
        """Return the sequence of a step; it belongs to all who ask, and is not changed."""
        if step in self._held:
            self._held.move_to_end(step)
            return self._held[step]
        value = super().__getitem__(step)
        self._held[step] = value
        self._num_items += len(value)
        while self._num_items > self._max_items and len(self._held) > 2:
            self._num_items -= len(self._held.popitem(last=False)[1])
        return value
