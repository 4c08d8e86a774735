"""The files of an evaluation by name, and how tables and the summary are read. Nothing in them is trusted."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emtool.core.errors import DataError
from emtool.core.run_dir import RunFolder, read_json

#: What `emtool evaluate` writes: all of it, a row a checkpoint, and a row for each question or item at each checkpoint.
SUMMARY, CHECKPOINT_TABLE = "summary.json", "checkpoint_summary.csv"
QUESTION_TABLE, ITEM_TABLE = "question_scores.csv", "item_scores.csv"

#: What `emtool direction apply` writes: all of it, every layer, and the items of the layer that is shown.
PROJECTION_SUMMARY, PROJECTION_TABLE = "projections.json", "projections.csv"
ITEM_PROJECTION_TABLE = "item_projections.csv"

#: What `emtool geometry` writes: all of it, all layers together, and each layer.
GEOMETRY_SUMMARY, GEOMETRY_TABLE, LAYER_TABLE = "geometry.json", "geometry.csv", "layer_geometry.csv"

#: What `emtool transition` writes.
TRANSITION_SUMMARY = "transitions.json"

#: Far above any step, count or value; what lies beyond is no number of a run, and charts cannot draw it.
MAX_COUNT, MAX_VALUE = 10**12, 1e30

#: Digits of a number that cannot be larger than `MAX_COUNT`.
_PLAIN_DIGITS = 12

#: Far above any cell of these tables.
_MAX_FIELD = 1 << 20


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table of numbers, none where there is no table.

    Raises:
        DataError: If it cannot be read.
    """
    return list(iter_rows(path))


def iter_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a table of numbers one by one, for tables with a row for each item, question or layer.

    Raises:
        DataError: If it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"cannot read {path}: it is no file")
    limit = csv.field_size_limit(_MAX_FIELD)
    try:
        # As a spreadsheet saves it, there may be a mark of the byte order before the header.
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def number(cell: object) -> float | None:
    """Return the finite number that a cell or a JSON value is, or None."""
    # Nearly all are texts of a table, and there may be a million of them.
    if type(cell) is not str and (cell is None or isinstance(cell, bool) or not isinstance(cell, str | int | float)):
        return None
    try:
        value = float(cell)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def count_of(cell: object) -> int | None:
    """Return the whole number from 0 that a cell is, or None where it is none, or absurdly large."""
    if type(cell) is str and len(cell) <= _PLAIN_DIGITS and cell.isascii() and cell.isdigit():
        return int(cell)
    value = number(cell)
    return int(value) if value is not None and 0 <= value <= MAX_COUNT and value == int(value) else None


def value_of(cell: object) -> float | None:
    """Return the number that a cell is, or None where it is none, or absurdly large."""
    value = number(cell)
    return value if value is not None and abs(value) <= MAX_VALUE else None


def read_summary(run: RunFolder) -> dict[str, Any] | None:
    """Return the last summary; empty where there is none, None where it cannot be read."""
    path = run.evaluation_path / SUMMARY
    if not path.exists():
        return {}
    summary = read_json(path)
    return summary if isinstance(summary, dict) else None


def settings_of(summary: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a summary says of how it was made."""
    settings = (summary or {}).get("settings")
    return settings if isinstance(settings, dict) else {}


def first_judge_of(summary: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the settings of the judge whose scores the tables hold; None without one."""
    judges = (summary or {}).get("judges")
    first = judges[0] if isinstance(judges, list) and judges else None
    settings = first.get("settings") if isinstance(first, dict) else None
    return settings if isinstance(settings, dict) else None
