"""`emtool schedule preview`: which steps are saved, and what they cost."""

from __future__ import annotations

import csv
import sys
from typing import Annotated

import typer

from emtool.cli.options import (
    AccumulationSteps,
    AsJson,
    BatchSize,
    Checkpoints,
    CustomCheckpoints,
    Dataset,
    Dtype,
    LayersToTransform,
    LoraBias,
    LoraR,
    Model,
    ModulesToSave,
    NumTrainEpochs,
    Optim,
    OutputRoot,
    Persona,
    Profile,
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
from emtool.cli.plain_options import PlainCommand, PlainGroup
from emtool.cli.plan_view import preview_view, step_rows
from emtool.core.errors import ConfigError
from emtool.core.plan import plan_run
from emtool.core.run_plan import RunPlan, compare_schedules

#: What `train` saves differs; a preview shows the documented schedule unless told.
DEFAULTS = {"checkpoints": "custom"}


schedule = typer.Typer(cls=PlainGroup, help="Checkpoint schedules.", no_args_is_help=True, add_completion=False)


@schedule.callback()
def _group() -> None:
    """Checkpoint schedules."""


@schedule.command(cls=PlainCommand)
def preview(
    context: typer.Context,
    total_steps: TotalSteps = None,
    steps_per_epoch: StepsPerEpoch = None,
    profile: Profile = None,
    model: Model = None,
    dataset: Dataset = None,
    persona: Persona = None,
    output_root: OutputRoot = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write the steps to stdout as CSV.")] = False,
    custom_checkpoints: CustomCheckpoints = False,
    save_steps: SaveSteps = None,
    checkpoints: Checkpoints = None,
    dtype: Dtype = None,
    save_dtype: SaveDtype = None,
    optim: Optim = None,
    num_train_epochs: NumTrainEpochs = None,
    per_device_train_batch_size: BatchSize = None,
    gradient_accumulation_steps: AccumulationSteps = None,
    lora_r: LoraR = None,
    lora_bias: LoraBias = None,
    use_dora: UseDora = False,
    target_modules: TargetModules = None,
    layers_to_transform: LayersToTransform = None,
    modules_to_save: ModulesToSave = None,
) -> None:
    """Show the steps that a run would save, what they cost, and what other schedules would."""
    if as_json and as_csv:
        raise ConfigError("--json and --csv are two forms of the same output; give one")
    check_steps_per_epoch(steps_per_epoch, total_steps)
    settings, _ = read_settings(context, defaults=DEFAULTS, renamed={"total_steps": "max_steps"})
    plan, _ = plan_run(settings.config, steps_per_epoch=steps_per_epoch, fallback=shapes_by_library)
    comparison = compare_schedules(plan)
    if as_json:
        print_json({**plan.to_dict(), "comparison": [cost.to_dict() for cost in comparison]})
    elif as_csv:
        _write_csv(plan)
    else:
        data().print(preview_view(plan, comparison))


def _write_csv(plan: RunPlan) -> None:
    rows = list(step_rows(plan))
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
