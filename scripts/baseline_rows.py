"""The rows and the model that every training baseline is given: those of `emtool train` with the same options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.config import TrainConfig, resolve_train_config
from emtool.core.events import ignore_events
from emtool.core.hardware import limit_threads
from emtool.core.plan import plan_run
from emtool.engines.encoded_rows import encode_dataset
from emtool.engines.encoding import Encoded
from emtool.engines.fitting import split_rows
from emtool.engines.modeling import add_lora, load_base, open_base


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a training begins with.

    Attributes:
        config: The configuration that `emtool train` resolves.
        model: The base with its fresh LoRA adapter.
        tokenizer: Its tokenizer.
        rows: The training rows as tokens and labels.
    """

    config: TrainConfig
    model: Any
    tokenizer: Any
    rows: list[Encoded]


def start(*, dtype: str, max_steps: int) -> Start:
    """Return what `emtool train --profile demo` begins with."""
    limit_threads()
    overrides = {"dtype": dtype, "max_steps": max_steps, "output_root": Path("unused")}
    config = resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0)
    plan, conversations = plan_run(config)
    base = open_base(config.model, device="cpu", dtype=dtype, on_event=ignore_events)
    encoded = encode_dataset(conversations, tokenizer=base.tokenizer, max_length=config.max_length)
    rows, _ = split_rows(encoded, num_held_out=plan.num_held_out_rows, seed=config.seed)
    model = add_lora(load_base(base.files.path, dtype=dtype), config, plan.model)
    return Start(config=config, model=model, tokenizer=base.tokenizer, rows=rows)
