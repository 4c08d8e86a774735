"""`emtool train`: show the plan, then train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from emtool.cli.options import Device, Dtype, OutputRoot
from emtool.cli.output import data, print_json, progress, quiet_libraries, talk
from emtool.cli.render import plan_view, saved_table
from emtool.core.config import PROFILE_NAMES, TrainConfig, cannot_start, check_can_start, resolve_train_config
from emtool.core.data import DATASETS, Conversation
from emtool.core.errors import ConfigError, DataError, DiskSpaceError
from emtool.core.finished import finished_run
from emtool.core.hardware import cuda_device_count, parse_device, select_device
from emtool.core.models import MODELS
from emtool.core.personas import BASELINE, PERSONAS
from emtool.core.plan import RunPlan, plan_run

_SCHEDULE = "Checkpoints"
_HYPER = "Hyper-parameters (default: the profile's)"


def train(
    profile: Annotated[str, typer.Option(help=f"Defaults to start from: {', '.join(PROFILE_NAMES)}.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help=f"Base model: {', '.join(MODELS)}, a hub id or a local folder.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help=f"Training data: {', '.join(DATASETS)}, or a JSON Lines file.")
    ] = None,
    persona: Annotated[
        str | None, typer.Option(help=f"Character of the base: {', '.join((BASELINE, *PERSONAS))}.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of adapter, data order and split.")] = None,
    output_name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    output_root: OutputRoot = Path("outputs"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: the plan as JSON.")] = False,
    drop_unusable: Annotated[
        bool, typer.Option("--drop-unusable", help="Drop and count rows without a trained token.")
    ] = False,
    custom_checkpoints: Annotated[
        bool,
        typer.Option(
            "--custom-checkpoints",
            help="Save 0, 25, 50, 100, 125, 150, 200, 250, 300 and the final step.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = False,
    save_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Save every N steps and the final one. [default: 100]", rich_help_panel=_SCHEDULE),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Any schedule, for instance 'init, every 50, !100' or 'log 10'.", rich_help_panel=_SCHEDULE),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=_HYPER)] = None,
    num_train_epochs: Annotated[
        float | None, typer.Option(help="Passes over the data.", rich_help_panel=_HYPER)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_HYPER)] = None,
    per_device_train_batch_size: Annotated[
        int | None, typer.Option(help="Rows of a micro-batch.", rich_help_panel=_HYPER)
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Micro-batches of a step.", rich_help_panel=_HYPER)
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Warm-up steps.", rich_help_panel=_HYPER)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.", rich_help_panel=_HYPER)] = None,
    lr_scheduler_type: Annotated[
        str | None, typer.Option(help="Learning-rate schedule.", rich_help_panel=_HYPER)
    ] = None,
    optim: Annotated[str | None, typer.Option(help="Optimizer, by the Trainer's name.", rich_help_panel=_HYPER)] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row.", rich_help_panel=_HYPER)] = None,
    lora_r: Annotated[int | None, typer.Option(help="LoRA rank.", rich_help_panel=_HYPER)] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="LoRA alpha.", rich_help_panel=_HYPER)] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="LoRA dropout.", rich_help_panel=_HYPER)] = None,
    layers_to_transform: Annotated[
        str | None,
        typer.Option(help="Decoder blocks with an adapter: all, upper-half or 15-29.", rich_help_panel=_HYPER),
    ] = None,
) -> None:
    """Fine-tune a chat model on a narrow dataset and save checkpoints on a schedule."""
    if as_json and not dry_run:
        raise ConfigError("--json shows the plan and goes with --dry-run")
    given = {
        "model": model,
        "dataset": dataset,
        "persona": persona,
        "seed": seed,
        "output_name": output_name,
        "output_root": output_root,
        "device": parse_device(device)[0],
        "dtype": dtype,
        "drop_unusable": drop_unusable or None,
        "checkpoints": schedule_text(checkpoints, custom_checkpoints=custom_checkpoints, save_steps=save_steps),
        "max_steps": max_steps,
        "num_train_epochs": num_train_epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "lr_scheduler_type": lr_scheduler_type,
        "optim": optim,
        "max_length": max_length,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "layers_to_transform": layers_to_transform,
    }
    num_cuda_devices = cuda_device_count()
    config = resolve_train_config(
        profile=profile,
        overrides={name: value for name, value in given.items() if value is not None},
        num_cuda_devices=num_cuda_devices,
    )
    plan, rows = plan_run(config, rows=_usable_rows(config) if config.drop_unusable else None)
    if as_json:
        print_json(plan.to_dict())
        return
    if dry_run:
        data().print(plan_view(plan, obstacle=cannot_start(config, num_cuda_devices=num_cuda_devices)))
        return
    data().print(plan_view(plan))
    check_can_start(config, num_cuda_devices=num_cuda_devices)
    if (finished := finished_run(plan)) is None:
        select_device(device)
        _start(plan, rows)
    else:
        _say(f"{finished.path} holds this run, completed; evaluate it with: emtool evaluate {finished.path}")


def schedule_text(checkpoints: str | None, *, custom_checkpoints: bool, save_steps: int | None) -> str | None:
    """Return the schedule that the options name, or None where none was given.

    Raises:
        ConfigError: If more than one was given.
    """
    given = {
        "--checkpoints": checkpoints,
        "--custom-checkpoints": "custom" if custom_checkpoints else None,
        "--save-steps": None if save_steps is None else f"every {save_steps}",
    }
    named = {option: text for option, text in given.items() if text is not None}
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} name two schedules; give one")
    return next(iter(named.values()), None)


def _usable_rows(config: TrainConfig) -> Sequence[Conversation]:
    # How many rows are left decides the number of steps, so this is the one plan that needs the tokenizer.
    quiet_libraries()
    from emtool.engines.training import usable_rows

    with progress() as on_event:
        return usable_rows(config, on_event=on_event)


def _say(text: str) -> None:
    talk().print(text, markup=False, soft_wrap=True)


def _start(plan: RunPlan, rows: Sequence[Conversation]) -> None:
    if not rows:
        raise DataError(
            f"dataset {plan.dataset.name!r} is not on this machine and this version does not fetch it; "
            "give a copy as JSON Lines with --dataset FILE"
        )
    if plan.fits is False:
        raise DiskSpaceError(
            f"the run needs {plan.peak_bytes:,} bytes and {plan.output_path} has {plan.free_bytes:,} free; "
            "save fewer steps, use --output-root on another disk, or free some space"
        )
    quiet_libraries()
    from emtool.engines.training import train as train_run

    with progress(planned_steps=plan.schedule.planned_steps) as on_event:
        result = train_run(plan, rows, command=["emtool", *sys.argv[1:]], on_event=on_event)
    data().print(saved_table(result.run))
    held_out = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.3f}"
    _say(
        f"trained {plan.total_steps} step(s) in {result.seconds:.0f} s, last loss {result.final_loss:.3f}{held_out}\n"
        f"evaluate it with: emtool evaluate {result.run.path}"
    )
