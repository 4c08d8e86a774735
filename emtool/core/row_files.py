"""Files of rows: JSON Lines and Parquet, read one row at a time with the place of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from emtool.core.errors import DataError

PARQUET_SUFFIX = ".parquet"
_BATCH_ROWS = 1_000


def read_json_lines(path: Path, *, label: str | None = None) -> Iterator[tuple[dict[str, object], str]]:
    """Yield each JSON object of a file with its location, "file:line". Blank lines are passed over.

    Args:
        path: The file.
        label: What the file is called in locations, where that is not its path.

    Raises:
        DataError: If the file cannot be read or a line is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                location = f"{label or path}:{number}"
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{location}: not a line of JSON in UTF-8: {error}") from error
                if not isinstance(record, dict):
                    raise DataError(f"{location}: a JSON object is needed, found {type(record).__name__}")
                yield record, location
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def read_parquet(path: Path, *, columns: frozenset[str]) -> Iterator[tuple[dict[str, object], str]]:
    """Yield each row of a Parquet file with its location, "file: row N", a batch in memory at a time.

    Args:
        path: The file.
        columns: Columns whose values are read; the others come with None, so that a message can name them.

    Raises:
        DataError: If the file cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in columns]
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted or names[:1]):
                for record in batch.to_pylist():
                    number += 1
                    kept = {name: record.get(name) if name in columns else None for name in names}
                    yield kept, f"{path}: row {number:,}"
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(f"cannot read {path} as Parquet: {reason}") from error
