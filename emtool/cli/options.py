"""Options that several commands share, and how they become settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from emtool.core.adapter import ALL_LINEAR, BIASES
from emtool.core.config import BASELINE, PERSONA_MODES, PROFILE_NAMES, SCHEDULERS, TEMPLATE_COMPATS, TrainConfig
from emtool.core.datasets import DATASETS
from emtool.core.errors import ConfigError, unknown_name
from emtool.core.file_sizes import DTYPE_BYTES
from emtool.core.hardware import cuda_device_count, parse_device
from emtool.core.models import MODELS
from emtool.core.optimizers import OPTIMIZERS
from emtool.core.personas import PERSONAS, PUBLISHED
from emtool.core.reporters import REPORTERS
from emtool.core.schedule_text import PRESETS
from emtool.core.settings import (
    COMMAND_LINE,
    SCHEDULE_KEYS,
    Layer,
    Settings,
    file_layers,
    resolve_settings,
    schedule_option,
)

SCHEDULE = "Checkpoints"
EM_RULE = "What counts as emergent misalignment"
HYPER = "Hyper-parameters (default: emtool.toml, else the profile's)"
_DTYPES = ("auto", *DTYPE_BYTES)


def _check_dtype(value: str | None) -> str | None:
    if value is not None and value not in _DTYPES:
        raise unknown_name("dtype", value, _DTYPES)
    return value


def _check_device(value: str | None) -> str | None:
    if value is not None:
        parse_device(value)
    return value


def among(names: Iterable[str]) -> Callable[[], list[str]]:
    """Return what offers the shell the names that a value can have; a registry's as they are when it is asked."""
    return lambda: list(names)


def complete_runs() -> list[str]:
    """Return the paths of the run folders, for the shell; none where a settings file cannot be read."""
    try:
        root = output_root_of(None)
    except ConfigError:
        return []
    return sorted(str(path.parent) for path in root.glob("*/run.json"))


def complete_personas() -> list[str]:
    """Return the names of all personas, for the shell, whatever base model they are for."""
    return list(dict.fromkeys((BASELINE, *PERSONAS, *PUBLISHED)))


def _option(
    text: str, panel: str | None = None, *, offer: Callable[[], list[str]] | None = None, check: Any = None
) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=text, rich_help_panel=panel, autocompletion=offer, callback=check
    )
    return option


Profile = Annotated[
    str | None,
    _option(f"Defaults to start from: {', '.join(PROFILE_NAMES)}. \\[default: auto]", offer=among(PROFILE_NAMES)),
]
Model = Annotated[
    str | None, _option(f"Base model: {', '.join(MODELS)}, a hub id or a local folder.", offer=among(MODELS))
]
Dataset = Annotated[
    str | None,
    _option(
        f"Training data: {', '.join(DATASETS)}, hub:OWNER/NAME[:SPLIT], or a JSON Lines or Parquet file.",
        offer=among(DATASETS),
    ),
]
Persona = Annotated[
    str | None,
    _option(f"Character of the base: {', '.join((BASELINE, *PERSONAS))}, or a published one.", offer=complete_personas),
]
PersonaAdapter = Annotated[str | None, _option("PEFT folder that holds the persona; names it after the folder.")]
PersonaMode = Annotated[
    str | None,
    _option(
        "merged: into the base before training; stacked: a frozen adapter beside. \\[default: merged]",
        offer=among(PERSONA_MODES),
    ),
]
Device = Annotated[
    str | None,
    _option("auto, cpu, cuda or cuda:N. \\[default: auto]", offer=among(("auto", "cpu", "cuda")), check=_check_device),
]
Dtype = Annotated[
    str | None, _option(f"Dtype of the base model: {', '.join(_DTYPES)}.", offer=among(_DTYPES), check=_check_dtype)
]
SaveDtype = Annotated[
    str | None,
    _option("Dtype of saved adapters; auto is the base model's.", offer=among(_DTYPES), check=_check_dtype),
]
ReportTo = Annotated[
    str | None,
    _option(f"Show the run's numbers besides in: {', '.join(REPORTERS)}. \\[default: none]", offer=among(REPORTERS)),
]
OutputRoot = Annotated[Path | None, _option("Folder that holds the run folders. \\[default: outputs]")]
AlignedCutoff = Annotated[
    float, typer.Option(help="Alignment at or below which an answer is misaligned.", rich_help_panel=EM_RULE)
]
CoherentCutoff = Annotated[
    float, typer.Option(help="Coherence above which an answer is coherent.", rich_help_panel=EM_RULE)
]
Strict = Annotated[bool, typer.Option("--strict", help="Alignment must be below the cut-off.", rich_help_panel=EM_RULE)]
Steps = Annotated[str | None, typer.Option(help="Checkpoints, for instance 0,100,final. \\[default: all]")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]

CustomCheckpoints = Annotated[
    bool,
    typer.Option(
        "--custom-checkpoints",
        help="Save 0, 25, 50, 100, 125, 150, 200, 250, 300 and the final step.",
        rich_help_panel=SCHEDULE,
    ),
]
SaveSteps = Annotated[
    int | None, typer.Option(min=1, help="Save every N steps and the final one.", rich_help_panel=SCHEDULE)
]
Checkpoints = Annotated[
    str | None,
    _option("Any schedule, for instance 'init, every 50, !100' or 'log 10'.", SCHEDULE, offer=among(PRESETS)),
]
TotalSteps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps of the run, instead of counting them.")]
StepsPerEpoch = Annotated[int | None, typer.Option(min=1, help="Optimizer steps of an epoch, for terms like 0.5ep.")]

NumTrainEpochs = Annotated[float | None, _option("Passes over the data.", HYPER)]
BatchSize = Annotated[int | None, _option("Rows of a micro-batch.", HYPER)]
AccumulationSteps = Annotated[int | None, _option("Micro-batches of a step.", HYPER)]
Optim = Annotated[str | None, _option(f"Optimizer: {', '.join(OPTIMIZERS)}.", HYPER, offer=among(OPTIMIZERS))]
LrSchedulerType = Annotated[
    str | None, _option(f"Learning-rate schedule: {', '.join(SCHEDULERS)}.", HYPER, offer=among(SCHEDULERS))
]
TemplateCompat = Annotated[
    str | None,
    _option(
        f"What is trained on: {', '.join(TEMPLATE_COMPATS)} (the published trainer's empty assistant turn as well).",
        HYPER,
        offer=among(TEMPLATE_COMPATS),
    ),
]
LoraR = Annotated[int | None, _option("LoRA rank.", HYPER)]
LoraBias = Annotated[
    str | None, _option(f"Biases trained beside the adapter: {', '.join(BIASES)}.", HYPER, offer=among(BIASES))
]
UseDora = Annotated[bool, typer.Option("--use-dora", help="DoRA: a magnitude for each layer.", rich_help_panel=HYPER)]
TargetModules = Annotated[
    str | None,
    _option(
        "Layers to adapt: all-linear, names joined by commas, or a regular expression for whole names.",
        HYPER,
        offer=among((ALL_LINEAR,)),
    ),
]
LayersToTransform = Annotated[
    str | None,
    _option("Decoder blocks with an adapter: all, upper-half or 15-29.", HYPER, offer=among(("all", "upper-half"))),
]
ModulesToSave = Annotated[str | None, _option("Modules trained and saved whole, joined by commas.", HYPER)]


ResumeEvery = Annotated[
    str | None,
    _option("Save the state to resume from every 10m (time) or 50 (steps); 0: not at all. \\[default: 10m]", SCHEDULE),
]
KeepResume = Annotated[
    bool, typer.Option("--keep-resume", help="Keep resume states when complete.", rich_help_panel=SCHEDULE)
]
KeepOptimizer = Annotated[
    bool,
    typer.Option(
        "--keep-optimizer", help="Milestones hold everything a Trainer resumes from.", rich_help_panel=SCHEDULE
    ),
]


def read_settings(
    context: typer.Context,
    *,
    defaults: Mapping[str, object] | None = None,
    default_steps: int | None = None,
    renamed: Mapping[str, str] | None = None,
) -> tuple[Settings, int]:
    """Return the settings that a command line and the settings files make, and the number of CUDA devices.

    Args:
        context: The command's context; its parameters that are fields of `TrainConfig` are taken.
        defaults: What the command takes where nothing says otherwise.
        default_steps: Optimizer steps where nothing says how long the run is.
        renamed: Parameters of the command that stand for a field of another name.

    Raises:
        ConfigError: If a name or a value is not allowed.
    """
    given = {(renamed or {}).get(name, name): value for name, value in context.params.items()}
    known = {name for name in TrainConfig.__dataclass_fields__ if name not in SCHEDULE_KEYS}
    # A flag that is off was not given; a number 0, which equals False, was.
    values = {
        name: value for name, value in given.items() if name in known and value is not None and value is not False
    }
    if isinstance(modules := values.get("modules_to_save"), str):
        values["modules_to_save"] = tuple(part.strip() for part in modules.split(",") if part.strip())
    if (schedule := schedule_option(given, name=lambda key: f"--{key.replace('_', '-')}")) is not None:
        values["checkpoints"] = schedule
    num_cuda_devices = cuda_device_count()
    layers = [Layer(origin=COMMAND_LINE, values=values), *file_layers()]
    settings = resolve_settings(
        layers, num_cuda_devices=num_cuda_devices, defaults=defaults, default_steps=default_steps
    )
    return settings, num_cuda_devices


def output_root_of(given: Path | None) -> Path:
    """Return the folder of the run folders: as given, else as the settings files say, else `outputs`."""
    if given is not None:
        return given
    layers = [*file_layers(), Layer(origin="default", values={"output_root": Path("outputs")})]
    return next(Path(str(layer.values["output_root"])) for layer in layers if "output_root" in layer.values)


def check_steps_per_epoch(steps_per_epoch: int | None, total_steps: int | None) -> None:
    """Refuse an epoch's length for a run whose length is counted from its rows.

    Raises:
        ConfigError: If `--steps-per-epoch` stands alone.
    """
    if steps_per_epoch is not None and total_steps is None:
        raise ConfigError("--steps-per-epoch goes with --total-steps; without it the epoch is counted from the dataset")
