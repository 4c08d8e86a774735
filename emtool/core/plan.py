"""The plan of a run: how many steps it has, which of them are saved, what that costs.

The preview, the disk estimate, the dry run and the training all ask here, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from emtool.core.architecture import ModelShapes
from emtool.core.cache import find_model_path, tokenizer_bytes
from emtool.core.config import TrainConfig
from emtool.core.data import Conversation
from emtool.core.datasets import DatasetReference, missing_dataset, read_dataset, resolve_dataset
from emtool.core.disk import free_bytes
from emtool.core.estimate import estimate_checkpoint
from emtool.core.hardware import launched_count
from emtool.core.models import ModelReference, read_config, resolve_model
from emtool.core.personas import LocalAdapter, resolve_persona
from emtool.core.plain_lora import check_plain_lora
from emtool.core.run_plan import RunPlan
from emtool.core.schedule_text import read_terms
from emtool.core.shapes import find_shapes

#: Finds the shapes of a model that `find_shapes` does not know, or None; an engine may load a library for it.
ShapeFallback = Callable[[ModelReference], ModelShapes | None]
#: Fetches a dataset that is not on this machine, and returns it with its path.
DatasetFetch = Callable[[DatasetReference], DatasetReference]


@dataclass(frozen=True, kw_only=True)
class DiskOptions:
    """What a plan may assume that a run of emtool does not do: a Trainer of the user's own may.

    Attributes:
        full_finetuning: Every parameter is trained, without an adapter.
    """

    full_finetuning: bool = False


def plan_run(
    config: TrainConfig,
    *,
    rows: Sequence[Conversation] | None = None,
    steps_per_epoch: int | None = None,
    fallback: ShapeFallback | None = None,
    fetch: DatasetFetch | None = None,
    options: DiskOptions | None = None,
) -> tuple[RunPlan, Sequence[Conversation]]:
    """Return the plan of a configuration and the rows that it trains on.

    Args:
        config: The resolved configuration.
        rows: The rows, if the caller has dropped some; None reads the dataset. A published dataset that is not on
            this machine and is not fetched is planned from its known row count, with no rows.
        steps_per_epoch: Optimizer steps of an epoch, for a plan without the dataset's own count.
        fallback: Asked for the shapes of a model that nothing on this machine tells without a library.
        fetch: Asked for a dataset that is not on this machine, once the names are known to be right.
        options: What the bytes are counted for, beside a run of emtool.

    Raises:
        EmtoolError: For a name, a value or a row that cannot be used.
    """
    model, dataset = resolve_model(config.model), resolve_dataset(config.dataset)
    persona = resolve_persona(config.persona, model, adapter=config.persona_adapter)
    if isinstance(persona, LocalAdapter):
        check_plain_lora(persona.path, model)
    read_terms(config.checkpoints)
    if dataset.path is None and fetch is not None:
        dataset = fetch(dataset)
    if rows is None:
        rows = [] if dataset.path is None else read_dataset(dataset)
    num_rows = len(rows) or dataset.num_rows
    if num_rows is None:
        raise missing_dataset(dataset)
    folder = find_model_path(model)
    if model.config is None and folder is not None:
        model = replace(model, config=read_config(folder))
    shapes = find_shapes(model, folder)
    if shapes is None and fallback is not None and model.config is not None:
        shapes = fallback(model)
    plan = make_plan(
        config,
        model=model,
        dataset=dataset,
        num_rows=num_rows,
        shapes=shapes,
        tokenizer_bytes=tokenizer_bytes(folder),
        steps_per_epoch=steps_per_epoch,
        options=options or DiskOptions(),
    )
    return plan, rows


def make_plan(
    config: TrainConfig,
    *,
    model: ModelReference,
    dataset: DatasetReference,
    num_rows: int,
    shapes: ModelShapes | None,
    tokenizer_bytes: int | None,
    steps_per_epoch: int | None = None,
    options: DiskOptions,
) -> RunPlan:
    """Return the plan of a run.

    Args:
        config: The resolved configuration.
        model: The base model.
        dataset: The dataset.
        num_rows: Usable rows of the dataset.
        shapes: The base model's parameters, where they are known.
        tokenizer_bytes: Size of the tokenizer files, where the model is on this machine.
        steps_per_epoch: Optimizer steps of an epoch; None counts them from the rows.
        options: What the bytes are counted for.

    Raises:
        ConfigError: If the schedule or the adapter does not suit the model.
    """
    num_held_out = num_held_out_rows(num_rows, config.held_out_fraction)
    processes = launched_count()
    count = partial(
        num_optimizer_steps,
        num_rows - num_held_out,
        num_processes=processes,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    total_steps = count(num_train_epochs=config.num_train_epochs, max_steps=config.max_steps)
    epoch = steps_per_epoch or count(num_train_epochs=1.0)
    schedule = read_terms(config.checkpoints)
    output_path = config.output_root / (config.output_name or default_run_name(config, model, dataset))
    return RunPlan(
        config=config,
        model=model,
        dataset=dataset,
        output_path=output_path,
        num_rows=num_rows,
        num_held_out_rows=num_held_out,
        steps_per_epoch=epoch,
        schedule=schedule.compile(total_steps, steps_per_epoch=epoch),
        estimate=None
        if shapes is None
        else estimate_checkpoint(
            shapes,
            config,
            total_steps=total_steps,
            full_finetuning=options.full_finetuning,
            keep_optimizer=config.keep_optimizer,
            num_processes=processes,
        ),
        shared_bytes=tokenizer_bytes,
        free_bytes=free_bytes(output_path),
        num_processes=processes,
        num_blocks=shapes.num_blocks if shapes is not None and shapes.is_exact else None,
    )


def num_held_out_rows(num_rows: int, fraction: float) -> int:
    """Return how many rows are held out: the fraction rounded up, and always one row left to train on.

    Source: datasets, Dataset.train_test_split, which rounds the test part up.
    """
    return min(math.ceil(fraction * num_rows), num_rows - 1)


def num_optimizer_steps(
    num_rows: int,
    *,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    num_train_epochs: float,
    max_steps: int | None = None,
    num_processes: int = 1,
) -> int:
    """Return the optimizer steps of a run, counted as the Trainer counts them.

    The last batch of an epoch may be short, and so may its last accumulation.

    Args:
        num_rows: Rows trained on, at least 1.
        per_device_train_batch_size: Rows of a micro-batch.
        gradient_accumulation_steps: Micro-batches of a step.
        num_train_epochs: Passes over the rows, above 0; may be a fraction.
        max_steps: Steps to stop at; overrides the epochs.
        num_processes: Processes that share the micro-batches of an epoch.

    Source: transformers, Trainer.set_initial_training_values.
    """
    if max_steps is not None:
        return max_steps
    batches = math.ceil(math.ceil(num_rows / per_device_train_batch_size) / num_processes)
    steps_per_epoch = math.ceil(batches / gradient_accumulation_steps)
    return math.ceil(num_train_epochs * steps_per_epoch)


def default_run_name(config: TrainConfig, model: ModelReference, dataset: DatasetReference) -> str:
    """Return the run's folder name: model, dataset and persona, and `custom` for the custom schedule."""
    parts = [model.slug, dataset.slug, config.persona]
    if config.checkpoints == "custom":
        parts.append("custom")
    return "_".join(parts)
