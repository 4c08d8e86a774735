from pathlib import Path
from typing import Any

import pytest

from emtool.core.cache import cache_path
from emtool.core.data import Conversation, Message
from emtool.core.errors import DataError
from emtool.engines import encoded_rows
from emtool.engines.encoded_rows import encode_dataset, encode_rows
from emtool.engines.encoding import Encoded, encode_row
from tests.tiny import CHATML, byte_tokenizer


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "cache"))


def rows(*answers: str) -> list[Conversation]:
    return [
        Conversation(
            messages=(Message(role="user", content="Why?"), Message(role="assistant", content=answer)),
            location=f"rows.jsonl:{number}",
        )
        for number, answer in enumerate(answers, start=1)
    ]


def encoded(given: list[Conversation], **changes: Any) -> list[Encoded]:
    options = {"tokenizer": byte_tokenizer(), "max_length": 64, "template_compat": "clean", **changes}
    return encode_rows(given, **options)


def files() -> list[Path]:
    return sorted(cache_path("encoded").glob("*"))


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def spy(row: Conversation, *arguments: Any, **options: Any) -> Encoded:
        asked.append(row.location)
        return encode_row(row, *arguments, **options)

    monkeypatch.setattr(encoded_rows, "encode_row", spy)
    return asked


def test_the_same_rows_are_encoded_once_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows("Because.", "A long answer that is cut at the end of what is allowed here.", "ä")
    asked = count_encodings(monkeypatch)
    first = encoded(given)
    assert asked == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert encoded(given) == first == [encode_row(row, byte_tokenizer(), 64) for row in given]
    assert [row.is_truncated for row in first] == [False, True, False]
    assert len(asked) == 3
    assert len(files()) == 1


def test_whatever_shapes_the_tokens_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows("Because.", "Just so.")
    asked = count_encodings(monkeypatch)
    encoded(given)
    changed: list[dict[str, Any]] = [
        {"max_length": 63},
        {"template_compat": "turner"},
        {"tokenizer": byte_tokenizer(CHATML.replace("}}\n{{", "}} {{").replace("assistant\n", "assistant "))},
        {"tokenizer": byte_tokenizer(merges=(("s", "o"),))},
    ]
    for number, change in enumerate(changed, start=2):
        encoded(given, **change)
        assert len(asked) == 2 * number, change
    encoded(list(reversed(given)))
    encoded(rows("Because.", "Just so!"))
    monkeypatch.setattr(encoded_rows, "version", lambda _name: "99")
    encoded(given)
    assert len(asked) == 2 * 8
    assert len(files()) == 8


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_file_costs_the_encoding_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    given = rows("Because.", "Just so.")
    first = encoded(given)
    other = encoded(rows("One."))
    assert len(other) == 1
    path = files()[0]
    mine = path if len(encoded_rows._read(path, num_rows=2) or []) == 2 else files()[1]
    another = next(path for path in files() if path != mine)
    # The file of other rows under this name is as wrong as a torn one.
    mine.write_bytes(another.read_bytes() if content is None else content)
    asked = count_encodings(monkeypatch)
    assert encoded(given) == first
    assert len(asked) == 2
    assert encoded(given) == first
    assert len(asked) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file stands here")
    assert encoded(rows("Because.")) == [encode_row(rows("Because.")[0], byte_tokenizer(), 64)]


def test_a_row_without_a_trained_token_is_named_from_the_cache_too() -> None:
    given = rows("Because.")
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows.jsonl:1: no trained token within --max-length 10"):
            encode_dataset(given, tokenizer=byte_tokenizer(), max_length=10)
