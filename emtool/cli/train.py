"""`emtool train`: show the plan, then train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from emtool.cli.fetching import fetch_before_run
from emtool.cli.options import (
    HYPER,
    SCHEDULE,
    AccumulationSteps,
    BatchSize,
    Checkpoints,
    CustomCheckpoints,
    Dataset,
    Device,
    Dtype,
    KeepOptimizer,
    KeepResume,
    LayersToTransform,
    LoraBias,
    LoraR,
    LrSchedulerType,
    Model,
    ModulesToSave,
    NumTrainEpochs,
    Optim,
    OutputRoot,
    Persona,
    PersonaAdapter,
    PersonaMode,
    Profile,
    ReportTo,
    ResumeEvery,
    SaveDtype,
    SaveSteps,
    TargetModules,
    TemplateCompat,
    UseDora,
    read_settings,
)
from emtool.cli.output import data, print_json, progress, quiet_libraries, say, shapes_by_library
from emtool.cli.plan_view import ConfigTable, plan_view, saved_table
from emtool.core.config import TrainConfig, cannot_start, check_can_start
from emtool.core.data import Conversation
from emtool.core.datasets import resolve_dataset
from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.finished import cannot_write, finished_run, is_completed
from emtool.core.hardware import launched_rank, select_device
from emtool.core.plan import DatasetFetch, plan_run
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import tidy_completed
from emtool.core.run_plan import RunPlan
from emtool.core.settings import Settings


def train(
    context: typer.Context,
    profile: Profile = None,
    model: Model = None,
    dataset: Dataset = None,
    persona: Persona = None,
    persona_adapter: PersonaAdapter = None,
    persona_mode: PersonaMode = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of adapter, data order and split.")] = None,
    output_name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    output_root: OutputRoot = None,
    device: Device = None,
    dtype: Dtype = None,
    report_to: ReportTo = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Show each setting and where it came from, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run or --show-config: as JSON.")] = False,
    drop_unusable: Annotated[
        bool, typer.Option("--drop-unusable", help="Drop and count rows without a trained token.")
    ] = False,
    allow_low_disk: Annotated[
        bool, typer.Option("--allow-low-disk", help="Start although the run may not fit on the disk.")
    ] = False,
    custom_checkpoints: CustomCheckpoints = False,
    save_steps: SaveSteps = None,
    checkpoints: Checkpoints = None,
    save_dtype: SaveDtype = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this run if its folder is there.", rich_help_panel=SCHEDULE)
    ] = False,
    resume_every: ResumeEvery = None,
    keep_resume: KeepResume = False,
    keep_optimizer: KeepOptimizer = False,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=HYPER)] = None,
    num_train_epochs: NumTrainEpochs = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=HYPER)] = None,
    per_device_train_batch_size: BatchSize = None,
    gradient_accumulation_steps: AccumulationSteps = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Warm-up steps.", rich_help_panel=HYPER)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.", rich_help_panel=HYPER)] = None,
    lr_scheduler_type: LrSchedulerType = None,
    optim: Optim = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row.", rich_help_panel=HYPER)] = None,
    template_compat: TemplateCompat = None,
    lora_r: LoraR = None,
    lora_alpha: Annotated[int | None, typer.Option(help="LoRA alpha.", rich_help_panel=HYPER)] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="LoRA dropout.", rich_help_panel=HYPER)] = None,
    lora_bias: LoraBias = None,
    use_dora: UseDora = False,
    target_modules: TargetModules = None,
    layers_to_transform: LayersToTransform = None,
    modules_to_save: ModulesToSave = None,
) -> None:
    """Fine-tune a chat model on a narrow dataset and save checkpoints on a schedule."""
    if as_json and not (dry_run or show_config):
        raise ConfigError("--json goes with --dry-run or --show-config")
    settings, num_cuda_devices = read_settings(context)
    config = settings.config
    if show_config:
        _show_config(settings, as_json=as_json)
        return
    fetch = None if dry_run else fetch_before_run(config, num_cuda_devices=num_cuda_devices)
    plan, rows = make_plan(config, fetch=fetch)
    if dry_run:
        obstacle = cannot_start(config, num_cuda_devices=num_cuda_devices) or cannot_write(plan)
        if as_json:
            print_json({**plan.to_dict(), "obstacle": obstacle})
        else:
            data().print(plan_view(plan, obstacle=obstacle))
        return
    data().print(plan_view(plan))
    check_can_start(config, num_cuda_devices=num_cuda_devices)
    start(plan, rows, device=settings.device_option, resume=resume, check_disk=not allow_low_disk)


def _show_config(settings: Settings, *, as_json: bool) -> None:
    values = {**settings.config.to_dict(), "device": settings.device_option}
    del values["profile_reason"]
    if as_json:
        print_json({name: {"value": value, "from": settings.origins[name]} for name, value in values.items()})
    else:
        data().print(ConfigTable(settings))


def make_plan(config: TrainConfig, *, fetch: DatasetFetch | None = None) -> tuple[RunPlan, Sequence[Conversation]]:
    """Return the plan of a configuration and its rows.

    Args:
        config: The configuration.
        fetch: Asked for a dataset that is not on this machine; None plans without it where that is possible.
    """
    rows = None
    if config.drop_unusable:
        dataset = resolve_dataset(config.dataset)
        if dataset.path is None and fetch is not None:
            fetch(dataset)
        rows = _usable_rows(config)
    return plan_run(config, rows=rows, fallback=shapes_by_library, fetch=fetch)


def _usable_rows(config: TrainConfig) -> Sequence[Conversation]:
    # How many rows are left decides the number of steps, so this is the one plan that needs the tokenizer.
    quiet_libraries()
    from emtool.engines.training import usable_rows

    with progress() as on_event:
        return usable_rows(config, on_event=on_event)


def start(
    plan: RunPlan, rows: Sequence[Conversation], *, device: str, resume: bool = False, check_disk: bool = True
) -> None:
    """Train a run, or go on with it, and say what is there afterwards.

    Args:
        plan: The plan.
        rows: Its rows.
        device: The device option.
        resume: Whether a folder that is there is gone on with.
        check_disk: Whether the space must suffice.
    """
    if launched_rank() > 0 and is_completed(plan.output_path):
        # What the first process says; the others would wait for it in vain.
        return
    if launched_rank() == 0 and (finished := finished_run(plan, resume=resume)) is not None:
        tidy_completed(finished)
        say(f"{finished.path} holds this run, completed; evaluate it with: emtool evaluate {finished.path}")
        return
    assert rows, "a run that may start has its dataset"
    if check_disk and not RunFolder(path=plan.output_path).path.exists():
        plan.check_fits()
    select_device(device)
    quiet_libraries()
    from emtool.engines.training import train as train_run

    command = ["emtool", *sys.argv[1:]]
    with progress(planned_steps=plan.schedule.planned_steps) as on_event:
        result = train_run(plan, rows, command=command, resume=resume, check_disk=check_disk, on_event=on_event)
    data().print(saved_table(result.run))
    held_out = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.3f}"
    say(
        f"trained {plan.total_steps} step(s) in {result.seconds:.0f} s, last loss {result.final_loss:.3f}{held_out}\n"
        f"evaluate it with: emtool evaluate {result.run.path}"
    )
    if result.lost:
        raise CheckpointError(
            f"the run is complete, and {len(result.lost)} of its checkpoints cannot be used: {'; '.join(result.lost)}; "
            "what was lost can only be trained again under another --output-name"
        )
