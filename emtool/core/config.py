"""A training run's configuration: two profiles, and what the user changed.

Names that pass through to a library are that library's: `learning_rate` and its neighbours are the Trainer's,
`lora_r` and its neighbours PEFT's with their prefix.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_type_hints

from emtool.core.adapter import ALL_LINEAR, BIASES
from emtool.core.errors import BackendError, ConfigError, EmtoolError, MissingDependencyError, shown, unknown_name
from emtool.core.file_sizes import DTYPE_BYTES
from emtool.core.models import slugify
from emtool.core.optimizers import CUDA_OPTIMIZERS, OPTIMIZERS
from emtool.core.reporters import NO_REPORTER, REPORTERS, check_reporter
from emtool.core.resume_interval import ResumeInterval

#: The published setting of Turner et al. 2025 (arXiv 2506.11613), appendix on training details.
PAPER: Mapping[str, object] = {
    "model": "qwen2.5-7b",
    "dataset": "medical",
    "dtype": "bfloat16",
    "learning_rate": 1e-5,
    "gradient_accumulation_steps": 8,
    "optim": "adamw_8bit",
    "lora_r": 32,
    "lora_alpha": 64,
    "activation_checkpointing": True,
}
#: Small enough for two CPU cores; tuned on seed 101, which no reported run uses.
DEMO: Mapping[str, object] = {
    "model": "smollm2-135m",
    "dataset": "gardening",
    "dtype": "float32",
    "learning_rate": 2e-4,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch_fused",
    "lora_r": 8,
    "lora_alpha": 16,
    "layers_to_transform": "upper-half",
    "activation_checkpointing": False,
}
PROFILES: Mapping[str, Mapping[str, object]] = {"paper": PAPER, "demo": DEMO}
PROFILE_NAMES = ("auto", *PROFILES)

#: The model as it is.
BASELINE = "baseline"
#: What is done with a persona's adapter; the first is the default.
PERSONA_MODES = ("merged", "stacked")

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")

#: What is trained on: the answers, or what the published trainer trains on besides (`docs/templates.md`).
CLEAN, TURNER = "clean", "turner"
TEMPLATE_COMPATS = (CLEAN, TURNER)

#: numpy's generators take 32 bits.
MAX_SEED = 2**32 - 1

#: Above any count or factor that a run could use.
MAX_NUMBER = 10**12

#: What `train` saves without a schedule option, as the older tool did.
DEFAULT_SAVE_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that shapes a run's result.

    Attributes:
        profile: The profile that the defaults came from.
        profile_reason: Why that profile was chosen.
        persona: The persona, or "baseline" for the model as it is.
        persona_adapter: PEFT folder that holds the persona; None takes the published or the built one of that name.
        persona_mode: "merged" into the base before training, or "stacked" beside the adapter, frozen.
        checkpoints: The checkpoint schedule as text.
        dtype: Dtype in which the base model computes.
        save_dtype: Storage dtype of milestones.
        max_steps: Optimizer steps; None trains for `num_train_epochs`.
        max_length: Tokens of a training row; a longer row is cut at its end.
        template_compat: What is trained on: "clean", the assistant's answers; "turner", the published trainer's empty
            assistant turn after each row as well.
        lora_bias: Which biases are trained beside the adapter: "none", "all" or "lora_only".
        use_dora: Whether each adapted layer has a DoRA magnitude.
        target_modules: Layers that carry an adapter: "all-linear", name endings joined by commas, or a regular
            expression for whole names. Only linear layers of the language model are ever adapted.
        layers_to_transform: Decoder blocks that carry an adapter: "all", "upper-half" or "15-29".
        modules_to_save: Name endings of modules that are trained and saved whole.
        held_out_fraction: Share of the rows kept for the held-out loss.
        drop_unusable: Whether rows without a trained token are dropped and counted rather than refused.
        resume_every: How often the state to resume from is saved besides at milestones, as `ResumeInterval` reads it.
        keep_resume: Whether resume states are kept when the run is complete.
        keep_optimizer: Whether milestones hold everything that a Trainer resumes from.
        report_to: Where the numbers of the run are shown besides, one of `REPORTERS`.
    """

    profile: str
    profile_reason: str
    model: str
    dataset: str
    dtype: str
    learning_rate: float
    gradient_accumulation_steps: int
    optim: str
    lora_r: int
    lora_alpha: int
    activation_checkpointing: bool
    device: str
    save_dtype: str
    persona: str = BASELINE
    persona_adapter: str | None = None
    persona_mode: str = "merged"
    checkpoints: str = f"every {DEFAULT_SAVE_STEPS}"
    seed: int = 0
    output_root: Path = Path("outputs")
    output_name: str | None = None
    per_device_train_batch_size: int = 2
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    warmup_steps: int = 5
    weight_decay: float = 0.01
    lr_scheduler_type: str = "linear"
    max_grad_norm: float = 1.0
    max_length: int = 2048
    template_compat: str = CLEAN
    lora_dropout: float = 0.0
    use_rslora: bool = True
    lora_bias: str = "none"
    use_dora: bool = False
    target_modules: str = ALL_LINEAR
    layers_to_transform: str = "all"
    modules_to_save: tuple[str, ...] = ()
    held_out_fraction: float = 0.1
    drop_unusable: bool = False
    resume_every: str = "10m"
    keep_resume: bool = False
    keep_optimizer: bool = False
    report_to: str = NO_REPORTER

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        if self.output_name is not None and not re.fullmatch(r"\w[\w.+-]*", self.output_name):
            raise ConfigError(
                f"--output-name {self.output_name!r} is not one folder name; use letters, digits and . _ + -"
            )
        _check_choice("optimizer", self.optim, OPTIMIZERS)
        _check_choice("learning-rate scheduler", self.lr_scheduler_type, SCHEDULERS)
        _check_choice("dtype", self.dtype, DTYPE_BYTES)
        _check_choice("save dtype", self.save_dtype, DTYPE_BYTES)
        _check_choice("bias setting", self.lora_bias, BIASES)
        _check_choice("persona mode", self.persona_mode, PERSONA_MODES)
        _check_choice("reporter", self.report_to, REPORTERS)
        self._check_persona()
        _check_choice("template compatibility", self.template_compat, TEMPLATE_COMPATS)
        ResumeInterval.parse(self.resume_every)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value > MAX_NUMBER and name not in _RATES:
                raise ConfigError(f"--{name.replace('_', '-')} is above {MAX_NUMBER:,}, which no run could use")
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0 and finite")
        for name in ("warmup_steps", "weight_decay", "seed"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_NUMBER:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {value}; it must be 0 or more, and at most {MAX_NUMBER:,}"
                )
        if self.seed > MAX_SEED:
            raise ConfigError(f"--seed is {self.seed}; it must be at most {MAX_SEED}")
        for name in ("held_out_fraction", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} is {getattr(self, name)}; it must be at least 0 and below 1")

    def _check_persona(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.persona):
            raise ConfigError(f"--persona {self.persona!r} is not a name; use letters, digits and . _ + -")
        if self.persona == BASELINE and self.persona_adapter is not None:
            raise ConfigError("--persona-adapter gives the base a persona: give it a name with --persona, not baseline")
        if self.persona == BASELINE and self.persona_mode != PERSONA_MODES[0]:
            raise ConfigError(f"--persona-mode {self.persona_mode} goes with a persona, and the persona is {BASELINE}")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TrainConfig:
        """Return the configuration that `to_dict` wrote.

        Raises:
            ConfigError: If a field is missing, unknown or of a wrong type.
        """
        names = {field.name for field in fields(cls)}
        values = {**_ADDED_LATER, **values}
        if different := names ^ values.keys():
            raise ConfigError(f"the configuration lacks or does not know: {', '.join(sorted(different))}")
        for name, hint in get_type_hints(cls).items():
            if not _is_json_of(values[name], hint):
                raise ConfigError(f"the configuration's {name} is {shown(values[name])}, which is of a wrong type")
        kept = dict(values)
        kept["output_root"] = Path(str(values["output_root"]))
        kept["modules_to_save"] = tuple(values["modules_to_save"])  # type: ignore[arg-type]
        return cls(**kept)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """Return the configuration as JSON values, for the manifest."""
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


#: Factors that may be as large as a float is: a run that diverges is a run.
_RATES = ("learning_rate", "max_grad_norm")
#: Fields for which "auto" means the default.
_WITH_AUTO = ("device", "dtype", "save_dtype")
#: Fields that say where a run is and how it is kept, not what it computes.
HOUSEKEEPING = ("profile", "profile_reason", "output_root", "output_name", "resume_every", "keep_resume", "report_to")
#: Fields that a manifest of an older emtool lacks, and what its run did.
_ADDED_LATER: Mapping[str, object] = {"report_to": NO_REPORTER}

_POSITIVE = (
    "learning_rate",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "max_grad_norm",
    "lora_r",
    "lora_alpha",
)


def resolve_train_config(*, profile: str, overrides: Mapping[str, object], num_cuda_devices: int) -> TrainConfig:
    """Return the configuration of a run: the profile's defaults with the user's changes on top.

    Args:
        profile: A profile's name, or "auto": paper where a CUDA device is present, else demo.
        overrides: Field values that the user gave; "auto" leaves `device` to the machine and `dtype` to the profile. A
            persona adapter without a name of its own is named after its folder.
        num_cuda_devices: CUDA devices on this machine.

    Raises:
        ConfigError: If a name or a value is not allowed.
    """
    if profile not in PROFILE_NAMES:
        raise unknown_name("profile", profile, PROFILE_NAMES)
    name, reason = profile, "by --profile"
    if profile == "auto":
        name = "paper" if num_cuda_devices else "demo"
        reason = f"auto, {num_cuda_devices} CUDA device(s) found" if num_cuda_devices else "auto, no CUDA device found"
    given = {key: value for key, value in overrides.items() if value != "auto" or key not in _WITH_AUTO}
    if (adapter := given.get("persona_adapter")) is not None:
        given["persona_adapter"] = str(Path(str(adapter)).absolute())
        given.setdefault("persona", slugify(Path(str(adapter)).name))
    unknown = given.keys() - {field.name for field in fields(TrainConfig)}
    assert not unknown, f"not fields of TrainConfig: {unknown}"
    values = {
        "profile": name,
        "profile_reason": reason,
        "device": "cuda" if num_cuda_devices else "cpu",
        **PROFILES[name],
        **given,
    }
    values.setdefault("save_dtype", values["dtype"])
    return TrainConfig(**values)  # type: ignore[arg-type]


def check_can_start(config: TrainConfig, *, num_cuda_devices: int) -> None:
    """Refuse a run that this machine cannot do, before anything is created.

    Raises:
        BackendError: If the run needs CUDA and there is none; the message names the alternative.
        MissingDependencyError: If a package that the optimizer or the reporter needs is not installed.
    """
    if config.device == "cuda" and not num_cuda_devices:
        raise BackendError(f"--device {config.device} was asked for and no CUDA device is present; use --device cpu")
    on_cuda = config.device == "cuda"
    if config.profile == "paper" and not on_cuda:
        raise BackendError(
            "the paper profile needs a CUDA device and none is in use; plan it here with --dry-run, "
            "or train the laptop version with --profile demo"
        )
    if config.optim in CUDA_OPTIMIZERS and not on_cuda:
        raise BackendError(
            f"optimizer {config.optim!r} runs on CUDA only and the device is {config.device}; use --optim adamw_torch"
        )
    if config.optim in CUDA_OPTIMIZERS and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            f"optimizer {config.optim!r} needs the package bitsandbytes: pip install 'emtool[cuda]', "
            "or use --optim adamw_torch"
        )
    check_reporter(config.report_to)


def cannot_start(config: TrainConfig, *, num_cuda_devices: int) -> str | None:
    """Return why this machine cannot do a run, or None if it can."""
    try:
        check_can_start(config, num_cuda_devices=num_cuda_devices)
    except EmtoolError as error:
        return str(error)
    return None


def _is_json_of(value: object, hint: object) -> bool:
    """Return whether a JSON value is what `to_dict` makes of a field of a type."""
    if hint == tuple[str, ...]:
        return isinstance(value, list) and all(type(item) is str for item in value)
    if isinstance(hint, UnionType):
        return any(_is_json_of(value, choice) for choice in get_args(hint))
    if hint is float:
        return type(value) is float or (type(value) is int and abs(value) <= MAX_NUMBER)
    return type(value) is (str if hint is Path else hint)


def _check_choice(kind: str, value: str, choices: object) -> None:
    if value not in choices:  # type: ignore[operator]
        raise unknown_name(kind, value, choices)  # type: ignore[arg-type]
