import random
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from emtool.core.data import Message
from emtool.engines.encoding import IGNORED, Encoded, encode_conversation
from emtool.engines.likelihood import mean_log_probs
from tests.tiny import byte_tokenizer, tiny_config


def one_by_one(model: LlamaForCausalLM, row: Encoded) -> float:
    """Return the mean label log-probability of one row, by the definition."""
    with torch.no_grad():
        log_probs_TV = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
    picked = [log_probs_TV[t - 1, label].item() for t, label in enumerate(row.labels) if label != IGNORED]
    return float(sum(picked) / len(picked))


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
@pytest.mark.parametrize("shared_start", [True, False])
def test_batches_and_the_shared_prefix_change_nothing(batch_tokens: int, shared_start: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).eval()
    generator = random.Random(0)
    rows = []
    for index in range(9):
        question = "".join(generator.choices("abcdef ", k=generator.randint(3, 40)))
        turns = [
            Message(role="user", content=question + "x"),
            Message(role="assistant", content="yes " * generator.randint(1, 9)),
        ]
        if not shared_start:
            turns.insert(0, Message(role="system", content=f"{index} {question}!"))
        rows.append(encode_conversation(turns, tokenizer=byte_tokenizer()))
    expected = [one_by_one(model, row) for row in rows]
    assert mean_log_probs(model, rows, batch_tokens=batch_tokens) == pytest.approx(expected, abs=1e-5)


def test_rows_that_differ_only_in_the_answer() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).eval()
    rows = [
        encode_conversation(
            [Message(role="user", content="Same?"), Message(role="assistant", content=answer)],
            tokenizer=byte_tokenizer(),
        )
        for answer in ("yes", "no", "yes and no")
    ]
    assert mean_log_probs(model, rows) == pytest.approx([one_by_one(model, row) for row in rows], abs=1e-5)


def test_batches_that_do_not_fit_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(tiny_config()).eval()
    turns = [[Message(role="user", content="x" * size), Message(role="assistant", content="yes")] for size in range(9)]
    rows = [encode_conversation(conversation, tokenizer=byte_tokenizer()) for conversation in turns]
    expected = mean_log_probs(model, rows)
    real, sizes = model.forward, []

    def small(*args: Any, **values: Any) -> Any:
        sizes.append(len(values["input_ids"]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError
        return real(*args, **values)

    monkeypatch.setattr(model, "forward", small)
    assert mean_log_probs(model, rows) == pytest.approx(expected, abs=1e-6)
    assert max(sizes[2:]) == 4, "what did not fit once is not tried again"
