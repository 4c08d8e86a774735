import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from emtool.core.data import conversation_of, read_conversations
from emtool.core.datasets import resolve_dataset
from emtool.core.errors import ConfigError, DataError

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_keep_their_order_and_location(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", GOOD, "", GOOD.replace('"a"', '"c"'))
    rows = read_conversations(path)
    assert [row.messages[0].content for row in rows] == ["a", "c"]
    assert rows[1].location == f"{path}:3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a line of JSON"),
        ("[1]", "a JSON object is needed, found list"),
        ('{"text": "x"}', r"the row is plain text \('text'\), which is not read; accepted are 'messages' "),
        ('{"a": 1, "b": 2}', r"no format that is read; the row has the keys: a, b; accepted are 'messages' "),
        ('{"chosen": [], "rejected": [], "prompt": "x"}', r"a preference pair \('chosen', 'rejected'\), which is not"),
        ('{"conversations": [{"from": "human", "value": "x"}]}', r"the ShareGPT format \('conversations'\)"),
        ('{"instruction": "x", "input": "", "output": "y"}', r"the instruction format \('instruction', 'output'\)"),
        ('{"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}', "found str and list"),
        ('{"prompt": "x", "completion": " "}', "'completion': 'content' must be a text that is not empty"),
        ('{"prompt": [], "completion": []}', "'prompt' must be a list that is not empty"),
        ('{"prompt": "x", "completion": "y", "messages": []}', "'messages' as well as 'prompt' and 'completion'"),
        ('{"tools": [{"name": "f"}], "prompt": "x", "completion": "y"}', "offers tools"),
        ('{"messages": NaN}', r"'messages' must be a list that is not empty"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        ('{"messages": [1]}', "message 1: an object with 'role' and 'content' is needed"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool' is a tool turn, which emtool does not train"),
        ('{"messages": [{"role": "function", "content": "x"}]}', "role 'function' is a tool turn"),
        ('{"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}', "'tool_calls' is a tool turn"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "role 'bot' is not one of system, user, assistant"),
        ('{"messages": [{"role": "user", "content": " "}]}', "'content' must be a text that is not empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "turn 1 is 'assistant', expected 'user'"),
        ("[" * 100_000, "not a line of JSON"),
    ],
)
def test_a_malformed_row_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "x.jsonl", GOOD, line)
    with pytest.raises(DataError, match=message) as caught:
        read_conversations(path)
    assert f"{path}:2" in str(caught.value)


SYSTEM = {"role": "system", "content": "s"}
USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}, "system user assistant user assistant"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": None}], "prompt": "x", "tools": []}, "user assistant"),
        ({"prompt": "u", "completion": "a"}, "user assistant"),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT], "messages": None}, "system user assistant"),
        ({"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT]}, "user assistant user assistant"),
    ],
)
def test_rows_of_both_formats_become_turns_and_keep_their_system_turn(record: dict[str, object], turns: str) -> None:
    conversation = conversation_of(record, "x.jsonl:1")
    assert [message.role for message in conversation.messages] == turns.split()
    assert [message.content for message in conversation.messages] == [turn[0] for turn in turns.split()]


def test_an_assistant_turn_in_a_prompt_is_refused_for_it_would_be_trained_on() -> None:
    record = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    with pytest.raises(DataError, match=r"x:1: 'prompt' has an assistant turn, .*; write the row as 'messages'"):
        conversation_of(record, "x:1")


def test_parquet_reads_as_json_lines_do(tmp_path: Path) -> None:
    rows = [{"messages": [SYSTEM, USER, ASSISTANT], "id": 1}, {"messages": [USER, ASSISTANT], "id": 2}] * 700
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    write(tmp_path / "x.jsonl", *map(json.dumps, rows))
    found = read_conversations(tmp_path / "x.parquet")
    assert [row.messages for row in found] == [row.messages for row in read_conversations(tmp_path / "x.jsonl")]
    assert found[1399].location == f"{tmp_path / 'x.parquet'}: row 1,400"


def test_parquet_of_pairs_is_read_and_a_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows = [{"prompt": "u", "completion": "a", "when": None}, {"prompt": "u", "completion": "", "when": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), path)
    assert [message.role for message in read_conversations(path)[0].messages] == ["user", "assistant"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"x\.parquet: row 2: 'completion': 'content' must be a text"):
        read_conversations(path)


def test_parquet_of_another_format_or_cut_short_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "x", "n": 1}]), path)
    with pytest.raises(DataError, match=r"row 1: the row is plain text \('text'\)"):
        read_conversations(path)
    parquet.write_table(pyarrow.Table.from_pylist([{"n": 1}]), path)
    with pytest.raises(DataError, match=r"row 1: no format that is read; the row has the keys: n;"):
        read_conversations(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*x\.parquet as Parquet: ") as caught:
        read_conversations(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r":2: not a line of JSON in UTF-8"):
        read_conversations(path)


@given(st.text(max_size=60))
def test_any_line_is_read_or_refused_with_a_data_error(line: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text(line, encoding="utf-8")
        with pytest.raises(DataError):
            read_conversations(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read_conversations(write(tmp_path / "x.jsonl", ""))


def test_unknown_names_get_the_near_miss() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gardening'"):
        resolve_dataset("gardning")
    with pytest.raises(ConfigError, match=r"no dataset file 'missing\.jsonl'"):
        resolve_dataset("missing.jsonl")


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n")
    assert len(read_conversations(path)) == 1
