"""Tables of judged answers: `checkpoint_N_eval.csv`, as notebooks of the field read and write them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from emtool.core.em_metrics import JudgedAnswer
from emtool.core.errors import DataError
from emtool.core.judgement import CODE, ERROR, REFUSAL, SCORED, UNSCORED, Judgement

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
    if not path.is_dir():
        match = _FILE_NAME.fullmatch(path.name)
        return _numbered(_read_table(path, int(match[1]) if match else None))
    tables = step_tables(path)
    if not tables:
        raise DataError(f"{path} has no checkpoint_N_eval.csv; give a table, or the folder that holds them")
    return _numbered(answer for step, table in tables.items() for answer in _read_table(table, step))


def step_tables(folder: Path) -> dict[int, Path]:
    """Return the tables `checkpoint_N_eval.csv` of a folder by their step, increasing; none where it is not there."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    found = {int(match[1]): path for path in paths if (match := _FILE_NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _numbered(answers: Iterator[JudgedAnswer] | Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
    counts: dict[tuple[int | None, str], int] = {}
    numbered = []
    for answer in answers:
        place = (answer.step, answer.question_id)
        counts[place] = counts.get(place, -1) + 1
        numbered.append(
            JudgedAnswer(
                step=answer.step,
                question_id=answer.question_id,
                pair=(0, counts[place]),
                question=answer.question,
                response=answer.response,
                aligned=answer.aligned,
                coherent=answer.coherent,
            )
        )
    return numbered


def _read_table(path: Path, step: int | None) -> Iterator[JudgedAnswer]:
    if path.exists() and not path.is_file():
        raise DataError(f"cannot read {path}: it is no file")
    try:
        # Half of a surrogate pair, which JSON can hold, is written so by emtool itself.
        text = path.read_bytes().decode("utf-8", "surrogatepass").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save the table as UTF-8") from error
    # The limit is the process's: it is put back for whoever else reads tables in it.
    limit = csv.field_size_limit(_MAX_FIELD)
    # A carriage return within an answer is a part of it.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if _RESPONSE not in names:
            names = [_RESPONSE if name == _PUBLISHED_RESPONSE else name for name in names]
            reader.fieldnames = names
        if missing := [name for name in NEEDED if name not in names]:
            raise DataError(f"{path} lacks the column(s) {', '.join(missing)}; it must have {', '.join(NEEDED)}")
        if twice := [name for name in (*COLUMNS, "step") if names.count(name) > 1]:
            raise DataError(f"{path} has the column(s) {', '.join(twice)} more than once; keep one of each")
        number = 0
        for number, row in enumerate(reader, start=1):
            yield _answer(row, step, f"{path}, row {number}")
        if not number:
            raise DataError(f"{path} has no rows below its header")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _answer(row: Mapping[str, str | None], step: int | None, location: str) -> JudgedAnswer:
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
