from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtool.core.data import read_conversations, resolve_dataset
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
        ('{"text": "x"}', r"'messages' must be a list that is not empty; the row has the keys: text"),
        ('{"messages": NaN}', r"'messages' must be a list that is not empty"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        ('{"messages": [1]}', "message 1: an object with 'role' and 'content' is needed"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool' is not one of"),
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
