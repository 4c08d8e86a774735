"""Where records stand in a file, by a hash of what names them: 16 bytes a record."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np

from emtool.core.errors import shown

#: Records that are added one by one before they are sorted in.
_MAX_LOOSE = 100_000


class PlaceIndex:
    """Places by name, several for one name. Names are SHA-256 in hexadecimal, of which 64 bits are held."""

    def __init__(self) -> None:
        self._names: Any = np.empty(0, dtype=np.uint64)
        self._places: Any = np.empty(0, dtype=np.int64)
        self._loose: dict[int, list[int]] = {}
        self._num_loose = 0

    def add(self, sha256: str, place: int) -> None:
        """Add a place; a name that is no SHA-256 is passed over, since nobody will ask for it."""
        try:
            name = short_hash(sha256)
        except ValueError:
            return
        self._loose.setdefault(name, []).append(place)
        self._num_loose += 1
        if self._num_loose >= _MAX_LOOSE:
            self._sort_in()

    def last(self, sha256: str) -> int | None:
        """Return the place of a name that was added last, or None; hardly ever that of another name."""
        name = short_hash(sha256)
        if loose := self._loose.get(name):
            return loose[-1]
        # A view gives Python's numbers: numpy takes four times as long to look for one.
        names = memoryview(self._names)
        end = bisect_right(names, name)
        return int(self._places[end - 1]) if end and names[end - 1] == name else None

    def has(self, sha256: str) -> bool:
        """Return whether a name has a place."""
        return self.last(sha256) is not None

    def _sort_in(self) -> None:
        names = [name for name, places in self._loose.items() for _ in places]
        places = [place for of_name in self._loose.values() for place in of_name]
        every = np.concatenate([self._names, np.array(names, dtype=np.uint64)])
        # Stable: of equal names, the place that was added last stays the last.
        order = np.argsort(every, kind="stable")
        self._names = every[order]
        self._places = np.concatenate([self._places, np.array(places, dtype=np.int64)])[order]
        self._loose, self._num_loose = {}, 0


def short_hash(sha256: str) -> int:
    """Return the first 64 bits of a SHA-256 in hexadecimal.

    Raises:
        ValueError: If it is none.
    """
    if len(sha256) != 64:
        raise ValueError(f"{shown(sha256)} is no SHA-256")
    return int(sha256[:16], 16)
