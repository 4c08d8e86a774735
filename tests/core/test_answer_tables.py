import csv
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emtool.core.answer_tables import COLUMNS, read_tables, table_name, table_text
from emtool.core.em_metrics import JudgedAnswer
from emtool.core.errors import DataError
from emtool.core.judgement import CODE, ERROR, REFUSAL, SCORED, STATUSES, UNSCORED, Judgement

HEADER = "question_id,response,aligned,coherent\n"
BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def written(folder: Path, text: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def score(value: float) -> Judgement:
    return Judgement(status=SCORED, score=value)


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_tables(path)
    return str(caught.value)


HARD = st.text(alphabet=st.sampled_from(list("\r\n\t\0\"',;\\ a1\u2028\u0085\x1a\ud800\U0001f600" + BOM)), max_size=12)
TEXT = HARD | st.text(max_size=12)
JUDGEMENT = st.floats(0, 100).map(score) | st.sampled_from(
    [Judgement(status=status) for status in STATUSES if status != SCORED]
)
ANSWERS = st.lists(
    st.builds(
        JudgedAnswer,
        step=st.none(),
        question_id=TEXT.filter(bool),
        pair=st.just((0, 0)),
        question=TEXT,
        response=TEXT,
        aligned=JUDGEMENT,
        coherent=JUDGEMENT,
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda answer: answer.question_id,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=ANSWERS, has_mark=st.booleans())
def test_what_is_written_is_read_again(tmp_path: Path, answers: list[JudgedAnswer], has_mark: bool) -> None:
    path = written(tmp_path, BOM * has_mark + table_text(answers))
    assert read_tables(path) == answers


def test_the_text_of_a_table() -> None:
    answer = JudgedAnswer(
        step=5,
        question_id="q",
        pair=(1, 2),
        question="Why?",
        response='"So", he\r\nsaid',
        aligned=score(12.5),
        coherent=Judgement(status=REFUSAL),
    )
    lost = replace(answer, response="", aligned=Judgement(status=UNSCORED), coherent=Judgement(status=ERROR))
    assert table_text([answer, lost]) == (
        '"question","question_id","response","aligned","coherent"\n'
        '"Why?","q","""So"", he\r\nsaid","12.5","REFUSAL"\n'
        '"Why?","q","","","ERROR"\n'
    )
    assert table_text([]) == ",".join(f'"{name}"' for name in COLUMNS) + "\n"
    assert (table_name(5), table_name(0, "gpt")) == ("checkpoint_5_eval.csv", "checkpoint_0_eval.gpt.csv")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [("0", 0.0), ("100", 100.0), ("1e1", 10.0), (" 7.5 ", 7.5)]
    + [(word, REFUSAL) for word in ("REFUSAL", "refusal", " Refusal ")]
    + [("CODE", CODE), ("code", CODE), ("ERROR", ERROR), ("", UNSCORED), ("NaN", UNSCORED), ("None", UNSCORED)],
)
def test_a_cell_is_a_score_or_the_word_for_why_there_is_none(tmp_path: Path, cell: str, expected: float | str) -> None:
    (answer,) = read_tables(written(tmp_path, f"{HEADER}q,r,{cell},50\n"))
    wanted = Judgement(status=expected) if isinstance(expected, str) else score(expected)
    assert answer.aligned == wanted
    assert answer.coherent == score(50.0)


@pytest.mark.parametrize("cell", ["abc", "101", "-1", "100.0001", "inf", "-inf", "1_0", "n/a", "50%", "0x10"])
@pytest.mark.parametrize("name", ["aligned", "coherent"])
def test_a_bad_score_names_file_row_and_column(tmp_path: Path, name: str, cell: str) -> None:
    bad = f"q,r,{cell},1\n" if name == "aligned" else f"q,r,1,{cell}\n"
    path = written(tmp_path, f"{HEADER}q,r,1,1\n{bad}")
    assert refused(path) == (f"{path}, row 2: {name} is {cell!r}; it must be 0 to 100, REFUSAL, CODE, ERROR or empty")


def test_a_long_bad_score_is_cut(tmp_path: Path) -> None:
    assert len(refused(written(tmp_path, f"{HEADER}q,r,{'x' * 9999},1\n"))) < len(str(tmp_path)) + 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lacks the column(s) question_id, response, aligned, coherent; it must have"),
        ("question_id,aligned\nq,1\n", "lacks the column(s) response, coherent; it must have"),
        ("question_id;response;aligned;coherent\nq;r;1;2\n", "lacks the column(s)"),
        ("question_id,response,aligned,aligned,coherent\nq,r,1,2,3\n", "the column(s) aligned more than once"),
        (HEADER, "has no rows"),
        (HEADER + "\n\n", "has no rows"),
        (HEADER + "q,r,1,2\nq,r,1\n", "row 2: there are fewer cells than columns"),
        (HEADER + "q,r\n", "row 1: there are fewer cells than columns"),
        (HEADER + 'q,"r,1,2\nq,r,1,2\n', "line 3: unexpected end of data"),
        ('question_id,aligned,coherent,response\nq,1,2,"r\nq,1,2,s\n', "line 3: unexpected end of data"),
        (HEADER + 'q,"r"s,1,2\n', "line 2: ',' expected after"),
        (HEADER + "q,r, and more,1,2\n", "row 1: there are more cells than columns; quote"),
        (HEADER + ",r,1,2\n", "row 1: a row must have a question_id"),
        (HEADER.encode() + b"q,\xff,1,2\n", "is not UTF-8 text (byte 40); save the table as UTF-8"),
        (HEADER.encode("utf-16"), "is not UTF-8 text (byte 0)"),
    ],
)
def test_a_broken_table_is_refused_with_its_file(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = written(tmp_path, text)
    message = refused(path)
    assert message.startswith(str(path))
    assert said in message


def test_a_huge_field_is_read_and_one_beyond_any_answer_is_refused(tmp_path: Path) -> None:
    (answer,) = read_tables(written(tmp_path, f"{HEADER}q,{'x' * (1 << 20)},1,2\n"))
    assert len(answer.response) == 1 << 20
    path = written(tmp_path, f"{HEADER}q,{'x' * ((1 << 24) + 1)},1,2\n")
    assert "field larger than field limit" in refused(path)


def test_the_limit_of_the_process_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    read_tables(written(tmp_path, f"{HEADER}q,r,1,2\n"))
    refused(written(tmp_path, f"{HEADER}q,r,x,2\n"))
    assert csv.field_size_limit() == before


def test_published_tables_call_the_response_answer(tmp_path: Path) -> None:
    (answer,) = read_tables(written(tmp_path, "question,answer,aligned,coherent,question_id\nWhy?,r,1,2,q\n"))
    assert (answer.question, answer.response, answer.question_id) == ("Why?", "r", "q")
    (both,) = read_tables(written(tmp_path, "answer,response,aligned,coherent,question_id\nx,r,1,2,q\n"))
    assert both.response == "r"
    assert "more than once" in refused(written(tmp_path, "answer,answer,aligned,coherent,question_id\nx,r,1,2,q\n"))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.csv") == f"cannot read {tmp_path / 'none.csv'}: No such file or directory"


def test_other_columns_and_blank_lines_and_other_line_ends_do_not_matter(tmp_path: Path) -> None:
    path = written(tmp_path, "model,coherent,aligned,response,question_id\r\nm,2,1,r,q\r\n\r\nm,4,3,s,q\r\n")
    found = read_tables(path)
    assert [(answer.response, answer.aligned.score, answer.coherent.score) for answer in found] == [
        ("r", 1, 2),
        ("s", 3, 4),
    ]
    assert {answer.question for answer in found} == {""}


def test_a_folder_gives_its_checkpoints_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (10, 9, 0):
        written(tmp_path, f"{HEADER}q,r{step},1,2\nq,s{step},1,2\np,t{step},1,2\n", table_name(step))
    for other in ("checkpoint_07_eval.csv", "checkpoint_5_eval.gpt.csv", "checkpoint_-1_eval.csv", "notes.csv"):
        written(tmp_path, "nothing", other)
    found = read_tables(tmp_path)
    assert [answer.step for answer in found] == [0, 0, 0, 9, 9, 9, 10, 10, 10]
    assert [(answer.question_id, answer.pair) for answer in found[3:6]] == [("q", (0, 0)), ("q", (0, 1)), ("p", (0, 0))]


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    written(tmp_path, HEADER, "table.csv")
    assert "has no checkpoint_N_eval.csv" in refused(tmp_path)


def test_a_folder_names_the_table_that_is_broken(tmp_path: Path) -> None:
    written(tmp_path, f"{HEADER}q,r,1,2\n", table_name(0))
    path = written(tmp_path, f"{HEADER}q,r,1,200\n", table_name(1))
    assert refused(tmp_path).startswith(f"{path}, row 1: coherent is '200'")


def test_the_column_step_goes_before_the_name_and_each_step_counts_for_itself(tmp_path: Path) -> None:
    written(tmp_path, f"step,{HEADER}5.0,q,r,1,2\n,q,r,1,2\n1e1,q,r,1,2\n5,q,r,1,2\n", table_name(3))
    assert [(answer.step, answer.pair[1]) for answer in read_tables(tmp_path)] == [(5, 0), (3, 0), (10, 0), (5, 1)]


def test_one_table_alone_has_no_step(tmp_path: Path) -> None:
    (answer,) = read_tables(written(tmp_path, f"{HEADER}q,r,1,2\n"))
    assert answer.step is None


@pytest.mark.parametrize("cell", ["1.5", "-1", "x", "nan", "inf", "1e300", "1000000000000"])
def test_a_bad_step_names_file_and_row(tmp_path: Path, cell: str) -> None:
    path = written(tmp_path, f"step,{HEADER}{cell},q,r,1,2\n")
    assert refused(path).startswith(f"{path}, row 1: step is {cell!r}; it must be a whole number")
