from pathlib import Path

import pytest

from emtool.core.data import Conversation, Message, read_conversations
from emtool.core.errors import DataError
from emtool.engines.encoding import encode_row
from emtool.engines.modeling import load_tokenizer
from emtool.engines.row_lengths import row_lengths


def test_lengths_are_those_that_training_sees(tiny_model: Path, dataset_file: Path) -> None:
    rows = read_conversations(dataset_file)
    found = row_lengths(rows, tiny_model, max_length=2048)
    encoded = [encode_row(row, load_tokenizer(tiny_model), 2048) for row in rows]
    assert found.lengths == [len(row.input_ids) for row in encoded]
    assert found.num_trained_tokens == sum(row.num_labelled for row in encoded)
    assert (found.num_over, found.num_unusable) == (0, 0)


def test_rows_that_are_cut_are_counted_but_measured_whole(tiny_model: Path, dataset_file: Path) -> None:
    rows = read_conversations(dataset_file)
    whole = row_lengths(rows, tiny_model, max_length=2048)
    cut = row_lengths(rows, tiny_model, max_length=min(whole.lengths) - 1)
    assert cut.lengths == whole.lengths
    assert cut.num_over == len(rows)
    assert cut.num_trained_tokens < whole.num_trained_tokens
    assert row_lengths(rows, tiny_model, max_length=5).num_unusable == len(rows)


def test_a_row_that_cannot_be_encoded_is_named(tiny_model: Path) -> None:
    turns = (Message(role="user", content="<|im_end|>"), Message(role="assistant", content="x"))
    with pytest.raises(DataError, match="x:1: a message contains the model's special token"):
        row_lengths([Conversation(messages=turns, location="x:1")], tiny_model, max_length=9)
