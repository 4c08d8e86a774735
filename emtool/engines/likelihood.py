"""Judge-free scores: how likely the model finds given answers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from emtool.engines.batch_size import run_batches
from emtool.engines.encoding import IGNORED, Encoded
from emtool.engines.rounded_products import products_of

# Shape suffixes: B rows of a batch, T tokens after the common prefix, P tokens of the prefix, L scored positions,
# V vocabulary.

BATCH_TOKENS = 2048


def mean_log_probs(model: Any, rows: Sequence[Encoded], *, batch_tokens: int = BATCH_TOKENS) -> list[float]:
    """Return the mean log-probability of each row's labelled tokens.

    Tokens that all rows begin with (a system turn, for instance) are run through the model once. Rows are batched by
    length, so padding is small; the order of the result is the order of the rows.

    Args:
        model: Causal language model in evaluation mode.
        rows: Encoded rows, each with at least one labelled token.
        batch_tokens: Tokens of a batch, padding included; bounds the memory for logits.

    Returns:
        Natural logarithms, one a row, at most 0.

    Raises:
        BackendError: If there is no memory for one row alone; batches that do not fit are halved.
    """
    prefix = _common_prefix(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    scores = [0.0] * len(rows)
    with torch.inference_mode(), products_of(model):
        cache: Any = None

        def start(_batch: list[int]) -> None:
            nonlocal cache
            cache = _prefix_cache(model, rows[0].input_ids[:prefix])

        if prefix:
            run_batches([[0]], start)

        def run(batch: list[int]) -> None:
            values = _score_batch(model, [rows[index] for index in batch], prefix, cache)
            for index, value in zip(batch, values, strict=True):
                scores[index] = value

        run_batches(_batches(order, rows, prefix, batch_tokens), run)
    return scores


def _score_batch(model: Any, rows: Sequence[Encoded], prefix: int, cache: Any) -> list[float]:
    device = model.device
    width = max(len(row.input_ids) for row in rows) - prefix
    ids_BT = torch.zeros((len(rows), width), dtype=torch.long)
    labels_BT = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    mask_BPT = torch.zeros((len(rows), prefix + width), dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids_BT[index, : length - prefix] = torch.tensor(row.input_ids[prefix:])
        labels_BT[index, : length - prefix] = torch.tensor(row.labels[prefix:])
        mask_BPT[index, :length] = 1
    columns_L = (labels_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    past = {}
    if cache is not None:
        past = {"cache": copy.deepcopy(cache), "use_cache": True}
        past["cache"].batch_repeat_interleave(len(rows))
    logits_BLV = model(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BPT.to(device),
        logits_to_keep=(columns_L - 1).to(device),
        **past,
    ).logits.float()
    labels_BL = labels_BT[:, columns_L].to(device)
    is_scored_BL = labels_BL != IGNORED
    log_probs_BL = -torch.nn.functional.cross_entropy(
        logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels_BL)
    means: list[float] = (log_probs_BL.double().sum(dim=1) / is_scored_BL.sum(dim=1)).tolist()
    return means


def _prefix_cache(model: Any, ids: list[int]) -> Any:
    ids_1P = torch.tensor([ids], device=model.device)
    return model(input_ids=ids_1P, use_cache=True, logits_to_keep=1).cache


def _common_prefix(rows: Sequence[Encoded]) -> int:
    """Return how many leading tokens all rows share, short of the first that predicts a labelled one."""
    first_label = min(next(i for i, label in enumerate(row.labels) if label != IGNORED) for row in rows)
    columns = zip(*(row.input_ids for row in rows), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return min(shared, first_label - 1)


def _batches(order: Sequence[int], rows: Sequence[Encoded], prefix: int, batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:
        width = len(rows[index].input_ids) - prefix
        if batch and (len(batch) + 1) * width > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
