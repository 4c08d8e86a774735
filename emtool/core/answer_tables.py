"""Tables of judged answers: `checkpoint_N_eval.csv`, as notebooks of the field read and write them."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from emtool.core.csv_lines import CsvLines
from emtool.core.em_metrics import JudgedAnswer
from emtool.core.errors import DataError
from emtool.core.judgement import CODE, ERROR, REFUSAL, SCORED, UNSCORED, Judgement

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

COLUMNS = ("question", "question_id", "response", "aligned", "coherent")
#: What a table must have to compute from. Published tables call the response `answer`.
NEEDED = ("question_id", "response", "aligned", "coherent")
_RESPONSE, _PUBLISHED_RESPONSE = "response", "answer"

_FILE_NAME = re.compile(r"checkpoint_(0|[1-9][0-9]{0,11})_eval\.csv")
_WRITTEN_NAME = re.compile(r"(checkpoint_(0|[1-9][0-9]{0,11})_eval|question_scores|item_scores)(\.[\w.-]+)?\.csv")
#: Far above any answer.
_MAX_FIELD = 1 << 24
#: As many digits as the name of a table can have.
_MAX_STEP = 10**12
#: A cell without a number, and what it stands for. Empty is a score that could not be made.
_WORDS = {"": UNSCORED, "nan": UNSCORED, "none": UNSCORED, "refusal": REFUSAL, "code": CODE, "error": ERROR}


def table_name(step: int, judge: str = "") -> str:
    """Return the file name of a checkpoint's table.

    Args:
        step: Optimizer step.
        judge: What marks the table of a further judge.
    """
    return f"checkpoint_{step}_eval{'.' if judge else ''}{judge}.csv"


def is_table_name(name: str) -> bool:
    """Return whether a file name is one that an evaluation gives to its tables."""
    return _WRITTEN_NAME.fullmatch(name) is not None


def table_text(answers: Sequence[JudgedAnswer]) -> str:
    """Return answers as the text of a table; a score that is not there is the word for why, or empty."""
    text = io.StringIO()
    # Quoted, all of them: an answer may hold a carriage return, which csv would leave bare.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    for answer in answers:
        scores = [_cell(judgement) for judgement in (answer.aligned, answer.coherent)]
        writer.writerow([answer.question, answer.question_id, answer.response, *scores])
    return text.getvalue()


def _cell(judgement: Judgement) -> str:
    if judgement.status == SCORED:
        return repr(judgement.score)
    return "" if judgement.status == UNSCORED else judgement.status.upper()


def read_tables(path: Path) -> list[JudgedAnswer]:
    """Return the answers of a table, or of every `checkpoint_N_eval.csv` of a folder.

    The step is the column `step`, else the file's name, else unknown. Answers of a step that name one question are
    numbered in their order, so that two steps are paired if their tables have the same order.

    Raises:
        DataError: If nothing can be read, a column is missing, or a score is none; names file and row.
    """
    return _numbered(answer for table, step in _tables_at(path) for _, answer in _rows(table, step))


class AnswersByStep(Mapping[int | None, list[JudgedAnswer]]):
    """The answers that `read_tables` returns, by step: increasing, those of an unknown step first.

    They stay on disk, and those of a step are read when they are asked for. Of a table with the column `step`, the
    place of each row is kept: 8 bytes.

    Args:
        path: A table, or a folder of them.

    Raises:
        DataError: As `read_tables` does; what is wrong in a table of one step is found when that step is asked for.
    """

    def __init__(self, path: Path) -> None:
        self._places: dict[int | None, list[tuple[Path, array[int] | None]]] = {}
        for table, step in _tables_at(path):
            if "step" not in _columns(table):
                self._places.setdefault(step, []).append((table, None))
                continue
            places: dict[int | None, array[int]] = {}
            for place, answer in _rows(table, step):
                places.setdefault(answer.step, array("q")).append(place)
            for found, of_step in places.items():
                self._places.setdefault(found, []).append((table, of_step))
        self._steps = sorted(self._places, key=lambda step: -1 if step is None else step)

    def __getitem__(self, step: int | None) -> list[JudgedAnswer]:
        """Return the answers of a step, read anew."""
        return _numbered(answer for table, places in self._places[step] for _, answer in _rows(table, step, places))

    def __iter__(self) -> Iterator[int | None]:
        """Iterate over the steps."""
        return iter(self._steps)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._steps)


def _tables_at(path: Path) -> list[tuple[Path, int | None]]:
    """Return the tables that a path stands for, with the step that each one's name says."""
    if not path.is_dir():
        match = _FILE_NAME.fullmatch(path.name)
        return [(path, int(match[1]) if match else None)]
    tables = step_tables(path)
    if not tables:
        raise DataError(f"{path} has no checkpoint_N_eval.csv; give a table, or the folder that holds them")
    return [(table, step) for step, table in tables.items()]


def step_tables(folder: Path) -> dict[int, Path]:
    """Return the tables `checkpoint_N_eval.csv` of a folder by their step, increasing; none where it is not there."""
    names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208
    found = {int(match[1]): folder / name for name in names if (match := _FILE_NAME.fullmatch(name))}
    return dict(sorted(found.items()))


def _numbered(answers: Iterable[JudgedAnswer]) -> list[JudgedAnswer]:
    counts: dict[tuple[int | None, str], int] = {}
    numbered = []
    for answer in answers:
        place = (answer.step, answer.question_id)
        counts[place] = counts.get(place, -1) + 1
        numbered.append(replace(answer, pair=(0, counts[place])))
    return numbered


def _columns(path: Path) -> list[str]:
    with _open(path) as file:
        return _header(csv.reader(CsvLines(file, path), strict=True), path)


def _rows(path: Path, step: int | None, places: Iterable[int] | None = None) -> Iterator[tuple[int, JudgedAnswer]]:
    """Yield the place of each row of a table and its answer, unnumbered. Another table is read after the last one.

    Args:
        path: The table.
        step: What its name says.
        places: Where the rows begin that are wanted, increasing; None takes all.
    """
    # The limit is the process's: it is put back for whoever else reads tables in it.
    limit = csv.field_size_limit(_MAX_FIELD)
    try:
        with _open(path) as file:
            lines = CsvLines(file, path)
            reader = csv.reader(lines, strict=True)
            try:
                names = _header(reader, path)
                number = 0
                for number, (place, cells) in enumerate(_cells(reader, lines, places), start=1):
                    yield place, _answer(_row(names, cells), step, f"{path}, row {number}")
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: {error}") from error
        if not number:
            raise DataError(f"{path} has no rows below its header")
    finally:
        csv.field_size_limit(limit)


def _cells(reader: CsvReader, lines: CsvLines, places: Iterable[int] | None) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank, each with its place."""
    if places is not None:
        for place in places:
            lines.go_to(place)
            yield place, next(reader)
        return
    while True:
        place = lines.place
        cells = next(reader, None)
        if cells is None:
            return
        if cells:
            yield place, cells


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise DataError(f"cannot read {path}: it is no file")
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _header(reader: CsvReader, path: Path) -> list[str]:
    names = next(reader, [])
    if _RESPONSE not in names:
        names = [_RESPONSE if name == _PUBLISHED_RESPONSE else name for name in names]
    if missing := [name for name in NEEDED if name not in names]:
        raise DataError(f"{path} lacks the column(s) {', '.join(missing)}; it must have {', '.join(NEEDED)}")
    if twice := [name for name in (*COLUMNS, "step") if names.count(name) > 1]:
        raise DataError(f"{path} has the column(s) {', '.join(twice)} more than once; keep one of each")
    return names


def _row(names: Sequence[str], cells: Sequence[str]) -> dict[str | None, str | None]:
    """Return a row by its columns, None for a cell or a column that is not there."""
    row: dict[str | None, str | None] = dict(zip_longest(names, cells[: len(names)]))
    return row if len(cells) <= len(names) else {**row, None: None}


def _answer(row: Mapping[str | None, str | None], step: int | None, location: str) -> JudgedAnswer:
    if None in row:
        raise DataError(f"{location}: there are more cells than columns; quote texts that hold commas")
    # Else the end of a cut file, or a quote that nothing closes, would pass for unscored answers.
    if None in row.values():
        raise DataError(f"{location}: there are fewer cells than columns; the file is cut, or a quote is not closed")
    question_id, response = row["question_id"], row["response"]
    if not question_id or response is None:
        raise DataError(f"{location}: a row must have a question_id and a response")
    return JudgedAnswer(
        step=_step(row.get("step"), step, location),
        question_id=question_id,
        pair=(0, 0),
        question=row.get("question") or "",
        response=response,
        aligned=_judgement(row["aligned"], "aligned", location),
        coherent=_judgement(row["coherent"], "coherent", location),
    )


def _step(cell: str | None, step: int | None, location: str) -> int | None:
    if cell is None or cell.strip() == "":
        return step
    value = _number(cell)
    if not (math.isfinite(value) and 0 <= value < _MAX_STEP and value == int(value)):
        raise DataError(f"{location}: step is {cell[:40]!r}; it must be a whole number from 0, below 10**12")
    return int(value)


def _judgement(cell: str | None, name: str, location: str) -> Judgement:
    text = (cell or "").strip()
    if (status := _WORDS.get(text.lower())) is not None:
        return Judgement(status=status)
    score = _number(text)
    if not 0 <= score <= 100:
        raise DataError(f"{location}: {name} is {text[:40]!r}; it must be 0 to 100, REFUSAL, CODE, ERROR or empty")
    return Judgement(status=SCORED, score=score)


def _number(text: str) -> float:
    """Return the number that a text is, or NaN; Python alone takes 1_0 for 10."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
