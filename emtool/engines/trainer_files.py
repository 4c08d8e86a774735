"""The small files that a Trainer resumes from, in its own formats, made in memory."""

from __future__ import annotations

import io
import json
import random
from dataclasses import asdict
from typing import Any

import numpy
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.training_args import ParallelMode

from emtool.core.estimate import random_state_names
from emtool.engines.processes import Processes


def trainer_files(trainer: Trainer, processes: Processes) -> dict[str, bytes]:
    """Return scheduler, trainer state, arguments, and the random state of each process, by file name.

    Every process must call this at the same step.
    """
    states = processes.gather(_torch_bytes(_random_state(trainer.args)))
    state = json.dumps(asdict(trainer.state), indent=2, sort_keys=True) + "\n"
    return {
        **dict(zip(random_state_names(len(states)), states, strict=True)),
        TRAINER_STATE_NAME: state.encode(),
        SCHEDULER_NAME: _torch_bytes(trainer.lr_scheduler.state_dict()),
        TRAINING_ARGS_NAME: _torch_bytes(trainer.args),
    }


def _random_state(args: TrainingArguments) -> dict[str, Any]:
    """Return the state of every generator, as the Trainer saves it.

    The Trainer's own method writes a file, and a full disk is then not an ordinary error.

    Source: transformers 5.23, Trainer._save_rng_state.
    """
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        is_distributed = args.parallel_mode == ParallelMode.DISTRIBUTED
        state["cuda"] = torch.cuda.random.get_rng_state_all() if is_distributed else torch.cuda.random.get_rng_state()
    return state


def _torch_bytes(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()
