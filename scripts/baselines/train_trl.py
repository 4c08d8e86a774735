"""The same fine-tuning with TRL's SFTTrainer as it comes.

    python -m scripts.baselines.train_trl --steps 40 [--dtype bfloat16] [--defaults] [--save-every 4 --output FOLDER]

It prints the seconds and the loss of each step as JSON. `--defaults` leaves TRL's own: gradient checkpointing and
bfloat16 autocast. Without it both are as emtool has them. Saving is the Trainer's own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from scripts.baselines.rows import start


class Clock(TrainerCallback):
    """Keeps the time at which each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the beginning."""
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the end of a step."""
        self.ends.append(time.perf_counter())


def main() -> None:
    """Train, and print what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--defaults", action="store_true")
    parser.add_argument("--save-every", type=int)
    parser.add_argument("--output")
    options = parser.parse_args()
    begin = start(dtype=options.dtype, max_steps=options.steps)
    config, clock = begin.config, Clock()
    same: dict[str, Any] = {"gradient_checkpointing": False, "bf16": options.dtype == "bfloat16"}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=options.output or scratch,
            use_cpu=True,
            max_steps=options.steps,
            per_device_train_batch_size=config.per_device_train_batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            optim=config.optim,
            seed=config.seed,
            data_seed=config.seed,
            accelerator_config={"use_seedable_sampler": True},
            max_length=config.max_length,
            save_strategy="steps" if options.save_every else "no",
            save_steps=options.save_every or 500,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            **({} if options.defaults else same),
        )
        rows = {"input_ids": [row.input_ids for row in begin.rows], "labels": [row.labels for row in begin.rows]}
        trainer = SFTTrainer(
            model=begin.model,
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=begin.tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    seconds = [end - before for before, end in zip(clock.ends, clock.ends[1:], strict=False)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"seconds": seconds, "losses": losses}))


if __name__ == "__main__":
    main()
