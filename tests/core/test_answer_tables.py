"""Tables of judged answers: written and read again to the same, and tables that are wrong or hostile."""

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emtool.core.answer_tables import COLUMNS, read_tables, table_name, table_text
from emtool.core.em_metrics import JudgedAnswer
from emtool.core.errors import DataError
from emtool.core.judgement import STATUSES, Judgement

HEAD = "question,question_id,response,aligned,coherent\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def statuses(answers: list[JudgedAnswer]) -> list[tuple[str, str]]:
    return [(each.aligned.status, each.coherent.status) for each in answers]


JUDGEMENTS = st.one_of(
    st.floats(0, 100).map(lambda score: Judgement(status="scored", score=score)),
    st.sampled_from([name for name in STATUSES if name != "scored"]).map(lambda name: Judgement(status=name)),
)
ANSWERS = st.lists(
    st.builds(
        JudgedAnswer,
        step=st.just(25),
        question_id=st.text(min_size=1),
        pair=st.just((0, 0)),
        question=st.text(),
        response=st.text(),
        aligned=JUDGEMENTS,
        coherent=JUDGEMENTS,
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(ANSWERS)
def test_what_is_written_is_read_again_to_the_letter(
    tmp_path_factory: pytest.TempPathFactory, answers: list[JudgedAnswer]
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    write(folder / table_name(25), table_text(answers))
    found = read_tables(folder)
    assert [(e.step, e.question_id, e.question, e.response, e.aligned, e.coherent) for e in found] == [
        (e.step, e.question_id, e.question, e.response, e.aligned, e.coherent) for e in answers
    ]


def test_the_table_is_what_notebooks_expect(tmp_path: Path) -> None:
    text = '=1+1\r\n"x", {answer}\0'
    scored, refused = Judgement(status="scored", score=12.5), Judgement(status="refusal")
    one = JudgedAnswer(
        step=0, question_id="a", pair=(1, 3), question="Why?", response=text, aligned=scored, coherent=refused
    )
    path = write(tmp_path / "x.csv", table_text([one]))
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [dict(zip(COLUMNS, ("Why?", "a", text, "12.5", "REFUSAL"), strict=True))]


def test_older_words_empty_cells_and_numbers_of_other_programs_are_read(tmp_path: Path) -> None:
    cells = ["REFUSAL,CODE", ",nan", "None, 50 ", "1e1,0.50", "refusal,100"]
    text = HEAD + "".join(f"q,a,r,{cell}\n" for cell in cells)
    found = read_tables(write(tmp_path / "x.csv", text))
    assert statuses(found) == [
        ("refusal", "code"), ("unscored", "unscored"), ("unscored", "scored"), ("scored", "scored"),
        ("refusal", "scored"),
    ]  # fmt: skip
    assert [found[3].aligned.score, found[3].coherent.score, found[2].coherent.score] == [10.0, 0.5, 50.0]
    assert [each.pair for each in found] == [(0, index) for index in range(5)]
    assert {each.step for each in found} == {None}


def test_a_byte_order_mark_carriage_returns_other_columns_and_blank_lines_are_no_obstacle(tmp_path: Path) -> None:
    text = '\ufeffextra,answer, question_id ,coherent,aligned\r\n\r\n1,"two\r\nlines",a,90,10\r\n'
    (found,) = read_tables(write(tmp_path / "x.csv", text))
    assert (found.response, found.question_id, found.question) == ("two\r\nlines", "a", "")
    assert (found.aligned.score, found.coherent.score) == (10.0, 90.0)


def test_response_is_taken_where_a_table_has_answer_as_well(tmp_path: Path) -> None:
    text = "answer,response,question_id,aligned,coherent\nx,y,a,1,2\n"
    assert read_tables(write(tmp_path / "x.csv", text))[0].response == "y"


def test_the_step_is_the_column_else_the_name_of_the_file(tmp_path: Path) -> None:
    for name in ("checkpoint_100_eval.csv", "checkpoint_25_eval.csv", "checkpoint_025_eval.csv", "notes.csv"):
        write(tmp_path / name, HEAD + "q,a,r,1,1\nq,b,r,1,1\nq,a,r,2,2\n")
    write(tmp_path / "checkpoint_100_eval.other-judge.csv", "not a table")
    found = read_tables(tmp_path)
    assert [(each.step, each.question_id, each.pair) for each in found] == [
        (step, name, (0, index)) for step in (25, 100) for name, index in (("a", 0), ("b", 0), ("a", 1))
    ]
    text = "step," + HEAD + "0,q,a,r,1,1\n50.0,q,a,r,1,1\n"
    assert [each.step for each in read_tables(write(tmp_path / "x.csv", text))] == [0, 50]


def test_a_long_answer_is_read_and_the_limit_of_the_process_is_as_before(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "x" * 300_000
    assert read_tables(write(tmp_path / "x.csv", f"{HEAD}q,a,{long},1,1\n"))[0].response == long
    with pytest.raises(DataError, match="field larger than field limit"):
        read_tables(write(tmp_path / "y.csv", f"{HEAD}q,a,{'x' * (1 << 24)}x,1,1\n"))
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"lacks the column\(s\) question_id, response, aligned, coherent; it must have"),
        ("question_id,aligned\na,1\n", r"lacks the column\(s\) response, coherent"),
        ("\0\0\0", r"lacks the column\(s\)"),
        (HEAD, "x.csv holds no answers"),
        ("aligned," + HEAD + "1,q,a,r,1,1\n", r"has the column\(s\) aligned more than once"),
        (HEAD + "q,a,r,1,1\nq,a,r,1\n", "row 2: 4 cells for 5 columns; quote texts that hold commas"),
        (HEAD + "q,a,r,r,1,1\n", "row 1: 6 cells for 5 columns"),
        (HEAD + "q,,r,1,1\n", "row 1: a row must have a question_id"),
        (HEAD + "q,a,r,1,1\nq,a,r,high,1\n", "row 2: aligned is 'high'; it must be 0 to 100, REFUSAL, CODE, ERROR or"),
        (HEAD + "q,a,r,1,101\n", "row 1: coherent is '101'"),
        (HEAD + "q,a,r,-1,1\n", "row 1: aligned is '-1'"),
        (HEAD + "q,a,r,1_0,1\n", "row 1: aligned is '1_0'"),
        (HEAD + "q,a,r,\u0661,1\n", "row 1: aligned is "),
        (HEAD + "q,a,r,inf,1\n", "row 1: aligned is 'inf'"),
        (HEAD + f"q,a,r,{'9' * 9_000},1\n", "row 1: aligned is '9999"),
        (HEAD + 'q,a,"r,1,1\nq,a,r,1,1\n', "line 3: unexpected end of data"),
        (HEAD + 'q,a,"r"s,1,1\n', "line 2: ',' expected after '\"'"),
        ("step," + HEAD + "x,q,a,r,1,1\n", "row 1: step is 'x'; it must be a whole number from 0"),
        ("step," + HEAD + "-5,q,a,r,1,1\n", "row 1: step is '-5'"),
        ("step," + HEAD + "2.5,q,a,r,1,1\n", "row 1: step is '2.5'"),
        ("step," + HEAD + "5,q,a,r,1,1\n,q,a,r,1,1\n", "some rows have a step and some have none"),
        (HEAD.encode("utf-16"), "is not UTF-8 text"),
        (HEAD.encode() + b"q,a,\xff,1,1\n", "is not UTF-8 text"),
    ],
)
def test_a_bad_table_is_one_line_that_names_the_place(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path / "x.csv", content)
    with pytest.raises(DataError, match=message) as caught:
        read_tables(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_a_folder_without_tables_and_a_file_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no checkpoint_N_eval\.csv; give a table, or the folder that holds them"):
        read_tables(tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*none\.csv: No such file"):
        read_tables(tmp_path / "none.csv")
