"""The plan of a run: how many steps, which of them are saved, what that costs.

The preview, the dry run and the training read the same `RunPlan`, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from emtool.core.architecture import linear_layers
from emtool.core.cache import find_model_path, tokenizer_bytes
from emtool.core.config import TrainConfig
from emtool.core.data import Conversation, DatasetReference, file_sha256, read_conversations, resolve_dataset
from emtool.core.disk import SMALL_FILES_BYTES, adapter_file_bytes, free_bytes
from emtool.core.errors import CheckpointError
from emtool.core.models import ModelReference, read_config, resolve_model
from emtool.core.personas import resolve_persona
from emtool.core.run_dir import RunFolder, free_name
from emtool.core.schedule import CheckpointSchedule, CompiledSchedule


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do.

    Attributes:
        config: The resolved configuration.
        model: The base model.
        dataset: The dataset.
        output_path: The run folder.
        num_rows: Rows of the dataset.
        num_held_out_rows: Rows kept for the held-out loss.
        schedule: Steps to save.
        checkpoint_bytes: One milestone without the files it shares; None where the shapes are not known yet.
        shared_bytes: Tokenizer files, stored once; None where they are not known yet.
        free_bytes: Free space of the run folder's file system.
    """

    config: TrainConfig
    model: ModelReference
    dataset: DatasetReference
    output_path: Path
    num_rows: int
    num_held_out_rows: int
    schedule: CompiledSchedule
    checkpoint_bytes: int | None
    shared_bytes: int | None
    free_bytes: int
    #: This version writes milestones only; a resume state would be counted here.
    resume_bytes: int = 0

    @property
    def num_train_rows(self) -> int:
        """Return the rows that are trained on."""
        return self.num_rows - self.num_held_out_rows

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of the run."""
        return self.schedule.total_steps

    @property
    def num_checkpoints(self) -> int:
        """Return the number of milestones."""
        return len(self.schedule.planned_steps)

    @property
    def total_bytes(self) -> int | None:
        """Return the projected size of the finished run folder."""
        if self.checkpoint_bytes is None:
            return None
        return self.num_checkpoints * self.checkpoint_bytes + (self.shared_bytes or 0)

    @property
    def peak_bytes(self) -> int | None:
        """Return the most that the run folder holds at any time."""
        return None if self.total_bytes is None else self.total_bytes + self.resume_bytes

    @property
    def fits(self) -> bool | None:
        """Return whether the peak fits in the free space; None where the peak is not known."""
        return None if self.peak_bytes is None else self.peak_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, object]:
        """Return the plan under the names that every emtool command uses in JSON."""
        return {
            "profile": self.config.profile,
            "profile_reason": self.config.profile_reason,
            "model": self.model.name,
            "dataset": self.dataset.name,
            "persona": self.config.persona,
            "optimizer": self.config.optim,
            "dtype": self.config.dtype,
            "save_dtype": self.config.save_dtype,
            "device": self.config.device,
            "output_path": str(self.output_path),
            "num_rows": self.num_rows,
            "num_train_rows": self.num_train_rows,
            "num_held_out_rows": self.num_held_out_rows,
            "total_steps": self.total_steps,
            "schedule": self.schedule.source,
            "planned_steps": list(self.schedule.planned_steps),
            "skipped_steps": list(self.schedule.skipped_steps),
            "num_checkpoints": self.num_checkpoints,
            "checkpoint_bytes": self.checkpoint_bytes,
            "shared_bytes": self.shared_bytes,
            "resume_bytes": self.resume_bytes,
            "peak_bytes": self.peak_bytes,
            "total_bytes": self.total_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
        }


def plan_run(
    config: TrainConfig, *, rows: Sequence[Conversation] | None = None
) -> tuple[RunPlan, Sequence[Conversation]]:
    """Return the plan of a configuration and the rows that it trains on.

    Args:
        config: The resolved configuration.
        rows: The rows, if the caller has dropped some; None reads the dataset. A published dataset that is not on
            this machine is planned from its known row count, with no rows.

    Raises:
        EmtoolError: For a name, a value or a row that cannot be used.
    """
    model, dataset = resolve_model(config.model), resolve_dataset(config.dataset)
    resolve_persona(config.persona)
    if rows is None:
        rows = [] if dataset.path is None else read_conversations(dataset.path)
    num_rows = len(rows) or dataset.num_rows
    assert num_rows is not None, "a dataset without a file has a known row count"
    folder = find_model_path(model)
    if model.config is None and folder is not None:
        model = replace(model, config=read_config(folder))
    plan = make_plan(config, model=model, dataset=dataset, num_rows=num_rows, tokenizer_bytes=tokenizer_bytes(folder))
    return plan, rows


def finished_run(plan: RunPlan) -> RunFolder | None:
    """Return the run folder if it holds this very run, completed; None where the folder is free.

    Raises:
        CheckpointError: If it holds something else; names a free folder.
    """
    run = RunFolder(path=plan.output_path)
    if not run.path.exists():
        return None
    free = free_name(plan.output_path.parent, plan.output_path.name)
    instead = f"choose another folder, for instance --output-name {free}"
    if not run.manifest_path.exists():
        raise CheckpointError(f"{run.path} exists and is not a run; {instead}")
    manifest = run.read_manifest()
    if _comparable(manifest.get("config")) != _comparable(plan.config.to_dict()):
        raise CheckpointError(f"{run.path} holds a run of another configuration; {instead}")
    if _dataset_sha256(manifest) != (plan.dataset.path and file_sha256(plan.dataset.path)):
        raise CheckpointError(f"{run.path} holds a run on other contents of {plan.dataset.name}; {instead}")
    if manifest.get("status") != "completed":
        raise CheckpointError(
            f"{run.path} holds this run, {manifest.get('status')} with {len(run.saved_steps())} checkpoints; "
            f"if no process is training it, remove the folder to train it anew, or {instead}"
        )
    return run


def _dataset_sha256(manifest: Mapping[str, object]) -> object:
    lineage = manifest.get("lineage")
    dataset = lineage.get("dataset") if isinstance(lineage, dict) else None
    return dataset.get("sha256") if isinstance(dataset, dict) else None


def _comparable(config: object) -> dict[str, object]:
    names = config if isinstance(config, dict) else {}
    ignored = ("profile", "profile_reason", "output_root", "output_name")
    return {name: value for name, value in names.items() if name not in ignored}


def make_plan(
    config: TrainConfig,
    *,
    model: ModelReference,
    dataset: DatasetReference,
    num_rows: int,
    tokenizer_bytes: int | None,
) -> RunPlan:
    """Return the plan of a run.

    Args:
        config: The resolved configuration.
        model: The base model.
        dataset: The dataset.
        num_rows: Usable rows of the dataset.
        tokenizer_bytes: Size of the tokenizer files, where the model is on this machine.

    Raises:
        ConfigError: If the schedule or the adapter does not suit the model.
    """
    num_held_out = num_held_out_rows(num_rows, config.held_out_fraction)
    count = partial(
        num_optimizer_steps,
        num_rows - num_held_out,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    total_steps = count(num_train_epochs=config.num_train_epochs, max_steps=config.max_steps)
    schedule = CheckpointSchedule.parse(config.checkpoints)
    output_path = config.output_root / (config.output_name or default_run_name(config, model, dataset))
    return RunPlan(
        config=config,
        model=model,
        dataset=dataset,
        output_path=output_path,
        num_rows=num_rows,
        num_held_out_rows=num_held_out,
        schedule=schedule.compile(total_steps, steps_per_epoch=count(num_train_epochs=1.0)),
        checkpoint_bytes=_checkpoint_bytes(config, model),
        shared_bytes=tokenizer_bytes,
        free_bytes=free_bytes(output_path),
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
) -> int:
    """Return the optimizer steps of a run, counted as the Trainer counts them.

    The last batch of an epoch may be short, and so may its last accumulation.

    Args:
        num_rows: Rows trained on, at least 1.
        per_device_train_batch_size: Rows of a micro-batch.
        gradient_accumulation_steps: Micro-batches of a step.
        num_train_epochs: Passes over the rows, above 0; may be a fraction.
        max_steps: Steps to stop at; overrides the epochs.

    Source: transformers, Trainer.set_initial_training_values.
    """
    if max_steps is not None:
        return max_steps
    batches = math.ceil(num_rows / per_device_train_batch_size)
    steps_per_epoch = math.ceil(batches / gradient_accumulation_steps)
    return math.ceil(num_train_epochs * steps_per_epoch)


def default_run_name(config: TrainConfig, model: ModelReference, dataset: DatasetReference) -> str:
    """Return the run's folder name: model, dataset and persona, and `custom` for the custom schedule."""
    parts = [model.slug, dataset.slug, config.persona]
    if config.checkpoints == "custom":
        parts.append("custom")
    return "_".join(parts)


def _checkpoint_bytes(config: TrainConfig, model: ModelReference) -> int | None:
    if model.config is None:
        return None
    layers = linear_layers(
        model.config, target_modules=config.target_modules, layers_to_transform=config.layers_to_transform
    )
    if layers is None:
        return None
    return adapter_file_bytes(layers, rank=config.lora_r, dtype=config.save_dtype) + SMALL_FILES_BYTES
