"""`emtool disk-estimate`: bytes a checkpoint and a run take, before anything starts."""

from __future__ import annotations

from typing import Annotated

import typer

from emtool.cli.disk_view import disk_view
from emtool.cli.options import (
    AccumulationSteps,
    AsJson,
    BatchSize,
    Checkpoints,
    CustomCheckpoints,
    Dataset,
    Dtype,
    KeepOptimizer,
    KeepResume,
    LayersToTransform,
    LoraBias,
    LoraR,
    Model,
    ModulesToSave,
    NumTrainEpochs,
    Optim,
    OutputRoot,
    Profile,
    ResumeEvery,
    SaveDtype,
    SaveSteps,
    StepsPerEpoch,
    TargetModules,
    TotalSteps,
    UseDora,
    check_steps_per_epoch,
    read_settings,
)
from emtool.cli.output import data, print_json, shapes_by_library
from emtool.core.errors import ModelError
from emtool.core.plan import DiskOptions, plan_run
from emtool.core.run_plan import compare_schedules

#: The documented comparison: the published setting at 400 steps.
DEFAULTS = {"profile": "paper", "checkpoints": "custom"}
DEFAULT_STEPS = 400


def disk_estimate(
    context: typer.Context,
    total_steps: TotalSteps = None,
    steps_per_epoch: StepsPerEpoch = None,
    profile: Profile = None,
    model: Model = None,
    dataset: Dataset = None,
    dtype: Dtype = None,
    output_root: OutputRoot = None,
    full_finetuning: Annotated[
        bool, typer.Option("--full-finetuning", help="Train every parameter, in a Trainer of your own.")
    ] = False,
    as_json: AsJson = False,
    custom_checkpoints: CustomCheckpoints = False,
    save_steps: SaveSteps = None,
    checkpoints: Checkpoints = None,
    save_dtype: SaveDtype = None,
    keep_optimizer: KeepOptimizer = False,
    resume_every: ResumeEvery = None,
    keep_resume: KeepResume = False,
    num_train_epochs: NumTrainEpochs = None,
    per_device_train_batch_size: BatchSize = None,
    gradient_accumulation_steps: AccumulationSteps = None,
    optim: Optim = None,
    lora_r: LoraR = None,
    lora_bias: LoraBias = None,
    use_dora: UseDora = False,
    target_modules: TargetModules = None,
    layers_to_transform: LayersToTransform = None,
    modules_to_save: ModulesToSave = None,
) -> None:
    """Show what a checkpoint and a run take on disk. Without options: the published setting at 400 steps."""
    check_steps_per_epoch(steps_per_epoch, total_steps)
    settings, _ = read_settings(
        context, defaults=DEFAULTS, default_steps=DEFAULT_STEPS, renamed={"total_steps": "max_steps"}
    )
    plan, _ = plan_run(
        settings.config,
        steps_per_epoch=steps_per_epoch,
        fallback=shapes_by_library,
        options=DiskOptions(full_finetuning=full_finetuning),
    )
    if plan.estimate is None:
        raise ModelError(
            f"the shapes of {plan.model.name} are not known: it is not in the catalogue and not on this machine; "
            "fetch it, give a local folder with --model, or take a model of the same size from the catalogue"
        )
    rows = compare_schedules(plan, with_own=True)
    if as_json:
        print_json(
            {
                **plan.to_dict(),
                "rows": [row.to_dict() for row in rows],
                "adapter_parameters": plan.estimate.num_trainable_parameters,
                "tensor_bytes": plan.estimate.tensor_bytes,
                "checkpoint": dict(plan.estimate.checkpoint),
                "resume": dict(plan.estimate.resume),
                "shapes_source": plan.estimate.shapes_source,
                "unverified": dict(plan.estimate.doubts),
            }
        )
    else:
        data().print(disk_view(plan, plan.estimate, rows))
