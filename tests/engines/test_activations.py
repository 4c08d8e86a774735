"""Activations: means over the right tokens of the right blocks, whatever the batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emtool.core.data import Message
from emtool.core.errors import BackendError, CheckpointError, ModelError
from emtool.core.questions import read_items
from emtool.core.run_dir import RunFolder
from emtool.engines.activation_files import (
    ActivationFolder,
    encode_texts,
    item_texts,
    read_activations,
    take_activations,
)
from emtool.engines.activations import answer_mask, mean_activations
from emtool.engines.decoder_blocks import decoder_blocks
from emtool.engines.encoding import encode_conversation
from emtool.engines.modeling import attach_adapter, load_base
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def model(spread_run: RunFolder, tiny_model: Path) -> Any:
    return attach_adapter(load_base(tiny_model, dtype="float32"), spread_run.checkpoint_path(20)).eval()


def rows(count: int = 12) -> list[Any]:
    return encode_texts(item_texts(read_items()[: count // 2]), byte_tokenizer())[1]


def test_the_mean_is_over_the_answers_text_and_not_the_end_of_turn(model: Any) -> None:
    found = mean_activations(model, rows(), layers=[0, 1])
    sums, total = torch.zeros(2, found.mean_LD.shape[1]), 0
    for index, row in enumerate(rows()):
        answer = [place for place, label in enumerate(row.labels) if label != -100][:-1]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
        # The library's last hidden state has the final norm on it; the block before it has not.
        torch.testing.assert_close(found.text_means_NLD[index, 0], hidden[1][0, answer].mean(0), rtol=1e-5, atol=1e-6)
        sums[0] += hidden[1][0, answer].sum(0)
        total += len(answer)
        assert found.num_tokens_N[index] == len(answer)
    torch.testing.assert_close(found.mean_LD[0], sums[0] / total, rtol=1e-5, atol=1e-6)


def test_the_last_block_is_taken_before_the_final_norm(model: Any) -> None:
    found = mean_activations(model, rows(2), layers=[0, 1])
    kept: dict[str, Any] = {}
    handle = decoder_blocks(model)[1].register_forward_hook(lambda _m, _i, output: kept.update(out=output))
    row = rows(2)[0]
    with torch.no_grad():
        model(input_ids=torch.tensor([row.input_ids]))
    handle.remove()
    hidden = kept["out"][0] if isinstance(kept["out"], tuple) else kept["out"]
    picked = hidden.reshape(len(row.input_ids), -1)[answer_mask(row)]
    torch.testing.assert_close(found.text_means_NLD[0, 1], picked.mean(0), rtol=1e-5, atol=1e-6)


def test_batch_1_and_batch_16_agree(model: Any) -> None:
    one = mean_activations(model, rows(40), layers=[0, 1], batch_size=1)
    many = mean_activations(model, rows(40), layers=[0, 1], batch_size=16)
    for a, b in ((one.mean_LD, many.mean_LD), (one.text_means_NLD, many.text_means_NLD)):
        assert float((a - b).norm() / a.norm()) < 1e-5
    assert not torch.equal(one.text_means_NLD[0], one.text_means_NLD[1])


def test_layers_are_chosen_by_index(model: Any) -> None:
    both = mean_activations(model, rows(4), layers=[0, 1])
    last = mean_activations(model, rows(4), layers=[1])
    assert torch.equal(last.mean_LD[0], both.mean_LD[1])


def test_a_truncated_answer_has_no_end_of_turn_to_leave_out() -> None:
    turns = [Message(role="user", content="Why?"), Message(role="assistant", content="Because.")]
    whole = encode_conversation(turns, tokenizer=byte_tokenizer())
    cut = encode_conversation(turns, tokenizer=byte_tokenizer(), max_length=len(whole.input_ids) - 3)
    assert sum(answer_mask(whole)) == whole.num_labelled - 1
    assert sum(answer_mask(cut)) == cut.num_labelled


class Decoder(nn.Module):
    def __init__(self, lists: int) -> None:
        super().__init__()
        for index in range(lists):
            setattr(self, f"layers{index}", nn.ModuleList(nn.Identity() for _ in range(3)))
        self.experts = nn.ModuleList(nn.Identity() for _ in range(4))

    @property
    def config(self) -> Any:
        class Config:
            num_hidden_layers = 3

            def get_text_config(self, **_: Any) -> Any:
                return self

        return Config()

    def get_decoder(self) -> Any:
        return self


@pytest.mark.parametrize("lists", [0, 2])
def test_blocks_that_cannot_be_told_are_refused(lists: int) -> None:
    with pytest.raises(ModelError, match=f"{lists} module lists have 3 modules"):
        decoder_blocks(Decoder(lists))


def test_the_one_list_of_the_right_length_is_taken() -> None:
    assert len(decoder_blocks(Decoder(1))) == 3


class TupleBlock(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.inner(*args, **kwargs), None)


def test_a_block_that_returns_a_tuple_gives_the_same(tiny_model: Path) -> None:
    plain = load_base(tiny_model, dtype="float32")
    expected = mean_activations(plain, rows(4), layers=[1])
    wrapped = load_base(tiny_model, dtype="float32")
    blocks = decoder_blocks(wrapped)
    last = len(blocks) - 1
    blocks[last] = TupleBlock(blocks[last])
    blocks[last].register_forward_hook(lambda _m, _i, output: output)
    handle = wrapped.get_decoder().norm.register_forward_pre_hook(lambda _m, inputs: (inputs[0][0],))
    found = mean_activations(wrapped, rows(4), layers=[last])
    handle.remove()
    assert torch.equal(found.mean_LD, expected.mean_LD)


def test_files_hold_what_they_say_and_are_found_again(spread_run: RunFolder, model: Any, tmp_path: Path) -> None:
    run = RunFolder(path=tmp_path)
    texts = item_texts(read_items()[:3])
    ids, found = take_activations(model, byte_tokenizer(), texts, layers=[0, 1])
    folder = ActivationFolder(run=run, settings={"layers": [0, 1], "texts": "fixed"})
    assert not folder.has(7, {"adapter_sha256": "a"})
    assert ids == [text.id for text in texts]
    folder.write(7, found, texts=texts, pins={"adapter_sha256": "a"})
    assert folder.has(7, {"adapter_sha256": "a"})
    assert not folder.has(7, {"adapter_sha256": "b"})
    read, metadata = read_activations(folder.file_path(7))
    assert torch.equal(read.text_means_NLD, found.text_means_NLD)
    assert read.mean_LD.dtype == torch.float32
    assert metadata["text_ids"] == ids
    assert len(set(metadata["answer_sha256"])) == 6
    assert metadata["layers"] == [0, 1]
    folder.file_path(7).write_bytes(folder.file_path(7).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read the activations"):
        read_activations(folder.file_path(7))
    assert not folder.has(7, {"adapter_sha256": "a"})


def test_batches_that_do_not_fit_are_halved_and_the_texts_stay_the_same(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mean_activations(model, rows(), layers=[0, 1])
    decoder = model.get_decoder()
    real, sizes = decoder.forward, []

    def small(*args: Any, **values: Any) -> Any:
        sizes.append(len(values["input_ids"]))
        if sizes[-1] > 3:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        return real(*args, **values)

    monkeypatch.setattr(decoder, "forward", small)
    found = mean_activations(model, rows(), layers=[0, 1], batch_size=8)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    torch.testing.assert_close(found.text_means_NLD, whole.text_means_NLD, rtol=1e-5, atol=1e-6)

    def never(*_args: Any, **_values: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decoder, "forward", never)
    with pytest.raises(BackendError, match="out of memory for a single text"):
        mean_activations(model, rows(), layers=[0, 1])
