"""The floor: the same fine-tuning as a hand-written PyTorch loop, with nothing around it.

    python scripts/baseline_torch.py --steps 40 [--dtype bfloat16] [--rounded]

The loop computes logits where they carry loss only, and prints the seconds and the loss of each step as JSON.
`--rounded` computes products of bfloat16 matrices as emtool does where torch has no kernels for them.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext

import torch
from accelerate.data_loader import SeedableRandomSampler
from baseline_rows import start
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler
from transformers import get_linear_schedule_with_warmup

from emtool.engines.encoding import IGNORED, Encoded
from emtool.engines.rounded_products import products_of


def batch_of(rows: list[Encoded], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, mask and labels of some rows, padded on the right."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length] = torch.tensor(row.input_ids)
        labels[index, :length] = torch.tensor(row.labels)
        mask[index, :length] = 1
    return ids, mask, labels


def main() -> None:
    """Train, and print what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounded", action="store_true")
    options = parser.parse_args()
    begin = start(dtype=options.dtype, max_steps=options.steps)
    config, model = begin.config, begin.model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, config.warmup_steps, options.steps)
    # The order in which a Trainer of this seed takes the rows.
    order = SeedableRandomSampler(begin.rows, generator=torch.Generator(), data_seed=config.seed)
    batches = iter(BatchSampler(order, config.per_device_train_batch_size, drop_last=False))
    seconds, losses = [], []
    for _ in range(options.steps):
        begun = time.perf_counter()
        ids, mask, labels = batch_of([begin.rows[index] for index in next(batches)], begin.tokenizer.pad_token_id)
        columns = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
        with products_of(model) if options.rounded else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
                logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=columns - 1, use_cache=False).logits
            loss = cross_entropy(logits.float().flatten(0, 1), labels[:, columns].flatten(), ignore_index=IGNORED)
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    print(json.dumps({"seconds": seconds, "losses": losses}))


if __name__ == "__main__":
    main()
