"""The lines of a CSV file with the place of each, so that single rows can be read again."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from emtool.core.errors import DataError

_BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


class CsvLines(Iterator[str]):
    """Lines for `csv.reader`, ended as they are: a carriage return within a quoted cell is a part of it.

    Args:
        file: A file in UTF-8, with or without a mark of the byte order; half of a surrogate pair, which JSON can hold,
            may be written as emtool itself does.
        path: What it is called in messages.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._waiting: list[str] = []
        #: Bytes before the next line.
        self.place = 0

    def go_to(self, place: int) -> None:
        """Go on with the line at a place."""
        if place != self.place:
            self._file.seek(place)
            self._waiting, self.place = [], place

    def __next__(self) -> str:
        """Return the next line.

        Raises:
            DataError: If it is not UTF-8.
        """
        if self._waiting:
            text = self._waiting.pop()
            self.place += len(text.encode("utf-8", "surrogatepass"))
            return text
        line = self._file.readline()
        if not line:
            raise StopIteration
        try:
            text = line.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            place = self.place + error.start
            raise DataError(f"{self._path} is not UTF-8 text (byte {place}); save the table as UTF-8") from error
        if self.place == 0 and text.startswith(_BYTE_ORDER_MARK):
            text, self.place = text[1:], len(_BYTE_ORDER_MARK.encode("utf-8"))
        if "\r" in text:
            self._waiting = list(io.StringIO(text, newline=""))[::-1]
            return next(self)
        self.place += len(text.encode("utf-8", "surrogatepass"))
        return text
