"""Activations: what each decoder block puts out over an answer, averaged as it streams by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from emtool.engines.batch_size import run_batches
from emtool.engines.decoder_blocks import decoder_blocks
from emtool.engines.encoding import IGNORED, Encoded
from emtool.engines.rounded_products import products_of

# Shape suffixes: N texts, L selected blocks, D hidden size, B texts of a batch, T tokens.

#: Tokens of a batch, padding included, where no number of texts is given.
BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Mean outputs of decoder blocks.

    Attributes:
        mean_LD: Mean over all tokens of all answers, float32.
        text_means_NLD: Mean over the tokens of each answer, float32.
        num_tokens_N: Tokens of each answer.
    """

    mean_LD: torch.Tensor
    text_means_NLD: torch.Tensor
    num_tokens_N: torch.Tensor


def mean_activations(
    model: Any, rows: Sequence[Encoded], *, layers: Sequence[int], batch_size: int | None = None
) -> Activations:
    """Return the mean output of decoder blocks over the answers of teacher-forced texts.

    The tokens are those of the answers' text, without the token that ends the turn. Sums are taken in float32 while
    the model runs; nothing is kept for a token. The language-model head does not run.

    Args:
        model: Causal language model in evaluation mode, with or without an adapter in it.
        rows: Texts as `encode_conversation` gives them.
        layers: Blocks by index, 0 is the first.
        batch_size: Texts at a time; None fills batches of `BATCH_TOKENS` tokens. Batches of another size change the
            result by rounding only.

    Raises:
        ModelError: If the blocks cannot be told.
        BackendError: If there is no memory for one text alone; batches that do not fit are halved.
    """
    blocks = decoder_blocks(model)
    decoder = model.get_decoder()
    masks = [answer_mask(row) for row in rows]
    counts_N = torch.tensor([sum(mask) for mask in masks])
    means_NLD = torch.zeros(len(rows), len(layers), decoder.config.get_text_config(decoder=True).hidden_size)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))

    def run(batch: list[int]) -> None:
        ids_BT, mask_BT, answer_BT = _pad([rows[i] for i in batch], [masks[i] for i in batch])
        sums_of_batch = _summed([blocks[layer] for layer in layers], answer_BT.to(model.device))
        with torch.inference_mode(), products_of(model), sums_of_batch as sums:
            decoder(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), use_cache=False)
        sums_BLD = torch.stack([total_BD.cpu() for total_BD in sums], dim=1)
        means_NLD[batch] = sums_BLD / counts_N[batch].clamp(min=1)[:, None, None]

    run_batches(_batches(order, rows, batch_size), run)
    weights_N = counts_N.double() / max(1, int(counts_N.sum()))
    mean_LD = torch.einsum("n,nld->ld", weights_N, means_NLD.double()).float()
    return Activations(mean_LD=mean_LD, text_means_NLD=means_NLD, num_tokens_N=counts_N)


def answer_mask(row: Encoded) -> list[bool]:
    """Return which tokens are text of the answer: the labelled ones but the last, which ends the turn.

    A row that was cut before its answer ended has no such token, and all of its labelled ones are text.
    """
    labelled = [label != IGNORED for label in row.labels]
    if not row.is_truncated and any(labelled):
        labelled[len(labelled) - 1 - labelled[::-1].index(True)] = False
    return labelled


@contextmanager
def _summed(blocks: Sequence[Any], answer_BT: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Yield the sum of each block's output over the answers' tokens, shape (B, D), filled as the model runs."""
    sums: list[torch.Tensor] = []
    weights_BT = answer_BT.float()

    def add(_module: Any, _inputs: Any, output: Any) -> None:
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        sums.append(torch.einsum("bt,btd->bd", weights_BT, hidden_BTD.float()))

    handles = [block.register_forward_hook(add) for block in blocks]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _pad(rows: Sequence[Encoded], masks: Sequence[Sequence[bool]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and answer mask, each of shape (B, T), padded on the right."""
    width = max(len(row.input_ids) for row in rows)
    ids_BT = torch.zeros((len(rows), width), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    answer_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        length = len(row.input_ids)
        ids_BT[index, :length] = torch.tensor(row.input_ids)
        mask_BT[index, :length] = 1
        answer_BT[index, :length] = torch.tensor(mask)
    return ids_BT, mask_BT, answer_BT


def _batches(order: Sequence[int], rows: Sequence[Encoded], batch_size: int | None) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:
        is_full = (len(batch) + 1) * len(rows[index].input_ids) > BATCH_TOKENS
        if batch and (is_full if batch_size is None else len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
