"""Tables of judged answers: `checkpoint_N_eval.csv`, as notebooks of the field read and write them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from emtool.core.em_metrics import JudgedAnswer
from emtool.core.errors import DataError
from emtool.core.judgement import CODE, ERROR, REFUSAL, SCORED, UNSCORED, Judgement

COLUMNS = ("question", "question_id", "response", "aligned", "coherent")
#: What a table must have to compute from. Published tables call the response `answer`.
NEEDED = ("question_id", "response", "aligned", "coherent")
_OTHER_NAMES = {"answer": "response"}

_STEP = re.compile(r"([0-9]{1,12})(\.0*)?", re.ASCII)
_SCORE = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_FILE_NAME = re.compile(r"checkpoint_(0|[1-9][0-9]{0,11})_eval\.csv")
#: Far above any answer.
_MAX_FIELD = 1 << 24
#: A cell without a number, and what it stands for. Empty is a score that could not be made.
_WORDS = {"": UNSCORED, "nan": UNSCORED, "none": UNSCORED, "refusal": REFUSAL, "code": CODE, "error": ERROR}


def table_name(step: int, judge: str = "") -> str:
    """Return the file name of a checkpoint's table.

    Args:
        step: Optimizer step.
        judge: What marks the table of a further judge.
    """
    return f"checkpoint_{step}_eval{'.' if judge else ''}{judge}.csv"


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
        DataError: If nothing can be read, there is no row, a column is missing, a score is none, or only some rows say
            their step; names file and row.
    """
    answers = _numbered(_read_tables(path))
    if not answers:
        raise DataError(f"{path} holds no answers")
    if len({answer.step is None for answer in answers}) > 1:
        raise DataError(f"{path}: some rows have a step and some have none; fill the column step")
    return answers


def _read_tables(path: Path) -> Iterator[JudgedAnswer]:
    if not path.is_dir():
        yield from _read_table(path, None)
        return
    found = {path_: _FILE_NAME.fullmatch(path_.name) for path_ in path.iterdir()}
    tables = sorted((int(match[1]), path_) for path_, match in found.items() if match)
    if not tables:
        raise DataError(f"{path} has no checkpoint_N_eval.csv; give a table, or the folder that holds them")
    for step, table in tables:
        yield from _read_table(table, step)


def _numbered(answers: Iterable[JudgedAnswer]) -> list[JudgedAnswer]:
    counts: dict[tuple[int | None, str], int] = {}
    numbered = []
    for answer in answers:
        place = (answer.step, answer.question_id)
        counts[place] = counts.get(place, -1) + 1
        numbered.append(replace(answer, pair=(0, counts[place])))
    return numbered


def _read_table(path: Path, step: int | None) -> Iterator[JudgedAnswer]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save the table as UTF-8") from error
    # The limit is the process's: it is put back for whoever else reads tables in it.
    before = csv.field_size_limit(_MAX_FIELD)
    # A carriage return within an answer is a part of it.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)
    names = _names(rows[0] if rows else [], path)
    for number, row in enumerate(rows[1:], start=1):
        location = f"{path}, row {number}"
        if len(row) != len(names):
            raise DataError(f"{location}: {len(row)} cells for {len(names)} columns; quote texts that hold commas")
        yield _answer(dict(zip(names, row, strict=True)), step, location)


def _names(header: Sequence[str], path: Path) -> list[str]:
    """Return the names of a table's columns, those that are called otherwise elsewhere by ours."""
    names = [name.strip() for name in header]
    names = [name if _OTHER_NAMES.get(name, name) in names else _OTHER_NAMES.get(name, name) for name in names]
    if missing := [name for name in NEEDED if name not in names]:
        raise DataError(f"{path} lacks the column(s) {', '.join(missing)}; it must have {', '.join(NEEDED)}")
    if twice := [name for name in (*COLUMNS, "step") if names.count(name) > 1]:
        raise DataError(f"{path} has the column(s) {', '.join(twice)} more than once")
    return names


def _answer(row: Mapping[str, str], step: int | None, location: str) -> JudgedAnswer:
    if not row["question_id"]:
        raise DataError(f"{location}: a row must have a question_id")
    return JudgedAnswer(
        step=_step(row.get("step", ""), step, location),
        question_id=row["question_id"],
        pair=(0, 0),
        question=row.get("question", ""),
        response=row["response"],
        aligned=_judgement(row["aligned"], "aligned", location),
        coherent=_judgement(row["coherent"], "coherent", location),
    )


def _step(cell: str, step: int | None, location: str) -> int | None:
    if not cell.strip():
        return step
    if (match := _STEP.fullmatch(cell.strip())) is None:
        raise DataError(f"{location}: step is {cell[:40]!r}; it must be a whole number from 0")
    return int(match[1])


def _judgement(cell: str, name: str, location: str) -> Judgement:
    text = cell.strip()
    if (status := _WORDS.get(text.lower())) is not None:
        return Judgement(status=status)
    score = float(text) if _SCORE.fullmatch(text) else math.nan
    if not 0 <= score <= 100:
        raise DataError(f"{location}: {name} is {text[:40]!r}; it must be 0 to 100, REFUSAL, CODE, ERROR or empty")
    return Judgement(status=SCORED, score=score)
